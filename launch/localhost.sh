#!/usr/bin/env bash
# Several processes on one machine, each with CPU devices of its own, joined by gloo: what a pod does, in small.
#
#   launch/localhost.sh PROCESSES --config=configs/emoji.py --workdir=runs/try [--config.FIELD=VALUE ...]
#   DEVICES=4 launch/localhost.sh 2 ...        two processes with four devices each, a mesh of eight
#
# SIGTERM to this script goes to every process; they save and end with 75. The exit code is the first that is not 0.
# Run in November 2026: 2 processes x 1 and x 2 devices, JAX 0.10.2, and by tests/distributed/test_localhost.py.
set -uo pipefail
cd "$(dirname "$0")/.."

if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
    echo "launch/localhost.sh: the first argument is the number of processes, e.g. 2; then come the flags of train.py" >&2
    exit 2
fi
processes=$1
shift
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}"

running=()
trap 'kill -TERM "${running[@]}" 2>/dev/null' TERM INT
for ((number = 0; number < processes; number++)); do
    python train.py "$@" --config.mesh.multihost=True --config.mesh.coordinator="127.0.0.1:$port" \
        --config.mesh.num_processes="$processes" --config.mesh.process_id="$number" 2> >(sed -u "s/^/[$number] /" >&2) &
    running+=($!)
done

code=0
for process in "${running[@]}"; do
    wait "$process"
    ended=$?
    while kill -0 "$process" 2>/dev/null; do # the wait was cut short by a signal that has been passed on
        wait "$process"
        ended=$?
    done
    if ((code == 0)); then code=$ended; fi
done
exit "$code"
