"""`train.py --aot=TOPOLOGY`: the real training step, compiled for accelerators that are not here."""

import dataclasses
import functools
import math
import time

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax.aot import collectives, traffic
from sana_jax.aot.report import Memory, Report, Show, out_of_memory
from sana_jax.aot.stand_ins import stand_in_sources
from sana_jax.aot.topologies import Topology, open_topology
from sana_jax.parallel import sharding
from sana_jax.parallel.mesh import check_batch, make_mesh
from sana_jax.training.loop import make_task
from sana_jax.training.prefetch import WAITING
from sana_jax.training.program import TrainProgram, abstract_batch, example_batch, make_program
from sana_jax.training.ranges import check_ranges
from sana_jax.training.settings import check_platform, loader_config
from sana_jax.training.task import Task


def compile_ahead(config, topology_name: str, *, show: bool = False) -> Report:
    """Compiles the step of `config` for a topology and says what it needs; nothing is allocated or run.

    No weights, pictures or tokenizer are read; see `stand_ins`.

    Args:
      config: the whole tree, as for `train`.
      topology_name: see `open_topology`.
      show: also compile the program that draws the held-out pictures, which takes up to twice as long as the step.

    Raises:
      ValueError: there is no such topology, or the config does not fit it or itself.
      ModuleNotFoundError: the compiler is not installed.
    """
    topology = open_topology(topology_name)
    lowered, mesh, known = lower_step(config, topology)
    report = compile_lowered(lowered, topology, mesh, **known)
    return dataclasses.replace(report, show=compile_show(config, topology)) if show else report


def lower_step(config, topology: Topology) -> tuple[jax.stages.Lowered, Mesh, dict]:
    """The step of `config` before it is compiled, its mesh, and what a `Report` says of it beside the compiler.

    Raises:
      ValueError: the config does not fit the topology or itself.
    """
    mesh, task, program = _abstract_run(config, topology)
    size = largest_size(config)
    batch, heldout = abstract_batch(config, task, mesh, size), abstract_heldout(config, task, mesh)
    weights = [part for name, part in program.frozen.items() if name in sharding.MODELS]  # not what is computed of them
    parameters = count(program.state.params), count(weights)
    logging.info("%s parameters, %s frozen; compiling for %s", *(f"{n:,}" for n in parameters), topology.name)
    with jax.set_mesh(mesh):
        lowered = program.step.lower(program.state, program.frozen, batch)
    known = {
        "batch_size": config.data.batch_size,
        "parameters": parameters[0],
        "frozen_parameters": parameters[1],
        "step_flops": config.data.batch_size * task.picture_flops(*size),
        "beside": WAITING * device_bytes(batch) + device_bytes(heldout),
    }
    return lowered, mesh, known


def compile_show(config, topology: Topology) -> Show:
    """Compiles the drawing of held-out pictures as `train` runs it every `train.sample_every` steps.

    Raises:
      ValueError: the config does not fit the topology or itself.
    """
    mesh, task, program = _abstract_run(config, topology)
    batch, heldout = abstract_batch(config, task, mesh, largest_size(config)), abstract_heldout(config, task, mesh)
    averaged = program.state.averaged()
    with jax.set_mesh(mesh):
        lowered = program.show.lower(averaged, program.frozen, heldout)
    compiled, refusal, seconds = _compile(lowered, topology)
    # The last step's batch is still there, and of the state what is not drawn with.
    beside = WAITING * device_bytes(batch) + device_bytes(program.state) - device_bytes(averaged)
    return Show(memory(compiled, beside) if compiled else None, refusal, seconds)


def _abstract_run(config, topology: Topology) -> tuple[Mesh, Task, TrainProgram]:
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.seq, devices=topology.devices)
    check_batch(config.data.batch_size, mesh, config.train.accumulate_steps)
    check_platform(config.model, mesh.devices.flat[0].platform)
    check_ranges(config)
    task = make_task(config, functools.partial(stand_in_sources, config))
    # Shapes come before the mesh is set: under a mesh of devices that are not here nothing can be computed.
    return mesh, task, make_program(config, task, mesh)


def compile_lowered(lowered: jax.stages.Lowered, topology: Topology, mesh: Mesh, *, beside: int = 0, **known) -> Report:
    """Compiles a program for the topology; the report has also what is `known` of it, by the fields of `Report`.

    Args:
      beside: bytes of a device for arrays that live while the program runs and that it does not take.
    """
    compiled, refusal, seconds = _compile(lowered, topology)
    text = compiled.as_text() if compiled else ""
    return Report(
        topology=topology.name,
        chip=topology.chip,
        compiler=topology.compiler,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        memory=memory(compiled, beside) if compiled else None,
        traffic=traffic.traffic(text) if compiled else 0,
        collectives=collectives.totals(collectives.collectives(text)) if compiled else {},
        refusal=refusal,
        compile_seconds=seconds,
        memory_share=topology.memory_share,
        **known,
    )


def _compile(
    lowered: jax.stages.Lowered, topology: Topology
) -> tuple[jax.stages.Compiled | None, tuple[str, ...], float]:
    """(the program or None, why it was refused, seconds)."""
    started, refusal = time.monotonic(), ()
    try:
        compiled = lowered.compile(compiler_options=topology.options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, refusal = None, out_of_memory(str(error))
    seconds = time.monotonic() - started
    logging.info("compiled in %.0f s", seconds)
    return compiled, refusal, seconds


def largest_size(config) -> tuple[int, int]:
    """Of the sizes that pictures have, the one with most pixels, whose step needs most memory."""
    return max((bucket.size for bucket in loader_config(config.data).buckets), key=math.prod)


def abstract_heldout(config, task: Task, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The same of the held-out batch, which is whole on every device."""
    place = NamedSharding(mesh, P())
    square = (config.data.image_size,) * 2
    prepared = task.prepare_heldout(example_batch(config.sample.num_images, square))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), prepared)


def memory(compiled: jax.stages.Compiled, beside: int) -> Memory:
    """What the compiler says of one device's memory, and so many bytes beside it."""
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        program=found.generated_code_size_in_bytes,
        beside=beside,
    )


def device_bytes(tree) -> int:
    """Bytes of one device for arrays whose shapes say where they live."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def count(tree) -> int:
    """Elements of all arrays of a tree, or of their shapes."""
    return sum(x.size for x in jax.tree.leaves(tree))
