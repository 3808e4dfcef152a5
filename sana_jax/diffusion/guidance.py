"""Classifier-free and perturbed attention guidance: how strongly prompt and structure pull on the velocity."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sana_jax.diffusion.flow import TIMESTEPS

Interval = Float[Array, "2"]  # the first and the last timestep at which guidance acts


def guidance_interval(low: float, high: float) -> Interval | None:
    """Noise levels between which guidance acts, both included, as an array: other values compile nothing anew.

    A level counts as the timestep that the model is given, of 1000, from which a model of whole ones has cut off the rest. None
    where guidance always acts.

    Raises:
      ValueError: there is nothing between them.
    """
    if not low <= high:
        raise ValueError(f"guidance_interval={(low, high)} is empty; give (low, high) noise levels, as (0.0, 1.0).")
    return None if low <= 0 and high >= 1 else jax.device_put(np.float32([low * TIMESTEPS, high * TIMESTEPS]))


def classifier_free_guidance(
    model_fn: Callable,
    conditional: Any,
    unconditional: Any,
    scale: Float[Array, ""] | Float[Array, "B 1 1 1"] | float,
    interval: Interval | None = None,
    prepare: Callable[[Any], Any] | None = None,
) -> Callable:
    r"""Velocity of the guided flow: $v = v_\varnothing + g\,(v_c - v_\varnothing)$ (arXiv 2207.12598).

    Noise and data predictions are affine in v, so that guiding any of the three is the same. Both velocities come from
    one forward pass over a batch of 2B. Outside the guidance interval (arXiv 2404.07724) only the conditional half is
    computed.

    Args:
      model_fn: (latents [B,...], timesteps [B], condition) -> velocity [B,...].
      conditional: tree of arrays with leading axis P: what the prompts are to `model_fn`. P divides B; the pictures of a
        prompt are next to each other, and `model_fn` is called with 2P rows of conditions for 2B of latents.
      unconditional: the same tree for the negative or empty prompts.
      scale: guidance scale g, of all pictures or of each; 1 is no guidance, 4.5 is SANA's default.
      interval: where guidance acts, by `guidance_interval`; None: everywhere.
      prepare: condition -> what `model_fn` is given of it, calculated once for all calls; None: the condition itself.

    Returns:
      velocity_fn(latents, timesteps); with an interval all timesteps of a batch have to be equal.
    """
    both = _prepared(prepare, _interleaved(unconditional, conditional))

    def guided(latents, timesteps):
        group = _pictures_of_a_prompt(latents, conditional)
        null, text = _apart(model_fn(*_interleaved(*[(latents, timesteps)] * 2, group=group), both), 2, group)
        return null + scale * (text - null)

    return _inside(interval, guided, model_fn, conditional, prepare)


class PerturbedAttention(NamedTuple):
    """Settings of `perturbed_attention_guidance`; arrays, so that other values compile nothing anew.

    Attributes:
      scale: s.
      adaptive_scale: a.
      layers: true for the blocks that are perturbed.
    """

    scale: Float[Array, ""]
    adaptive_scale: Float[Array, ""]
    layers: Bool[Array, " N"]


def perturbed_attention(
    scale: float, adaptive_scale: float, layers: Sequence[int], num_layers: int
) -> PerturbedAttention | None:
    """The settings as arrays; None for scale 0, which is no guidance.

    Raises:
      ValueError: a scale is negative or not finite, or the layers are none or not the model's.
    """
    for name, value in (("pag_scale", scale), ("pag_adaptive_scale", adaptive_scale)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} is not a number of at least 0; 0 switches it off.")
    if scale == 0:
        return None
    if not layers or min(layers) < 0 or max(layers) >= num_layers:
        raise ValueError(
            f"pag_layers={tuple(layers)}: name at least one of this model's blocks, 0 to {num_layers - 1}, or set "
            "pag_scale=0."
        )
    flags = np.zeros(num_layers, bool)  # NumPy's, for which nothing is compiled
    flags[list(layers)] = True
    return PerturbedAttention(jnp.float32(scale), jnp.float32(adaptive_scale), jax.device_put(flags))


def perturbed_attention_guidance(
    model_fn: Callable,
    conditional: Any,
    unconditional: Any | None,
    scale: Float[Array, ""] | float,
    pag: PerturbedAttention,
    interval: Interval | None = None,
    prepare: Callable[[Any], Any] | None = None,
) -> Callable:
    r"""Velocity led away from a prediction without structure (PAG, arXiv 2403.17377), and from the null text.

    $v = v_\varnothing + g\,(v_c - v_\varnothing) + s_t\,(v_c - v_p)$, where $v_p$ is the conditional prediction with
    the self-attention of some blocks replaced by the identity on its values: each token keeps its own. The strength
    fades with the noise, $s_t = \max(0, s - a\,(1000 - t))$. All branches are one forward pass, over a batch of 3B;
    without classifier-free guidance ($g = 1$, no null text) of 2B. Outside the interval neither guidance acts.

    Deviation from diffusers: in the perturbed blocks its attention processors leave out the norms of q and k, for the
    normal branches too, so that SANA-1.5 models are not themselves there. Here those branches are the model's own.

    Args:
      model_fn: (latents [B,...], timesteps [B], condition[, perturbed [N, B]]) -> velocity [B,...].
      conditional: tree of arrays with leading axis P, as of `classifier_free_guidance`.
      unconditional: the same tree for the negative or empty prompts; None: no classifier-free guidance.
      scale: guidance scale g; not used without `unconditional`.
      pag: s, a and the perturbed blocks.
      interval: where guidance acts, by `guidance_interval`; None: everywhere.
      prepare: as of `classifier_free_guidance`.

    Returns:
      velocity_fn(latents, timesteps), all timesteps of a batch being equal.
    """
    branches = [conditional, conditional] if unconditional is None else [unconditional, conditional, conditional]
    count = len(branches)
    condition = _prepared(prepare, _interleaved(*branches))

    def guided(latents, timesteps):
        group = _pictures_of_a_prompt(latents, conditional)
        last = jnp.arange(count * latents.shape[0]) // group % count == count - 1
        inputs = _interleaved(*[(latents, timesteps)] * count, group=group)
        velocity = model_fn(*inputs, condition, pag.layers[:, None] & last)
        *null, text, perturbed = _apart(velocity, count, group)
        strength = jnp.maximum(pag.scale - pag.adaptive_scale * (TIMESTEPS - timesteps[0]), 0)
        base = null[0] + scale * (text - null[0]) if null else text
        return base + strength * (text - perturbed)

    return _inside(interval, guided, model_fn, conditional, prepare)


def _pictures_of_a_prompt(latents: Float[Array, "B ..."], conditional: Any) -> int:
    pictures, prompts = latents.shape[0], jax.tree.leaves(conditional)[0].shape[0]
    if pictures % prompts:
        raise ValueError(f"{prompts} prompts do not divide {pictures} latents; give each prompt as many latents.")
    return pictures // prompts


def _interleaved(*branches: Any, group: int = 1) -> Any:
    """Trees of arrays as one: the branches of each `group` of rows next to each other, so that they share a device."""

    def join(*x):
        groups = [branch.reshape(-1, group, *branch.shape[1:]) for branch in x]
        return jnp.stack(groups, axis=1).reshape(-1, *x[0].shape[1:])

    return jax.tree.map(join, *branches)


def _apart(velocity: Float[Array, "N ..."], count: int, group: int) -> list[Float[Array, "B ..."]]:
    """The branches of `_interleaved`, float32."""
    shape = velocity.shape[1:]
    velocity = velocity.astype(jnp.float32).reshape(-1, count, group, *shape)
    return [velocity[:, branch].reshape(-1, *shape) for branch in range(count)]


def _prepared(prepare: Callable[[Any], Any] | None, condition: Any) -> Any:
    return condition if prepare is None else prepare(condition)


def _inside(interval: Interval | None, guided: Callable, model_fn: Callable, conditional: Any, prepare) -> Callable:
    """`guided` between the timesteps of `interval`, the conditional velocity alone outside."""
    if interval is None:
        return guided
    conditional = _prepared(prepare, conditional)

    def plain(latents, timesteps):
        return model_fn(latents, timesteps, conditional).astype(jnp.float32)

    def inside_only(latents, timesteps):
        inside = (interval[0] <= timesteps[0]) & (timesteps[0] <= interval[1])
        return jax.lax.cond(inside, guided, plain, latents, timesteps)

    return inside_only
