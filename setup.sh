#!/usr/bin/env bash
# Sets up what is missing on a Debian 12 machine, then does one of these jobs:
#
#   ./setup.sh repro [ARG…]   release build, then `harness repro ARG…`: measurements, plots, report under results/
#   ./setup.sh test           formatting, lints, build, the whole test suite
#   ./setup.sh gate REVISION  is this tree slower than that one? Both are built and measured here; exit 1 if it is
#
# Run again, it installs nothing and rebuilds nothing. The network is used by apt and cargo alone.
set -euo pipefail
cd "$(dirname "$0")"

PACKAGES=(apache2 apache2-utils nftables iproute2 procps gcc libc6-dev librsvg2-bin fonts-dejavu-core
  # the other folders of workloads/
  redis-server memcached python3 postgresql openssh-server openssh-client runit supervisor cron bubblewrap
  nginx mariadb-server nodejs openjdk-17-jdk-headless caddy make git sqlite3 ffmpeg chromium chromium-sandbox
  # workloads/overhead
  fio redis-tools
  # workloads/xdesktop, both sizes
  tigervnc-standalone-server dbus xterm vim xdotool x11-apps busybox
  icewm tmux pcmanfm emacs-gtk dillo
  xfce4-session xfwm4 xfce4-panel xfdesktop4 xfce4-settings thunar xfce4-terminal firefox-esr
  # guests that set up networks
  ethtool ipset
  # guests with other kernels
  qemu-system-x86 lz4 zstd xz-utils)
RUST_PACKAGES=(rustc-web cargo-web rustfmt-web rust-web-clippy)
RUST_NEEDED=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
CARGO_HOME=${CARGO_HOME:-$HOME/.cargo}
export PATH="$PATH:$CARGO_HOME/bin:/usr/local/sbin:/usr/sbin:/sbin"

say() { printf '%s\n' "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

# --- time of each part -----------------------------------------------------------------------------------------------
names=() seconds=()
part() { # NAME COMMAND…
  local name=$1 before=$SECONDS status=0
  shift
  printf '\n=== %s\n' "$name"
  # Not `"$@" || status=$?`: that would switch `set -e` off inside a function.
  set +e
  (set -e; "$@")
  status=$?
  set -e
  names+=("$name") seconds+=($((SECONDS - before)))
  if ((status)); then
    fail "$name failed (exit $status)"
  fi
}
times() {
  ((${#names[@]})) || return 0
  printf '\nTime of each part:\n'
  local i
  for i in "${!names[@]}"; do printf '  %-28s %4d s\n' "${names[i]}" "${seconds[i]}"; done
  printf '  %-28s %4d s\n' "whole" "$SECONDS"
}
trap times EXIT

# --- packages ----------------------------------------------------------------------------------------------------------
# Whatever fails because of a network is tried again, and whoever else installs something is waited for.
APT=(apt-get -qq -o Acquire::Retries=5 -o DPkg::Lock::Timeout=600)
export CARGO_NET_RETRY=${CARGO_NET_RETRY:-10}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# Debian starts a package's service as it is installed unless policy-rc.d says no: say no, and put back what was there.
POLICY=/usr/sbin/policy-rc.d
restore_policy() {
  rm -f "$POLICY"
  if [ -e "$POLICY.before-zap" ] || [ -L "$POLICY.before-zap" ]; then mv "$POLICY.before-zap" "$POLICY"; fi
}
apt_install() {
  local status=0 fresh_apache=no pause
  installed apache2 || fresh_apache=yes
  if [ ! -e "$POLICY.before-zap" ] && [ -e "$POLICY" ]; then mv "$POLICY" "$POLICY.before-zap"; fi
  printf '#!/bin/sh\nexit 101\n' >"$POLICY"
  chmod 755 "$POLICY"
  trap restore_policy EXIT INT TERM
  export DEBIAN_FRONTEND=noninteractive
  # What an installation that was cut off has left half done.
  dpkg --configure -a >/dev/null || say "dpkg could not finish what was begun earlier"
  for pause in 10 30 0; do
    status=0
    "${APT[@]}" update || say "apt-get update failed; trying with the lists that are there"
    "${APT[@]}" -y --no-install-recommends install "$@" >/dev/null || status=$?
    ((status)) || break
    sleep $pause
  done
  restore_policy
  trap - EXIT INT TERM
  ((status == 0)) || fail "apt-get could not install: $*"
  # Not started now, and not at the next boot either, where it was not there before.
  if [ $fresh_apache = yes ] && command -v systemctl >/dev/null; then
    systemctl --quiet --no-reload disable apache2.service apache-htcacheclean.service 2>/dev/null || true
  fi
}

packages() {
  local missing=() p
  for p in "${PACKAGES[@]}"; do installed "$p" || missing+=("$p"); done
  if ((${#missing[@]} == 0)); then
    echo "nothing is missing"
    return
  fi
  echo "installing: ${missing[*]}"
  apt_install "${missing[@]}"
}

# The source of a C project as Debian has it, to be built in a pod and natively: apt knows its checksum.
SOURCES=target/sources SOURCE=lua5.4
sources() {
  if compgen -G "$SOURCES/${SOURCE}_*.orig.tar.gz" >/dev/null; then
    echo "$SOURCE is there"
    return
  fi
  local lists options
  mkdir -p "$SOURCES"
  lists=$(mktemp -d)
  chmod 755 "$lists"
  # From wherever this machine has its packages.
  apt-get indextargets --format 'deb-src $(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' |
    { grep ' main$' || true; } | sort -u >"$lists/sources.list"
  options=(-o "Dir::Etc::sourcelist=$lists/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$lists/lists")
  mkdir -p "$lists/lists/partial"
  ("${APT[@]}" "${options[@]}" update && cd "$SOURCES" && "${APT[@]}" "${options[@]}" source --download-only "$SOURCE") ||
    say "the source of $SOURCE could not be fetched: building it is not measured"
  rm -rf "$lists"
}

# --- Rust --------------------------------------------------------------------------------------------------------------
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; } # at_least NEEDED FOUND
cargo_version() { cargo --version 2>/dev/null | cut -d ' ' -f 2; }
rust_complete() {
  local found
  found=$(cargo_version) && [ -n "$found" ] && at_least "$RUST_NEEDED" "$found" &&
    cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1
}

toolchain() {
  if ! rust_complete; then
    if command -v rustup >/dev/null; then
      echo "adding rustfmt and clippy to the toolchain of rustup"
      at_least "$RUST_NEEDED" "$(cargo_version)" || rustup toolchain install stable --profile minimal
      rustup component add rustfmt clippy
    else
      echo "installing Rust from Debian's packages: ${RUST_PACKAGES[*]}"
      apt_install "${RUST_PACKAGES[@]}"
    fi
  fi
  rust_complete || fail "Rust $RUST_NEEDED or later with rustfmt and clippy is needed; found: $(cargo_version || true). \
Debian 12 has it in bookworm-security (${RUST_PACKAGES[*]}); https://rustup.rs works too"
  cargo --version
}

just_tool() {
  if command -v just >/dev/null; then
    just --version
  else
    # A convenience: nothing here needs it. The debug profile builds in half the time.
    timeout 600 cargo install --quiet --locked --debug just || say "just could not be installed; the recipes in justfile are plain commands"
  fi
}

# --- the machine ---------------------------------------------------------------------------------------------------------
machine() {
  [ "$(uname -sm)" = "Linux x86_64" ] || fail "zap runs on x86-64 Linux; this is $(uname -sm)"
  [ "$(id -u)" = 0 ] || fail "root is needed (namespaces, mounts, ptrace): run it as root"
  command -v apt-get >/dev/null || fail "apt-get is needed: this script sets up Debian (made for Debian 12)"
  . /etc/os-release
  [ "${ID:-}/${VERSION_ID:-}" = debian/12 ] || say "made for Debian 12; this is ${PRETTY_NAME:-unknown}: going on"
  case $PWD/ in
    /tmp/* | /run/* | /dev/* | /proc/* | /sys/*)
      fail "pods have a /$(cut -d/ -f2 <<<"$PWD") of their own, where they would look for the programs built here: use another directory" ;;
  esac
  local free
  free=$(df --output=avail -BM . | tail -n 1 | tr -dc 0-9)
  ((free > 4096)) || say "only $free MB are free here; a build and the measurements want 4 GB"
  echo "Linux $(uname -r), $(nproc) CPUs, ${PRETTY_NAME:-unknown}"
}

setup() {
  part "machine" machine
  part "packages" packages
  part "sources" sources
  part "toolchain" toolchain
  part "just" just_tool
}

host_check() { # ZAP
  "$1" check || {
    local status=$?
    say "this host lacks something that zap needs: see the list above"
    return $status
  }
}

repro() {
  setup
  part "release build" cargo build --release --locked --workspace
  part "host check" host_check target/release/zap
  # All of it within half an hour, set-up and build included: what is left of it is the experiments'. A later --minutes wins.
  local left=$((28 - SECONDS / 60))
  part "experiments" target/release/harness repro --minutes $((left < 12 ? 12 : left)) "$@"
}

tests() {
  setup
  part "formatting" cargo fmt --all --check
  part "clippy" cargo clippy --locked --workspace --all-targets -- -D warnings
  part "build" cargo build --locked --workspace
  part "test build" cargo test --locked --workspace --no-run
  host_check target/debug/zap >/dev/null || say "going on: the tests will say what does not work here"
  # Pods and servers share the cores with their tests: more at once only makes each slower.
  part "tests" cargo test --locked --workspace --no-fail-fast -- --test-threads="${TEST_THREADS:-$(nproc)}"
}

# What is measured of both: the experiments, and how often each; a baseline needs more, see crates/harness/src/gate.rs.
GATED=(checkpoint-restart --workload sleep --workload apache-event)
gate() { # REVISION
  local base=target/gate/tree samples=$PWD/target/gate/samples
  setup
  part "release build" cargo build --release --locked --workspace
  part "host check" host_check target/release/zap
  git worktree remove --force "$base" 2>/dev/null || rm -rf "$base"
  rm -rf "$samples"
  git worktree add --quiet --detach "$base" "$1" || fail "there is no revision $1"
  part "release build of $1" env --chdir="$base" CARGO_TARGET_DIR="$PWD/target/gate/build" \
    cargo build --release --locked --workspace
  part "measuring $1" env --chdir="$base" "$PWD/target/gate/build/release/harness" run "${GATED[@]}" --runs 30 --out "$samples"
  git worktree remove --force "$base"
  part "measuring this tree" target/release/harness gate --baseline "$samples"
}

case ${1:-} in
  repro) shift; repro "$@" ;;
  test) shift; tests "$@" ;;
  gate) [ $# = 2 ] || fail "gate takes one revision"; gate "$2" ;;
  *)
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
