"""Which of the sizes that the public models draw serves a requested one.

Imports neither JAX nor NumPy, so that `sample.py` can check at once.
"""

from sana_jax.aspect_ratios import BUCKETS_1024, nearest
from sana_jax.weights.model_index import check_sides

# diffusers has these in the tables for 2048 and 4096 only.
_NOT_BELOW_2048 = {0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88}

DOWNSAMPLE_FACTOR = 32  # of the autoencoder all public models share
SAMPLE_SIZES = (16, 32, 64, 128)  # latent sides of the models that have a table: 512, 1024, 2048 and 4096 pixels


def buckets(sample_size: int) -> dict[float, tuple[int, int]]:
    """Aspect ratio H / W -> (height, width) in pixels, ascending, for a model trained on sample_size x sample_size latents.

    Raises:
      ValueError: no public model has this sample_size.
    """
    if sample_size not in SAMPLE_SIZES:
        raise ValueError(f"sample_size={sample_size} has no table of aspect ratios; {SAMPLE_SIZES} have.")
    return {
        ratio: (height * sample_size // 32, width * sample_size // 32)
        for ratio, height, width in BUCKETS_1024
        if sample_size >= 64 or ratio not in _NOT_BELOW_2048
    }


def has_buckets(sample_size: int, downsample_factor: int) -> bool:
    """Whether a model is of the public sizes, so that resolution binning is on unless the call says otherwise."""
    return sample_size in SAMPLE_SIZES and downsample_factor == DOWNSAMPLE_FACTOR


def nearest_bucket(height: int, width: int, sample_size: int) -> tuple[int, int]:
    """(height, width) of the bucket whose ratio is nearest to the request's; of two as near, the wider one.

    Raises:
      ValueError: no public model has this sample_size.
    """
    table = buckets(sample_size)
    return table[nearest(height / width, table)]


def check_binning(use_resolution_binning: bool | None, sample_size: int, downsample_factor: int) -> bool:
    """Whether to draw at a bucket's size: as asked, and where nothing is asked, for the models that have a table.

    Raises:
      ValueError: it is asked for with a model that has no table.
    """
    possible = has_buckets(sample_size, downsample_factor)
    if use_resolution_binning and not possible:
        raise ValueError(
            f"resolution binning needs a model with sample_size {', '.join(map(str, SAMPLE_SIZES))} and an autoencoder of "
            f"factor {DOWNSAMPLE_FACTOR}; this one has sample_size {sample_size} and factor {downsample_factor}. Switch "
            "binning off and give sizes that the factor divides."
        )
    return possible if use_resolution_binning is None else use_resolution_binning


def generated_size(height: int, width: int, *, binning: bool, sample_size: int, multiple: int) -> tuple[int, int]:
    """The size to draw for a requested one: its nearest bucket with `binning`, else itself.

    Args:
      height, width: requested, in pixels.
      binning: what `check_binning` returned.
      sample_size: of the model.
      multiple: what both sides must be multiples of without binning.

    Raises:
      ValueError: a side is below 1 or, without binning, no multiple of `multiple`; names the nearest that would do.
    """
    if not binning:
        check_sides(height, width, multiple)
        return height, width
    for name, value in (("height", height), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} {value}: at least 1 pixel is needed.")
    return nearest_bucket(height, width, sample_size)
