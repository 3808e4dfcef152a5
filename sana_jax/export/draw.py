"""Draws pictures with the model in this script's folder: python draw.py --prompt="a red apple" --out=apple.png

`python -m sana_jax.export stablehlo` made the folder; it needs the packages of requirements.txt and no other code. Several
prompts (--prompt=... --prompt=...) are drawn together and written as apple_000.png, apple_001.png, ...
"""

import argparse
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from PIL import Image
from safetensors.flax import load_file
from tokenizers import Tokenizer

FOLDER = pathlib.Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompt", action="append", required=True, help="what a picture shows; may be repeated")
    parser.add_argument("--negative_prompt", default="", help="what to lead away from")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--out", type=pathlib.Path, default="sample.png", help="PNG file (default: sample.png)")
    options = parser.parse_args()
    settings = json.loads((FOLDER / "settings.json").read_text())
    if options.negative_prompt and settings["null_length"] is None:
        parser.error("--negative_prompt: this program was exported without guidance.")
    if options.guidance is not None and settings["null_length"] is None and not settings["step_noise"]:
        parser.error("--guidance: this program was exported without it.")
    if options.out.is_dir() or not os.access(options.out.parent, os.W_OK):
        parser.error(f"--out={options.out} cannot be written; give a file in a folder that you may write to.")
    if options.out.suffix.lower() not in Image.registered_extensions():
        parser.error(f"--out={options.out} has no ending of a picture file; give it .png.")
    pixels = draw(settings, options.prompt, options.negative_prompt, options.guidance, options.seed)
    pictures = [Image.fromarray(picture) for picture in np.rint(np.asarray(pixels) * 255).astype(np.uint8)]
    out, digits = options.out, max(3, len(str(len(pictures) - 1)))
    for index, picture in enumerate(pictures):
        file = out if len(pictures) == 1 else out.with_name(f"{out.stem}_{index:0{digits}d}{out.suffix}")
        picture.save(file)
        print(file)
    return 0


def draw(settings: dict, prompts: list[str], negative_prompt: str, guidance: float | None, seed: int) -> jax.Array:
    """Pixels [prompts, height, width, 3] in 0..1."""
    sampler = jax.jit(export.deserialize((FOLDER / "sampler.stablehlo").read_bytes()).call)
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    ids, mask = tokenize(settings, tokenizer, prompts, settings["prefix"], settings["prompt_length"])
    inputs = {
        "ids": ids,
        "mask": mask,
        "noise": noise(seed, len(prompts), settings["latents"]),
        "guidance_scale": jnp.float32(settings["guidance_scale"] if guidance is None else guidance),
    }
    if settings["null_length"] is not None:
        null = tokenize(settings, tokenizer, [negative_prompt], "", settings["null_length"])
        inputs["null_ids"], inputs["null_mask"] = null
    if settings["step_noise"]:
        inputs["step_noise"] = step_noise(seed, len(prompts), settings["steps"], settings["latents"])
    return sampler(nested(load_file(str(FOLDER / "weights.safetensors"))), inputs)


def tokenize(settings: dict, tokenizer: Tokenizer, texts: list[str], prefix: str, length: int):
    """Ids and mask [texts, length] of prefix and text, padded on the right."""
    ids = np.full((len(texts), length), tokenizer.token_to_id("<pad>"), np.int32)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        text = text.lower() if settings["lower_case"] else text
        kept = tokenizer.encode(prefix + text.strip()).ids[:length]
        ids[row, : len(kept)], mask[row, : len(kept)] = kept, 1
    return ids, mask


def noise(seed: int, count: int, shape: list[int]) -> jax.Array:
    """That of sana_jax: picture i has noise of its own, whichever are drawn beside it."""
    keys = [jax.random.fold_in(jax.random.key(seed), index) for index in range(count)]
    return jnp.stack([jax.random.normal(key, shape) for key in keys])


def step_noise(seed: int, count: int, steps: int, shape: list[int]) -> jax.Array:
    """SANA-Sprint's noise after each step but the last; keys of steps are numbered down from the largest number."""

    def one(step: int, index: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), np.uint32(2**32 - 1 - step))
        return jax.random.normal(jax.random.fold_in(key, index), shape)

    return jnp.asarray([[one(step, index) for index in range(count)] for step in range(steps - 1)]).reshape(
        steps - 1, count, *shape
    )


def nested(flat: dict) -> dict:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[name] = leaf
    return tree


if __name__ == "__main__":
    sys.exit(main())
