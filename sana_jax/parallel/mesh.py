"""The device mesh: axes `data` (replicas), `fsdp` (parameter shards) and `seq` (tokens of one picture)."""

import math

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "seq")


def make_mesh(data: int = -1, fsdp: int = 1, seq: int = 1, *, devices=None) -> Mesh:
    """Arranges the devices as data x fsdp x seq.

    Args:
      data: replicas of the model; -1 takes what the other axes leave over.
      fsdp: devices over which every large parameter is split.
      seq: devices over which the tokens of one picture are split; stays within one host, because each host
        reads pictures of its own.
      devices: which devices; all by default.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `seq` crosses hosts.
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
    local = sum(device.process_index == devices[0].process_index for device in devices)
    if local % seq:
        raise ValueError(
            f"mesh.seq={seq} does not divide the {local} devices of a host, so that two hosts would have to read the "
            f"same picture. Use mesh.seq={math.gcd(seq, local)}."
        )
    return jax.make_mesh((data, fsdp, seq), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError where the global batch cannot be split evenly over the `data` and `fsdp` axes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise ValueError(
            f"data.batch_size={batch_size} is not a multiple of mesh.data * mesh.fsdp = {ways}, over which a batch is "
            f"split. Use data.batch_size={max(1, round(batch_size / ways)) * ways}."
        )
