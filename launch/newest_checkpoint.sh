#!/usr/bin/env bash
# Prints the step of a run's newest checkpoint, or "none": launch/newest_checkpoint.sh WORKDIR
#
# Run in tests/unit/test_launch.py, 2026-11-30.
set -uo pipefail

newest=none
for folder in "$1"/checkpoints/*; do
    step=${folder##*/}
    if [[ $step =~ ^[0-9]+$ ]] && { [[ $newest == none ]] || ((step > newest)); }; then newest=$step; fi
done
echo "$newest"
