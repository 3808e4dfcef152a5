"""The diffusion transformer with the tokens of a picture split over the mesh axis `seq`.

Each device works on some rows of every picture's latents. What crosses devices is, per layer and picture, one sum of the
linear attention's state ([heads, 32, 33] float32, about 300 kB at 70 heads, whatever the resolution) and one row of the
feed-forward layer's grid to each neighbour; text, modulation and cross-attention are local. The axes `data` and `fsdp` are
left to XLA's partitioner. tests/distributed reads the collectives from the compiled program.
"""

import dataclasses
import functools

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from sana_jax.models.attention import TextKeys
from sana_jax.models.controlnet import Branch, control
from sana_jax.models.transformer import SanaTransformer, TransformerConfig

AXIS = "seq"
_ROWS = P(None, AXIS)


def apply_transformer(
    transformer: SanaTransformer,
    params: dict,
    latents: Float[Array, "B H W C"],
    *inputs: Array | TextKeys | tuple[TextKeys, ...],
    perturbed: Bool[Array, "N B"] | None = None,
    branch: Branch | None = None,
) -> Float[Array, "B H W C"]:
    """`transformer.apply`, with the rows of the latents split over `seq` where the mesh in force (`jax.set_mesh`) has it.

    Args:
      transformer: whole, without `seq_axis`.
      params: its parameters.
      latents: noisy latents.
      inputs: timesteps, text features or keys, text mask; guidance where the model takes it.
      perturbed: as the transformer takes it.
      branch: of a ControlNet, without `seq_axis`; None: there is none.

    Raises:
      ValueError: `seq` does not divide the rows of tokens.
    """

    def apply(module, net, params, latents, perturbed, added, *inputs):
        controlled = None
        if added is not None:
            timesteps, _, text_mask = inputs[:3]
            controlled = control(Branch(net, *added), latents, timesteps, text_mask)
        return module.apply({"params": params}, latents, *inputs, perturbed=perturbed, control=controlled)

    net, *added = branch or (None,)
    arrays = params, latents, perturbed, tuple(added) or None, *inputs
    devices = dict(jax.sharding.get_abstract_mesh().shape).get(AXIS, 1)
    if devices == 1:
        return apply(transformer, net, *arrays)
    check_rows(transformer.config, latents.shape[1], devices)
    modules = [module and dataclasses.replace(module, seq_axis=AXIS) for module in (transformer, net)]
    of_branch = P(), P(), _ROWS, P()  # parameters, strength, hint, text
    on_rows = jax.shard_map(
        functools.partial(apply, *modules),
        axis_names={AXIS},
        in_specs=(P(), _ROWS, P(), of_branch if branch else P(), *(P() for _ in inputs)),
        out_specs=_ROWS,
        # Replication is not tracked through the kernels' own derivatives; the gradient of what is replicated is
        # summed over the axis either way.
        check_vma=False,
    )
    return on_rows(*arrays)


def check_rows(config: TransformerConfig, height: int, devices: int) -> None:
    """Raises ValueError where so many devices of `seq` cannot share the tokens of a latent grid with `height` rows."""
    tokens = height // config.patch_size
    if height % config.patch_size == 0 and tokens % devices:
        fits = max(d for d in range(1, devices + 1) if tokens % d == 0)
        raise ValueError(f"mesh.{AXIS}={devices} does not divide the {tokens} rows of tokens. Use mesh.{AXIS}={fits}.")
