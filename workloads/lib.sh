# What the checks of the workloads share. Machines that test are busy: whatever only has to happen has a minute.

fail() { echo "$*" >&2; exit 1; }

# soon COMMAND…: it succeeds within a minute.
soon() {
  local end=$((SECONDS + 60))
  until "$@"; do
    ((SECONDS < end)) || return 1
    sleep 0.1
  done
}

# answers COMMAND…: the same, and else the check fails.
answers() { soon "$@" || fail "no success: $*"; }

# says_else FILE TEXT: FILE says something, and not TEXT.
says_else() {
  local now
  now=$(cat "$1" 2>/dev/null)
  [ -n "$now" ] && [ "$now" != "$2" ]
}

# goes_on FILE WHO: FILE, in which WHO says how far it is, changes.
goes_on() {
  local before
  soon says_else "$1" "" || fail "$2 has not begun"
  before=$(cat "$1")
  soon says_else "$1" "$before" || fail "$2 stands still at $before: $(tail -n 5 /tmp/errors 2>/dev/null)"
}

has_more() { (($(wc -l <"$1") > $2)); }

# grows FILE WHAT: WHAT goes on in FILE, line by line.
grows() {
  local before
  before=$(wc -l <"$1") || fail "$2 has not begun"
  soon has_more "$1" "$before" || fail "$2 goes on no more ($before lines)"
}

# counted FILE: the whole lines in it are the numbers from 1; the last of them is printed.
counted() {
  local now
  now=$(wc -l <"$1")
  [ "$(head -n "$now" "$1")" = "$(seq "$now")" ] || fail "a number is missing in $1"
  echo "$now"
}

# no_errors FILE…: nobody has complained there.
no_errors() {
  local file
  for file in "$@"; do [ ! -s "$file" ] || fail "$file: $(tail -n 5 "$file")"; done
}
