"""The device mesh: axes `data` (replicas), `fsdp` (parameter shards) and `seq` (tokens of one picture)."""

import math

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "seq")


def make_mesh(data: int = -1, fsdp: int = 1, seq: int = 1, *, devices=None) -> Mesh:
    """Arranges the devices as data x fsdp x seq.

    On several TPU slices, which only the slower data-centre network joins, `data` goes over the slices and the other axes
    stay within one: gradients are all that crosses. GPUs are taken node by node: `fsdp` and `seq` stay within a node where
    they fit, and span nodes where they do not, which is logged.

    Args:
      data: replicas of the model; -1 takes what the other axes leave over.
      fsdp: devices over which every large parameter is split.
      seq: devices over which the tokens of one picture are split.
      devices: which devices; all by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or the TPU slices do not divide `data`.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    for name, size in (("fsdp", fsdp), ("seq", seq)):
        if size < 1:
            raise ValueError(f"mesh.{name}={size}: an axis has at least one device; only mesh.data may be -1.")
    if data == -1:
        if count % (fsdp * seq):
            raise ValueError(
                f"mesh.fsdp={fsdp} times mesh.seq={seq} does not divide the {count} devices. "
                f"Use mesh.fsdp={math.gcd(fsdp, count)}, mesh.seq=1."
            )
        data = count // (fsdp * seq)
    if data * fsdp * seq != count:
        raise ValueError(
            f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.seq={seq} need {data * fsdp * seq} devices, there are {count}. "
            f"Use mesh.data=-1 to take what is there."
        )
    on_tpu = devices[0].platform == "tpu"
    grid = _arrange_tpus(devices, data, fsdp, seq) if on_tpu else _arrange_nodes(devices, data, fsdp, seq)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange_tpus(devices: list, data: int, fsdp: int, seq: int) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # A physical axis may be split: jax.make_mesh, which allows that on v5e alone, has no 32 x 8 on a v6e of 16 x 16.
    if slices == 1:
        return mesh_utils.create_device_mesh((data, fsdp, seq), devices, allow_split_physical_axes=True)
    if data % slices:
        raise ValueError(
            f"mesh.data={data} is not a multiple of the {slices} slices, so that fsdp or seq would cross the data-centre "
            f"network. Use mesh.data={slices * max(1, data // slices)} and a smaller mesh.fsdp or mesh.seq."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, seq), (slices, 1, 1), devices=devices, allow_split_physical_axes=True
    )


def _arrange_nodes(devices: list, data: int, fsdp: int, seq: int) -> np.ndarray:
    def node(device):  # XLA calls all GPUs of one machine a slice, whichever processes drive them; CPUs have none
        return getattr(device, "slice_index", device.process_index)

    ordered = sorted(devices, key=lambda device: (node(device), device.process_index, device.id))
    grid = np.array(ordered, dtype=object).reshape(data, fsdp, seq)
    spanned = max(len({node(device) for device in replica.flat}) for replica in grid)
    if spanned > 1:
        logging.info(
            "mesh.fsdp=%d times mesh.seq=%d span %d nodes: parameters and tokens cross the network between them",
            fsdp,
            seq,
            spanned,
        )
    return grid


def check_batch(batch_size: int, mesh: Mesh, accumulate_steps: int = 1) -> None:
    """Raises ValueError where the global batch cannot be split evenly over `data` and `fsdp`, and that over the parts of
    a step with accumulated gradients."""
    if accumulate_steps < 1:
        raise ValueError(
            f"train.accumulate_steps={accumulate_steps} must be at least 1, which is the whole batch at once."
        )
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    ways = devices * accumulate_steps
    if batch_size % ways:
        parts = f" times train.accumulate_steps={accumulate_steps}" if accumulate_steps > 1 else ""
        raise ValueError(
            f"data.batch_size={batch_size} is not a multiple of mesh.data * mesh.fsdp = {devices}{parts}, over which a batch "
            f"is split. Use data.batch_size={max(1, round(batch_size / ways)) * ways}."
        )
