#!/usr/bin/env bash
# One extraction by several processes of this machine:
#
#   launch/local.sh 2 --config my_run.yaml
#
# Everything after the number goes to python -m jaxplain.extract. GPUS_PER_PROCESS=1 gives each process its own
# GPUs; without it every process sees all devices, which only a CPU allows. PORT is where they meet, PYTHON the
# interpreter. A process that fails takes the others with it; the exit status is that of the first that failed.
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
    echo "error: bash is $BASH_VERSION; use 5.1 or newer." >&2
    exit 2
fi
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    echo "error: the number of processes is '${1:-}'; give a positive number first." >&2
    exit 2
fi
processes=$1
shift
preempted=75
python=${PYTHON:-python}
port=${PORT:-$((20000 + RANDOM % 20000))}

running=()
stop() { kill -TERM "${running[@]}" 2>/dev/null || true; }
trap stop TERM INT

for ((process = 0; process < processes; process++)); do
    if [[ -n ${GPUS_PER_PROCESS:-} ]]; then
        first=$((process * GPUS_PER_PROCESS))
        CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + GPUS_PER_PROCESS - 1)))
        export CUDA_VISIBLE_DEVICES
    fi
    "$python" -m jaxplain.extract "$@" \
        --coordinator "localhost:$port" --processes "$processes" --process "$process" &
    running+=($!)
done

status=0
while ((${#running[@]})); do
    code=0 ended=
    wait -n -p ended "${running[@]}" || code=$?
    # A signal ends the waiting, but no process.
    if [[ -z ${ended:-} ]]; then
        continue
    fi
    left=()
    for process in "${running[@]}"; do
        if ((process != ended)); then
            left+=("$process")
        fi
    done
    running=("${left[@]}")
    if ((status == 0)); then
        status=$code
    fi
    # Those that were preempted end together, each after saving.
    if ((code != 0 && code != preempted)); then
        stop
    fi
done
exit "$status"
