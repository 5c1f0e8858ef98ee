# What the checks of the workloads share.

fail() { echo "$*" >&2; exit 1; }

# goes_on FILE WHO: FILE, in which WHO says how far it is, changes within 10 s.
goes_on() {
  local before
  before=$(cat "$1" 2>/dev/null) && [ -n "$before" ] || fail "$2 has not begun"
  for _ in $(seq 100); do
    [ "$(cat "$1")" = "$before" ] || return 0
    sleep 0.1
  done
  fail "$2 stands still at $before: $(tail -n 5 /tmp/errors 2>/dev/null)"
}

# no_errors FILE…: nobody has complained there.
no_errors() {
  local file
  for file in "$@"; do [ ! -s "$file" ] || fail "$file: $(tail -n 5 "$file")"; done
}

# answers COMMAND…: it succeeds within 10 s.
answers() {
  for _ in $(seq 100); do "$@" && return 0; sleep 0.1; done
  fail "no success: $*"
}
