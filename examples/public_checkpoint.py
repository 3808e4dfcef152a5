"""A model's folder in, a picture out, and the same folder back for diffusers.

    python examples/public_checkpoint.py --model=FOLDER_OR_HUB_ID --prompt="a red apple" --out=DIR

1. loads the folder and draws DIR/sana_jax.png;
2. exports the model to DIR/model, loads that again and draws the same picture;
3. where diffusers is installed, opens DIR/model there, draws DIR/diffusers.png from the same noise, and compares.

A ControlNet in the folder is left out. Without --model it runs on the small emoji model that comes with the package, in seconds
on a CPU.
"""

import argparse
import importlib.util
import pathlib
import sys
from unittest import mock

import jax
import numpy as np
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.diffusion.noise import initial_noise
from sana_jax.diffusion.trigflow import step_noise

TOLERANCE = 2  # of 255; float32 on both sides, rounding to 8 bits included


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0; 1 where a picture differs by more than TOLERANCE; 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder in the diffusers layout, or OWNER/NAME on the Hugging Face hub")
    parser.add_argument("--prompt", default="a red apple, noto style, on a blue background")
    parser.add_argument("--steps", type=int, help="solver steps (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("public_checkpoint"), help="folder to write")
    options = parser.parse_args(arguments)
    jax.config.update("jax_default_matmul_precision", "highest")  # GPUs and TPUs would multiply float32 in fewer bits
    try:
        worst = compare(options)
    except (ValueError, OSError) as error:
        print(f"public_checkpoint.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return int(worst > TOLERANCE)


def compare(options: argparse.Namespace) -> int:
    """Draws and writes everything; returns the largest difference of two pictures, of 255."""
    pipe = SanaPipeline.from_pretrained(options.model, controlnet=False)
    steps = pipe.defaults.num_inference_steps if options.steps is None else options.steps
    shape = pipe.latent_shape(pipe.default_height, pipe.default_width)
    noise = {"latents": np.asarray(initial_noise(options.seed, [0], shape))}
    if pipe.defaults.family == "sprint":
        noise["step_noise"] = np.asarray(step_noise(options.seed, [0], steps, shape))
    # Without binning, as the noise has the size of the picture.
    call = {"num_inference_steps": steps, "use_resolution_binning": False, **noise}
    picture = pipe(options.prompt, **call)[0]
    options.out.mkdir(parents=True, exist_ok=True)
    picture.save(options.out / "sana_jax.png")

    pipe.save_pretrained(options.out / "model")
    differences = {
        "export, loaded again": SanaPipeline.from_pretrained(options.out / "model")(options.prompt, **call)[0]
    }
    if not (importlib.util.find_spec("diffusers") and importlib.util.find_spec("torch")):
        print("diffusers is not installed; pip install torch diffusers transformers accelerate to compare with it.")
    elif pipe.defaults.pag_scale > 0 and pipe.transformer.config.qk_norm:
        print(
            "not compared with diffusers, whose PAG leaves out the norms of q and k that this model was trained with."
        )
    elif pipe.transformer.config.clamp_fp16:
        print("not compared with diffusers, which clips attention, as this model needs it, in float16 alone.")
    elif pipe.defaults.null_mask != "own" or not pipe.defaults.lower_case:
        print("not compared with diffusers, which cannot be told to mask or write texts as this model's sampling does.")
    elif pipe.defaults.solver_order == 3:
        print("not compared with diffusers, whose third order is another one.")
    else:
        theirs = draw_with_diffusers(options.out / "model", pipe, options.prompt, noise, steps)
        theirs.save(options.out / "diffusers.png")
        differences["export, in diffusers"] = theirs

    worst = 0
    for name, other in differences.items():
        difference = int(np.abs(np.asarray(picture, np.int16) - np.asarray(other, np.int16)).max())
        worst = max(worst, difference)
        print(f"{name}: largest difference {difference} of 255")
    return worst


def draw_with_diffusers(folder: pathlib.Path, pipe: SanaPipeline, prompt: str, noise: dict, steps: int) -> Image.Image:
    """The picture that diffusers draws from the same noise with the settings of `pipe`; model_index.json says how."""
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.schedulers import scheduling_scm
    from transformers import AutoModel

    # transformers' faster attention leaves out Gemma's soft-cap, with which the public models were trained.
    text_encoder = AutoModel.from_pretrained(
        folder / "text_encoder", attn_implementation="eager", dtype=torch.float32, local_files_only=True
    )
    theirs = DiffusionPipeline.from_pretrained(
        folder, text_encoder=text_encoder, torch_dtype=torch.float32, local_files_only=True
    )
    theirs.set_progress_bar_config(disable=True)
    defaults = pipe.defaults
    instruction = defaults.complex_human_instruction
    own = {}
    if defaults.family == "sprint":
        own["intermediate_timesteps"] = 1.3 if steps == 2 else None
    if defaults.pag_scale > 0:
        own |= {"pag_scale": defaults.pag_scale, "pag_adaptive_scale": defaults.pag_adaptive_scale}

    def to_torch(latents):
        return torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())

    # After its last step Sprint's scheduler draws too, and multiplies by 0.
    between = [*map(to_torch, noise.get("step_noise", ())), to_torch(0 * noise["latents"])]
    with mock.patch.object(scheduling_scm, "randn_tensor", lambda *args, **kwargs: between.pop(0)):
        return theirs(
            prompt,
            height=pipe.default_height,
            width=pipe.default_width,
            num_inference_steps=steps,
            guidance_scale=defaults.guidance_scale,
            latents=to_torch(noise["latents"]),
            use_resolution_binning=False,
            complex_human_instruction=list(instruction) if instruction else None,
            max_sequence_length=defaults.max_sequence_length,
            **own,
        ).images[0]


if __name__ == "__main__":
    sys.exit(main())
