"""The training loop: mesh, task, input, state, resume, steps."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable

import jax
from absl import logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax import atomic
from sana_jax.checkpoint import Checkpoints, UnwrittenError
from sana_jax.data import loader
from sana_jax.parallel import multihost, sharding
from sana_jax.parallel.mesh import check_batch, make_mesh
from sana_jax.training.autoencoder import make_autoencoder_task
from sana_jax.training.behind import Behind
from sana_jax.training.claim import Claim
from sana_jax.training.metrics import MetricWindow, MetricWriter, picture_grid
from sana_jax.training.optimizers.recipe import make_optimizer
from sana_jax.training.prefetch import prefetch
from sana_jax.training.profiling import StepProfiler
from sana_jax.training.program import abstract_batch, make_program, restore_state
from sana_jax.training.progress import Progress
from sana_jax.training.resume import (
    check_resumable,
    check_same_data,
    check_same_frozen,
    describe_data,
    digests,
    make_record,
    plain,
)
from sana_jax.training.ranges import check_ranges
from sana_jax.training.settings import check_folder, check_platform, is_adapted, loader_config
from sana_jax.training.sources import (
    Sources,
    check_heldout,
    open_sources,
    read_pictures_once,
)
from sana_jax.training.start import check_start, check_teacher
from sana_jax.training.startup import Spans
from sana_jax.training.state import TrainState
from sana_jax.training.task import Task
from sana_jax.training.termination import Preempted, Termination
from sana_jax.training.text_to_image import make_text_to_image_task


def train(config, workdir: str, spans: Spans | None = None) -> TrainState:
    """Trains as `config` says, from the newest checkpoint in `workdir` if there is one; returns the last state.

    Writes to WORKDIR: config.json, run.json, metrics.jsonl, tensorboard/, samples/, checkpoints/, export/ (the averaged
    weights in diffusers layout) and profile/. `spans` is of the time that the process took to come here.

    Raises:
      ValueError: the config contradicts itself, the machine or the checkpoint it would go on from.
      NonFiniteError: a metric became infinite or not a number.
      UnwrittenError: a checkpoint or the last export could not be written.
      CheckpointError: no checkpoint that is there could be read, or another run has taken the folder over.
      Preempted: SIGTERM or Ctrl-C came; all steps so far are saved.
    """
    check_folder("--workdir", workdir)
    check_folder("train.cache_folder", config.train.cache_folder or workdir)
    check_ranges(config)
    spans = spans or Spans()
    with contextlib.ExitStack() as stack:
        termination = stack.enter_context(Termination())

        # Mesh

        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.seq)
        check_batch(config.data.batch_size, mesh, config.train.accumulate_steps)
        check_platform(config.model, mesh.devices.flat[0].platform)
        make_optimizer(config.optimizer, config.train.num_steps)  # a mistake in it is told before anything is written
        stack.enter_context(jax.set_mesh(mesh))
        logging.info("%d %s devices: %s", mesh.size, jax.devices()[0].platform, dict(mesh.shape))

        # Task: the model, its loss, and the weights that stay frozen

        checkpoints = stack.enter_context(Checkpoints(workdir, config.train.keep_checkpoints, config.train.keep_every))
        saved = checkpoints.record()
        if saved is not None:
            check_resumable(saved, config, mesh, workdir)
        if config.task == "transformer" and config.init_from and (saved is None or is_adapted(config)):
            check_start(config, resumed=saved is not None)
        if config.task == "transformer" and config.distillation.teacher:
            check_teacher(config)

        def leave_if_due():
            if termination.due():
                raise Preempted(
                    "SIGTERM or Ctrl-C: kept what was read and encoded so far, and ended. Start again to go on."
                )

        read_pictures_once(config, workdir, leave_if_due)
        check_heldout(config)
        pictures = loader.open_pictures(loader_config(config.data), controlled=config.controlnet.num_layers > 0)
        check_same_data(saved, pictures)
        open_all = functools.partial(open_sources, config, workdir, pictures, saved is not None, leave_if_due)
        task = make_task(config, open_all)
        spans.end("task")

        # State: shapes, then where each array lives, then the arrays, so that nothing is ever whole on one device

        program = make_program(config, task, mesh)
        logging.info("%s parameters", f"{sum(x.size for x in jax.tree.leaves(program.state.params)):,}")

        frozen = task.load_frozen(sharding.places(program.frozen))
        trained_on = {"frozen": digests(frozen)} | describe_data(pictures)
        check_same_frozen(saved, trained_on["frozen"])

        claim = Claim(workdir)  # a run before that is still going saves nothing more
        checkpoints.remove_unfinished()

        # Resume, in this order: this run's newest checkpoint that can be read; other weights to start from; random ones

        if saved is not None:
            state = restore_state(checkpoints, saved["config"]["optimizer"]["name"], config, task, mesh, program.state)
        elif task.load_initial is not None:
            from_params = jax.jit(program.from_params, out_shardings=sharding.places(program.state))
            state = from_params(task.load_initial(sharding.places(program.state.params)))
        else:
            options = quick_compilation()
            from_key = jax.jit(program.from_key, out_shardings=sharding.places(program.state), compiler_options=options)
            state = from_key(jax.random.key(config.seed))
        first_step = int(jax.device_get(state.step))
        spans.end("init" if saved is None else "restore")

        # Input: batch number n is a function of the seed and n, so that the position in the data is the step

        batches = loader.make_loader(
            loader_config(config.data),
            seed=config.seed,
            start_step=first_step,
            positions=sharding.own_positions(config.data.batch_size, mesh),
            images=not config.train.cache_latents,
            pictures=pictures,
        )
        stack.enter_context(contextlib.closing(batches))
        arrays = (sharding.put_batch(task.prepare(batch), mesh, config.data.batch_size) for batch in batches)
        ready = stack.enter_context(contextlib.closing(prefetch(arrays)))
        heldout = jax.device_put(task.prepare_heldout(heldout_batch(config)), NamedSharding(mesh, P()))

        # Steps

        writer = stack.enter_context(MetricWriter(workdir, first_step, enabled=multihost.is_first()))
        behind = stack.enter_context(Behind())
        measure_fn = jax.jit(task.measure, out_shardings=NamedSharding(mesh, P()))

        def log(step):
            count, means = window.take(step)
            if count:
                measured = progress.advance(step)
                for name in ("data_wait", "hbm_peak_gib"):  # the process that lacks most holds up all
                    if name in measured:
                        measured[name] = multihost.highest(measured[name])
                means |= measured | {"hours": spans.elapsed() / 3600}
                writer.scalars(step, means)
                if "loss" in means and multihost.is_first():  # no loss: every update was skipped, which has been said
                    logging.info("%s", progress.line(step, means))

        def show(step, state):
            images, metrics = jax.device_get(program.show(state.averaged(), frozen, heldout))
            if multihost.is_first():
                behind.start(lambda: writer.pictures(step, picture_grid(images, task.columns)))
            writer.scalars(step, {name: float(value) for name, value in metrics.items()})
            logging.info("step %s%s", f"{step:,}", "".join(f"   {name} {metrics[name]:.4f}" for name in metrics))

        exported = None  # the folder, once this process has written it

        def export(state, last):
            behind.wait()  # the host has memory for one model
            params = multihost.fetch_to_first(state.averaged())
            measured = jax.device_get(measure_fn(state.averaged(), heldout))
            if multihost.is_first():
                behind.start(write_export, params, measured, last)
            if last:
                behind.wait()
                multihost.barrier("export")

        def write_export(params, measured, last):
            nonlocal exported
            path = pathlib.Path(workdir) / "export"
            try:
                with atomic.new_folder(path) as folder:
                    task.export(params, folder, measured, exported)
                exported = path
            except OSError as error:
                if last:
                    raise UnwrittenError(f"{path} could not be written: {error}.") from error
                logging.error("%s could not be written (%s); it is tried again at the next checkpoint", path, error)

        if multihost.is_first():
            atomic.write_file(
                pathlib.Path(workdir, "config.json"), (json.dumps(plain(config), indent=1) + "\n").encode()
            )
        every, last = config.train, config.train.num_steps
        window = MetricWindow(every.skip_nonfinite)
        shares = {each.size: len(each) / trained_on["pictures"] for each in pictures}
        picture_flops = sum(share * task.picture_flops(*size) for size, share in shares.items())
        progress = Progress(first_step, last, config.data.batch_size, picture_flops, list(mesh.devices.flat))
        profiler = stack.enter_context(StepProfiler(every.profile_steps, workdir, enabled=multihost.is_first()))
        step, before = first_step, None
        ending, leaving = step >= last, False
        if ending:
            logging.info("all %s steps are done; train.num_steps says how many there are", f"{step:,}")
            export(state, last=True)  # the last process may have been killed between its last checkpoint and its export
        while not ending:
            batch = progress.fetch(ready)
            if step == first_step:
                spans.end("data")
                for each in pictures:  # all sizes now: a pod would stand still at the first step of each
                    shapes = abstract_batch(config, task, mesh, each.size)
                    lowered = program.step.lower(state, frozen, shapes)
                    spans.end("trace")
                    lowered.compile()
                    spans.end("compile")
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                state, metrics = program.step(state, frozen, batch)
            step += 1
            window.add(step, metrics)
            jax.block_until_ready(before)  # so that no more than this step's batch waits on the devices
            before = metrics
            if step == first_step + 1:
                jax.block_until_ready(metrics)
                spans.end("first step")
                logging.info("%s", spans.line())
                writer.scalars(step, spans.metrics())
                progress.restart(step)
            profiler.at(step, metrics)
            if (step - 1) % every.log_every == 0:
                log(step - 1)  # one step late: this step runs while the numbers are read
            checkpoints.check()
            leaving = step < last and termination.due()
            ending = step == last or leaving
            saving = ending or step % every.checkpoint_every == 0
            sampling = every.sample_every > 0 and (step == last or step % every.sample_every == 0) and not leaving
            if sampling or saving:
                log(step)  # also keeps weights that are not finite from being saved
                if saving:
                    claim.check()
                    checkpoints.save(step, state, make_record(config, step, mesh, **trained_on))
                if saving and not leaving:  # else the machine may be gone in half a minute
                    export(state, last=ending)
                if sampling:
                    logging.info("drawing held-out pictures")
                    show(step, state)
                writer.scalars(step, {"pause_seconds": progress.pause(step)})
        if leaving:
            raise Preempted(f"SIGTERM or Ctrl-C: saved step {step:,} of {last:,} and ended. Start again to go on.")
        logging.info("the averaged weights are in %s", pathlib.Path(workdir) / "export")
        return state


def make_task(config, sources: Callable[[], Sources]) -> Task:
    """The task that `config.task` names; `sources` opens what the transformer's takes from outside.

    Raises:
      ValueError: there is no such task, or its config is impossible.
    """
    if config.task == "autoencoder":
        return make_autoencoder_task(config)
    if config.task == "transformer":
        return make_text_to_image_task(config, sources())
    raise ValueError(f"task={config.task!r} is not one of autoencoder, transformer.")


def quick_compilation() -> dict:
    """Compiler options for a program that runs once: optimising hundreds of random draws takes a CPU half a minute."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def heldout_batch(config) -> dict:
    """The same pictures, all square, and captions at every call, from the split that `config.sample` names."""
    data = loader_config(
        config.data,
        split=config.sample.split,
        aspect_ratios=(1.0,),
        batch_size=config.sample.num_images,
        prefetch=1,
    )
    pictures = loader.open_pictures(data, controlled=config.controlnet.num_layers > 0)
    return next(loader.make_loader(data, seed=config.seed, pictures=pictures))
