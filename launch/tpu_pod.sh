#!/usr/bin/env bash
# One extraction on all workers of a Cloud TPU slice, made anew and resumed as often as it is preempted:
#
#   ZONE=us-west4-a ACCELERATOR_TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite \
#       launch/tpu_pod.sh my-tpu my_run.yaml gs://my-bucket/run [flags of jaxplain.extract]
#
# Run it from jaxplain's checkout, with gcloud's project set; it installs the last commit. The output has to lie
# in a bucket, since a slice that is preempted is deleted, and so do the checkpoints beside it. The workers need
# Python 3.11 or newer: PYTHON names it (python3), or take a RUNTIME that has it. SPOT=0 asks for a slice that is
# not preempted, ATTEMPTS says how often to try (20), WAIT how many seconds lie between two looks at a slice (30).
# The slice stays when the run is over: delete it.
set -euo pipefail

refuse() {
    echo "error: $1." >&2
    exit 2
}
if (($# < 3)); then refuse "there are $# arguments; give a slice's name, a config and gs://BUCKET/FOLDER"; fi
name=$1 config=$2 output=$3
shift 3
if [[ ! -f $config ]]; then refuse "the config is '$config'; there is no such file"; fi
if [[ $output != gs://?* ]]; then refuse "the output is '$output'; give gs://BUCKET/FOLDER"; fi
for variable in ZONE ACCELERATOR_TYPE RUNTIME; do
    if [[ -z ${!variable:-} ]]; then refuse "$variable is ''; set it, as the head of this script shows"; fi
done
preempted=75
wait=${WAIT:-30}
spot=()
if [[ ${SPOT:-1} != 0 ]]; then spot=(--spot); fi

tpu() { gcloud compute tpus tpu-vm "$1" "$name" --zone="$ZONE" "${@:2}"; }
on_workers() { tpu ssh --worker="$1" --command="$2"; }
state() { tpu describe --format='value(state)' 2>/dev/null || echo MISSING; }

install() {
    local folder
    folder=$(mktemp -d)
    git archive --format=tar.gz --output="$folder/jaxplain.tar.gz" HEAD &&
        cp "$config" "$folder/run.yaml" &&
        gcloud compute tpus tpu-vm scp "$folder/jaxplain.tar.gz" "$folder/run.yaml" "$name:" \
            --zone="$ZONE" --worker=all &&
        rm -r "$folder" &&
        on_workers all "mkdir -p jaxplain && tar -xzf jaxplain.tar.gz -C jaxplain && \
${PYTHON:-python3} -m venv venv && venv/bin/pip install --quiet 'jax[tpu]' './jaxplain[gcs]'"
}

ready() {
    while :; do
        case $(state) in
            READY) return ;;
            MISSING)
                tpu create --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME" ${spot[@]+"${spot[@]}"} ||
                    return
                ;;
            PREEMPTED | TERMINATED | STOPPED) tpu delete --quiet || return ;;
            *) sleep "$wait" ;;
        esac
    done
}

# The status is kept on the workers, because gcloud has one of its own for several of them.
extraction=$(printf '%q ' venv/bin/python -m jaxplain.extract --config run.yaml --output "$output" \
    --run.checkpoint_folder "$output" "$@")
for ((attempt = 1; attempt <= ${ATTEMPTS:-20}; attempt++)); do
    echo "attempt $attempt: $extraction"
    if ! ready; then
        sleep "$wait"
        continue
    fi
    if ! install; then
        sleep "$wait"
        # A slice that is still there will not do better the next time.
        if [[ $(state) == READY ]] && ! install; then
            echo "error: jaxplain could not be installed on $name; the lines above say why." >&2
            exit 2
        fi
        continue
    fi
    if on_workers all "rm -f status; $extraction; status=\$?; echo \$status > status; exit \$status"; then
        exit 0
    fi
    if status=$(on_workers 0 "cat status") && [[ $status != "$preempted" ]]; then
        if [[ $status != 0 ]]; then
            # A worker that is taken away first takes the others down with an error.
            sleep "$wait"
            if [[ $(state) != READY ]]; then continue; fi
            echo "error: the extraction ended with status $status; its last lines above say why." >&2
        fi
        exit "$status"
    fi
    sleep "$wait"
done
echo "error: the run is not done after ${ATTEMPTS:-20} attempts; start this again to go on." >&2
exit "$preempted"
