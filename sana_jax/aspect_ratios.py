"""The aspect ratios of the published models, and the size of a picture of each: what they were trained on and what they draw.

Imports neither JAX nor NumPy.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Bucket(NamedTuple):
    """Pictures of about one aspect ratio, which are all brought to one size.

    Attributes:
      ratio: height / width, as it is labelled.
      height, width: in pixels.
    """

    ratio: float
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width


# (ratio H / W, height, width) of the 1024 models; the others' are this times 1/2, 2 and 4. The ratio is the published label of
# two digits and not height / width: requests are compared with the label.
BUCKETS_1024 = tuple(Bucket(*each) for each in (
    (0.25, 512, 2048), (0.26, 512, 1984), (0.27, 512, 1920), (0.28, 512, 1856), (0.32, 576, 1792), (0.33, 576, 1728),
    (0.35, 576, 1664), (0.4, 640, 1600), (0.42, 640, 1536), (0.48, 704, 1472), (0.5, 704, 1408), (0.52, 704, 1344),
    (0.57, 768, 1344), (0.6, 768, 1280), (0.68, 832, 1216), (0.72, 832, 1152), (0.78, 896, 1152), (0.82, 896, 1088),
    (0.88, 960, 1088), (0.94, 960, 1024), (1.0, 1024, 1024), (1.07, 1024, 960), (1.13, 1088, 960), (1.21, 1088, 896),
    (1.29, 1152, 896), (1.38, 1152, 832), (1.46, 1216, 832), (1.67, 1280, 768), (1.75, 1344, 768), (2.0, 1408, 704),
    (2.09, 1472, 704), (2.4, 1536, 640), (2.5, 1600, 640), (2.89, 1664, 576), (3.0, 1728, 576), (3.11, 1792, 576),
    (3.62, 1856, 512), (3.75, 1920, 512), (3.88, 1984, 512), (4.0, 2048, 512),
))  # fmt: skip


def nearest(ratio: float, labels: Iterable[float]) -> float:
    """The label nearest to height / width of a picture; of two as near, the first."""
    return min(labels, key=lambda label: abs(label - ratio))


def buckets_of(ratios: Iterable[float], image_size: int) -> tuple[Bucket, ...]:
    """The buckets with these labels, from wide to tall, each with about image_size^2 pixels.

    Their sides are those of the 1024 models times image_size / 1024.

    Raises:
      ValueError: there is no such label, or its sides are no whole pixels at this size.
    """
    ratios = set(ratios)
    for ratio in ratios:
        if not isinstance(ratio, int | float):
            raise ValueError(
                f"aspect_ratios has {ratio!r}, which is no number. Use ratios height / width, as (0.57, 1.0, 1.75)."
            )
    if not ratios:
        raise ValueError("aspect_ratios=() leaves no picture. Use (1.0,) for squares.")
    table, found = {bucket.ratio: bucket for bucket in BUCKETS_1024}, []
    for ratio in sorted(ratios):
        if ratio not in table:
            near = sorted(table, key=lambda label: abs(label - ratio))[:2]
            raise ValueError(
                f"aspect_ratios has {ratio}, which is none of the published ratios height / width. The nearest are "
                f"{' and '.join(map(str, sorted(near)))}; all are in sana_jax/aspect_ratios.py."
            )
        height, width = (side * image_size for side in table[ratio].size)
        if height % 1024 or width % 1024:
            raise ValueError(
                f"aspect_ratios has {ratio}, which at image_size={image_size} is {height / 1024:g}x{width / 1024:g} pixels. Use "
                "ratios or a size that give whole ones; 1.0 always does."
            )
        found.append(Bucket(ratio, height // 1024, width // 1024))
    return tuple(found)
