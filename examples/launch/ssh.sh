#!/usr/bin/env bash
# A run on the hosts of a file, over ssh; no Ray, no daemon. docs/launching.md
#   bash examples/launch/ssh.sh [OPTION …] HOSTFILE train|sft CONFIG [KEY=VALUE …]
#     --print            show every command and run nothing
#     --no-preflight     do not compare the hosts first (real-megatron doctor --cluster)
#     --max-restarts N   start again up to N times when a host, a rank or a server host is lost (0)
#     --logs DIR         logs, one folder a host (runs/launch/DATE); on a file system that all hosts share
# Paths are relative to the repository. It, its environment, the model and `output` lie under the same paths on all hosts;
# `output` and the logs on a file system that they share. Of the environment:
# SSH_OPTIONS (options of ssh, quoted as for a shell), PYTHON, STOP_SECONDS, SILENCE_SECONDS and RENDEZVOUS_PORT (node.sh),
# HOST_SECONDS (how long a restart waits for hosts that are not ready, 1800), RESTART_SECONDS (the pause before a restart,
# 10; three times as long after each, up to 5 minutes, until a start has lived for 5 minutes).
# Handed on to the hosts, where set: NCCL_*, GLOO_*, HF_*, TORCH_*, TRITON_*, OMP_NUM_THREADS, the variables of proxies, and
# the names in FORWARD; never what is named a token, key, secret or password, nor a proxy with one: hosts have their own.
# Exit status: 0 when all training hosts have finished, 130 or 143 after Ctrl-C or SIGTERM, else 1.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$here"
print='' preflight=1 restarts=0 logs=''
while [[ ${1:-} == --* ]]; do
    case $1 in
        --print) print=1 ;;
        --no-preflight) preflight='' ;;
        --max-restarts | --logs)
            [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
            if [ "$1" = --logs ]; then logs=$2; else restarts=$2; fi
            shift
            ;;
        *) echo "unknown option $1: see the head of examples/launch/ssh.sh" >&2; exit 2 ;;
    esac
    shift
done
if [ $# -lt 3 ]; then
    echo "usage: bash examples/launch/ssh.sh [OPTION …] HOSTFILE train|sft CONFIG [KEY=VALUE …]" >&2
    exit 2
fi
hostfile=$(realpath "$1")
shift
export PYTHON=${PYTHON:-.venv/bin/python} STOP_SECONDS=${STOP_SECONDS:-25} SILENCE_SECONDS=${SILENCE_SECONDS:-20}
run=$(date -u +%Y%m%d-%H%M%S)-$$
logs=$(realpath -m "${logs:-runs/launch/$run}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"$PYTHON" -m real_megatron.cluster.ssh "$SILENCE_SECONDS" >"$scratch/ssh"
mapfile -d '' -t ssh <"$scratch/ssh"

listed=$("$PYTHON" -m real_megatron.cluster.hostfile "$hostfile")
names=() roles=() targets=()
while read -r name _ role _ port user; do
    names+=("$name") roles+=("$role")
    target=''
    [ "$port" = - ] || target+="-p $port "
    [ "$user" = - ] || target+="-l $user "
    targets+=("$target$name")
done <<<"$listed"

forwarded() { # the variables that hosts get, as NAME=VALUE, each followed by a NUL
    local name
    for name in $(compgen -e); do
        case ${name^^} in *TOKEN* | *KEY* | *SECRET* | *PASSWORD*) continue ;; esac
        case $name in
            NCCL_* | GLOO_* | HF_* | TORCH_* | TRITON_* | OMP_NUM_THREADS | RENDEZVOUS_PORT) ;;
            http_proxy | https_proxy | no_proxy | HTTP_PROXY | HTTPS_PROXY | NO_PROXY)
                [[ ${!name} != *@* ]] || continue # with a password
                ;;
            *) [[ " ${FORWARD:-} " == *" $name "* ]] || continue ;;
        esac
        printf '%s=%s\0' "$name" "${!name}"
    done
}
mapfile -d '' -t variables < <(forwarded)

remote() { # the command of host $1 in start $2, for its shell
    local word line
    line="cd $(printf %q "$here") && LINE=1"
    for word in "PYTHON=$PYTHON" "LOGS=$logs" "RUN_ID=$run-$2" "STOP_SECONDS=$STOP_SECONDS" \
        "SILENCE_SECONDS=$SILENCE_SECONDS" \
        "REFUSED=$logs/refused" "${variables[@]}"; do
        line+=" $(printf %q "$word")"
    done
    shift 2
    line+=" exec bash examples/launch/node.sh $(printf '%q ' "$@")"
    printf '%s' "$line"
}

if [ -n "$print" ]; then
    [ -z "$preflight" ] || echo "preflight: $PYTHON -m real_megatron doctor --cluster $hostfile --config ${*:2}"
    for i in "${!names[@]}"; do
        echo "${names[i]}: $(printf '%q ' "${ssh[@]}")${targets[i]} $(remote "$i" 0 "$hostfile" "$i" "$@")"
    done
    for i in "${!names[@]}"; do
        LOGS=$logs RUN_ID=$run-0 bash examples/launch/node.sh --print "$hostfile" "$i" "$@"
    done
    exit
fi
if [ -n "$preflight" ]; then
    "$PYTHON" -m real_megatron doctor --cluster "$hostfile" --config "${@:2}" &
    looking=$!
    # It ends with this script, however that does, and all that it has started ends with it.
    while kill -0 $$ && kill -0 "$looking" && sleep 0.5; do :; done 2>/dev/null && kill -TERM "$looking" 2>/dev/null &
    trap 'kill -TERM "$looking" 2>/dev/null; wait "$looking" || true; exit 130' INT
    trap 'kill -TERM "$looking" 2>/dev/null; wait "$looking" || true; exit 143' TERM HUP
    wait "$looking" || exit $?
    trap - INT TERM HUP
fi
mkdir -p "$logs"
key=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
launcher=$$
say() { echo "launch: $*" >&2; }

talk() { # what the line to a host carries; it ends with the launcher, however that dies
    printf '%s\n' "$key"
    while [ ! -e "$scratch/kill" ] && kill -0 "$launcher" 2>/dev/null; do
        # The line stays open while the ranks save.
        if [ -e "$scratch/stop" ]; then echo stop; else echo beat; fi
        sleep 0.5
    done 2>/dev/null
}

pids=()
start() {
    rm -f "$scratch/stop" "$scratch/kill" "$logs/refused"
    pids=()
    for i in "${!names[@]}"; do
        # A signal to the whole group, as of a terminal that closes, must not end the line before the ranks have saved.
        # shellcheck disable=SC2086  # the options of a host
        (
            trap '' HUP TERM INT
            exec "${ssh[@]}" ${targets[i]} "$(remote "$i" "$1" "$hostfile" "$i" "${@:2}")" < <(talk) 2>&1
        ) &
        pids[i]=$!
    done
    say "start $1 on ${names[*]}; logs in $logs"
}
running() {
    local pid
    for pid in "${pids[@]}"; do kill -0 "$pid" 2>/dev/null && return 0; done
    return 1
}
finish() { # end all hosts: $1 is stop, with time to save, or kill
    local until=$((SECONDS + 10))
    touch "$scratch/$1"
    [ "$1" = kill ] || until=$((SECONDS + STOP_SECONDS + 3))
    while running && ((SECONDS < until)); do sleep 0.2 || true; done
    touch "$scratch/kill"
    until=$((SECONDS + 5))
    while running && ((SECONDS < until)); do sleep 0.2 || true; done
    # Of a host that is cut off: it ends by itself when the line is silent.
    for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
}
answering() { # wait until every host answers and has its file systems
    local until=$((SECONDS + ${HOST_SECONDS:-1800})) check
    check="cd $(printf %q "$here") && $(printf '%q ' "$PYTHON" -m real_megatron.cluster.hostfile "$hostfile")"
    for i in "${!names[@]}"; do
        # shellcheck disable=SC2086
        until "${ssh[@]}" ${targets[i]} "$check" </dev/null >/dev/null 2>&1; do
            [ -z "$signal" ] || return 1
            if ((SECONDS > until)); then
                say "${names[i]} does not answer, or not with this repository and the host file"
                return 1
            fi
            sleep 2 || true
        done
    done
}

signal='' pause=${RESTART_SECONDS:-10}
trap 'signal=130' INT
trap 'signal=143' TERM HUP
trap 'touch "$scratch/kill"; rm -rf "$scratch"' EXIT
for ((attempt = 0; ; attempt++)); do
    start "$attempt" "$@"
    outcome='' begun=$SECONDS
    while [ -z "$outcome" ]; do
        [ -z "$signal" ] || outcome=stopped
        training=0
        for i in "${!names[@]}"; do
            [ -n "${pids[i]:-}" ] || continue
            if kill -0 "${pids[i]}" 2>/dev/null; then
                [ "${roles[i]}" = rollout ] || training=$((training + 1))
                continue
            fi
            status=0
            wait "${pids[i]}" || status=$?
            unset "pids[i]"
            if ((status)) || [ "${roles[i]}" = rollout ]; then
                say "${names[i]} has ended with status $status$( ((status != 255)) || echo ' (ssh: the host is lost)')"
                outcome=${outcome:-failed}
            fi
        done
        ((training)) || outcome=${outcome:-finished}
        sleep 0.5 || true
    done
    if [ "$outcome" = failed ]; then finish kill; else finish stop; fi
    case $outcome in
        finished) exit 0 ;;
        stopped) exit "$signal" ;;
    esac
    if [ -e "$logs/refused" ]; then
        say "the run cannot be done as it is: $(cat "$logs/refused")"
        exit 1
    fi
    if ((attempt >= restarts)); then
        say "no restart is left (--max-restarts $restarts); the same command goes on from the last checkpoint"
        exit 1
    fi
    ((SECONDS - begun < 300)) || pause=${RESTART_SECONDS:-10}
    say "restart $((attempt + 1)) of $restarts in $pause s, when all hosts answer"
    until=$((SECONDS + pause))
    while [ -z "$signal" ] && ((SECONDS < until)); do sleep 0.5 || true; done
    [ -z "$signal" ] || exit "$signal"
    pause=$((pause * 3 > 300 ? 300 : pause * 3))
    answering || exit "${signal:-1}"
done
