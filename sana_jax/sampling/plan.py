"""What the arguments of a pipeline call come to: checked, completed from the model's own, as a `Sampling` and a `Fit`."""

from collections.abc import Sequence

import numpy as np

from sana_jax.diffusion import trigflow
from sana_jax.models.autoencoder_strips import check_strips, choose_strips
from sana_jax.models.autoencoder_tiles import check_tiles
from sana_jax.sampling.image_to_image import first_step
from sana_jax.sampling.program import Fit, Modules, Sampling
from sana_jax.weights.folder import NULL_MASKS, SamplingDefaults
from sana_jax.weights.model_index import check_sampling

OUTPUT_TYPES = ("pil", "np", "latent")
SOLVERS = ("flow_dpm", "flow_euler", "scm")


def plan_sampling(
    modules: Modules,
    defaults: SamplingDefaults,
    *,
    size: tuple[int, int],
    generated: tuple[int, int],
    guidance_scale: float,
    num_inference_steps: int | None = None,
    timesteps: Sequence[float | int] | np.ndarray | None = None,
    strength: float | None = None,
    solver: str | None = None,
    output_type: str = "np",
    decode_strips: int | None = None,
    autoencoder_tiles: tuple[int, int] | None = None,
    rows_are_split: bool = False,
    reports_steps: bool = False,
    controlled: bool = False,
) -> Sampling:
    """How a call is sampled.

    Args:
      modules: the model.
      defaults: its own of what is None here.
      size: height and width of the pictures, in pixels.
      generated: the height and width that are drawn for it (`SanaPipeline.generated_size`).
      guidance_scale: of the call; only whether it is above 1 matters here.
      strength: of img2img; None: there is no picture to start from.
      rows_are_split: whether several devices share a picture, which saves them strips.
      reports_steps: as in `Sampling`.
      controlled: whether there is a picture for a ControlNet.
      num_inference_steps, timesteps, solver, output_type, decode_strips, autoencoder_tiles: as in
        `SanaPipeline.__call__`.

    Raises:
      ValueError: an argument that cannot be used; names it.
    """
    steps = len(timesteps) - 1 if timesteps is not None else num_inference_steps
    steps = defaults.num_inference_steps if steps is None else steps
    solver = defaults.solver if solver is None else solver
    check_sampling(steps, guidance_scale)
    _check_choices(output_type, solver, defaults.null_mask)
    sprint = defaults.family == "sprint"
    angles = ()
    if sprint:
        angles = trigflow.trigflow_angles(steps) if timesteps is None else trigflow.check_angles(timesteps)
    result = {"pil": "bytes", "np": "pictures", "latent": "latents"}[output_type]
    decode_strips, encode_strips, tiles = _plan_autoencoder(
        modules.autoencoder.config, generated, decode_strips, autoencoder_tiles, rows_are_split
    )
    return Sampling(
        solver=solver,
        order=defaults.solver_order,
        shift=defaults.flow_shift,
        num_steps=steps,
        start=0 if strength is None else first_step(steps, strength),
        angles=tuple(map(float, angles)),
        integer_timesteps=modules.transformer.config.integer_timesteps and defaults.integer_timesteps,
        max_sequence_length=defaults.max_sequence_length,
        guided=guidance_scale > 1 and not sprint,
        null_mask=defaults.null_mask,
        result=result if plan_fit(size, generated, output_type) is None else "decoded",
        decode_strips=decode_strips,
        encode_strips=1 if strength is None and not controlled else encode_strips,
        autoencoder_tiles=tiles,
        reports_steps=reports_steps,
    )


def plan_fit(size: tuple[int, int], generated: tuple[int, int], output_type: str = "np") -> Fit | None:
    """How pictures of the size `generated` become those of `size`; None: nothing is to be done. As of `plan_sampling`."""
    if size == generated or output_type == "latent":
        return None
    return Fit(size, as_bytes=output_type == "pil")


def _plan_autoencoder(config, generated, decode_strips, tiles, rows_are_split):
    """(strips to decode in, strips to encode in, tiles) of pictures of the size `generated`."""
    if tiles is not None:
        if decode_strips is not None:
            raise ValueError("autoencoder_tiles and decode_strips exclude each other; leave one of them out.")
        check_tiles(config, tiles)
        return 1, 1, tuple(tiles)
    if decode_strips is None:
        decode_strips = 1 if rows_are_split else choose_strips(config, *generated)
    check_strips(config, generated[0], decode_strips)
    return decode_strips, 1 if rows_are_split else choose_strips(config, *generated, side="encoder"), None


def _check_choices(output_type, solver, null_mask) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is not one of {', '.join(OUTPUT_TYPES)}.")
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(SOLVERS)}.")
    if null_mask not in NULL_MASKS:
        raise ValueError(f"the model's null_mask={null_mask!r} is not one of {', '.join(NULL_MASKS)}.")


def check_sprint(sprint: bool, interval, timesteps, num_inference_steps, step_noise, pag_scale) -> None:
    """Raises ValueError for what only a SANA-Sprint, or only a SANA, has a use for; arguments as of the call."""
    if not sprint and (timesteps is not None or step_noise is not None):
        name = "timesteps" if timesteps is not None else "step_noise"
        raise ValueError(f"{name} is for SANA-Sprint models, and this is a SANA model; leave it out.")
    if sprint and tuple(interval) != (0.0, 1.0):
        raise ValueError(
            f"guidance_interval={tuple(interval)}: a SANA-Sprint model has its guidance built in; leave it out."
        )
    if sprint and pag_scale:
        raise ValueError(f"pag_scale={pag_scale}: a SANA-Sprint model has its guidance built in; leave it out.")
    if timesteps is not None and num_inference_steps not in (None, len(timesteps) - 1):
        raise ValueError(
            f"{len(timesteps)} timesteps are of {len(timesteps) - 1} steps and num_inference_steps="
            f"{num_inference_steps}; give one of them, or timesteps one more than steps."
        )
