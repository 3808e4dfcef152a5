"""How much each block of a transformer changes what comes in, and the model without some of its blocks (SANA-1.5, section 2.3)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from jaxtyping import Array, Float

from sana_jax.models.layers import BLOCKS, are_apart
from sana_jax.models.transformer import SanaTransformer
from sana_jax.models.transformer_block import TransformerBlock
from sana_jax.pipeline import SanaPipeline
from sana_jax.weights.folder import PipelineParts, SamplingDefaults


def block_importance(pipe: SanaPipeline, prompts: Sequence[str], seed: int = 0, **call) -> Float[np.ndarray, " layers"]:
    r"""Of each block 1 less the cosine between the stream before and after it: 0 is a block that changes no direction.

    $BI_i = 1 - E[\langle x_i, x_{i+1}\rangle / (\|x_i\|\,\|x_{i+1}\|)]$ over tokens, pictures, sampling steps and both branches of
    guidance, where $x_i$ is a token before block i.

    Args:
      pipe: with its parameters on one device; drawn with are neither its ControlNet nor perturbed attention.
      prompts: for calibration, a picture of each; the paper takes 100.
      seed: of the pictures' noise, one after the other.
      **call: of `SanaPipeline.__call__`: height, num_inference_steps, guidance_scale, ...

    Raises:
      ValueError: the parameters are on several devices, or as the call raises.
    """
    if pipe.mesh is not None:
        raise ValueError("blocks are measured on one device; open the model without mesh.")
    cosines = []

    def measured(method, arguments, keywords, context):
        result = method(*arguments, **keywords)
        if isinstance(context.module, TransformerBlock) and context.method_name == "__call__":
            jax.debug.callback(cosines.append, _mean_cosine(arguments[0], result[0]), ordered=True)
        return result

    if pipe.defaults.pag_scale > 0:
        call["pag_scale"] = 0.0
    own = _pipeline(pipe, pipe.transformer, pipe.params["transformer"])  # whose programs are all compiled within
    with nn.intercept_methods(measured):
        for number, prompt in enumerate(prompts):
            own(prompt, seed=seed + number, output_type="latent", **call)
    jax.effects_barrier()
    by_block = np.asarray(cosines, np.float64).reshape(-1, pipe.transformer.config.num_layers)
    return 1 - by_block.mean(0)


def most_important(importance: Float[np.ndarray, " layers"], count: int) -> tuple[int, ...]:
    """Numbers of the `count` blocks of the largest importance, in the model's order; of equal ones the earlier."""
    return tuple(sorted(np.argsort(-importance, kind="stable")[:count].tolist()))


def with_blocks(pipe: SanaPipeline, kept: Sequence[int]) -> SanaPipeline:
    """The same pipeline with the `kept` blocks alone, in that order, whose parameters are shared with it.

    Without its ControlNet, whose copies are of certain blocks; and without perturbed attention guidance, with a warning, where none of
    the blocks that it perturbs is kept.

    Raises:
      ValueError: there are no such blocks.
    """
    layers = pipe.transformer.config.num_layers
    if not kept or min(kept) < 0 or max(kept) >= layers:
        raise ValueError(f"kept={tuple(kept)}: name one block or more of this model, 0 to {layers - 1}.")
    params = pipe.params["transformer"]
    blocks = params[BLOCKS]
    if are_apart(params):
        blocks = {str(place): blocks[str(number)] for place, number in enumerate(kept)}
    else:
        blocks = jax.tree.map(lambda x: x[np.asarray(kept)], blocks)
    config = dataclasses.replace(pipe.transformer.config, num_layers=len(kept))
    pruned = _pipeline(pipe, SanaTransformer(config), params | {BLOCKS: blocks})
    if pipe.defaults.pag_scale > 0:
        perturbed = tuple(kept.index(number) for number in pipe.defaults.pag_layers if number in kept)
        changes = (
            {"pag_layers": perturbed} if perturbed else {"pag_scale": 0.0, "pag_layers": SamplingDefaults.pag_layers}
        )
        if not perturbed:
            logging.warning(
                "perturbed attention guidance is off: of the blocks %s none is kept", pipe.defaults.pag_layers
            )
        pruned.defaults = dataclasses.replace(pipe.defaults, **changes)
    return pruned


def _pipeline(pipe: SanaPipeline, transformer: SanaTransformer, params: dict) -> SanaPipeline:
    """`pipe` with another transformer, and without a ControlNet."""
    parts = PipelineParts(
        (transformer, params),
        (pipe.autoencoder, pipe.params["autoencoder"]),
        (pipe.text_encoder, pipe.params["text_encoder"]),
        pipe.tokenizer,
        pipe.defaults,
    )
    return SanaPipeline(parts)


def _mean_cosine(x: Float[Array, "B H W C"], y: Float[Array, "B H W C"]) -> Float[Array, ""]:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.mean(jnp.sum(x * y, -1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)))
