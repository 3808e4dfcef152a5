"""What a pipeline folder says about itself in its JSON files.

Imports neither JAX nor NumPy, so that `sample.py` can refuse bad input at once.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from sana_jax.weights import setting_rules

EMBEDDED_MODEL = pathlib.Path(__file__).resolve().parent.parent / "assets" / "emoji_model"
# diffusers' pipelines whose folders hold the same parts; what one of them adds is an argument of the call here.
FAMILIES = {
    "SanaPipeline": "sana",
    "SanaPAGPipeline": "sana",
    "SanaControlNetPipeline": "sana",
    "SanaSprintPipeline": "sprint",
    "SanaSprintImg2ImgPipeline": "sprint",
}
CONTROLNET_CLASS = "SanaControlNetPipeline"
_OWN_FOLDERS = ("runs/", "pretrained/")  # of README and configs; no owners on the hub
_POINTER = b"version https://git-lfs"
_NAMES = {"sana": "SANA", "sprint": "SANA-Sprint"}
_SIZES = {  # what a picture's size is made of
    "sample_size": setting_rules.whole_number(1, 32),
    "patch_size": setting_rules.whole_number(1, 1),
    "encoder_block_out_channels": setting_rules.list_of(setting_rules.whole_number(1, 128), least=1),
    "height": setting_rules.SIDE,
    "width": setting_rules.SIDE,
}


def check_fetched(file: pathlib.Path) -> None:
    """Raises ValueError where a clone without Git LFS has left a few lines of text in the place of a large file."""
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{file} is the Git LFS pointer to a file, not the file. Run `git lfs pull` in {file.parent}."
            )


def read_json(file: pathlib.Path) -> dict:
    """A JSON object from a file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not JSON, or no object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__} where an object is expected.")
    return values


def pipeline_folder(path: str | pathlib.Path) -> pathlib.Path:
    """`path` itself where it is a pipeline folder, or the export inside it where it is a training run's folder.

    Raises:
      FileNotFoundError: it is neither.
      ValueError: it is a file.
    """
    folder = pathlib.Path(path)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; a model that draws is a folder.{hint([folder.name])}")
    if not folder.is_dir():
        raise FileNotFoundError(no_folder(path))
    for candidate in (folder, folder / "export"):
        if (candidate / "model_index.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"{folder} has no model_index.json (nor has {folder / 'export'}): it is neither a complete model in the "
        "diffusers layout nor a training run that has exported one. (A run of an autoencoder alone exports no model that draws; "
        f"--config.autoencoder_path takes it.){hint(found_files(folder))}"
    )


def no_folder(path: str | pathlib.Path) -> str:
    """What to say where a folder of that name is not there."""
    elsewhere = is_hub_id(path) and not str(path).startswith(_OWN_FOLDERS)
    fetch = f" To fetch it from the hub: hf download {path} --local-dir FOLDER." if elsewhere else ""
    return f"there is no folder {path}.{fetch}"


def found_files(folder: pathlib.Path) -> list[str]:
    """What `hint` looks at, of a folder."""
    return [
        str(file.relative_to(folder)) for pattern in ("*", "checkpoints/*", "export/*") for file in folder.glob(pattern)
    ]


def hint(names: Iterable[str]) -> str:
    """What files of these names are, where they are often taken for a model that draws; else nothing."""
    for name in names:
        if name.endswith(("pytorch_lora_weights.safetensors", "adapter_model.safetensors")):
            return (
                f" {name} is a LoRA, a change to another model: sample.py takes that model, and this with --lora; "
                "SanaPipeline.from_pretrained(lora=) and save_pretrained make one model of both."
            )
        if name.endswith(".pth"):
            return (
                f" {name} is a file of the original code, which `load_transformer` or `load_autoencoder` reads; to draw, take the "
                "model in the diffusers layout, on the hub the repository whose name ends in _diffusers."
            )
    return ""


def pipeline_family(path: str | pathlib.Path) -> str:
    """Either "sana" or "sprint", as model_index.json says.

    Raises:
      FileNotFoundError: no such folder, or no pipeline in it.
      ValueError: a pipeline that is neither.
    """
    file = pipeline_folder(path) / "model_index.json"
    name = read_json(file).get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{file} is of a {name}; implemented are {', '.join(FAMILIES)}.")
    return FAMILIES[name]


class PictureGeometry(NamedTuple):
    """What a model says about the sizes of its pictures.

    Attributes:
      height, width: default, in pixels: those of sana_jax.json, else the side the transformer was trained at.
      sample_size: that side in latents.
      downsample_factor: pixels per latent side.
      patch_size: latents per token side.
    """

    height: int
    width: int
    sample_size: int
    downsample_factor: int
    patch_size: int

    @property
    def multiple(self) -> int:
        """What both sides of a generated picture are multiples of."""
        return self.downsample_factor * self.patch_size


def picture_geometry(path: str | pathlib.Path) -> PictureGeometry:
    """Reads the sizes from a model folder's configuration files.

    Raises:
      FileNotFoundError: no such folder, or one of its configuration files is missing.
      ValueError: one of them is not readable, or a size in it is no size.
    """
    folder = pipeline_folder(path)

    def read(name: str) -> dict:
        values = read_json(folder / name)
        setting_rules.check(folder / name, values, _SIZES)
        return values

    transformer, autoencoder = read("transformer/config.json"), read("vae/config.json")
    own = read("sana_jax.json") if (folder / "sana_jax.json").is_file() else {}
    factor = 2 ** (len(autoencoder.get("encoder_block_out_channels", range(6))) - 1)
    sample_size = transformer.get("sample_size", 32)
    return PictureGeometry(
        height=own.get("height") or sample_size * factor,
        width=own.get("width") or sample_size * factor,
        sample_size=sample_size,
        downsample_factor=factor,
        patch_size=transformer.get("patch_size", 1),
    )


def is_hub_id(path: str | pathlib.Path) -> bool:
    """Whether `path` can only mean OWNER/NAME on the Hugging Face hub: two plain words, and no such place here."""
    words = str(path).split("/")
    return (
        len(words) == 2
        and all(word and not word.startswith(".") for word in words)
        and not pathlib.Path(words[0]).exists()
    )


def check_sides(height: int, width: int, multiple: int) -> None:
    """Raises a ValueError that names the side and the nearest sizes that would do."""
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % multiple:
            below = value // multiple * multiple
            fitting = f"{below} or {below + multiple}" if below > 0 else f"{multiple}"
            raise ValueError(f"{name} {value} is not a positive multiple of {multiple}; use {fitting}.")


def check_sampling(num_inference_steps: int, guidance_scale: float) -> None:
    """Raises a ValueError that names the first number that no sampler can use."""
    if num_inference_steps < 1:
        raise ValueError(f"steps {num_inference_steps}: at least 1 is needed; 20 is usual.")
    if not 0 <= guidance_scale < float("inf"):
        raise ValueError(f"guidance {guidance_scale} is not a number of at least 0; 1 is no guidance, 4.5 is usual.")


def check_pictures(num_images: int, seed: int) -> None:
    """Raises a ValueError for fewer than one picture, or a seed that no noise has."""
    if num_images < 1:
        raise ValueError(f"number of images {num_images}: at least 1 is needed.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is not in 0..{2**32 - 1}.")


def check_strength(strength: float | None, has_image: bool) -> float:
    """The strength of img2img, 0.6 where none is given.

    Raises:
      ValueError: it is not in (0, 1], or there is no picture for it.
    """
    if strength is None:
        return 0.6
    if not has_image:
        raise ValueError(f"strength {strength} is given and no image; strength says how far to go from an image.")
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength} is not above 0 and at most 1; 1 starts from pure noise, 0.6 is usual.")
    return strength


def has_controlnet(path: str | pathlib.Path) -> bool:
    """Whether a pipeline folder has a ControlNet of its own."""
    return read_json(pipeline_folder(path) / "model_index.json").get("_class_name") == CONTROLNET_CLASS


def check_control(has_controlnet: bool, has_image: bool, strength: float | None) -> None:
    """Raises a ValueError for a ControlNet without a picture, a picture without one, or a factor that is no number; None: 1."""
    if has_controlnet and not has_image:
        raise ValueError(
            "the model has a ControlNet and no control image is given; give one, or open it without (controlnet=False; sample.py "
            "--controlnet=none)."
        )
    if has_image and not has_controlnet:
        raise ValueError("a control image is given, and the model has no ControlNet; open it with one.")
    if strength is not None and not has_image:
        raise ValueError(f"ControlNet scale {strength} is given and no control image; it says how strongly one guides.")
    if strength is not None and not -float("inf") < strength < float("inf"):
        raise ValueError(f"ControlNet scale {strength} is not a finite number; 1 is usual.")


def check_family(family: str, solver: str | None, negative_prompts: list[str]) -> None:
    """Raises a ValueError for what the family has no use for."""
    if solver is not None and (solver == "scm") != (family == "sprint"):
        fitting = "scm" if family == "sprint" else "flow_dpm or flow_euler"
        raise ValueError(f"solver {solver} does not fit this {_NAMES[family]} model; use {fitting}.")
    given = next((text for text in negative_prompts if text), None)
    if family == "sprint" and given is not None:
        raise ValueError(
            f"negative prompt {given!r}: a SANA-Sprint model has its guidance built in and takes no negative prompt; "
            "leave it out."
        )


def check_prompts(prompts: list[str]) -> None:
    """Raises a ValueError for a missing or an empty prompt."""
    if not prompts:
        raise ValueError("no prompt is given.")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            where = f"prompt {index + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            raise ValueError(f"{where} is empty ({prompt!r}); say what the picture shows.")
