"""What the backward pass of a block computes again in place of keeping it: policies by name.

From most memory and least time to the reverse: "none" keeps everything (with mesh.fsdp > 1 every layer's gathered weights
too), "minimal" the outputs of dense layers and of DC-AE's 3x3 convolutions, names joined by "+" ("attention+feed_forward")
the outputs of these layers, "full" each block's input alone. "offload" keeps the outputs of all named layers in the host's
memory: their bytes cross to the host and back, and nothing else is kept.
"""

import functools

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

__all__ = ["PRODUCT", "check_remat", "checkpoint_name", "recomputed", "remat"]

# The name of the outputs of dense layers and of DC-AE's 3x3 convolutions. (JAX's own policy for matrix products does not see
# those within a custom derivative.)
PRODUCT = "product"

# Cheap mathematics with float32 insides: the backward pass recomputes it from its compute-dtype inputs, which takes less time
# and memory than keeping the intermediates of every layer. (No CSE barrier is needed: the blocks are scanned.)
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)

POLICIES = ("none", "minimal", "full", "offload")


def remat(block: type[nn.Module], policy: str, names: tuple[str, ...], *, scanned: bool) -> type[nn.Module]:
    """The module class with its backward pass under a policy.

    Args:
      block: calls `checkpoint_name` on the outputs of its layers.
      policy: see the file's beginning.
      names: the layers that it names.
      scanned: whether it is the body of a scan, where XLA cannot undo the recomputation by merging it with the forward pass.
    """
    if policy == "none":
        return block
    policies = jax.checkpoint_policies
    if policy == "full":
        keep = None
    elif policy == "minimal":
        keep = policies.save_only_these_names(PRODUCT)
    elif policy == "offload":
        keep = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(names),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        keep = policies.save_only_these_names(*policy.split("+"))
    return nn.remat(block, policy=keep, prevent_cse=not scanned)


def check_remat(policy: str, names: tuple[str, ...]) -> None:
    """Raises ValueError where `policy` is no policy of a block that names these layers."""
    if policy not in POLICIES and not set(policy.split("+")) <= set(names):
        raise ValueError(
            f"remat={policy!r} is unknown; use one of {', '.join(POLICIES)}, or layers whose outputs are kept, joined by + "
            f"({', '.join(names)})."
        )
