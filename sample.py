"""Draws pictures for prompts: python sample.py --prompt="a red apple" [--model=FOLDER] --out=apple.png

Several pictures (--num_images, --prompts_file) make single files apple_000.png, apple_001.png, ... beside --out,
written batch by batch, and at the end a grid in --out. Every PNG carries its prompt, seed and settings as text; a grid
carries its prompts where they are a million characters at most.
"""

import argparse
import contextlib
import difflib
import functools
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from sana_jax import atomic
from sana_jax.arguments import prompt_lines, texts
from sana_jax.failures import too_little_memory
from sana_jax.sampling import aspect_buckets
from sana_jax.weights import model_index

# Of one device; they bound memory: one 1024x1024 picture at a time, or sixteen small ones.
PIXELS_PER_BATCH = 1024 * 1024
LARGEST_BATCH = 16


def main(argv: list[str]) -> int:
    """Exit code: 0; or, with one line on stderr, 2 for unusable input, 1 for too little memory, 130 after Ctrl-C."""
    try:
        arguments = parse(argv)
        prompts = read_prompts(arguments)
        height, width = check(arguments, prompts)
        image, control_image = (read_image(name, getattr(arguments, name)) for name in ("image", "control_image"))
        prepare_out(arguments)
        draw(arguments, prompts, height, width, image, control_image)
    except ModuleNotFoundError as error:
        print(
            f"sample.py: error: this Python has no {error.name}; `source .venv/bin/activate` where README's first command "
            "made that environment, or pip install -r requirements.txt",
            file=sys.stderr,
        )
        return 2
    except (ValueError, OSError) as error:
        line = " ".join(str(error).split())
        print(f"sample.py: error: {line}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # JAX's errors are such
        print(
            f"sample.py: error: {too_little_memory(error)}; smaller --height and --width, --dtype=bfloat16 or "
            "--quantization=int8 take less, and --mesh=seq=2 divides each picture between two devices.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("sample.py: interrupted", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises ValueError where argparse would print its usage."""
    parser = _Parser(prog="sample.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--prompt", help="what the picture shows")
    parser.add_argument("--prompts_file", help="text file with one prompt per line, in place of --prompt")
    parser.add_argument("--negative_prompt", default="", help="what to lead away from")
    parser.add_argument(
        "--model",
        help="model folder in the diffusers layout, a training run's folder, or OWNER/NAME on the Hugging Face hub "
        "(default: the emoji model that comes with the package)",
    )
    parser.add_argument("--revision", help="commit, tag or branch of a model on the hub (default: the newest)")
    parser.add_argument("--height", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--width", type=int, help="in pixels (default: the model's own)")
    parser.add_argument("--image", help="picture file to start from; resized to height x width")
    parser.add_argument(
        "--strength", type=float, help="how far to go from --image, above 0 and at most 1 (default: 0.6)"
    )
    parser.add_argument(
        "--steps", type=int, help="solver steps (default: the model's own, usually 20; 2 for SANA-Sprint)"
    )
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's own, usually 4.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--num_images", type=int, default=1, help="pictures per prompt (default: 1)")
    parser.add_argument("--solver", choices=("flow_dpm", "flow_euler", "scm"), help="(default: the model's own)")
    parser.add_argument(
        "--binning",
        action=argparse.BooleanOptionalAction,
        help="draw at the nearest of the sizes the model was trained on, then resize and crop to --height and --width "
        "(default: on for the public model sizes, off for others)",
    )
    parser.add_argument(
        "--mesh",
        type=mesh_axes,
        metavar="AXIS=N,...",
        help="devices of this process that share the work: data=8 draws 8 pictures at a time, seq=4 splits the rows "
        "of each picture, fsdp=4 pictures and parameters; data=2,seq=4 takes 8 devices, data=-1 all that there are "
        "(default: one device)",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    parser.add_argument(
        "--quantization",
        choices=("int8", "fp8"),
        help="the transformer's large products in eight bits, on top of --dtype (default: none)",
    )
    parser.add_argument(
        "--lora",
        help="change to the model's transformer as diffusers and PEFT write it: a .safetensors file, a folder with one, "
        "a training run's --workdir, or OWNER/NAME on the hub (default: none)",
    )
    parser.add_argument("--lora_scale", type=float, help="how strongly --lora changes it (default: 1)")
    parser.add_argument(
        "--controlnet",
        help="ControlNet of the model: a folder as diffusers writes it, a .pth file of the original code, or OWNER/NAME on the hub; "
        "none: not the one in the model's folder either (default: that, if any)",
    )
    parser.add_argument(
        "--control_image", help="picture file that guides the ControlNet: edges, depth, ..., resized to height x width"
    )
    parser.add_argument("--controlnet_scale", type=float, help="factor on what the ControlNet adds (default: 1)")
    parser.add_argument(
        "--controlnet_wiring",
        choices=("diffusers", "original"),
        help="how it is connected: as diffusers does, or as the public ControlNets were trained (default: the latter for a .pth "
        "file, else the former)",
    )
    parser.add_argument(
        "--executables",
        help="folder of compiled programs, by `python -m sana_jax.export executable` on this machine: calls that it has "
        "compile nothing, others do with a warning (default: none; what was compiled is cached all the same)",
    )
    parser.add_argument("--out", default="sample.png", help="PNG file to write (default: sample.png)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where a run with the same flags was ended: pictures whose files are there are not drawn again, and "
        "one that was drawn with another prompt, seed or setting is an error before anything is drawn (default: all "
        "are drawn, and files of those names replaced)",
    )
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(
            _unknown_flag(unknown[0], [flag for action in parser._actions for flag in action.option_strings])
        )
    return arguments


def mesh_axes(text: str) -> dict[str, int]:
    """Sizes by axis of --mesh; {"data": 1, "seq": 4} of "seq=4"."""
    axes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in ("data", "fsdp", "seq") or name in axes or not size.removeprefix("-").isdecimal():
            raise argparse.ArgumentTypeError(
                f"{text!r} is no mesh: give sizes of data, fsdp or seq, each once, as data=2,seq=4."
            )
        axes[name] = int(size)
    return {"data": 1} | axes


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of --prompt or of the non-blank lines of --prompts_file."""
    if (arguments.prompt is None) == (arguments.prompts_file is None):
        raise ValueError('give either --prompt="..." or --prompts_file=FILE.')
    if arguments.prompt is not None:
        return texts("--prompt", arguments.prompt)
    return prompt_lines("--prompts_file", arguments.prompts_file)


def check(arguments: argparse.Namespace, prompts: list[str]) -> tuple[int, int]:
    """Refuses what cannot be drawn, from the command line and the model's JSON files alone; returns height and width."""
    model_index.check_prompts(prompts)
    texts("--negative_prompt", arguments.negative_prompt)
    steps = 1 if arguments.steps is None else arguments.steps
    guidance = 1.0 if arguments.guidance is None else arguments.guidance
    model_index.check_sampling(steps, guidance)
    model_index.check_pictures(arguments.num_images, arguments.seed)
    model_index.check_strength(arguments.strength, arguments.image is not None)
    for name in ("image", "control_image"):
        file = getattr(arguments, name)
        if file is not None and not pathlib.Path(file).is_file():
            raise ValueError(f"--{name}={file} is not a file.")
    if arguments.lora_scale is not None and (arguments.lora is None or not math.isfinite(arguments.lora_scale)):
        raise ValueError(f"--lora_scale={arguments.lora_scale} needs --lora=FILE, and is a finite number.")
    if arguments.lora is not None and not model_index.is_hub_id(arguments.lora):
        from sana_jax.weights.lora import open_lora

        open_lora(arguments.lora)
    if arguments.executables is not None and not pathlib.Path(arguments.executables).is_dir():
        raise ValueError(f"--executables={arguments.executables} is not a folder.")
    out = pathlib.Path(arguments.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out={out} does not end in .png; pictures are written as PNG, with their settings inside.")
    if out.is_dir():
        raise ValueError(f"--out={out} is a folder; give a file name that ends in .png.")
    if arguments.model == "":
        raise ValueError("--model= names no model; leave it out for the one that comes with the package.")
    folder = arguments.model or model_index.EMBEDDED_MODEL
    if model_index.is_hub_id(folder):
        from sana_jax.weights import hub

        folder, _ = hub.download_configs(folder, arguments.revision)
    model_index.check_family(model_index.pipeline_family(folder), arguments.solver, [arguments.negative_prompt])
    own = arguments.controlnet is None and model_index.has_controlnet(folder)
    has_controlnet = own or arguments.controlnet not in (None, "none")
    model_index.check_control(has_controlnet, arguments.control_image is not None, arguments.controlnet_scale)
    model = model_index.picture_geometry(folder)
    height = model.height if arguments.height is None else arguments.height
    width = model.width if arguments.width is None else arguments.width
    binning = aspect_buckets.check_binning(arguments.binning, model.sample_size, model.downsample_factor)
    sizes = {"sample_size": model.sample_size, "multiple": model.multiple}
    aspect_buckets.generated_size(height, width, binning=binning, **sizes)
    return height, width


def read_image(name: str, path: str | None):
    """The picture of a flag, turned as its EXIF orientation says; None without one."""
    if path is None:
        return None
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"--{name}={path} is not a picture that can be read: {error}") from None


def prepare_out(arguments: argparse.Namespace) -> None:
    """Makes the folder of --out, and refuses one that cannot be written to before anything is drawn."""
    try:
        atomic.prepare_file(pathlib.Path(arguments.out))
    except OSError as error:
        raise ValueError(
            f"--out={arguments.out} cannot be written ({error}); give a file in a folder that you may write to."
        ) from None


def draw(
    arguments: argparse.Namespace, prompts: list[str], height: int, width: int, image=None, control_image=None
) -> None:
    """Loads the model, draws in batches of one size, writes the files and names them on stdout."""
    with _clock("starting"):
        import jax

        _keep_compiled_programs(jax)
        from sana_jax.diffusion.noise import initial_noise
        from sana_jax.diffusion.solvers import start_step
        from sana_jax.diffusion.trigflow import step_noise
        from sana_jax.pipeline import SanaPipeline
        from sana_jax.sampling import picture_files

        lora_file, lora_scale = _find_lora(arguments.lora), arguments.lora_scale
        lora_scale = 1.0 if lora_scale is None else lora_scale
        mesh = None if arguments.mesh is None else _open_mesh(jax, arguments.mesh)
        pipe = SanaPipeline.from_pretrained(
            arguments.model,
            revision=arguments.revision,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
            lora=lora_file,
            lora_scale=lora_scale,
            controlnet=False if arguments.controlnet == "none" else arguments.controlnet,
            controlnet_wiring=arguments.controlnet_wiring,
            mesh=mesh,
            executables=arguments.executables,
            background=True,
        )
    steps = pipe.defaults.num_inference_steps if arguments.steps is None else arguments.steps
    guidance = pipe.defaults.guidance_scale if arguments.guidance is None else arguments.guidance
    solver = arguments.solver or pipe.defaults.solver

    strength = model_index.check_strength(arguments.strength, image is not None)
    left_out = 0 if image is None else start_step(steps, strength)
    binning = pipe.resolution_binning(arguments.binning)
    generated = pipe.generated_size(height, width, binning)

    settings = {
        "negative_prompt": arguments.negative_prompt,
        "model": arguments.model or "embedded",
        "height": height,
        "width": width,
        "binning": binning,
        "steps": steps,
        "guidance": guidance,
        "solver": solver,
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
    }
    if arguments.revision is not None:
        settings |= {"revision": arguments.revision}
    if arguments.lora is not None:
        settings |= {
            "lora": arguments.lora,
            "lora_digest": picture_files.file_digest(lora_file),
            "lora_scale": lora_scale,
        }
    if image is not None:
        settings |= {
            "image": arguments.image,
            "image_digest": picture_files.file_digest(arguments.image),
            "strength": strength,
        }
    controlled = {}
    if control_image is not None:
        scale = 1.0 if arguments.controlnet_scale is None else arguments.controlnet_scale
        controlled = {"control_image": control_image, "controlnet_conditioning_scale": scale}
        settings |= {
            "controlnet": arguments.controlnet or "the model's own",
            "controlnet_wiring": pipe.controlnet.config.wiring,
            "control_image": arguments.control_image,
            "control_image_digest": picture_files.file_digest(arguments.control_image),
            "controlnet_scale": scale,
        }

    jobs = [prompt for prompt in prompts for _ in range(arguments.num_images)]
    files = picture_files.numbered(pathlib.Path(arguments.out), len(jobs))
    identities = [{"prompt": prompt, "seed": arguments.seed, "index": index} for index, prompt in enumerate(jobs)]
    there = picture_files.already_drawn(files, identities, settings) if arguments.resume else set()
    if there:
        print(f"{len(there)} of {len(jobs)} pictures are there and are not drawn again", file=sys.stderr)
    # Of the whole list also where some are there: each is drawn beside the same others, which fixes its last bits.
    batch = batch_size(len(jobs), math.prod(generated), {} if mesh is None else mesh.shape)

    def pictures() -> Iterator:
        included = ", weights included" if arguments.executables else ", weights and compiling included"
        for first in range(0, len(jobs), batch):
            last = min(first + batch, len(jobs))
            if there.issuperset(range(first, last)):
                yield from map(picture_files.read, files[first:last])
                continue
            # The last batch is filled up, so that all are of the size that is already compiled.
            numbers = [min(number, len(jobs) - 1) for number in range(first, first + batch)]
            shape = pipe.latent_shape(*generated)
            noise = {"latents": initial_noise(arguments.seed, numbers, shape)}
            if pipe.defaults.family == "sprint":
                noise["step_noise"] = step_noise(arguments.seed, numbers, steps, shape)
            with _clock(f"drawing {last} of {len(jobs)} ({steps - left_out} steps{included})"):
                drawn = pipe(
                    [jobs[number] for number in numbers],
                    negative_prompt=arguments.negative_prompt,
                    height=height,
                    width=width,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    solver=solver,
                    use_resolution_binning=binning,
                    image=image,
                    strength=arguments.strength,
                    **controlled,
                    **noise,
                )
            included = ""
            yield from drawn[: last - first]

    write(arguments, identities, settings, pictures(), there, waiting=batch)


def _find_lora(path: str | None) -> pathlib.Path | None:
    """The file that --lora means, fetched if it is on the hub."""
    if path is None:
        return None
    from sana_jax.weights import hub, lora

    return lora.find_file(hub.download_lora(path) if model_index.is_hub_id(path) else path)


def batch_size(jobs: int, pixels: int, mesh: Mapping[str, int]) -> int:
    """Pictures of one call, as many for each device: the list divided evenly among the fewest calls memory allows."""
    devices = mesh.get("data", 1) * mesh.get("fsdp", 1)
    allowed = min(LARGEST_BATCH, max(1, PIXELS_PER_BATCH * mesh.get("seq", 1) // pixels))
    calls = math.ceil(jobs / (allowed * devices))
    return math.ceil(jobs / (calls * devices)) * devices


def write(
    arguments: argparse.Namespace,
    identities: Sequence[dict],
    settings: dict,
    pictures: Iterable,
    there: Set[int],
    waiting: int,
) -> None:
    """One picture: --out. Several: numbered files beside it as the pictures come, then a grid of them in --out.

    They are encoded and written while the next are drawn. What was drawn is written also where drawing the next fails.

    Args:
      arguments: the command line.
      identities: prompt, seed and index of each picture.
      settings: what every file says it was drawn with.
      pictures: one for each identity, all of one size; none is kept once it is written.
      there: numbers of those whose files are there and stay.
      waiting: pictures that may wait for the thread.
    """
    from sana_jax.sampling import picture_files

    out, count, grid = pathlib.Path(arguments.out), len(identities), None
    files = picture_files.numbered(out, count)
    with picture_files.Writer(waiting, written=functools.partial(print, flush=True)) as writer:
        for index, (picture, identity) in enumerate(zip(pictures, identities, strict=True)):
            if count > 1:
                if grid is None:
                    grid = picture_files.Grid(count, arguments.num_images, picture.size)
                grid.put(index, picture)
            if index not in there:
                writer.save(picture, files[index], identity, settings)
    if grid is None:
        return
    if grid.reduction > 1:
        limit = f"a grid has at most {picture_files.LARGEST_GRID // 10**6} million pixels"
        print(f"{out} shows the pictures at 1/{grid.reduction} of their height and width: {limit}", file=sys.stderr)
    prompts = "\n".join(identity["prompt"] for identity in identities)
    described = {"prompt": prompts} if len(prompts) <= picture_files.LONGEST_TEXT else {}
    picture_files.save(grid.image, out, described | {"seed": arguments.seed}, settings)
    print(out, flush=True)


def _open_mesh(jax, axes: dict[str, int]):
    from sana_jax.parallel.mesh import make_mesh

    count = math.prod(axes.values())
    return make_mesh(**axes, devices=jax.devices()[:count] if count > 0 else None)


def _keep_compiled_programs(jax) -> None:
    """Programs are compiled once per machine: a cache in the user's cache folder, unless JAX was given one."""
    if jax.config.jax_compilation_cache_dir is None:
        caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(caches) / "sana_jax" / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextlib.contextmanager
def _clock(what: str):
    """Says on stderr what goes on and how long it took; on a terminal, with running seconds."""
    start, done, live = time.monotonic(), threading.Event(), sys.stderr.isatty()

    def tick():
        while not done.wait(0.5):
            print(f"\r{what}: {time.monotonic() - start:.0f} s ", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    if live:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if live:
            thread.join()
            print("\r\033[K", end="", file=sys.stderr)
    print(f"{what}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def _unknown_flag(flag: str, known: list[str]) -> str:
    if not flag.startswith("-"):
        return f'{flag!r} is not a flag; put texts with spaces in quotes, as in --prompt="a red apple".'
    name = flag.split("=")[0]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"unknown flag {name}" + (f"; the nearest is {near[0]}." if near else f"; there are {', '.join(known)}.")


class _Parser(argparse.ArgumentParser):
    """argparse that raises its complaints."""

    def error(self, message: str):
        raise ValueError(message)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
