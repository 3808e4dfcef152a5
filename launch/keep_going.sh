#!/usr/bin/env bash
# train.py, started again where that may help: after an error that nobody foresaw (1), a checkpoint that could not be written
# (73), the loss of another process (76, or an abort) and a kill; but no more than 3 times in a row without a newer checkpoint.
#
#   launch/keep_going.sh --config=configs/emoji.py --workdir=runs/emoji
#
# For machines without a scheduler that does so; `tpu_vm.sh train` runs it on every worker. It ends with train.py's exit code.
#
# Run in tests/unit/test_launch.py with a train.py that only ends, 2026-11-30.
set -uo pipefail

workdir=
for flag in "$@"; do
    if [[ $flag == --workdir=* ]]; then workdir=${flag#*=}; fi
done
: "${workdir:?give --workdir=FOLDER, with =; whether to go on is told by what is in it}"

before=- times=0
while true; do
    .venv/bin/python train.py "$@"
    code=$?
    case "$code" in
    0 | 2 | 70 | 74 | 75 | 130 | 143) exit "$code" ;; # 143: SIGTERM before train.py could answer it
    esac
    newest=$("$(dirname "$0")/newest_checkpoint.sh" "$workdir")
    if [[ $newest != "$before" ]]; then times=0; fi
    if ((times == 3)); then
        echo "train.py ended with $code; not started again: newest checkpoint $newest after $times restarts"
        exit "$code"
    fi
    before=$newest times=$((times + 1))
    echo "train.py ended with $code, newest checkpoint $newest; started again"
done
