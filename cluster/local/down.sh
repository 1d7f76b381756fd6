#!/usr/bin/env bash
# Ends what up.sh has started, and nothing else.   STATE=runs/local
set -euo pipefail

state=$(realpath -m "${STATE:-runs/local}")
[[ -e $state/pids ]] || { echo "$state: nothing was started from here" >&2; exit 0; }

signal() {
  while read -r _ pid; do kill "-$1" -- "-$pid" 2>/dev/null || true; done <"$state/pids"
}

left() {
  while read -r _ pid; do ! kill -0 -- "-$pid" 2>/dev/null || return 0; done <"$state/pids"
  return 1
}

ray_directory=$(cat "$state/ray_directory")
signal TERM
for ((i = 0; i < 40; i++)); do
  left || break
  sleep 0.5
done
signal KILL
# Workers of Ray that lead sessions of their own name its directory, which nobody else has.
for pid in $(pgrep -f -- "^[^ ]*(ray|python)[^ ]* .*$ray_directory/" || true); do kill -KILL "$pid" 2>/dev/null || true; done
rm -rf "$ray_directory" "$state/pids" "$state/s3"
echo "ended; logs are in $state"
