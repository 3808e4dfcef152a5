#!/usr/bin/env bash
# A slice of Cloud TPU VMs through gcloud: every command runs on all of its workers.
#
#   export TPU_NAME=sana ZONE=us-east5-a ACCELERATOR_TYPE=v5p-128 RUNTIME_VERSION=v2-alpha-tpuv5
#   launch/tpu_vm.sh create
#   launch/tpu_vm.sh setup                     this commit, Python 3.12, JAX with libtpu
#   launch/tpu_vm.sh train --config=configs/sana_1600m_1024.py --workdir=/mnt/shared/sana_1600m_1024 \
#       --config.autoencoder_path=/mnt/shared/pretrained/sana --config.text_encoder.path=/mnt/shared/pretrained/sana \
#       --config.init_from=/mnt/shared/pretrained/sana --config.data.path=/mnt/shared/pictures
#                                              starts again by itself what ends for a reason that may pass (keep_going.sh)
#   launch/tpu_vm.sh logs                      of the first worker, which writes metrics and pictures
#   launch/tpu_vm.sh stop                      SIGTERM: saves, then ends; `train` again goes on
#   launch/tpu_vm.sh delete
#
# Fill in
#   RUNTIME_VERSION
#                tpu-ubuntu2204-base (v4), v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e); tpu7x is not
#                offered this way, see gke_jobset.yaml
#   --workdir    a folder that all workers share (Filestore or other NFS, mounted by you)
#   config.autoencoder_path, config.text_encoder.path
#                the folder of `hf download Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers --local-dir FOLDER`
#   config.init_from
#                the same folder fine-tunes the public weights, a run's folder goes on from its size; without it the transformer
#                starts from random weights
#   config.data.path
#                the folder of `python -m sana_jax.data build folder --input PICTURES --output FOLDER`
#
# `setup` brings the repository alone: these folders are shared too, or copied to the same place on every worker. JAX finds
# coordinator and process numbers in the metadata server.
#
# Not run: no TPU was at hand. Checked: `bash -n`; the gcloud commands against docs.cloud.google.com/tpu/docs/jax-pods; the
# discovery against jax/_src/clusters/cloud_tpu_cluster.py of JAX 0.10.2.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${TPU_NAME:?is the name of the slice}" "${ZONE:?e.g. us-east5-a}"
tpu() { gcloud compute tpus tpu-vm "$1" "$TPU_NAME" --zone="$ZONE" "${@:2}"; }
everywhere() { tpu ssh --worker=all --command="$1"; }

command=${1:-}
if [[ $# -gt 0 ]]; then shift; fi
case "$command" in
create)
    : "${ACCELERATOR_TYPE:?e.g. v5p-128}" "${RUNTIME_VERSION:?e.g. v2-alpha-tpuv5}"
    tpu create --accelerator-type="$ACCELERATOR_TYPE" --version="$RUNTIME_VERSION" "$@"
    ;;
setup)
    archive=$(mktemp --suffix=.tar.gz)
    git archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:sana_jax.tar.gz" --zone="$ZONE" --worker=all
    rm "$archive"
    # The images' own Python is 3.10.
    # Modules that an earlier commit had and this one has not would still be imported.
    everywhere 'set -e; mkdir -p sana_jax && cd sana_jax && rm -rf sana_jax kernels && tar -xzf ../sana_jax.tar.gz
        curl -LsSf https://astral.sh/uv/install.sh | sh
        ~/.local/bin/uv venv --allow-existing --python 3.12 .venv
        ~/.local/bin/uv pip install --python .venv/bin/python -r requirements.txt "jax[tpu]"'
    ;;
train)
    printf -v flags '%q ' "$@"
    # In a session of its own, so that a lost connection does not end it, and alone in the background: a list there would hold
    # the connection's output until training ends.
    everywhere "cd sana_jax || exit; setsid nohup launch/keep_going.sh $flags --config.mesh.multihost=True </dev/null >>train.log 2>&1 &"
    ;;
logs) tpu ssh --worker=0 --command='tail -n 100 -f sana_jax/train.log' ;;
stop) everywhere 'pkill -TERM -f "^.venv/bin/python train.py"' ;;
delete) tpu delete "$@" ;;
*)
    echo "launch/tpu_vm.sh: ${command:-no command} is not one of create, setup, train, logs, stop, delete" >&2
    exit 2
    ;;
esac
