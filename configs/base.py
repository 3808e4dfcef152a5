"""Every field of a training run, with defaults that suit most runs. Experiments are the other files of this folder."""

import dataclasses
import typing

from ml_collections import ConfigDict, FieldReference

from sana_jax.data.loader import LoaderConfig
from sana_jax.training import lora


def get_config() -> ConfigDict:
    """The tree that experiments fill in; `--config.SECTION.FIELD=VALUE` overrides any of it."""
    config = ConfigDict()
    config.task = "transformer"  # or "autoencoder"
    config.seed = 0
    config.dtype = "float32"  # of the computation; what trains, optimizer and average are always float32
    # Folder in diffusers layout, or a run's WORKDIR, whose weights to start from, or beside which a LoRA or a ControlNet trains.
    config.init_from = ""
    config.init_adapts = ()  # fields of the model, of training/settings.py's INIT_ADAPTS, that init_from may have otherwise
    config.init_blocks = ()  # numbers of init_from's blocks that are taken over; further ones change nothing at first. (): all

    config.model = ConfigDict()  # fields of TransformerConfig or AutoencoderConfig: `fields(preset)`

    # Task "transformer": the frozen autoencoder, and the text encoder.
    config.autoencoder_path = ""  # pipeline, vae folder or WORKDIR; "" is the embedded model's
    config.autoencoder_dtype = "float32"
    config.text_encoder = ConfigDict()
    config.text_encoder.mode = "train"  # jointly with the transformer, or "frozen"
    config.text_encoder.path = ""  # pipeline folder with text_encoder/ and tokenizer/ (mode "frozen")
    config.text_encoder.tokenizer = ""  # tokenizer.json; "" trains one on the captions (mode "train")
    config.text_encoder.max_length = 300  # text tokens the transformer sees
    config.text_encoder.null_mask = (
        "own"  # a dropped caption's mask goes with it; "prompt": it stays, as in public training
    )
    config.text_encoder.use_instruction = False  # prefix the complex human instruction to every caption
    config.text_encoder.instruction = "diffusers"  # in whose quotation marks; "original": in those of public training
    config.text_encoder.lower_case = True  # captions and prompts, as in diffusers; not so in public training
    config.text_encoder.model = ConfigDict()  # fields of TextEncoderConfig (mode "train")

    # Task "transformer": a LoRA. All else of the model at init_from stays as it is; export/ then has the LoRA's file alone.
    config.lora = ConfigDict()
    config.lora.rank = 0  # 0: the whole transformer trains
    config.lora.scale = 1.0  # alpha / rank
    config.lora.layers = lora.ATTENTIONS  # all but "feed_forward/expand" and "feed_forward/project" of `lora.LAYERS`

    # Task "transformer": a ControlNet, of copies of the first blocks; needs a set with pictures that guide. All else of the model at
    # init_from stays as it is; export/ then has the ControlNet alone.
    config.controlnet = ConfigDict()
    config.controlnet.num_layers = 0  # copied blocks, 7 in the public ones; 0: there is no ControlNet
    config.controlnet.wiring = "diffusers"  # or "original", see `ControlNetConfig`
    config.controlnet.init_from = ""  # a ControlNet to go on from: folder, .pth file or WORKDIR; "": copies

    # Task "transformer": distillation to a model of few steps that takes a guidance scale, as SANA-Sprint (training/distillation.py).
    config.distillation = ConfigDict()
    config.distillation.teacher = ""  # pipeline, transformer's folder or WORKDIR; "": the transformer learns from data
    config.distillation.guidance_scales = (4.0, 4.5, 5.0)  # of the teacher, one drawn for each picture
    config.distillation.angle_mean = 0.2  # of the normal law of log(tan t / 2)
    config.distillation.angle_std = 1.6
    config.distillation.tangent_warmup = 4000  # steps until the tangent is whole
    config.distillation.adversarial_weight = 0.5  # of a critic, beside consistency's 1; 0: there is none
    config.distillation.critic_blocks = (2, 8, 14, 19)  # of the teacher, whose outputs its heads see
    config.distillation.critic_angle_mean = -0.6  # likewise of the noise under which the critic sees pictures
    config.distillation.critic_angle_std = 1.0
    config.distillation.pure_noise_share = 0.5  # of the student's pictures for the critic that begin at pure noise

    # Task "autoencoder": the loss. The first term has weight 1.
    config.reconstruction = "l1"  # or "l2", which is what PSNR measures
    config.perceptual_weight = 0.0
    config.perceptual = "efficientnet"  # EfficientNet-Lite0's features; or "lpips", with the two files it needs:
    config.lpips_vgg = ""  # torchvision's vgg16-397923af.pth
    config.lpips_heads = ""  # lpips/weights/v0.1/vgg.pth
    config.freeze_encoder = False  # train the decoder alone: latents stay what a transformer has learnt
    config.latent_noise = (
        0.0  # noise on the latents that are decoded: standard deviations at one of the normal law's own
    )
    config.gan = ConfigDict()
    config.gan.weight = 0.0  # 0: no discriminator
    config.gan.start_step = 0  # the autoencoder alone until then
    config.gan.width = 64
    config.gan.depth = 3

    # Fields of LoaderConfig: path "" is the emoji set in the repository; batch_size is over all devices and hosts.
    config.data = fields(LoaderConfig(image_size=512, batch_size=1024))

    config.mesh = ConfigDict()
    config.mesh.data = -1  # what the other axes leave over
    config.mesh.fsdp = 1
    config.mesh.seq = 1
    config.mesh.multihost = False  # several processes: join them through jax.distributed
    # Found by itself on TPU, GKE, Slurm and Open MPI; elsewhere all three, the last one different in every process.
    config.mesh.coordinator = ""  # HOST:PORT of process 0
    config.mesh.num_processes = 0
    config.mesh.process_id = -1

    config.train = ConfigDict()
    config.train.num_steps = 100_000
    config.train.class_dropout_prob = 0.1  # captions replaced by the empty prompt
    config.train.flow_shift = 3.0
    config.train.logit_mean = 0.0  # of the normal law whose sigmoid, shifted, is the noise level
    config.train.logit_std = 1.0
    config.train.cache_latents = False  # encode every picture once, before training; 2 bytes a value on disk
    # Parts of the batch, one after the other; the update is that of the whole batch (but latent_noise goes by each part's latents).
    config.train.accumulate_steps = 1
    config.train.skip_nonfinite = 0  # updates in a row that may be skipped because loss or gradient is not finite
    config.train.log_every = 50
    config.train.sample_every = 1000  # 0: never
    config.train.checkpoint_every = 1000
    config.train.keep_checkpoints = 2  # the newest ones
    config.train.keep_every = 0  # and for ever those of every so many steps; 0: none
    config.train.export_dtype = "float32"
    config.train.profile_steps = ()  # (first, last): traced by JAX's profiler into WORKDIR/profile
    config.train.cache_folder = ""  # of what is made of a set, for all runs: latents, lists of large sets; "": WORKDIR
    config.train.compilation_cache = ""  # folder; "": where JAX has it already, or WORKDIR/compilation_cache

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or "adamw8bit", "came", "came8bit", "muon" (matrices by Muon, the rest by AdamW)
    config.optimizer.convert_state = False  # resume a run of came as came8bit, of adamw as adamw8bit, or back
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 1000  # before a decay at most a tenth of train.num_steps
    config.optimizer.schedule = "constant"  # after the warm-up; or "cosine", "linear"
    config.optimizer.final_fraction = 0.0  # of the learning rate, at train.num_steps
    config.optimizer.betas = (0.9, 0.999)  # three for CAME
    config.optimizer.adamw_eps = 1e-8
    config.optimizer.came_eps = (1e-30, 1e-16)  # beside the squares of gradients, and of the momentum's residuals
    config.optimizer.came_clip = 1.0  # root mean square of a tensor's step before momentum, at most
    config.optimizer.muon_rms = (
        0.2  # root mean square of a matrix's update over the learning rate; AdamW's is about 0.2
    )
    config.optimizer.weight_decay = 0.0
    config.optimizer.grad_clip_norm = 1.0  # 0: none

    config.ema = ConfigDict()
    config.ema.decay = 0.999  # 0: no average

    # What is drawn of held-out pictures every train.sample_every steps, always from the same noise.
    config.sample = ConfigDict()
    config.sample.split = "heldout"  # "train" for sets that hold nothing out; the metrics are named by it
    config.sample.num_images = 32
    config.sample.prompts = ()  # the first of the pictures' prompts; the rest are held-out captions
    config.sample.num_inference_steps = 20
    config.sample.guidance_scale = 4.5
    return config


def fields(preset) -> ConfigDict:
    """A frozen config (of a model, of the loader) as a section of this tree; its dtype is left to `config.dtype`."""

    def overridable(value, kind):
        if dataclasses.is_dataclass(value):
            return fields(value)
        # Every optional field is a number; a reference keeps its type beside None (`train.py` reads FIELD=None).
        return FieldReference(value, float) if type(None) in typing.get_args(kind) else value

    kinds = typing.get_type_hints(type(preset))
    names = [field.name for field in dataclasses.fields(preset) if field.name != "dtype"]
    return ConfigDict({name: overridable(getattr(preset, name), kinds[name]) for name in names})
