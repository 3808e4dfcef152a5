"""The sampler as StableHLO for any number of pictures, in a folder that draws without sana_jax.

FOLDER/sampler.stablehlo    weights, token ids, noise, guidance scale -> pixels; as `jax.export` writes it
       weights.safetensors  the parameters, by their paths
       tokenizer.json       of the prompts
       settings.json        sizes and prompt settings; what the folder was made of
       draw.py              reads the others and draws: a script of its own
       requirements.txt     its packages
"""

import functools
import importlib.util
import json
import pathlib
import shutil
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import traverse_util

from sana_jax import atomic
from sana_jax.diffusion.guidance import perturbed_attention
from sana_jax.models import layers
from sana_jax.pipeline import SanaPipeline
from sana_jax.prompts import tokenize_prompts
from sana_jax.sampling.plan import plan_fit, plan_sampling
from sana_jax.sampling.program import Features, Fit, Inputs, Sampling, Text, draw, encode_text, fit

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_PROGRAM = "sampler.stablehlo"
_REQUIREMENTS = "jax>={jax}\nflatbuffers\nsafetensors\ntokenizers\npillow\n"


def check_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    """The platforms; raises ValueError for one that there is not, ModuleNotFoundError where a package is missing."""
    unknown = [platform for platform in platforms if platform not in PLATFORMS]
    if unknown or not platforms:
        raise ValueError(f"platforms={','.join(platforms)!r}: there are {', '.join(PLATFORMS)}.")
    if importlib.util.find_spec("flatbuffers") is None:
        raise ModuleNotFoundError("jax.export writes its files with flatbuffers: pip install -e '.[export]'.")
    return tuple(platforms)


def check_output(output: str | pathlib.Path) -> None:
    """Raises ValueError where the folder to be written would take the place of something else."""
    folder = pathlib.Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and an exported sampler is a folder; give another path.")
    if not folder.is_dir() or (folder / _PROGRAM).is_file():
        return
    if foreign := sorted(item.name for item in folder.iterdir()):
        raise ValueError(
            f"{folder} holds {', '.join(foreign[:3])} and no exported sampler ({_PROGRAM}); give a new or an empty folder, or one "
            "with a sampler to replace."
        )


def check_quantization(kind: str | None) -> None:
    """Raises ValueError for weights that the folder's script could not read."""
    if kind == "fp8":
        raise ValueError(
            "quantization='fp8': the file of weights cannot be read without this package; use 'int8' or None."
        )


def write(
    output: str | pathlib.Path,
    pipe: SanaPipeline,
    *,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> list[pathlib.Path]:
    """Writes the folder, whole or not at all; returns its files.

    Args:
      output: the folder to make; it takes the place of a sampler that is there.
      pipe: the model, on one device.
      height, width: in pixels, fixed in the program. None: the model's own.
      num_inference_steps: fixed too. None: the model's own.
      guidance_scale: above 1: the program has a second branch, and takes any scale. None: the model's own.
      platforms: that the program can run on.

    Raises:
      ValueError: an argument that cannot be used, a pipeline over several devices, in fp8 or with a ControlNet, or a folder of
        something else.
      ModuleNotFoundError: flatbuffers is not installed.
    """
    platforms = check_platforms(platforms)
    check_output(output)
    floats = {str(x.dtype) for x in jax.tree.leaves(pipe.params["transformer"])}
    check_quantization("fp8" if any("float8" in name for name in floats) else None)
    if pipe.mesh is not None:
        raise ValueError(f"the pipeline is split over {dict(pipe.mesh.shape)}; open it without a mesh to export it.")
    if pipe.controlnet is not None:
        raise ValueError(
            "the exported program takes no picture for a ControlNet; open the model with controlnet=False."
        )
    defaults = pipe.defaults
    guidance = defaults.guidance_scale if guidance_scale is None else guidance_scale
    size = height or pipe.default_height, width or pipe.default_width
    generated = pipe.generated_size(*size)
    sampling = plan_sampling(
        pipe.modules,
        defaults,
        size=size,
        generated=generated,
        guidance_scale=guidance,
        num_inference_steps=num_inference_steps,
    )
    prompt, null = _tokens(pipe, defaults.complex_human_instruction), _tokens(pipe, None)
    settings = {
        "prefix": "\n".join(defaults.complex_human_instruction or ()),
        "lower_case": defaults.lower_case,
        "prompt_length": prompt,
        "null_length": null if sampling.guided else None,
        "latents": list(pipe.latent_shape(*generated)),
        "steps": sampling.num_steps,
        "step_noise": defaults.family == "sprint",
        "guidance_scale": float(guidance),
        "height": size[0],
        "width": size[1],
        "made with": f"sana_jax, JAX {jax.__version__}",
    }
    stacked = {name: layers.stack(pipe.params[name]) for name in ("transformer", "text_encoder")}
    params = pipe.params | stacked  # the program has one layer in place of all
    exported = jax.export.export(jax.jit(_program(pipe, sampling, plan_fit(size, generated))), platforms=platforms)(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params), _shapes(settings)
    )
    with atomic.new_folder(pathlib.Path(output)) as folder:
        _write_files(folder, pipe.tokenizer, params, exported.serialize(), settings)
    return sorted(pathlib.Path(output).iterdir())


def _tokens(pipe: SanaPipeline, instruction: Sequence[str] | None) -> int:
    """How many tokens a prompt is padded to."""
    defaults = pipe.defaults
    ids, _ = tokenize_prompts(pipe.tokenizer, [""], instruction, defaults.max_sequence_length, defaults.lower_case)
    return ids.shape[1]


def _program(pipe: SanaPipeline, sampling: Sampling, fitting: Fit | None):
    defaults, modules = pipe.defaults, pipe.modules
    pag = functools.partial(
        perturbed_attention,
        defaults.pag_scale,
        defaults.pag_adaptive_scale,
        defaults.pag_layers,
        pipe.transformer.config.num_layers,
    )

    def program(params: dict, inputs: dict) -> jax.Array:
        """Pixels in 0..1; plain dicts, so that the file names no class of ours."""
        null = None
        if sampling.guided:
            ids, mask = inputs["null_ids"], inputs["null_mask"]
            null = Features(encode_text(modules, params["text_encoder"], ids, mask), mask)
        text = Text(inputs["ids"], inputs["mask"], None)
        whole = Inputs(
            text=text,
            null=null,
            noise=inputs["noise"],
            guidance_scale=inputs["guidance_scale"],
            interval=None,
            pag=pag(),
            image=None,
            step_noise=inputs.get("step_noise"),
        )
        drawn = draw(modules, params, whole, sampling=sampling).result
        return drawn if fitting is None else fit(modules, drawn, sampling=fitting)

    return program


def _shapes(settings: dict) -> dict:
    (batch,) = jax.export.symbolic_shape("b")
    tokens = jax.ShapeDtypeStruct((batch, settings["prompt_length"]), jnp.int32)
    shapes = {
        "ids": tokens,
        "mask": tokens,
        "noise": jax.ShapeDtypeStruct((batch, *settings["latents"]), jnp.float32),
        "guidance_scale": jax.ShapeDtypeStruct((), jnp.float32),
    }
    if settings["null_length"] is not None:
        null = jax.ShapeDtypeStruct((1, settings["null_length"]), jnp.int32)
        shapes |= {"null_ids": null, "null_mask": null}
    if settings["step_noise"]:
        shape = (settings["steps"] - 1, batch, *settings["latents"])
        shapes["step_noise"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return shapes


def _write_files(folder: pathlib.Path, tokenizer, params: dict, program: bytearray, settings: dict) -> None:
    from safetensors.flax import save_file

    (folder / _PROGRAM).write_bytes(program)
    weights = folder / "weights.safetensors"
    save_file(traverse_util.flatten_dict(params, sep="/"), str(weights))
    weights.chmod((folder / _PROGRAM).stat().st_mode)  # the library's own is for the owner's eyes alone
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    shutil.copy(pathlib.Path(__file__).with_name("draw.py"), folder)
    (folder / "requirements.txt").write_text(_REQUIREMENTS.format(jax=jax.__version__))
