"""Which back end of a kernel runs: the one that is asked for, or on each platform the best that can work on the arrays.

The platform that a program is compiled for is not known while it is traced; only whether this process has GPUs is.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from types import ModuleType

import jax
from jax import lax
from sana_jax.kernels.derivatives import in_forward_mode

Choice = str | tuple[tuple[str, str], ...]  # a back end, or pairs of platform and back end; hashable

# Platform -> the back end that is best on it. XLA's is the one for all others, and where the best refuses.
_BEST = {"cpu": "xla_wide", "tpu": "pallas_tpu", "cuda": "pallas_gpu"}


def choose(
    package: str, names: Sequence[str], asked: str | None, *arrays, only_asked: Sequence[str] = (), **options
) -> Choice:
    """The choice among back ends, which are modules of a package.

    Args:
      package: its name.
      names: of the back ends. One that cannot work on all arrays has a function `refusal`, which says why or gives None.
      asked: one of them, or None.
      arrays, options: what `refusal` is given; arrays, or trees of them.
      only_asked: back ends that are only taken where they are asked for: slower on these arrays, or timed by nobody yet.

    Raises:
      ValueError: there is no such back end, or it cannot work on these arrays.
    """
    if asked not in (None, *names):
        raise ValueError(f"implementation={asked!r} is unknown; use None, {', '.join(names)}.")
    if asked is not None:
        if refusal := _refusal(package, asked, *arrays, **options):
            raise ValueError(f"implementation={asked!r} cannot run: {refusal}. Use 'xla', or None.")
        return asked
    best = {platform: name for platform, name in _BEST.items() if name in names and name not in only_asked}
    if not _may_have_gpu():
        best.pop("cuda", None)
    fits = [(platform, name) for platform, name in best.items() if not _refusal(package, name, *arrays, **options)]
    # Without a GPU nobody says whether it will be a Hopper.
    return tuple((platform, name) for platform, name in fits if platform != "cuda" or has_gpu())


def run(package: str, choice: Choice, function: str | Callable, *arrays, **options):
    """What a function of the chosen back end gives: one that the back end has by this name, or one that is given the back end."""

    def form(name: str) -> Callable:
        back_end = _module(package, name)
        call = getattr(back_end, function) if isinstance(function, str) else functools.partial(function, back_end)
        return functools.partial(call, **options)

    if isinstance(choice, str):
        return form(choice)(*arrays)
    return lax.platform_dependent(*arrays, **{platform: form(name) for platform, name in choice}, default=form("xla"))


def has_gpu() -> bool:
    """Whether this process has one. Where JAX has no plugin for GPUs, no device is woken for the answer."""
    return _may_have_gpu() and jax.default_backend() == "gpu"


@functools.cache
def _may_have_gpu() -> bool:
    """Whether JAX has a plugin for GPUs; without one nothing for them is imported, which takes a quarter of a second."""
    return any(
        "cuda" in each.name or "rocm" in each.name for each in importlib.metadata.entry_points(group="jax_plugins")
    )


def _refusal(package: str, name: str, *arrays, **options) -> str | None:
    if in_forward_mode() and name.startswith("pallas"):
        return "it has no derivative in forward mode"
    back_end = _module(package, name)
    return back_end.refusal(*arrays, **options) if hasattr(back_end, "refusal") else None


def _module(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")
