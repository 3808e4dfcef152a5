"""From prompts to pictures: tokens, text features, latents, pixels."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from sana_jax.diffusion import solvers
from sana_jax.diffusion.guidance import classifier_free_guidance
from sana_jax.models.autoencoder_strips import check_strips, choose_strips, decode_in_strips
from sana_jax.prompts import select_features, tokenize_prompts
from sana_jax.weights import folder
from sana_jax.weights.model_index import EMBEDDED_MODEL, check_prompts, check_sampling, check_sides, is_hub_id

OUTPUT_TYPES = ("pil", "np", "latent")
SOLVERS = ("flow_dpm", "flow_euler")
# Of a hub repository, what is read here: no pickles, no second copies.
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer/*")


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """What a compiled program depends on besides shapes; hashable."""

    solver: str
    order: int
    shift: float
    num_steps: int
    images_per_prompt: int
    guided: bool
    interval: tuple[float, float]
    decode: bool
    decode_strips: int
    progress: Callable[[int, int], None] | None


class SanaPipeline:
    """Text-to-image with the parts of one model folder. Argument names follow diffusers' SanaPipeline.

    One program per shape is compiled, from token ids to pixels, and kept for later calls. Prompt, seed, guidance scale
    (above 1) and weights may change without another compilation.

    Attributes:
      transformer, autoencoder, text_encoder: Linen modules; `params` holds their parameters under the same names.
      tokenizer: a `tokenizers.Tokenizer`.
      defaults: `SamplingDefaults` of the model.
    """

    def __init__(self, parts: folder.PipelineParts):
        self.transformer, self.autoencoder, self.text_encoder = (part[0] for part in parts[:3])
        self.tokenizer, self.defaults = parts.tokenizer, parts.defaults
        names = ("transformer", "autoencoder", "text_encoder")
        self.params = {name: jax.device_put(part[1]) for name, part in zip(names, parts[:3], strict=True)}
        self._generate = jax.jit(self._program, static_argnames="sampling")

    @classmethod
    def from_pretrained(
        cls, path: str | pathlib.Path | None = None, *, dtype: str = "float32", clamp_fp16: bool | None = None
    ) -> "SanaPipeline":
        """Reads a model.

        Args:
          path: a pipeline folder in the diffusers layout, a training run's folder, or OWNER/NAME on the Hugging Face
            hub. None: the model that comes with the package.
          dtype: of parameters and computation: "float32", or "bfloat16" for half the memory and speed on GPU and TPU.
            Norms, attention sums and the solver's state are float32 with either.
          clamp_fp16: clip self-attention to the range of float16. The public checkpoints trained in float16
            (Sana_600M_*, Sana_1600M_512px, Sana_1600M_1024px, MultiLing) give broken pictures without. None: as the
            folder's configuration says.

        Raises:
          FileNotFoundError: no such folder, or a file in it is missing.
          ValueError: a file is damaged, parts do not fit, or `dtype` is unknown.
        """
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype!r} is not float32 or bfloat16; float16 overflows in linear attention.")
        path = EMBEDDED_MODEL if path is None else path
        parts = folder.load_pipeline(_download(str(path)) if is_hub_id(path) else path, dtype)
        clamp = {} if clamp_fp16 is None else {"clamp_fp16": clamp_fp16}

        def configured(part, **changes):
            module, params = part
            return type(module)(dataclasses.replace(module.config, dtype=dtype, **changes)), params

        return cls(
            parts._replace(
                transformer=configured(parts.transformer, **clamp),
                autoencoder=configured(parts.autoencoder),
                text_encoder=configured(parts.text_encoder),
            )
        )

    def save_pretrained(self, path: str | pathlib.Path, dtype: str = "float32") -> None:
        """Writes the model as a folder that `from_pretrained` and diffusers' SanaPipeline open."""
        folder.save_pipeline(
            path,
            transformer=(self.transformer, self.params["transformer"]),
            autoencoder=(self.autoencoder, self.params["autoencoder"]),
            text_encoder=(self.text_encoder, self.params["text_encoder"]),
            tokenizer=self.tokenizer,
            defaults=self.defaults,
            dtype=dtype,
        )

    @property
    def side_multiple(self) -> int:
        """Height and width must be multiples of this many pixels."""
        return self.autoencoder.config.downsample_factor * self.transformer.config.patch_size

    @property
    def default_height(self) -> int:
        """Pixels of a picture where the call does not say: the folder's sana_jax.json, else the side of training."""
        return self.defaults.height or self.transformer.config.sample_size * self.autoencoder.config.downsample_factor

    @property
    def default_width(self) -> int:
        """As `default_height`."""
        return self.defaults.width or self.transformer.config.sample_size * self.autoencoder.config.downsample_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of one picture's latents, [h, w, c]."""
        factor = self.autoencoder.config.downsample_factor
        return height // factor, width // factor, self.transformer.config.in_channels

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        latents: Float[Array, "B h w C"] | np.ndarray | None = None,
        output_type: str = "pil",
        *,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        solver: str | None = None,
        decode_strips: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image] | Float[np.ndarray, "B H W D"]:
        """Draws `num_images_per_prompt` pictures for each prompt, those of one prompt next to each other.

        Args:
          prompt: one or several; lower-cased, as diffusers does.
          negative_prompt: what to lead away from: one for all, or one per prompt. "" is the null text of training.
          height, width: in pixels, multiples of `side_multiple`. None: the model's own.
          num_inference_steps: network evaluations (two in one pass with guidance). None: the model's own (public: 20).
          guidance_scale: 1 or less: no guidance, and the negative prompt is not used. None: the model's own (public:
            4.5).
          num_images_per_prompt: pictures per prompt.
          seed: of the noise. Picture i of the batch starts from noise that depends on `seed` and i alone.
          latents: the noise itself, float32 [batch, height / f, width / f, channels], in place of `seed`.
          output_type: "pil"; "np": float32 [batch, height, width, 3] in 0..1; or "latent": the undecoded latents,
            float32, scaled as the transformer has them.
          guidance_interval: noise levels between which guidance acts.
          solver: "flow_dpm" or "flow_euler"; None: the model's own.
          decode_strips: horizontal strips in which the fine stages of the autoencoder decode a picture, for less memory;
            the picture is the same (`sana_jax.models.autoencoder_strips`). 1: all at once. None: 1 up to 2048x2048
            pixels, above that a strip per 1024x1024 pixels.
          progress: called with (steps done, steps in all) while the pictures are made. Such a program is compiled
            anew in every process: JAX's persistent cache keeps no program that calls the host.

        Raises:
          ValueError: an argument that cannot be used; names it, before anything is computed.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        height = self.default_height if height is None else height
        width = self.default_width if width is None else width
        steps = self.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        solver = self.defaults.solver if solver is None else solver
        check_prompts(prompts)
        check_sides(height, width, self.side_multiple)
        check_sampling(steps, guidance, num_images_per_prompt, seed)
        negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
        _check_choices(output_type, solver, guidance_interval, negatives, prompts)
        if decode_strips is None:
            decode_strips = choose_strips(self.autoencoder.config, height, width)
        check_strips(self.autoencoder.config, height, decode_strips)
        batch = len(prompts) * num_images_per_prompt
        shape = self.latent_shape(height, width)
        if latents is None:
            latents = initial_noise(seed, np.arange(batch), shape)
        elif np.shape(latents) != (batch, *shape):
            raise ValueError(f"latents have the shape {np.shape(latents)}; this call needs {(batch, *shape)} (NHWC).")

        guided = guidance > 1
        sampling = _Sampling(
            solver=solver,
            order=self.defaults.solver_order,
            shift=self.defaults.flow_shift,
            num_steps=steps,
            images_per_prompt=num_images_per_prompt,
            guided=guided,
            interval=tuple(map(float, guidance_interval)),
            decode=output_type != "latent",
            decode_strips=decode_strips,
            progress=progress,
        )
        length = self.defaults.max_sequence_length
        text = tokenize_prompts(self.tokenizer, prompts, self.defaults.complex_human_instruction, length)
        null = tokenize_prompts(self.tokenizer, negatives, None, length) if guided else None
        out = self._generate(
            self.params, text, null, jnp.asarray(latents, jnp.float32), jnp.float32(guidance), sampling=sampling
        )
        out = np.asarray(out)
        if output_type == "pil":
            return [Image.fromarray(picture) for picture in np.rint(out * 255).astype(np.uint8)]
        return out

    def _encode_text(self, params, ids: Int[Array, "B L"], mask: Int[Array, "B L"]):
        hidden = self.text_encoder.apply({"params": params["text_encoder"]}, ids, mask)
        return select_features(hidden, mask, self.defaults.max_sequence_length)

    def _program(self, params, text, null, noise, guidance_scale, *, sampling: _Sampling):
        """Token ids to pixels (or latents), all in one: what is compiled. `text` and `null` are (ids, mask)."""
        condition = self._encode_text(params, *text)
        condition = jax.tree.map(lambda x: jnp.repeat(x, sampling.images_per_prompt, axis=0), condition)

        def velocity(latents, timesteps, condition):
            return self.transformer.apply({"params": params["transformer"]}, latents, timesteps, *condition)

        if sampling.guided:
            unconditional = self._encode_text(params, *null)
            copies = noise.shape[0] // unconditional[0].shape[0]
            unconditional = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), unconditional)
            interval = sampling.interval
            velocity_fn = classifier_free_guidance(velocity, condition, unconditional, guidance_scale, interval)
        else:
            velocity_fn = functools.partial(velocity, condition=condition)
        on_step = None
        if sampling.progress is not None:

            def on_step(done):
                sampling.progress(int(done), sampling.num_steps)

        latents = solvers.sample(velocity_fn, noise, self._solver(sampling), on_step)
        if not sampling.decode:
            return latents
        latents = latents / self.autoencoder.config.scaling_factor
        if sampling.decode_strips == 1:
            pixels = self.autoencoder.apply({"params": params["autoencoder"]}, latents, method="decode")
        else:
            pixels = decode_in_strips(self.autoencoder, params["autoencoder"], latents, sampling.decode_strips)
        return jnp.clip(pixels / 2 + 0.5, 0, 1)

    def _solver(self, sampling: _Sampling) -> solvers.Solver:
        integer = self.transformer.config.integer_timesteps
        if sampling.solver == "flow_euler":
            return solvers.flow_euler(sampling.num_steps, sampling.shift, integer_timesteps=integer)
        return solvers.flow_dpm(sampling.num_steps, sampling.shift, order=sampling.order, integer_timesteps=integer)


def initial_noise(
    seed: int, indices: Sequence[int] | Int[np.ndarray, " B"], shape: tuple[int, int, int]
) -> Float[Array, "B h w C"]:
    """Standard normal noise for the pictures numbered `indices`: each a function of (seed, its number) alone.

    So a picture stays the same whichever others are drawn beside it, and a long list can be cut into batches.
    """
    key = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.normal(jax.random.fold_in(key, index), shape))(jnp.asarray(indices))


def _check_choices(output_type, solver, interval, negatives, prompts) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} is not one of {', '.join(OUTPUT_TYPES)}.")
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(SOLVERS)}.")
    low, high = interval
    if not low <= high:
        raise ValueError(f"guidance_interval={tuple(interval)} is empty; give (low, high) noise levels, as (0.0, 1.0).")
    if len(negatives) not in (1, len(prompts)):
        raise ValueError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one for all, or one for each."
        )


def _download(hub_id: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(hub_id, allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"no folder {hub_id} here, and the hub gave nothing by that name: {reason}") from error
