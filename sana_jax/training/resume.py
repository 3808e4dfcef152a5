"""What a run goes on from must be what it was: the record that a checkpoint carries, and what is compared with it."""

import functools
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
from collections.abc import Sequence

from absl import logging
from ml_collections import ConfigDict

from sana_jax.checkpoint import checksums
from sana_jax.data import picture_set
from sana_jax.data.picture_set import PictureSet
from sana_jax.parallel import multihost
from sana_jax.parallel.sharding import MODELS

# Fields that may differ between the run that saved and the run that resumes: they change neither the model nor the
# sequence of updates. Everything else must agree.
FREE_FIELDS = (
    "mesh.",
    "data.path",  # what is there is compared in place of the paths: `check_same_data`, `check_same_frozen`
    "autoencoder_path",
    "text_encoder.path",
    "distillation.teacher",
    "data.cache_mb",
    "data.threads",
    "data.prefetch",
    "train.num_steps",  # listed by `contradictions` where a learning-rate decay depends on it
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.export_dtype",
    "train.accumulate_steps",
    "train.skip_nonfinite",
    "train.profile_steps",
    "train.cache_folder",
    "train.compilation_cache",
    "sample.",
    "init_from",
    "init_adapts",
    "init_blocks",
    "controlnet.init_from",
    "optimizer.convert_state",  # lets the two forms of one optimizer's state differ
)


# Fields that checkpoints of older sources do not know -> what those did.
NEWER_FIELDS = {"data.aspect_ratios": [1.0], "lora.rank": 0, "controlnet.num_layers": 0}


# Parts that do not train -> the fields that name them.
_NAMED_BY = {
    "transformer": "init_from",
    "teacher": "distillation.teacher",
    "autoencoder": "autoencoder_path",
    "text_encoder": "text_encoder.path",
    "perceptual": "perceptual",
}


def digests(frozen: dict) -> dict[str, str]:
    """For each part that does not train, a digest of its weights: the same on every mesh."""
    weights = {name: arrays for name, arrays in frozen.items() if name in MODELS}  # others are computed, and so rounded
    return {
        name: hashlib.sha256(json.dumps(checksums(arrays)).encode()).hexdigest()[:16]
        for name, arrays in weights.items()
    }


def make_record(config: ConfigDict, step: int, mesh, **trained_on) -> dict:
    """What a checkpoint says of itself, JSON-able. Batch number `step` is the next to train on.

    Args:
      trained_on: what `describe_data` gives; "frozen", `digests`.
    """
    return {
        "config": plain(config),
        "data_position": step,
        "mesh": dict(mesh.shape),
        "versions": versions(),
    } | trained_on


@functools.cache
def versions() -> dict[str, str | None]:
    """Of what decides a run's numbers: jax, jaxlib, sana_jax, and the commit where sana_jax is a checkout of git."""
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        commit = git.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "sana_jax")} | {"commit": commit}


def plain(value):
    """A config as dicts, lists and scalars, as JSON gives it back."""
    if isinstance(value, ConfigDict | dict):
        return {str(name): plain(value[name]) for name in value}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def contradictions(saved: dict, config: ConfigDict) -> list[str]:
    """Lines "field: saved -> now" for every field in which a config contradicts a checkpoint's.

    Fields in FREE_FIELDS may differ; the number of steps only under a constant learning rate, because a decay to
    its end is another sequence of updates. A field that the checkpoint does not know is newer than it, and contradicts it only
    where its default is not what was done before (NEWER_FIELDS).
    """

    def flatten(tree, prefix=""):
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    new = dict(flatten(plain(config)))
    old = {name: value for name, value in NEWER_FIELDS.items() if name in new} | dict(flatten(saved))
    free = FREE_FIELDS
    if new.get("optimizer.schedule") != "constant":
        free = tuple(name for name in free if name != "train.num_steps")
    if new.get("optimizer.convert_state") and is_other_form(old.get("optimizer.name", ""), new["optimizer.name"]):
        free = (*free, "optimizer.name")
    return [
        f"{name}: {value!r} -> {new.get(name, '(absent)')!r}"
        for name, value in sorted(old.items())
        if (name not in new or new[name] != value) and not name.startswith(free)
    ]


def is_other_form(name: str, other: str) -> bool:
    """Whether two optimizers differ in the form of their state alone: float32 and eight bits."""
    return name != other and name.removesuffix("8bit") == other.removesuffix("8bit")


def check_resumable(saved: dict, config: ConfigDict, mesh, workdir: str) -> None:
    """Raises ValueError with the fields in which `config` contradicts the record of a checkpoint in `workdir`.

    Logs what else differs: it changes the rounding, so that the run is not bit for bit what it would have been.
    """
    lines = contradictions(saved["config"], config)
    if lines:
        before, now = saved["config"].get("optimizer", {}).get("name", ""), config.optimizer.name
        keep = ""
        if is_other_form(before, now):
            keep = f", or turn the optimizer's state of {before} into that of {now} with --config.optimizer.convert_state=True"
        anew = "or start a new run with another --workdir"
        if saved["config"].get("controlnet", {}).get("num_layers"):
            anew += f", from its weights with --config.controlnet.init_from={workdir}"
        elif not saved["config"].get("lora", {}).get("rank"):
            anew = f"or start a new run from its weights with another --workdir and --config.init_from={workdir}"
        raise ValueError(
            f"{workdir} holds a checkpoint of another config. Restore these fields{keep}, {anew}:\n  "
            + "\n  ".join(lines)
        )
    then = {"mesh": saved["mesh"]} | saved["versions"]
    facts = {"mesh": dict(mesh.shape)} | versions()
    differing = [f"{name} {then.get(name)} -> {value}" for name, value in facts.items() if then.get(name) != value]
    if differing:
        logging.info("going on with other rounding than before: %s", ", ".join(differing))


def check_same_frozen(saved: dict | None, frozen: dict[str, str]) -> None:
    """Raises ValueError where weights that do not train are not those that the checkpoint was trained with."""
    before = (saved or {}).get("frozen", frozen)  # checkpoints of older sources do not say
    changed = [name for name in frozen if before.get(name) != frozen[name]]
    if changed:
        raise ValueError(
            f"the weights of {' and '.join(changed)} are not those that the run was trained with so far, wherever they lie. "
            f"Restore them ({', '.join(f'config.{_NAMED_BY[name]}' for name in changed)}), or start a new run with another --workdir"
            f"{'' if 'transformer' in frozen else ', from the trained weights (config.init_from)'}."
        )


def describe_data(pictures: Sequence[PictureSet]) -> dict:
    """What a checkpoint says of the set, in parts by size, that it was trained on."""
    return {
        "pictures": sum(len(each) for each in pictures),
        "pictures_digest": picture_set.digest(pictures),
        "captions_digest": picture_set.digest(pictures, "header_checksum"),
    } | (
        {}
        if pictures[0].control is None
        else {"control_digest": picture_set.digest([each.control for each in pictures])}
    )


def check_same_data(saved: dict | None, pictures: Sequence[PictureSet]) -> None:
    """Raises ValueError where a set, in parts by size, is not that of the first process, or of the checkpoint.

    The order of the pictures is a function of their number: with one of them gone, all batches would be others.
    """
    own, so_far = describe_data(pictures), saved or {}
    numbers = [value if isinstance(value, int) else int(value[:7], 16) for value in own.values()]  # that fit an int32
    first = multihost.from_first(numbers)
    differing = {
        ("the first process", "has", first[0]): [
            name for name, number, other in zip(own, numbers, first, strict=True) if number != other
        ],
        # Checkpoints of older sources do not say all of it.
        ("the run so far", "was trained on", so_far.get("pictures")): [
            name for name, value in own.items() if so_far.get(name, value) != value
        ],
    }
    path, skipped = pictures[0].path, pictures[0].skipped
    for (who, verb, count), names in differing.items():
        if not names:
            continue
        if "pictures" in names:
            unreadable = "".join(f"\n  {line}" for line in skipped) or " none"
            raise ValueError(
                f"{path} has {own['pictures']:,} usable pictures, {who} has {count:,}, so that the batches would be others. "
                f"Restore the set, or start a new run from the weights. Unreadable now:{unreadable}"
            )
        what = "as many pictures as" if "pictures_digest" in names else "the pictures that"
        other = "and not the same" if "pictures_digest" in names else "with other captions or keys"
        if names == ["control_digest"]:
            other = "guided by others"
        raise ValueError(
            f"{path} has {what} {who} {verb}, {other}. Restore the set, or start a new run from the weights."
        )
