"""A model's folder in, a picture out, and the same folder back for diffusers.

    python examples/public_checkpoint.py --model=FOLDER_OR_HUB_ID --prompt="a red apple" --out=DIR

1. loads the folder and draws DIR/sana_jax.png;
2. exports the model to DIR/model, loads that again and draws the same picture;
3. where diffusers is installed, opens DIR/model there, draws DIR/diffusers.png from the same noise, and compares.

Without --model it runs on the small emoji model that comes with the package, in seconds on a CPU.
"""

import argparse
import importlib.util
import pathlib
import sys

import numpy as np
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.pipeline import initial_noise

TOLERANCE = 2  # of 255; float32 on both sides, rounding to 8 bits included


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, or 1 where a picture differs by more than TOLERANCE."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder in the diffusers layout, or OWNER/NAME on the Hugging Face hub")
    parser.add_argument("--prompt", default="a red apple, noto style, on a blue background")
    parser.add_argument("--steps", type=int, help="solver steps (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("public_checkpoint"), help="folder to write")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    pipe = SanaPipeline.from_pretrained(options.model)
    height, width = pipe.default_height, pipe.default_width
    noise = np.asarray(initial_noise(options.seed, [0], pipe.latent_shape(height, width)))
    steps = options.steps or pipe.defaults.num_inference_steps
    picture = pipe(options.prompt, latents=noise, num_inference_steps=steps)[0]
    picture.save(options.out / "sana_jax.png")

    pipe.save_pretrained(options.out / "model")
    again = SanaPipeline.from_pretrained(options.out / "model")
    differences = {"export, loaded again": again(options.prompt, latents=noise, num_inference_steps=steps)[0]}
    if importlib.util.find_spec("diffusers") and importlib.util.find_spec("torch"):
        theirs = draw_with_diffusers(options.out / "model", pipe, options.prompt, noise, steps)
        theirs.save(options.out / "diffusers.png")
        differences["export, in diffusers"] = theirs
    else:
        print("diffusers is not installed; pip install torch diffusers transformers accelerate to compare with it.")

    worst = 0
    for name, other in differences.items():
        difference = int(np.abs(np.asarray(picture, np.int16) - np.asarray(other, np.int16)).max())
        worst = max(worst, difference)
        print(f"{name}: largest difference {difference} of 255")
    print(f"wrote {options.out}")
    return int(worst > TOLERANCE)


def draw_with_diffusers(folder: pathlib.Path, pipe: SanaPipeline, prompt: str, noise, steps: int) -> Image.Image:
    """The picture that diffusers draws from the same noise with the settings of `pipe`."""
    import torch
    from diffusers import SanaPipeline as TheirPipeline
    from transformers import AutoModel

    # transformers' faster attention leaves out Gemma's soft-cap, with which the public models were trained.
    text_encoder = AutoModel.from_pretrained(
        folder / "text_encoder", attn_implementation="eager", dtype=torch.float32, local_files_only=True
    )
    theirs = TheirPipeline.from_pretrained(
        folder, text_encoder=text_encoder, torch_dtype=torch.float32, local_files_only=True
    )
    theirs.set_progress_bar_config(disable=True)
    instruction = pipe.defaults.complex_human_instruction
    return theirs(
        prompt,
        height=pipe.default_height,
        width=pipe.default_width,
        num_inference_steps=steps,
        guidance_scale=pipe.defaults.guidance_scale,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        use_resolution_binning=False,
        complex_human_instruction=list(instruction) if instruction else None,
        max_sequence_length=pipe.defaults.max_sequence_length,
    ).images[0]


if __name__ == "__main__":
    sys.exit(main())
