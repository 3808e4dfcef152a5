"""The pictures of a call: that img2img starts from, and that guides a ControlNet."""

from collections.abc import Sequence

import numpy as np
from absl import logging
from jaxtyping import Array, Float
from PIL import Image

from sana_jax.bit_depth import to_eight_bits
from sana_jax.diffusion.solvers import start_step

StartImage = Image.Image | Sequence[Image.Image] | np.ndarray | Array


def prepare_image(name: str, image: StartImage, height: int, width: int, prompts: int) -> Float[np.ndarray, "P H W 3"]:
    """One picture, or one for each prompt, as the autoencoder takes them: float32 in -1..1.

    Pillow pictures are laid on white where they are transparent, and resized to the size of the call (Lanczos, without
    regard to proportions, as diffusers does). Arrays must have that size already.

    Args:
      name: of the argument, for errors.
      image: one picture or a sequence of them; or a float array [H, W, 3] or [P, H, W, 3] in 0..1.
      height, width: of the call, in pixels.
      prompts: how many there are.

    Raises:
      ValueError: neither of these, another size or range, or another number of pictures than 1 or `prompts`.
    """
    if isinstance(image, Image.Image):
        image = [image]
    if isinstance(image, (list, tuple)) and image and all(isinstance(one, Image.Image) for one in image):
        values = np.stack([_resized(name, one, height, width) for one in image])
    else:
        values = _checked_array(name, image, height, width)
    if len(values) not in (1, prompts):
        raise ValueError(f"{name} is {len(values)} pictures for {prompts} prompts: give one for all, or one for each.")
    return values * np.float32(2) - np.float32(1)


def first_step(num_steps: int, strength: float) -> int:
    """`start_step`, with a warning where a strength below 1 still starts from pure noise."""
    start = start_step(num_steps, strength)
    if start == 0 and strength < 1:
        usable = (num_steps - 1) / num_steps
        fix = f"use a strength of at most {usable:.3g}, or more steps" if num_steps > 1 else "use more steps"
        logging.warning(
            "strength %s of %d steps leaves no step out, so that the image is drowned in noise; %s.",
            strength,
            num_steps,
            fix,
        )
    return start


def _resized(name: str, picture: Image.Image, height: int, width: int) -> Float[np.ndarray, "H W 3"]:
    try:
        picture = to_eight_bits(picture)
    except ValueError as error:
        raise ValueError(f"{name} {error}.") from None
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.float32) / np.float32(255)


def _checked_array(name: str, image, height: int, width: int) -> Float[np.ndarray, "P H W 3"]:
    values = np.asarray(image)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(
            f"{name} is of the type {type(image).__name__} ({values.dtype}); give a Pillow picture, or a float array "
            "[height, width, 3] in 0..1."
        )
    values = values[None] if values.ndim == 3 else values
    if values.ndim != 4 or values.shape[1:] != (height, width, 3):
        raise ValueError(
            f"{name} has the shape {np.shape(image)}; this call needs {(height, width, 3)} or several of these (NHWC). "
            "Pillow pictures are resized."
        )
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"{name} has values in {values.min():g}..{values.max():g}; they must lie in 0..1.")
    return values.astype(np.float32)
