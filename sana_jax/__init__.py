"""SANA text-to-image in JAX. The public names; each is imported when it is first used."""

import importlib

_HOMES = {
    "SanaPipeline": "sana_jax.pipeline",
    **dict.fromkeys(
        (
            "load_transformer",
            "load_autoencoder",
            "load_text_encoder",
            "save_transformer",
            "save_autoencoder",
            "save_text_encoder",
        ),
        "sana_jax.weights.folder",
    ),
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
