"""From prompts to pictures: tokens, text features, latents, pixels."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from PIL import Image

from sana_jax import arguments
from sana_jax.arguments import number, optional, whole_number
from sana_jax.diffusion import guidance
from sana_jax.models.autoencoder import Autoencoder
from sana_jax.models.controlnet import SanaControlNet
from sana_jax.models.text_encoder import TextEncoder
from sana_jax.models.transformer import SanaTransformer
from sana_jax.prompts import constant_tokens, instruction_lines, left_out, tokenize_prompts
from sana_jax.quantization import check_kind, is_quantized, quantize_transformer
from sana_jax.sampling import aspect_buckets, noise, program
from sana_jax.sampling.compiled import Programs
from sana_jax.sampling.devices import (
    check_call,
    input_shapes,
    params_shapes,
    put_inputs,
    put_params,
    reading_places,
    rows_are_split,
)
from sana_jax.sampling.image_to_image import StartImage, prepare_image
from sana_jax.sampling.plan import check_sprint, plan_fit, plan_sampling
from sana_jax.sampling.program import Control, Drawn, Features, Inputs, Modules, Sampling, Text
from sana_jax.sampling.text_cache import TextCache, TextShapes
from sana_jax.weights import controlnet_files, folder, hub
from sana_jax.weights.lora import open_lora
from sana_jax.weights.model_index import (
    EMBEDDED_MODEL,
    check_control,
    check_family,
    check_pictures,
    check_prompts,
    check_strength,
    is_hub_id,
)
from sana_jax.weights.parts import abstract_params
from sana_jax.weights.reading import Reading

# As the fields of `PipelineParts`; not all models have the last.
PARTS = ("transformer", "autoencoder", "text_encoder", "controlnet")


class SanaPipeline:
    """Text-to-image and img2img with the parts of one model folder, a SANA's or a SANA-Sprint's.

    Argument names follow diffusers' SanaPipeline and SanaSprintPipeline.

    One program per shape is compiled, from token ids to pixels, and kept for later calls; so are smaller ones that encode
    the instruction and the negative prompts, once, and with resolution binning one that crops to each size. Prompt, seed,
    guidance scale (above 1) and weights may change without another compilation.

    Attributes:
      transformer, autoencoder, text_encoder, controlnet: Linen modules, read only; the last may be None. `params` holds their
        parameters under the same names, on one CPU or GPU with their layers apart (`models.layers`); stacked ones may be assigned too.
      tokenizer: a `tokenizers.Tokenizer`.
      defaults: `SamplingDefaults` of the model.
      mesh: the devices that share the work; None: one device.
      programs: what was compiled, of which the 64 last used are kept (`sampling.compiled.KEPT`); `programs.save(FOLDER)`
        writes it for the `executables` of another process.
    """

    def __init__(
        self, parts: folder.PipelineParts, mesh: Mesh | None = None, executables: str | pathlib.Path | None = None
    ):
        """`parts` may have a `Reading` of all parameters in place of each part's own; see `from_pretrained` for the rest."""
        self.tokenizer, self.defaults = parts.tokenizer, parts.defaults
        self.mesh = mesh
        given = {name: getattr(parts, name) for name in PARTS if getattr(parts, name) is not None}
        params = parts.transformer[1]
        if not isinstance(params, Reading):
            params = put_params({name: part[1] for name, part in given.items()}, mesh)
        self._params = params
        self._modules = Modules(**{name: part[0] for name, part in given.items()})
        self.programs = Programs(self._modules, mesh, executables)
        self._text_cache = TextCache(self.programs)

    @property
    def modules(self) -> Modules:
        """The parts, without their parameters; of another model is another pipeline."""
        return self._modules

    @property
    def transformer(self) -> SanaTransformer:
        return self.modules.transformer

    @property
    def autoencoder(self) -> Autoencoder:
        return self.modules.autoencoder

    @property
    def text_encoder(self) -> TextEncoder:
        return self.modules.text_encoder

    @property
    def controlnet(self) -> SanaControlNet | None:
        return self.modules.controlnet

    @property
    def params(self) -> dict:
        """Parameters by part, waited for where they are still read; raises what reading them raised."""
        if isinstance(self._params, Reading):
            self._params = self._params.result()
        return self._params

    @params.setter
    def params(self, params: dict) -> None:
        self._params = params
        self._text_cache = TextCache(self.programs)  # the old one holds the old text encoder

    @classmethod
    def from_pretrained(
        cls,
        path: str | pathlib.Path | None = None,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        clamp_fp16: bool | None = None,
        quantization: str | None = None,
        lora: str | pathlib.Path | None = None,
        lora_scale: float = 1.0,
        controlnet: str | pathlib.Path | Literal[False] | None = None,
        controlnet_wiring: str | None = None,
        mesh: Mesh | None = None,
        executables: str | pathlib.Path | None = None,
        background: bool = False,
    ) -> "SanaPipeline":
        """Reads a model.

        Args:
          path: a pipeline folder in the diffusers layout, a training run's folder, or OWNER/NAME on the Hugging Face
            hub. None: the model that comes with the package.
          revision: commit, tag or branch of a model on the hub, which is otherwise the newest at each start.
          dtype: of parameters and computation: "float32", or "bfloat16" for half the memory and speed on GPU and TPU.
            Norms, attention sums and the solver's state are float32 with either. Products of float32 are as
            `jax_default_matmul_precision` says: TF32 on GPUs and bfloat16 on TPUs where it is not "highest".
          clamp_fp16: clip self-attention to the range of float16. The public checkpoints trained in float16
            (Sana_600M_*, Sana_1600M_512px, Sana_1600M_1024px, MultiLing) give broken pictures without. None: as the
            folder's configuration says, else on, with a warning, where name, `_name_or_path` or an fp16 variant show
            one of these.
          quantization: "int8" or "fp8": the transformer's large products in eight bits, see `sana_jax.quantization`; all
            else is of `dtype`, as is all without it.
          lora: a LoRA of the transformer as diffusers and PEFT write it, which is added to its weights: a .safetensors file, a
            folder with one, or OWNER/NAME on the hub. `save_pretrained` then writes the sum.
          lora_scale: how strongly; 1 as it was trained.
          controlnet: a ControlNet of this model, which every call then needs a `control_image` for: its folder as diffusers writes it,
            a .pth file of the original code, or OWNER/NAME on the hub. None: the folder's own, of a SanaControlNetPipeline, if any.
            False: none.
          controlnet_wiring: "original", as the public ControlNets were trained, or "diffusers"; see
            `models.controlnet.ControlNetConfig`. None: "original" of a file of the original code, else as diffusers.
          mesh: several devices of this process, from `sana_jax.parallel.mesh.make_mesh`. The pictures of a call are
            split over its axes `data` and `fsdp`, the rows of each picture over `seq`, parameters over `fsdp`: `data=8`
            draws eight pictures in the time of one, `seq=4` one of 4096x4096 sooner and with less memory a device. The
            pictures are those of one device.
          executables: a folder of compiled programs, by `programs.save` or `python -m sana_jax.export executable` on this
            machine and with these versions: the calls that they are of compile nothing. Others do, with a warning. An
            executable can run anything: give a folder of your own.
          background: return as soon as the files are checked, and read the weights while the first call compiles.

        Raises:
          FileNotFoundError: no such folder, or a file in it is missing.
          ValueError: a file is damaged, parts do not fit, `revision` is of no model on the hub, `dtype` or `quantization` is
            unknown, or the mesh cannot split this model.
        """
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype!r} is not float32 or bfloat16; float16 overflows in linear attention.")
        if quantization is not None:
            check_kind(quantization)
        path = EMBEDDED_MODEL if path is None else path
        if revision is not None and not is_hub_id(path):
            raise ValueError(f"revision={revision!r} is of a model on the hub, and {path} is a folder; leave it out.")
        scale = number("lora_scale", lora_scale)
        if lora is None and scale != 1:
            raise ValueError(f"lora_scale={scale} is given and no lora; it says how strongly a LoRA is added.")
        # Before a model of some GB is fetched.
        change = None if lora is None else open_lora(hub.download_lora(str(lora)) if is_hub_id(lora) else lora)
        if controlnet is not None and controlnet is not False:
            controlnet = hub.download_controlnet(str(controlnet), dtype) if is_hub_id(controlnet) else controlnet
            controlnet_files.check(controlnet, controlnet_wiring)
        branch = {"controlnet": controlnet, "controlnet_wiring": controlnet_wiring}
        local = hub.download(str(path), revision, dtype) if is_hub_id(path) else path
        found = folder.find_pipeline(local, clamp_fp16=clamp_fp16, lora=change, lora_scale=scale, **branch)
        names = [name for name in PARTS if getattr(found, name) is not None]
        places = reading_places(mesh)

        def read(progress=None):
            # No name holds the parameters, so that `put_params` can free what it takes apart.
            return put_params(_quantized(_read(found, dtype, places, progress), quantization), mesh)

        if background:
            abstract = {name: abstract_params(getattr(found, name).module) for name in names}
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), abstract)
            shapes = jax.eval_shape(functools.partial(_quantized, quantization=quantization), abstract)
            params = dict.fromkeys(names, Reading(params_shapes(shapes, mesh), functools.partial(read, _no_progress)))
        else:
            params = read()

        def part(name):
            module = getattr(found, name).module
            return type(module)(dataclasses.replace(module.config, dtype=dtype)), params[name]

        parts = {name: part(name) for name in names}
        return cls(folder.PipelineParts(**parts, tokenizer=found.tokenizer, defaults=found.defaults), mesh, executables)

    def save_pretrained(self, path: str | pathlib.Path, dtype: str = "float32") -> None:
        """Writes the model as a folder that `from_pretrained` and the pipeline of diffusers that model_index.json names open.

        A model that is there is replaced by the whole new one, or stays as it is; other files in its folder are kept. diffusers
        clips the attention of a model that was trained in float16 (`clamp_fp16`) in float16 alone: open such a model with
        `torch_dtype=torch.float16` there.

        Raises:
          ValueError: the transformer is quantised, `dtype` is unknown, a parameter is not in its range, or the folder
            holds files and no model.
        """
        if is_quantized(self.params["transformer"]):
            raise ValueError("a quantised transformer is not saved; load the model without quantization and save that.")
        folder.save_pipeline(
            path,
            transformer=(self.transformer, self.params["transformer"]),
            autoencoder=(self.autoencoder, self.params["autoencoder"]),
            text_encoder=(self.text_encoder, self.params["text_encoder"]),
            tokenizer=self.tokenizer,
            defaults=self.defaults,
            dtype=dtype,
            controlnet=None if self.controlnet is None else (self.controlnet, self.params["controlnet"]),
        )

    @property
    def side_multiple(self) -> int:
        """Height and width must be multiples of this many pixels (unless binning is on)."""
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

    def resolution_binning(self, use_resolution_binning: bool | None = None) -> bool:
        """What `use_resolution_binning` of a call comes to with this model; see `aspect_buckets.check_binning`."""
        sample_size, factor = self.transformer.config.sample_size, self.autoencoder.config.downsample_factor
        return aspect_buckets.check_binning(use_resolution_binning, sample_size, factor)

    def generated_size(self, height: int, width: int, use_resolution_binning: bool | None = None) -> tuple[int, int]:
        """Height and width that are drawn for a picture of the given ones; raises ValueError as a call does."""
        binning = self.resolution_binning(use_resolution_binning)
        height, width = whole_number("height", height), whole_number("width", width)
        sizes = {"sample_size": self.transformer.config.sample_size, "multiple": self.side_multiple}
        return aspect_buckets.generated_size(height, width, binning=binning, **sizes)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        latents: Float[Array, "B h w C"] | np.ndarray | None = None,
        output_type: str = "pil",
        *,
        complex_human_instruction: str | Sequence[str] | None = "model",
        lower_case: bool | None = None,
        use_resolution_binning: bool | None = None,
        pag_scale: float | None = None,
        pag_adaptive_scale: float | None = None,
        pag_layers: Sequence[int] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        solver: str | None = None,
        image: StartImage | None = None,
        strength: float | None = None,
        control_image: StartImage | None = None,
        controlnet_conditioning_scale: float | None = None,
        timesteps: Sequence[float | int] | np.ndarray | None = None,
        step_noise: Float[Array, "S B h w C"] | np.ndarray | None = None,
        decode_strips: int | None = None,
        autoencoder_tiles: tuple[int, int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image] | Float[np.ndarray, "B H W D"]:
        """Draws `num_images_per_prompt` pictures for each prompt, those of one prompt next to each other.

        Args:
          prompt: one or several.
          negative_prompt: what to lead away from: one for all, or one per prompt. "" is the null text of training, and
            so is None. The last ones are encoded once and kept.
          height, width: in pixels, multiples of `side_multiple` unless binning is on. None: the model's own.
          num_inference_steps: network evaluations (two in one pass with guidance). None: the model's own (public: 20;
            Sprint: 2).
          guidance_scale: 1 or less: no guidance, and the negative prompt is not used. None: the model's own (public:
            4.5). A Sprint model embeds the scale and takes no negative prompt.
          num_images_per_prompt: pictures per prompt.
          seed: of the noise. Picture i of the batch starts from noise that depends on `seed` and i alone. Several: one for
            each picture, which is then the first one that its seed alone draws; so requests of several users, each with
            a seed, are one batch: `pipe(["a dog", "a cat"], seed=[7, 3])`.
          latents: the noise itself, float32 [batch, height / f, width / f, channels], in place of `seed`. With
            binning, height and width are those of `generated_size`.
          output_type: "pil"; "np": float32 [batch, height, width, 3] in 0..1; or "latent": the undecoded latents,
            float32, scaled as the transformer has them.
          complex_human_instruction: lines put before every prompt, but not before negative ones. "model": the model's
            own; "diffusers" or "original": the published one in single or in double quotes; None: none. It is encoded
            once and kept.
          lower_case: whether prompts are lower-cased. None: as the model's defaults say, usually true, as in diffusers.
          use_resolution_binning: draw at the trained size of the nearest aspect ratio, then resize bilinearly and crop
            to height x width, which may be any. None: on for models of the public sizes (sample_size 16, 32, 64 or 128,
            factor 32), off for others. Latents are handed out at the size they are drawn at.
          pag_scale: strength of perturbed attention guidance, which costs a third branch; see
            `diffusion.guidance.perturbed_attention_guidance`. 0: none. None: the model's own (0; 3 for folders of
            diffusers' SanaPAGPipeline).
          pag_adaptive_scale: by how much that strength falls per timestep (of 1000). None: the model's own, usually 0.
          pag_layers: numbers of the blocks to perturb. None: the model's own, usually (0,) as in diffusers; the
            original code takes 8 for the 1.6B models and 14 for the 0.6B ones.
          guidance_interval: noise levels between which guidance acts.
          solver: "flow_dpm" or "flow_euler"; None: the model's own, which is "scm" for Sprint and fixed. Timesteps stay
            as the model's own solver has them: whole numbers, or continuous for a folder of Flow-Euler.
          image: picture to start from, one for all prompts or one for each: Pillow pictures, resized to the size that is
            drawn, or a float array [..., height, width, 3] of that size in 0..1. It is encoded and mixed with the noise.
          strength: of img2img, in (0, 1]: of N steps, the first int(N (1 - strength)) are left out, and the picture
            is noised to the level of the next. 1 hardly sees the picture, and nor does any strength above 0.5 with
            Sprint's 2 steps. None: 0.6.
          control_image: what guides the ControlNet of the pipeline, always and only where it has one: edges, depth, ... as the
            ControlNet was trained with; given as `image`.
          controlnet_conditioning_scale: factor on what the ControlNet adds. None: 1.
          timesteps: Sprint only: TrigFlow's angles, one more than steps, decreasing to 0, in place of the public ones.
          step_noise: Sprint only: the noise added after each step but the last, float32
            [steps - 1, batch, height / f, width / f, channels], in place of `seed`.
          decode_strips: horizontal strips in which the fine stages of the autoencoder decode a picture, for less memory;
            the picture is the same (`sana_jax.models.autoencoder_strips`). 1: all at once. None: 1 up to 2048x2048
            pixels and where the devices of `mesh` split the rows, else a strip per 1024x1024 pixels.
          autoencoder_tiles: (side, distance) of overlapping tiles in pixels, as (512, 448): the autoencoder encodes and
            decodes as diffusers' after `enable_tiling`. To compare with diffusers only: unlike strips, tiles change
            the picture. None: no tiles.
          progress: called with (steps done, steps in all) while the pictures are made; on one device only. What it
            raises ends the call. Such calls have a program of their own, which is compiled anew in every process: JAX's
            persistent cache keeps none that calls the host.

        Raises:
          ValueError: an argument that cannot be used; names it, before anything is computed.
        """
        prompts = arguments.texts("prompt", prompt)
        negatives = arguments.texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        check_prompts(prompts)
        if len(negatives) not in (1, len(prompts)):
            raise ValueError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one for all, or one for each."
            )
        num_images_per_prompt = whole_number("num_images_per_prompt", num_images_per_prompt)
        batch = len(prompts) * num_images_per_prompt
        seed, indices = noise.check_seeds(seed, batch)
        for one in np.atleast_1d(seed).tolist():
            check_pictures(num_images_per_prompt, one)
        num_inference_steps = optional(whole_number, "num_inference_steps", num_inference_steps)
        decode_strips = optional(whole_number, "decode_strips", decode_strips)
        if autoencoder_tiles is not None:
            autoencoder_tiles = arguments.pair("autoencoder_tiles", autoencoder_tiles, whole_number, (512, 448))
        guidance_interval = arguments.pair("guidance_interval", guidance_interval, number, (0.0, 1.0))
        pag_scale = optional(number, "pag_scale", pag_scale)
        pag_adaptive_scale = optional(number, "pag_adaptive_scale", pag_adaptive_scale)
        strength = optional(number, "strength", strength)
        if progress is not None and not callable(progress):
            raise ValueError(f"progress={progress!r} cannot be called; give a function of (steps done, steps in all).")
        if timesteps is not None:
            timesteps = arguments.numbers("timesteps", timesteps)
        defaults, sprint = self.defaults, self.defaults.family == "sprint"
        check_family(defaults.family, solver, negatives)
        check_sprint(sprint, guidance_interval, timesteps, num_inference_steps, step_noise, pag_scale)
        strength = check_strength(strength, image is not None)
        control_strength = optional(number, "controlnet_conditioning_scale", controlnet_conditioning_scale)
        check_control(self.controlnet is not None, control_image is not None, control_strength)
        scale = defaults.guidance_scale if guidance_scale is None else number("guidance_scale", guidance_scale)
        height = self.default_height if height is None else whole_number("height", height)
        width = self.default_width if width is None else whole_number("width", width)
        generated = self.generated_size(height, width, use_resolution_binning)
        sampling = plan_sampling(
            self.modules,
            defaults,
            size=(height, width),
            generated=generated,
            guidance_scale=scale,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            strength=None if image is None else strength,
            solver=solver,
            output_type=output_type,
            decode_strips=decode_strips,
            autoencoder_tiles=autoencoder_tiles,
            rows_are_split=rows_are_split(self.mesh),
            reports_steps=progress is not None,
            controlled=control_image is not None,
        )
        fitting = plan_fit((height, width), generated, output_type)
        interval = guidance.guidance_interval(*guidance_interval)
        pag = guidance.perturbed_attention(
            defaults.pag_scale if pag_scale is None else pag_scale,
            defaults.pag_adaptive_scale if pag_adaptive_scale is None else pag_adaptive_scale,
            defaults.pag_layers if pag_layers is None else arguments.whole_numbers("pag_layers", pag_layers),
            self.transformer.config.num_layers,
        )
        instruction = defaults.complex_human_instruction
        if complex_human_instruction != "model":
            if not isinstance(complex_human_instruction, str | None):
                complex_human_instruction = arguments.texts("complex_human_instruction", complex_human_instruction)
            instruction = instruction_lines(complex_human_instruction)
        lower_case = defaults.lower_case if lower_case is None else lower_case
        shape = self.latent_shape(*generated)
        check_call(self.mesh, self.transformer.config, batch, shape[0], sampling)

        text, instruction_ids, cut = self._tokenize(prompts, instruction, lower_case)
        null = None
        if sampling.guided:
            null, _, cut_negative = self._tokenize(negatives, None, lower_case)
            cut += cut_negative
        if cut:
            logging.warning(
                "max_sequence_length=%d tokens of a prompt are read; left out: %s",
                defaults.max_sequence_length,
                ", ".join(map(arguments.shown, dict.fromkeys(cut))),
            )
        inputs = Inputs(
            text=text,
            null=None,
            noise=noise.start_noise(latents, seed, indices, shape),
            guidance_scale=jnp.float32(scale),
            interval=interval if sampling.guided or pag is not None else None,
            pag=pag,
            image=None if image is None else jnp.asarray(prepare_image("image", image, *generated, len(prompts))),
            step_noise=noise.step_noise(step_noise, seed, indices, sampling.num_steps, shape) if sprint else None,
        )
        if control_image is not None:
            picture = jnp.asarray(prepare_image("control_image", control_image, *generated, len(prompts)))
            control_strength = 1.0 if control_strength is None else control_strength
            inputs = inputs._replace(control=Control(picture, jnp.float32(control_strength)))
        out, finite = self._run(inputs, instruction_ids, null, sampling, progress)
        if fitting is not None:
            out = self.programs(program.fit, out, sampling=fitting)
        # Waits before it copies: of a result that memory did not suffice for, a copy on a CPU aborts the process.
        out, finite = jax.device_get(jax.block_until_ready((out, finite)))
        if not finite.all():
            self._warn_of_broken(np.flatnonzero(~finite), batch, scale)
        return [Image.fromarray(picture) for picture in out] if output_type == "pil" else out

    def _warn_of_broken(self, pictures: Int[np.ndarray, " N"], batch: int, scale: float) -> None:
        reason = f"guidance_scale={scale:g} is too large"
        if not self.transformer.config.clamp_fp16:
            reason = f"the checkpoint was trained in float16 and needs clamp_fp16=True of from_pretrained, or {reason}"
        logging.warning(
            "of %d pictures these, counted from 0, are not of finite numbers and come out black or broken: %s. Likely %s.",
            batch,
            ", ".join(map(str, pictures)),
            reason,
        )

    def _tokenize(
        self, texts: list[str], instruction: tuple[str, ...] | None, lower_case: bool
    ) -> tuple[Text, Int[np.ndarray, " P"] | None, list[str]]:
        """Tokens after the instruction; the instruction's, None where all are among the former; what is cut off."""
        settings = instruction, self.defaults.max_sequence_length, lower_case
        ids, mask = tokenize_prompts(self.tokenizer, texts, *settings)
        cut = left_out(self.tokenizer, texts, *settings)
        constant = constant_tokens(self.tokenizer, instruction, ids) if instruction else 0
        return Text(ids[:, constant:], mask[:, constant:], None), ids[0, :constant] if constant else None, cut

    def _run(
        self,
        inputs: Inputs,
        instruction_ids: Int[np.ndarray, " P"] | None,
        null: Text | None,
        sampling: Sampling,
        progress: Callable[[int, int], None] | None,
    ) -> Drawn:
        """Completes `inputs` by what the encoder makes of the instruction and of the negative prompts, and draws."""

        def complete(texts: TextCache | TextShapes, params: dict) -> Inputs:
            whole = inputs
            if instruction_ids is not None:
                whole = whole._replace(text=whole.text._replace(prefix=texts.prefix(params, instruction_ids)))
            if null is not None:
                whole = whole._replace(null=Features(texts.hidden(params, null.ids, null.mask), null.mask))
            return whole

        if isinstance(self._params, Reading) and not self._params.done():
            shapes = self._params.shapes
            whole = complete(TextShapes(self.programs, self.text_encoder.config), shapes["text_encoder"])
            self.programs.compile(program.draw, shapes, input_shapes(whole, self.mesh), sampling=sampling)
        params = self.params
        whole = put_inputs(complete(self._text_cache, params["text_encoder"]), self.mesh)
        return self.programs(program.draw, params, whole, sampling=sampling, progress=progress)


def _read(found, dtype: str, places, progress) -> dict:
    parts = folder.read_pipeline(found, dtype, shardings=places, progress=progress)
    return {name: getattr(parts, name)[1] for name in PARTS if getattr(parts, name) is not None}


def _quantized(params: dict, quantization: str | None) -> dict:
    if quantization is None:
        return params
    return params | {"transformer": quantize_transformer(params["transformer"], quantization)}


def _no_progress(done: int, total: int) -> None:
    """While a thread reads, the terminal's line is somebody else's."""
