"""What trains in place of a transformer whose weights stay as they are: a LoRA, or a ControlNet."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array

from sana_jax import flops
from sana_jax.models.controlnet import Branch, SanaControlNet
from sana_jax.models.transformer import SanaTransformer
from sana_jax.training import controlnet, lora
from sana_jax.training.state import PyTree
from sana_jax.weights import lora as lora_files
from sana_jax.weights import parts


class Adapter(NamedTuple):
    """See the module. In what the functions are given, `params` is what trains, by name.

    Attributes:
      init: key -> params at random.
      load_initial: shardings of the parameters -> params to start from in place of `init`'s, whose shapes alone are then of use;
        None: there are none.
      weights: (params, frozen) -> the transformer's parameters for a call.
      picture_flops: operations of one velocity for one picture -> those of a training step for it.
      export: (params on the host, folder, dtype) writes what trains, in the public layout.
      net: the ControlNet; None of a LoRA.
    """

    init: Callable[[jax.Array], PyTree]
    load_initial: Callable[[PyTree], PyTree] | None
    weights: Callable[[PyTree, PyTree], PyTree]
    picture_flops: Callable[[int], int]
    export: Callable[[PyTree, pathlib.Path, str], None]
    net: SanaControlNet | None = None

    def branch(self, params: PyTree, hint: Array | None, hidden: Array) -> Branch | None:
        """What the ControlNet adds to a call, given latents of the pictures that guide and features of the captions."""
        return None if self.net is None else Branch(self.net, params["controlnet"], 1.0, hint, hidden)


def make_adapter(config, transformer: SanaTransformer) -> Adapter | None:
    """Of `config.lora` or `config.controlnet`; None where the transformer itself trains.

    Args:
      config: the whole tree.
      transformer: of `config.model`.
    """
    if config.lora.rank:
        return _lora(config, transformer)
    return _controlnet(config, transformer) if config.controlnet.num_layers else None


def _lora(config, transformer) -> Adapter:
    section, shapes = config.lora, parts.abstract_params(transformer)

    def export(params, path, dtype):
        lora_files.save(path, transformer, params["transformer"], section.scale, dtype)

    return Adapter(
        init=lambda key: {"transformer": lora.init(key, shapes, section.rank, section.layers)},
        load_initial=None,
        weights=lambda params, frozen: lora.joined(frozen["transformer"], params["transformer"], section.scale),
        picture_flops=lambda velocity: flops.training_flops(passed=velocity),
        export=export,
    )


def _controlnet(config, transformer) -> Adapter:
    net = SanaControlNet(controlnet.controlnet_config(config))
    shapes, count = parts.abstract_params(net), transformer.config.num_layers

    def load_initial(places):
        own = places["controlnet"]
        trained = config.controlnet.init_from
        return {"controlnet": controlnet.load(config, own) if trained else controlnet.copied(config, shapes, own)}

    def picture_flops(velocity):
        copies, before = net.config.num_layers, controlnet.first_guided(net.config)
        own = flops.training_flops(trained=velocity * copies // count)
        return own + flops.training_flops(
            frozen=velocity * before // count, passed=velocity * (count - before) // count
        )

    def export(params, path, dtype):
        parts.save(parts.CONTROLNET, net, params["controlnet"], path / parts.CONTROLNET.subfolder, dtype)

    return Adapter(
        init=lambda key: {"controlnet": controlnet.init(key, net)},
        load_initial=load_initial,
        weights=lambda params, frozen: frozen["transformer"],
        picture_flops=picture_flops,
        export=export,
        net=net,
    )
