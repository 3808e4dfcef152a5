"""What a pipeline call compiles: token ids to text features, noise to latents, latents to pixels, in one program.

What stays the same from call to call is not part of it: `encode_prefix` and `encode_text` are programs of their own, for the
instruction before every prompt and for the negative prompts. So is `fit`, for pictures of another size than the one that is
drawn: every size needs a small program only.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from sana_jax.diffusion import solvers, trigflow
from sana_jax.diffusion.guidance import (
    Interval,
    PerturbedAttention,
    classifier_free_guidance,
    perturbed_attention_guidance,
)
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.autoencoder_strips import decode_in_strips, encode_in_strips
from sana_jax.models.autoencoder_tiles import Tiles, decode_in_tiles, encode_in_tiles
from sana_jax.models.controlnet import Branch, SanaControlNet
from sana_jax.models.placement import gathered, on_own_pictures, picture_devices
from sana_jax.models.text_encoder import TextEncoder, TextPrefix
from sana_jax.models.transformer import SanaTransformer, text_keys
from sana_jax.parallel.autoencoder import apply_in_parts, in_parts
from sana_jax.parallel.transformer import apply_transformer
from sana_jax.prompts import read_features
from sana_jax.sampling.cover_crop import cover_and_crop


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a compiled program depends on besides shapes; hashable.

    Attributes:
      solver, order, shift, num_steps: of the solver; `start` is the first step that is run (img2img), `angles` are
        Sprint's in place of a shift.
      integer_timesteps: the network sees them truncated.
      max_sequence_length: text features per prompt.
      guided: whether there is a branch without the prompt.
      null_mask: which tokens that branch sees, see `SamplingDefaults`.
      result: what leaves the program, one of "latents"; "decoded", pixels as `fit` takes them; "pictures", pixels in 0..1;
        "bytes", these rounded to 0..255 on the device, a quarter of the bytes that travel to the host.
      decode_strips: in which the latents are decoded.
      encode_strips: in which a picture to start from, or one that guides, is encoded.
      autoencoder_tiles: the autoencoder runs in such tiles, which change the picture; None: it does not.
      reports_steps: the program tells the host of every step that is done.
    """

    solver: str
    order: int
    shift: float
    num_steps: int
    integer_timesteps: bool
    max_sequence_length: int
    guided: bool
    null_mask: str
    start: int = 0
    angles: tuple[float, ...] = ()
    result: str = "pictures"
    decode_strips: int = 1
    encode_strips: int = 1
    autoencoder_tiles: Tiles | None = None
    reports_steps: bool = False


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` depends on besides shapes: height and width of its pictures, and whether they are bytes; hashable."""

    size: tuple[int, int]
    as_bytes: bool


class Text(NamedTuple):
    """Tokens of P prompts, and what is known of the tokens before them: an instruction that was encoded earlier."""

    ids: Int[Array, "P L"]
    mask: Int[Array, "P L"]
    prefix: TextPrefix | None


class Features(NamedTuple):
    """Hidden states of P texts, as `encode_text` gives them, and which of them are of tokens."""

    hidden: Float[Array, "P N D"]
    mask: Int[Array, "P N"]


class Control(NamedTuple):
    """Pictures in -1..1 that guide a ControlNet, one or P of them, and the factor on what it adds."""

    image: Float[Array, "Q H W 3"]
    strength: Float[Array, ""]


class Inputs(NamedTuple):
    """The arrays of one call, for B pictures of P prompts.

    Attributes:
      text: the prompts.
      null: of the negative prompts, one or P of them, with N = max_sequence_length; None without guidance.
      noise: at the first noise level.
      guidance_scale: see `classifier_free_guidance`; of Sprint the scale that is embedded.
      interval: see `guidance_interval`; None: guidance acts at all noise levels, or there is none.
      pag: perturbed attention guidance; None: none.
      image: pictures to start from in -1..1, one or P of them; None: start from noise alone.
      step_noise: Sprint's, added between its steps; None for other solvers.
      control: of a pipeline with a ControlNet, else None.
    """

    text: Text
    null: Features | None
    noise: Float[Array, "B h w C"]
    guidance_scale: Float[Array, ""]
    interval: Interval | None
    pag: PerturbedAttention | None
    image: Float[Array, "Q H W 3"] | None
    step_noise: Float[Array, "S B h w C"] | None
    control: Control | None = None


class Drawn(NamedTuple):
    """Pictures, or what else `Sampling.result` says, and whether all numbers of each are finite, before rounding."""

    result: Num[Array, "B H W D"]
    finite: Bool[Array, " B"]


class Modules(NamedTuple):
    """The Linen modules of a pipeline; their parameters are a dict under these names."""

    transformer: SanaTransformer
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    controlnet: SanaControlNet | None = None


def encode_prefix(modules: Modules, params: dict, ids: Int[Array | np.ndarray, " P"]) -> TextPrefix:
    """What the text encoder, of the parameters `params`, knows after the tokens of an instruction."""
    return modules.text_encoder.apply({"params": params}, ids, method="encode_prefix")


def encode_text(
    modules: Modules, params: dict, ids: Int[Array | np.ndarray, "P N"], mask: Int[Array | np.ndarray, "P N"]
) -> Float[Array, "P N D"]:
    """Hidden states of texts without an instruction, by the text encoder's parameters."""
    return modules.text_encoder.apply({"params": params}, ids, mask)


def draw(
    modules: Modules,
    params: dict,
    inputs: Inputs,
    *,
    sampling: Sampling,
    report: Callable[[int, int], None] | None = None,
) -> Drawn:
    """Pictures in 0..1, or what else `sampling.result` says.

    With `sampling.reports_steps` the program calls `report` on the host, with (steps done, steps in all).
    """
    noise = inputs.noise
    batch = noise.shape[0]
    condition = read_features(
        modules.text_encoder, params["text_encoder"], *inputs.text, max_sequence_length=sampling.max_sequence_length
    )
    if picture_devices() > 1:  # each picture's text is on its device
        condition = _for_pictures(condition, batch)
    config = dataclasses.replace(modules.transformer.config, integer_timesteps=sampling.integer_timesteps)
    transformer = modules.transformer.clone(config=config)
    if config.guidance_embeds:
        condition = (*condition, jnp.full(batch, inputs.guidance_scale))

    def velocity(latents, timesteps, condition, perturbed=None):
        return apply_transformer(
            transformer, params["transformer"], latents, timesteps, *condition, perturbed=perturbed
        )

    def prepare(condition):
        features, *rest = condition
        return text_keys(transformer.config, params["transformer"], features), *rest

    unconditional = None
    if sampling.guided:
        null = _for_pictures(inputs.null, condition[1].shape[0])
        unconditional = null.hidden, condition[1] if sampling.null_mask == "prompt" else null.mask
    if inputs.control is not None:
        hint = _encode_scaled(modules, params, inputs.control.image, sampling)
        hint = _for_pictures(hint, condition[1].shape[0])
        condition = (*condition, hint)
        unconditional = None if unconditional is None else (*unconditional, hint)
        velocity, prepare = _controlled(modules, transformer, params, inputs.control.strength, sampling)

    branches = (velocity, condition, unconditional, inputs.guidance_scale)
    if inputs.pag is not None:
        velocity_fn = perturbed_attention_guidance(*branches, inputs.pag, inputs.interval, prepare)
    elif sampling.guided:
        velocity_fn = classifier_free_guidance(*branches, inputs.interval, prepare)
    else:
        velocity_fn = functools.partial(velocity, condition=prepare(condition))

    on_step = None
    if sampling.reports_steps:

        def on_step(done):
            report(int(done), sampling.num_steps - sampling.start)

    x0 = None
    if inputs.image is not None:
        x0 = _for_pictures(_encode_scaled(modules, params, inputs.image, sampling), batch)
    solver = make_solver(sampling, config.timestep_scale, inputs.step_noise)
    latents = solvers.sample(velocity_fn, noise, solver, on_step, x0)
    result = latents if sampling.result == "latents" else _decode(modules, params, latents, sampling)
    finite = jnp.isfinite(result).all(axis=(1, 2, 3))
    if sampling.result in ("pictures", "bytes"):
        result = _pictures(result, as_bytes=sampling.result == "bytes")
    return Drawn(result, finite)


def fit(modules: Modules, decoded: Float[Array, "B H W 3"], *, sampling: Fit) -> Num[Array, "B h w 3"]:
    """Pictures of another size than the decoded ones, see `cover_and_crop`. `modules`, as of the others, is not used."""
    return _pictures(cover_and_crop(decoded, *sampling.size), sampling.as_bytes)


def _pictures(decoded, as_bytes):
    pictures = jnp.clip(decoded / 2 + 0.5, 0, 1)
    return jnp.rint(255 * pictures).astype(jnp.uint8) if as_bytes else pictures


def make_solver(
    sampling: Sampling, timestep_scale: float, step_noise: Float[Array, "S B h w C"] | None = None
) -> solvers.Solver:
    """The solver of a call, for a transformer with this factor on timesteps."""
    if sampling.solver == "scm":
        angles = np.asarray(sampling.angles)
        return trigflow.trigflow(angles, step_noise, timestep_scale=timestep_scale, start=sampling.start)
    shared = dict(integer_timesteps=sampling.integer_timesteps, start=sampling.start)
    if sampling.solver == "flow_euler":
        return solvers.flow_euler(sampling.num_steps, sampling.shift, **shared)
    return solvers.flow_dpm(sampling.num_steps, sampling.shift, order=sampling.order, **shared)


def _for_pictures(tree, count):
    """`count` rows, of one for all or of prompts: each as often as it has pictures."""
    return jax.tree.map(lambda x: jnp.repeat(x, count // x.shape[0], axis=0), tree)


def _controlled(
    modules: Modules, transformer: SanaTransformer, params: dict, strength: Float[Array, ""], sampling: Sampling
):
    """Velocity and `prepare` of guidance where conditions end with the latents of a picture for the ControlNet."""
    config = dataclasses.replace(modules.controlnet.config, integer_timesteps=sampling.integer_timesteps)
    net = modules.controlnet.clone(config=config)
    own, copies = params["transformer"], params["controlnet"]

    def prepare(condition):
        features, mask, hint = condition
        return text_keys(transformer.config, own, features), mask, text_keys(config, copies, features), hint

    def velocity(latents, timesteps, condition, perturbed=None):
        keys, mask, branch_keys, hint = condition
        branch = Branch(net, copies, strength, hint, branch_keys)
        return apply_transformer(transformer, own, latents, timesteps, keys, mask, perturbed=perturbed, branch=branch)

    return velocity, prepare


def _encode_scaled(modules: Modules, params: dict, images: Float[Array, "Q H W 3"], sampling: Sampling):
    latents = _encode(modules.autoencoder, params["autoencoder"], images, sampling)
    return latents.astype(jnp.float32) * modules.autoencoder.config.scaling_factor


def _encode(autoencoder: Autoencoder, params: dict, images: Float[Array, "Q H W 3"], sampling: Sampling):
    if sampling.autoencoder_tiles is not None:
        encode = functools.partial(encode_in_tiles, tiles=sampling.autoencoder_tiles)
    elif sampling.encode_strips > 1:
        encode = functools.partial(encode_in_strips, strips=sampling.encode_strips)
    else:
        return apply_in_parts(autoencoder, params, images, "encode")
    return _one_by_one(encode, autoencoder, params, images)


def _decode(modules: Modules, params: dict, latents: Float[Array, "B h w C"], sampling: Sampling):
    autoencoder, params = modules.autoencoder, params["autoencoder"]
    latents = latents / autoencoder.config.scaling_factor
    if sampling.autoencoder_tiles is not None:
        decode = functools.partial(decode_in_tiles, tiles=sampling.autoencoder_tiles)
    elif sampling.decode_strips > 1:
        decode = functools.partial(decode_in_strips, strips=sampling.decode_strips)
    else:
        return apply_in_parts(autoencoder, params, latents, "decode")
    return _one_by_one(decode, autoencoder, params, latents)


def _one_by_one(function, autoencoder: Autoencoder, params: dict, x: Float[Array, "B H W C"]):
    """`function(autoencoder, params, pictures)` of every picture, each device doing its own, one after the other."""

    def own(x, weights):
        pictures = x.shape[0] if isinstance(x.shape[0], int) else 1  # jax.export leaves their number open
        return in_parts(functools.partial(function, autoencoder, weights), x, pictures)

    return on_own_pictures(own, (x,), (jax.tree.map(gathered, params),))
