"""DC-AE over several devices: the rows of a picture split over the mesh axis `seq`.

Every convolution takes the one or two rows it needs from its neighbours (collective-permute), and every attention adds up
its states, a [heads, d, d + 1] array per picture (all-reduce); no device ever holds a whole picture's activations.
tests/distributed reads that from the compiled program. Said by hand, because with XLA's partitioner the TPU compiler counts
40.7 GB a chip for 4096x4096 over four chips, and 9.0 so (benchmarks/decode_memory.py).
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
from einops import rearrange
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.placement import gathered, over_batch, picture_devices

# Encoding with sana-1.1 takes 3 GB for a float32 picture of 1024x1024 and 16 GB for four at once (XLA's TPU compiler).
PIXELS_AT_ONCE = 2**20


def apply_autoencoder(
    autoencoder: Autoencoder, params: dict, x: Float[Array, "B H W C"], method: str
) -> Float[Array, "B h w D"]:
    """`autoencoder.encode` or `.decode` within a program, rows split over `seq` where the mesh in force has it.

    Pictures stay with the partitioner, as in `parallel.transformer.apply_transformer`, so that any number of them will do.

    Raises:
      ValueError: `seq` does not divide the rows of the latents.
    """
    devices = _seq_devices()
    if devices == 1:
        return autoencoder.apply({"params": params}, x, method=method)
    _check_rows(devices, x.shape[1] // (autoencoder.config.downsample_factor if method == "encode" else 1))
    rows = P(None, "seq")
    on_rows = functools.partial(dataclasses.replace(autoencoder, seq_axis="seq").apply, method=method)
    split = jax.shard_map(on_rows, axis_names={"seq"}, in_specs=(P(), rows), out_specs=rows, check_vma=False)
    return split({"params": params}, x)


def apply_in_parts(
    autoencoder: Autoencoder, params: dict, x: Float[Array, "B H W C"], method: str
) -> Float[Array, "B h w D"]:
    """`apply_autoencoder` of some pictures after the other, so that a device has PIXELS_AT_ONCE pixels at a time.

    Weights are gathered once for all parts. A single picture is never cut (`models.autoencoder_strips` does that).

    Raises:
      ValueError: as `apply_autoencoder`.
    """
    weights = jax.tree.map(gathered, params)

    def apply(part):
        return apply_autoencoder(autoencoder, weights, over_batch(part), method)

    return in_parts(apply, x, _parts(autoencoder, *x.shape[:3], method) if isinstance(x.shape[0], int) else 1)


def in_parts(
    function: Callable[[Float[Array, "n H W C"]], Float[Array, "n h w D"]], x: Float[Array, "B H W C"], parts: int
) -> Float[Array, "B h w D"]:
    """`function` of so many parts of the pictures, one after the other.

    Part i is a device's own pictures i, i + parts, ..., so that none moves. The loop reads them without an axis of channels.
    XLA's TPU compiler has been seen to make that the last one and pad it from 3 to 128: 8.6 GB for sixteen pictures of
    1024x1024, in place of 0.2.
    """
    if parts == 1:
        return function(x)

    def apply(planes):
        return function(rearrange(planes, "n (h c) w -> n h w c", c=x.shape[-1]))

    y = jax.lax.map(apply, rearrange(x, "(n parts) h w c -> parts n (h c) w", parts=parts))
    return rearrange(y, "parts n h w c -> (n parts) h w c")


def _parts(autoencoder: Autoencoder, batch: int, height: int, width: int, method: str) -> int:
    devices = picture_devices()
    own = (
        batch // devices if batch % devices == 0 else batch
    )  # devices that do not divide the pictures have all of them
    scale = autoencoder.config.downsample_factor if method == "decode" else 1
    pixels = height * width * scale**2 // _seq_devices()
    return next(n for n in range(1, own + 1) if own % n == 0 and (own // n * pixels <= PIXELS_AT_ONCE or n == own))


def _seq_devices() -> int:
    return dict(jax.sharding.get_abstract_mesh().shape).get("seq", 1)


def _check_rows(seq: int, rows: int) -> None:
    if rows % seq:
        fits = max(d for d in range(1, seq + 1) if rows % d == 0)
        raise ValueError(f"mesh.seq={seq} does not divide the {rows} rows of latents. Use mesh.seq={fits}.")
