#!/usr/bin/env bash
# What one host of a launch does, however it is started: its ranks under torchrun, or the servers of rollouts.
#   node.sh [--print] HOSTFILE INDEX train|sft CONFIG [KEY=VALUE …]
# INDEX counts the hosts of the file from 0. --print shows the command and runs nothing. Of the environment:
#   PYTHON        the trainer's Python (.venv/bin/python)
#   LOGS          directory for logs, one folder a host
#   RUN_ID        name of the launch, a dash and the number of this start; the same on all hosts
#   STOP_SECONDS  how long the ranks may take to save after SIGTERM (25)
#   LINE          1: standard input is a line to the launcher. Its first word is the servers' API key, then a word comes
#                 every 0.5 s; `stop` is a SIGTERM. Silence for SILENCE_SECONDS (20), or its end, ends everything here at
#                 once: the launcher has died, or the network has, and other ranks are lost.
#   REFUSED       file that a run writes where starting it again would not help (LOGS/refused)
#   REAL_SERVER_KEY  the servers' API key, where there is no line
# Exit status: the command's; 143 after SIGTERM or `stop`; 4 where starting again would not help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
silence=${SILENCE_SECONDS:-20}
print=
if [ "${1:-}" = --print ]; then
    print=1
    shift
fi
export PYTHON=${PYTHON:-.venv/bin/python} LOGS=${LOGS:-runs/launch} STOP_SECONDS=${STOP_SECONDS:-25}
export RUN_ID=${RUN_ID:-real}

# A file, since the status of a process substitution is lost.
words=$(mktemp)
trap 'rm -f "$words"' EXIT
# Whoever refuses the run writes this file; a launcher with a line removes it itself.
if [ -z "$print" ]; then
    export REFUSED=${REFUSED:-$LOGS/refused}
    mkdir -p "$LOGS"
    [ -n "${LINE:-}" ] || [ "${2:-}" != 0 ] || rm -f "$REFUSED"
fi
# One of an earlier launch with the same LOGS is none of this start: host 0, which removes it, may come later than others.
version() { stat -c '%i %y' "$REFUSED" 2>/dev/null || true; }
[ -n "$print" ] || before=$(version)
refused() { [ -z "$print" ] && [ -e "$REFUSED" ] && [ "$(version)" != "$before" ]; }
"$PYTHON" -m real_megatron.cluster.node "$@" >"$words" || { refused && exit 4; exit 1; }
mapfile -d '' -t plan <"$words"
name=${plan[0]} role=${plan[1]}
settings=()
for ((i = 2; i < ${#plan[@]}; i++)); do
    [ -n "${plan[i]}" ] || break
    settings+=("${plan[i]}")
done
command=("${plan[@]:i+1}")
if [ -n "$print" ]; then
    printf '%s (%s):' "$name" "$role"
    printf ' %q' "${settings[@]}" "${command[@]}"
    printf '\n'
    exit
fi

if [ -n "${LINE:-}" ]; then
    IFS= read -r -t "$silence" REAL_SERVER_KEY
fi
export REAL_SERVER_KEY=${REAL_SERVER_KEY:-}
mkdir -p "$LOGS/$name"
# The start before this one may just be ending here: a host that was lost ends its own later than the others.
exec 9>"${TMPDIR:-/tmp}/real-launch-$(id -u)-${RUN_ID%-*}-$name.lock"
flock --wait 120 9 || { echo "$name: the start before has not ended" >&2; exit 1; }

# Processes of this start carry a mark in their environment, by which they are found whatever session they have made
# (torchrun gives each rank its own) and whoever has died in between.
mark=$RUN_ID.$name.$$
left() { grep -lzxsF "REAL_NODE=$mark" /proc/[0-9]*/environ | cut -d/ -f3 || true; }
end_all() { # SIGKILL for whatever is left of the start
    local pids
    while pids=$(left) && [ -n "$pids" ]; do
        # shellcheck disable=SC2086  # one word a process
        kill -KILL $pids 2>/dev/null || true
        sleep 0.1
    done
}
trap 'end_all; rm -f "$words"' EXIT

stopping='' deadline=0
stop() { # SIGTERM for the command, which hands it on; SIGKILL for what is left STOP_SECONDS later
    [ -z "$stopping" ] || return 0
    stopping=1 deadline=$((SECONDS + STOP_SECONDS))
    kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT HUP

log=$LOGS/$name/$role.log
if [ "$role" = train ]; then # seen by whoever watches the launcher, too
    env REAL_NODE="$mark" "${settings[@]}" setsid "${command[@]}" </dev/null > >(trap '' TERM HUP INT; exec 9>&-; exec tee -a "$log") 2>&1 9>&- &
else
    env REAL_NODE="$mark" "${settings[@]}" setsid "${command[@]}" </dev/null >>"$log" 2>&1 9>&- &
fi
child=$!
heard=$SECONDS
while kill -0 "$child" 2>/dev/null; do
    if [ -n "$stopping" ] && ((SECONDS >= deadline)); then
        end_all
    elif [ -z "${LINE:-}" ]; then
        sleep 0.5 || true
    else
        word='' ended=0 # above 128: no whole word within the second; else: the line has ended
        IFS= read -r -t 1 word || ended=$?
        if ((ended == 0)); then
            heard=$SECONDS
            [ "$word" != stop ] || stop
        elif [ -z "$stopping" ] && ((ended <= 128 || SECONDS - heard >= silence)); then
            echo "$name: the launcher is not heard any more; ending" >>"$log"
            end_all
        elif ((ended <= 128)); then # after `stop`: read returns at once
            sleep 0.2
        fi
    fi
done
status=0
wait "$child" || status=$?
if [ -n "$stopping" ]; then
    status=143
elif ((status)) && refused; then
    status=4
fi
exit "$status"
