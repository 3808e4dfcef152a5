"""`train.py --aot=TOPOLOGY`: the real training step, compiled for accelerators that are not here."""

import time

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from sana_jax.aot import collectives, traffic
from sana_jax.aot.report import Memory, Report, out_of_memory
from sana_jax.aot.stand_ins import stand_in_sources
from sana_jax.aot.topologies import Topology, open_topology
from sana_jax.parallel import sharding
from sana_jax.parallel.mesh import check_batch, make_mesh
from sana_jax.training.autoencoder import make_autoencoder_task
from sana_jax.training.program import make_program
from sana_jax.training.settings import check_platform
from sana_jax.training.task import Task
from sana_jax.training.text_to_image import make_text_to_image_task


def compile_ahead(config, topology_name: str) -> Report:
    """Compiles the step of `config` for a topology and says what it needs; nothing is allocated or run.

    No weights, pictures or tokenizer are read; see `stand_ins`.

    Args:
      config: the whole tree, as for `train`.
      topology_name: see `open_topology`.

    Raises:
      ValueError: there is no such topology, or the config does not fit it or itself.
      ModuleNotFoundError: the compiler is not installed.
    """
    topology = open_topology(topology_name)
    lowered, mesh, known = lower_step(config, topology)
    return compile_lowered(lowered, topology, mesh, **known)


def lower_step(config, topology: Topology) -> tuple[jax.stages.Lowered, Mesh, dict]:
    """The step of `config` before it is compiled, its mesh, and what a `Report` says of it beside the compiler.

    Raises:
      ValueError: the config does not fit the topology or itself.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.seq, devices=topology.devices)
    check_batch(config.data.batch_size, mesh, config.train.accumulate_steps)
    check_platform(config.model, mesh.devices.flat[0].platform)
    task = make_abstract_task(config)
    # Shapes come before the mesh is set: under a mesh of devices that are not here nothing can be computed.
    program = make_program(config, task, mesh)
    batch = abstract_batch(config, task, mesh)
    weights = [part for name, part in program.frozen.items() if name in sharding.MODELS]  # no null prompt
    parameters = count(program.state.params), count(weights)
    logging.info("%s parameters, %s frozen; compiling for %s", *(f"{n:,}" for n in parameters), topology.name)
    with jax.set_mesh(mesh):
        lowered = program.step.lower(program.state, program.frozen, batch)
    known = {
        "batch_size": config.data.batch_size,
        "parameters": parameters[0],
        "frozen_parameters": parameters[1],
        "step_flops": config.data.batch_size * task.picture_flops,
    }
    return lowered, mesh, known


def compile_lowered(lowered: jax.stages.Lowered, topology: Topology, mesh: Mesh, **known) -> Report:
    """Compiles a program for the topology; the report has also what is `known` of it, by the fields of `Report`."""
    started = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=topology.options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, refusal = None, out_of_memory(str(error))
    else:
        refusal = ()
    seconds, text = time.monotonic() - started, compiled.as_text() if compiled else ""
    logging.info("compiled in %.0f s", seconds)
    return Report(
        topology=topology.name,
        chip=topology.chip,
        compiler=topology.compiler,
        devices=mesh.size,
        mesh=dict(mesh.shape),
        memory=memory(compiled) if compiled else None,
        traffic=traffic.traffic(text) if compiled else 0,
        collectives=collectives.totals(collectives.collectives(text)) if compiled else {},
        refusal=refusal,
        compile_seconds=seconds,
        **known,
    )


def make_abstract_task(config) -> Task:
    """The task that `config.task` names, from shapes alone."""
    if config.task == "autoencoder":
        return make_autoencoder_task(config)
    return make_text_to_image_task(config, stand_in_sources(config))


def abstract_batch(config, task: Task, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and places of a step's arrays: those of one prepared example, with the batch's length in front."""
    size = config.data.image_size
    example = {
        "images": np.zeros((1, size, size, 3), np.float32),
        "captions": ["a"],
        "keys": [""],
        "indices": np.zeros(1, np.int32),
        "backgrounds": [""],
    }
    place = jax.sharding.NamedSharding(mesh, sharding.BATCH)

    def abstract(x):
        return jax.ShapeDtypeStruct((config.data.batch_size, *x.shape[1:]), x.dtype, sharding=place)

    return jax.tree.map(abstract, task.prepare(example))


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler says of one device's memory."""
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        program=found.generated_code_size_in_bytes,
    )


def count(tree) -> int:
    """Elements of all arrays of a tree, or of their shapes."""
    return sum(x.size for x in jax.tree.leaves(tree))
