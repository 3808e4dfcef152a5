"""The sampler over several devices: where the arrays of a call live, and what a mesh cannot split.

Pictures go over `data` and `fsdp`, the rows of each over `seq`, parameters over `fsdp` by their tables of logical axes;
every device of `seq` encodes the text. Over `data` nothing crosses devices at all, over `seq` what `parallel.transformer`
and `parallel.autoencoder` say: tests/distributed reads that from the compiled program. `sampling.program.draw` acts on the
mesh in force. None in place of a mesh is one device.
"""

import contextlib
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax.models import layers
from sana_jax.models.placement import BATCH_AXES
from sana_jax.models.transformer import TransformerConfig
from sana_jax.parallel import transformer
from sana_jax.parallel.mesh import AXES
from sana_jax.parallel.sharding import LATENTS, array_spec, shardings
from sana_jax.sampling.program import Control, Features, Inputs, Sampling, Text
from sana_jax.weights.placement import Shardings, default_device


def check_mesh(mesh: Mesh) -> None:
    """Raises ValueError for what is no mesh, one of other axes, or of several processes."""
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh={mesh!r} is not a mesh; make one with sana_jax.parallel.mesh.make_mesh.")
    if mesh.axis_names != AXES:
        raise ValueError(
            f"the mesh has the axes {mesh.axis_names}, and the sampler knows {AXES}; make it with "
            "sana_jax.parallel.mesh.make_mesh."
        )
    if mesh.is_multi_process:
        raise ValueError(
            f"the mesh has devices of several of the {jax.process_count()} processes, and the sampler runs in one; use "
            "make_mesh(..., devices=jax.local_devices())."
        )


def check_call(mesh: Mesh | None, config: TransformerConfig, batch: int, height: int, sampling: Sampling) -> None:
    """Raises ValueError where the devices cannot share this many pictures, with latents of `height` rows."""
    if mesh is None:
        return
    ways, seq = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["seq"]
    if batch % ways:
        raise ValueError(
            f"{batch} pictures cannot be split over mesh.data * mesh.fsdp = {ways} devices. Draw a multiple of {ways} "
            "(num_images_per_prompt), or put the devices on mesh.seq, which splits each picture."
        )
    if seq > 1 and config.self_attention != "linear":
        raise ValueError(
            f"self_attention={config.self_attention!r} needs all tokens of a picture on one device, and mesh.seq={seq} "
            "splits them. Use mesh.seq=1 and a larger mesh.data."
        )
    transformer.check_rows(config, height, seq)
    if sampling.reports_steps and mesh.size > 1:
        raise ValueError(
            f"progress is called in the order of the steps, which JAX cannot promise for a program on {mesh.size} "
            "devices; leave it out."
        )
    if seq > 1 and (sampling.autoencoder_tiles is not None or sampling.decode_strips > 1):
        name = "autoencoder_tiles" if sampling.autoencoder_tiles is not None else "decode_strips"
        raise ValueError(
            f"{name}={getattr(sampling, name)} needs whole pictures, and mesh.seq={seq} splits them over devices, "
            "which saves memory too; leave it out, or use mesh.seq=1."
        )


def rows_are_split(mesh: Mesh | None) -> bool:
    """Whether several devices share a picture."""
    return mesh is not None and mesh.shape["seq"] > 1


def in_force(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """A context in which programs are traced for the mesh; None: for one device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def reading_places(mesh: Mesh | None) -> Mapping[str, Shardings] | Shardings:
    """What `weights.folder.read_pipeline` takes as `shardings`."""
    if mesh is None:
        return default_device
    check_mesh(mesh)

    def places(part):
        def place(path, shape):
            return NamedSharding(mesh, array_spec((part, *path.split("/")), shape, dict(mesh.shape)))

        return place

    return {part: places(part) for part in ("transformer", "autoencoder", "text_encoder", "controlnet")}


def put_params(params: dict, mesh: Mesh | None) -> dict:
    """Parameters by name of the part, on the devices that work with them; those that are there are not moved.

    On one CPU or GPU the layers are taken apart, which is faster there: see `models.layers`. What nothing else holds is freed
    meanwhile.
    """
    if mesh is None:
        params = jax.device_put(params)  # dicts of its own, which `_layers_apart` empties
        return _layers_apart(params)
    check_mesh(mesh)
    return jax.device_put(params, shardings(params, mesh))


def _layers_apart(params: dict) -> dict:
    if jax.default_backend() == "tpu":
        return params
    scanned = [name for name in ("transformer", "text_encoder", "controlnet") if name in params]
    return params | {name: layers.take_apart(params[name]) for name in scanned}


def put_inputs(inputs: Inputs, mesh: Mesh | None) -> Inputs:
    """The arrays of a call on the mesh."""
    return inputs if mesh is None else jax.device_put(inputs, input_shardings(inputs, mesh))


def params_shapes(shapes: dict, mesh: Mesh | None) -> dict:
    """Shapes with their places, as `put_params` puts the arrays."""
    if mesh is None:
        return jax.eval_shape(_layers_apart, shapes)
    return _placed(shapes, shardings(shapes, mesh))


def input_shapes(inputs: Inputs, mesh: Mesh | None) -> Inputs:
    """Shapes of the arrays of a call, some of which may be shapes already, as `put_inputs` puts them."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if _is_committed(x) else None), inputs
    )
    return shapes if mesh is None else _placed(shapes, input_shardings(shapes, mesh))


def _is_committed(array) -> bool:
    return isinstance(array, jax.Array) and array.committed


def _placed(shapes, places):
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def input_shardings(inputs: Inputs, mesh: Mesh) -> Inputs:
    """The sharding of every array of a call, or of their shapes (`jax.ShapeDtypeStruct`)."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def prompts(rows) -> tuple[str, ...] | None:
        # As many as pictures, fewer, or one for all: where they cannot be split, every device encodes all of them.
        return BATCH_AXES if rows.shape[0] % ways == 0 else None

    text, null = inputs.text, inputs.null
    specs = Inputs(
        text=Text(P(prompts(text.ids)), P(prompts(text.mask)), jax.tree.map(lambda _: P(), text.prefix)),
        null=None if null is None else Features(P(prompts(null.hidden)), P(prompts(null.mask))),
        noise=LATENTS,
        guidance_scale=P(),
        interval=None if inputs.interval is None else P(),
        pag=jax.tree.map(lambda _: P(), inputs.pag),
        image=None if inputs.image is None else P(prompts(inputs.image), "seq"),
        step_noise=None if inputs.step_noise is None else P(None, *LATENTS),
        control=None if inputs.control is None else Control(P(prompts(inputs.control.image), "seq"), P()),
    )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
