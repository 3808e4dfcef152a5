"""Perturbed attention guidance in a public folder: what model_index.json of a `SanaPAGPipeline` says."""

import re
from collections.abc import Mapping, Sequence

CLASS_NAME = "SanaPAGPipeline"
SCALE = 3.0  # diffusers' pag_scale for that class; an ordinary SanaPipeline has none
LAYERS = "transformer_blocks.0"  # its pag_applied_layers


def defaults_from_index(index: Mapping, num_layers: int) -> dict:
    """The fields `pag_scale` and `pag_layers` of the sampling defaults; empty for other classes.

    diffusers names layers by regular expressions that are searched for in the modules' names. So are they here, which
    keeps its pictures and its pitfall: "transformer_blocks.1" also means 10 to 19.

    Raises:
      ValueError: an entry of pag_applied_layers is no regular expression or finds no block.
    """
    if index.get("_class_name") != CLASS_NAME:
        return {}
    patterns = index.get("pag_applied_layers", LAYERS)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Sequence) or not patterns:
        raise ValueError(
            f"pag_applied_layers is {patterns!r}; it is a name of blocks, as {LAYERS!r}, or a list of them."
        )
    layers = set()
    for pattern in patterns:
        try:
            found = {i for i in range(num_layers) if re.search(pattern, f"transformer_blocks.{i}.attn1")}
        except (re.error, TypeError) as error:
            raise ValueError(f"pag_applied_layers has {pattern!r}, which is no regular expression: {error}.") from error
        if not found:
            raise ValueError(
                f"pag_applied_layers has {pattern!r}, which names none of the blocks transformer_blocks.0 to "
                f"transformer_blocks.{num_layers - 1}."
            )
        layers |= found
    return {"pag_scale": SCALE, "pag_layers": tuple(sorted(layers))}


def index_entries(layers: Sequence[int]) -> dict:
    """What model_index.json says of a pipeline with these perturbed blocks; names that match one block each."""
    return {"_class_name": CLASS_NAME, "pag_applied_layers": [f"transformer_blocks.{i}.attn1" for i in layers]}
