"""Shape and switches of the diffusion transformer."""

import dataclasses

from sana_jax.kernels.glu_mbconv.api import IMPLEMENTATIONS as MIX_FFN_IMPLEMENTATIONS
from sana_jax.kernels.linear_attention.api import IMPLEMENTATIONS as ATTENTION_IMPLEMENTATIONS
from sana_jax.models.remat import check_remat
from sana_jax.models.sizes import check_numbers

REMAT_NAMES = ("attention", "cross_attention", "feed_forward")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and switches of a `SanaTransformer`. Presets of the public models are in `presets.py`.

    Attributes:
      sample_size: side of the square latent grid the model was trained at; only the position table depends on it.
      patch_size: latent pixels per token side.
      in_channels, out_channels: latent channels.
      width: channels of the residual stream.
      num_layers: number of blocks.
      attention_head_dim: channels per self-attention head.
      num_cross_attention_heads: heads of the attention to the text.
      caption_channels: channels of the text features.
      mlp_ratio: hidden width of the feed-forward layer over `width`, rounded down.
      qk_norm: RMSNorm on queries and keys of both attentions (SANA-1.5, Sprint).
      guidance_embeds: the call takes a guidance scale and embeds it (Sprint).
      guidance_embeds_scale: factor on that guidance scale.
      timestep_scale: factor on the timestep (0..1000) before it is embedded; 0.001 for Sprint.
      integer_timesteps: truncate timesteps before they are scaled, as the stock models were trained.
      interpolation_scale: of the position table; None for the models without one.
      self_attention: "linear", or "softmax" as an ablation.
      feed_forward: "mix_ffn", or "gelu_mlp" as an ablation.
      attention_implementation: of the linear attention, one of `kernels.linear_attention`'s; "auto" lets the platform choose.
      feed_forward_implementation: likewise of the Mix-FFN's middle, one of `kernels.glu_mbconv`'s.
      attention_eps: of the linear attention; 1e-15 in diffusers, 1e-8 in the original code.
      cross_norm_eps: of the cross-attention's q and k norm; 1e-5 in diffusers, 1e-6 in the original code.
      clamp_fp16: clip the self-attention output to +-65504, which the fp16 checkpoints need at any precision.
      remat: what the backward pass computes again, "none" to "full"; see `models.remat`.
      unroll: blocks per step of the scan. More make a larger program, which CPUs run faster: a training step of the
        embedded model takes 11.6 ms a picture with all 6 in one step and 18.1 ms with one.
      dtype: of the computation. Parameters are float32; sums, norms and softmax are computed in float32.
    """

    sample_size: int = 32
    patch_size: int = 1
    in_channels: int = 32
    out_channels: int = 32
    width: int = 2240
    num_layers: int = 20
    attention_head_dim: int = 32
    num_cross_attention_heads: int = 20
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    qk_norm: bool = False
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    timestep_scale: float = 1.0
    integer_timesteps: bool = True
    interpolation_scale: float | None = None
    self_attention: str = "linear"
    feed_forward: str = "mix_ffn"
    attention_implementation: str = "auto"
    feed_forward_implementation: str = "auto"
    attention_eps: float = 1e-15
    cross_norm_eps: float = 1e-5
    clamp_fp16: bool = False
    remat: str = "none"
    unroll: int = 1
    dtype: str = "float32"

    def __post_init__(self):
        check_numbers(
            self,
            counts=("sample_size", "patch_size", "in_channels", "out_channels", "width", "num_layers", "attention_head_dim",
                    "num_cross_attention_heads", "caption_channels", "unroll"),
            factors=("mlp_ratio", "guidance_embeds_scale", "timestep_scale", "interpolation_scale", "attention_eps",
                     "cross_norm_eps"),
        )  # fmt: skip
        for name in ("attention_head_dim", "num_cross_attention_heads"):
            if self.width % getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} does not divide width={self.width}; every head must have the same "
                    f"number of channels. Use a divisor of {self.width}."
                )
        if self.interpolation_scale is not None and self.width % 4:
            raise ValueError(
                f"width={self.width} is not a multiple of 4, which the position table needs (sine and cosine of two "
                f"axes). Use width={self.width // 4 * 4} or interpolation_scale=None."
            )
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"patch_size={self.patch_size} does not divide sample_size={self.sample_size}. Use a divisor of it."
            )
        choices = {
            "self_attention": ("linear", "softmax"),
            "feed_forward": ("mix_ffn", "gelu_mlp"),
            "attention_implementation": ("auto", *ATTENTION_IMPLEMENTATIONS),
            "feed_forward_implementation": ("auto", *MIX_FFN_IMPLEMENTATIONS),
            "dtype": ("float32", "bfloat16", "float16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(allowed)}.")
        if self.self_attention == "softmax" and self.attention_implementation != "auto":
            raise ValueError(
                f"attention_implementation={self.attention_implementation!r} is of linear attention, and "
                "self_attention='softmax'. Use 'auto'."
            )
        if self.feed_forward == "gelu_mlp" and self.feed_forward_implementation != "auto":
            raise ValueError(
                f"feed_forward_implementation={self.feed_forward_implementation!r} is of the Mix-FFN, and "
                "feed_forward='gelu_mlp'. Use 'auto'."
            )
        check_remat(self.remat, REMAT_NAMES)
