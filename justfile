# Every habit as a recipe. `just` alone lists them; all are plain commands that work without it.

_default:
    @just --list --unsorted

# Set up this machine and measure everything the paper shows
repro *ARGS:
    ./setup.sh repro {{ARGS}}

# Set up this machine, then formatting, lints, build and the whole test suite
ci:
    ./setup.sh test

# Development build
build:
    cargo build --workspace

# Optimised build, the one that is measured
release:
    cargo build --workspace --release

# Format everything
fmt:
    cargo fmt --all

# What CI refuses: formatting and lints
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

# The test suite, or the tests whose name contains NAME
test NAME='': build
    cargo test --workspace {{NAME}} -- --test-threads={{num_cpus()}}

# Pods on Debian's other kernels (6.1, 6.12, 7) and moves between them and this one, in emulated machines: takes minutes
test-kernels NAME='': build
    ZAP_KERNELS=all cargo test -p harness --test kernels {{NAME}} -- --nocapture --test-threads=1

# Only the tests that need no pod: parsers, formats, statistics
test-quick:
    cargo test --workspace --lib

# Until so many cases were tried or MINUTES are over. The first that fails ends it, with the command that tries it again;
# seeds are kept in target/soak.
# Generated programs, names, lives of hosts and hostile images in turn, for hours: `just soak 1000000`
soak CASES='1000000' MINUTES='100000': build
    #!/usr/bin/env bash
    set -euo pipefail
    mkdir -p target/soak
    rm -rf target/soak/*
    export ZAP_VERIFICATION=$PWD/target/soak/tables
    begun=$SECONDS cases=0
    try() { # CASES CRATE PROGRAM TEST
      ((cases < {{CASES}} && SECONDS - begun < {{MINUTES}} * 60)) || return 0
      rm -rf "$ZAP_VERIFICATION"
      if ! ZAP_SEED=random PROPTEST_CASES=$1 cargo test -q -p "$2" --test "$3" "$4" -- --nocapture >target/soak/now 2>&1; then
        cat target/soak/now
        echo "soak: $4 failed after $cases cases and $((SECONDS - begun)) s; how to try it again is said above" >&2
        exit 1
      fi
      grep -h ZAP_SEED= target/soak/now | tee -a target/soak/seeds
      cases=$((cases + $1))
      # The sums of all rounds, for the report.
      for table in "$ZAP_VERIFICATION"/*.csv; do
        awk -F, -v of="$(basename "$table" .csv)" 'FNR > 1 && $1 !~ /^seed |^alive/ { print of ": " $1 "," $2 }' "$table"
      done >>target/soak/counts
    }
    while ((cases < {{CASES}} && SECONDS - begun < {{MINUTES}} * 60)); do
      try 100 harness properties a_checkpoint_cannot_be_told_from_none
      try 4 harness properties names_are_the_pods_own
      try 20 harness lifecycle states_and_exit_codes_are_what_they_should_be
      try 600 zap hostile no_record_makes_verify
      try 40 zap hostile no_record_makes_restart
    done
    mkdir -p target/verification
    awk -F, 'BEGIN { print "what,count" } { sum[$1] += $2 } END { for (what in sum) print what "," sum[what] }' \
      target/soak/counts | tee target/verification/soak.csv
    echo "soak: $cases cases in $((SECONDS - begun)) s"

# Have a generated program that failed, the last one or that of FILE, be tried by every run of the tests: `just keep lost-lock`
keep NAME *FILE:
    cargo run -q -p harness --bin harness -- keep {{NAME}} {{FILE}}

# Needs `cargo install cargo-llvm-cov` and `rustup component add llvm-tools`; `just coverage --html` shows each line.
# Lines of crates/zap that tests run, in their own process and in every `zap` that they start
coverage *ARGS='--summary-only':
    #!/usr/bin/env bash
    set -euo pipefail
    # Monitors are killed, and copies of a process end without ado: what each has run is counted in memory that is a file,
    # one for each program.
    export LLVM_PROFILE_FILE_NAME='zap-%m%c.profraw' RUSTFLAGS='-C llvm-args=-runtime-counter-relocation'
    export ZAP_VERIFICATION=$PWD/target/llvm-cov-target/verification PROPTEST_CASES=16
    cargo llvm-cov clean --workspace
    # Two tests look at their own memory, where these counters are.
    cargo llvm-cov --no-report --package zap -- --test-threads={{num_cpus()}} \
      --skip memory_of_every_sort_is_made_again --skip what_is_followed_is_copied_once
    cargo llvm-cov report --package zap --ignore-filename-regex '/harness/|/tests?[./]|/testing.rs' {{ARGS}}

# Needs a nightly compiler and `cargo install cargo-fuzz`; targets are in fuzz/README.md. What is found goes to fuzz/artifacts,
# and then to fuzz/corpus.
# Fuzz what reads others' bytes: `just fuzz state 600` for ten minutes
fuzz TARGET='state' SECONDS='60':
    mkdir -p target/fuzz/{{TARGET}}
    ZAP_TARGET={{TARGET}} cargo +nightly fuzz run target target/fuzz/{{TARGET}} fuzz/corpus/{{TARGET}} -- \
      -max_total_time={{SECONDS}} -rss_limit_mb=1024 -timeout=20

# Fuzz every target, one after the other, each for so many seconds
fuzz-all SECONDS='60':
    for target in $(ls fuzz/corpus); do just fuzz $target {{SECONDS}} || exit 1; done

# Make the tables of docs/coverage.md from the tests; CI fails when they are stale
coverage-table:
    ZAP_COVERAGE_TABLE=write cargo test -p harness --test coverage

# What this host offers, feature by feature
check: build
    target/debug/zap check

# Experiments and workloads
list: release
    target/release/harness list

# Run experiments: `just run checkpoint-restart --runs 20`
run +ARGS: release
    target/release/harness run {{ARGS}}

# Plots and the report page from the raw samples in results/
report *ARGS: release
    target/release/harness report {{ARGS}}

# Is this build slower than the baseline?
gate BASELINE='results/baseline': release
    target/release/harness gate --baseline {{BASELINE}}

# A desktop moves between two hosts while a viewer looks on: narrated, with a timeline
demo-migrate *ARGS: release
    target/release/harness demo-migrate {{ARGS}}

# Micro-benchmarks (criterion)
bench *ARGS:
    cargo bench -p harness {{ARGS}}

# API documentation
doc:
    cargo doc --workspace --no-deps --document-private-items
