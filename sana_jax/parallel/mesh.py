"""The device mesh: axes `data` (replicas), `fsdp` (parameter shards) and `seq` (tokens of one picture)."""

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "seq")


def make_mesh(data: int = -1, fsdp: int = 1, seq: int = 1, *, devices=None) -> Mesh:
    """Arranges the devices as data x fsdp x seq.

    On several TPU slices, which only the slower data-centre network joins, `data` goes over the slices and the other axes
    stay within one: gradients are all that crosses.

    Args:
      data: replicas of the model; -1 takes what the other axes leave over.
      fsdp: devices over which every large parameter is split.
      seq: devices over which the tokens of one picture are split.
      devices: which devices; all by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or the slices do not divide `data`.
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
    types, slices = (AxisType.Auto,) * len(AXES), len({getattr(device, "slice_index", 0) for device in devices})
    # A physical axis may be split: jax.make_mesh, which allows that on v5e alone, has no 32 x 8 on a v6e of 16 x 16.
    if slices == 1:
        grid = mesh_utils.create_device_mesh((data, fsdp, seq), devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)
    if data % slices:
        raise ValueError(
            f"mesh.data={data} is not a multiple of the {slices} slices, so that fsdp or seq would cross the data-centre "
            f"network. Use mesh.data={slices * max(1, data // slices)} and a smaller mesh.fsdp or mesh.seq."
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, seq), (slices, 1, 1), devices=devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=types)


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
