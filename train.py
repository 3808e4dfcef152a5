"""Trains a SANA autoencoder or transformer.

python train.py --config=configs/emoji.py --workdir=DIR [--config.SECTION.FIELD=VALUE ...]
python train.py --config=configs/sana_1600m_1024.py --aot=v5p:4x4x4     # compiles only; no TPU, weights or pictures

Started again with the same --workdir it goes on from the newest checkpoint that can be read. Exit codes:

   0  trained to the end
   1  an error that is not foreseen, with its traceback: perhaps of the machine, so that another start may help
      with --aot: the step does not fit
   2  a mistake in the flags or the config, or data that cannot be read or is not what the checkpoint was trained on
  70  the loss or another metric became infinite or not a number
  73  a checkpoint, or the export at the end, could not be written; started again, the run goes on from the one before
  74  none of the checkpoints that are there could be read, or another run saves to the folder
  75  SIGTERM or Ctrl-C came: saved and ended early, at the first step if it was still starting; start it again
  76  another process of the job is lost, and named; start all of them again
 130  Ctrl-C came twice, or in the first seconds, before the run began, or with --aot: ended at once, saving nothing
 134  JAX aborted because process 0, which coordinates the others, is lost; start all of them again

2, 70 and 74 would come again: somebody has to look first. All processes of a job end with the code of an error that one of
them has alone.
"""

import functools
import json
import logging as python_logging
import operator
import os
import pathlib
import runpy
import sys
import time
import traceback

from absl import app, flags, logging
from ml_collections import ConfigDict, FieldReference, config_flags

STARTED = time.perf_counter()
NOT_FINITE, UNWRITTEN, UNUSABLE, PREEMPTED, INTERRUPTED = 70, 73, 74, 75, 130

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment: a file of configs/.", lock_config=True)
_AOT = flags.DEFINE_string(
    "aot",
    None,
    "Compile the training step for a topology that is not here (v5e:16x16, v5p:8x8x8, h100) and say if it fits.",
)
_AOT_JSON = flags.DEFINE_string("aot_json", None, "File for what --aot says, as JSON.")
_AOT_SHOW = flags.DEFINE_bool(
    "aot_show",
    False,
    "With --aot: compile the drawing of held-out pictures too; takes up to twice as long as the step.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics, samples and the exported model.")


def main(argv):
    del argv
    # Imported here, so that a mistake in the flags is told at once.
    from sana_jax.parallel import multihost
    from sana_jax.parallel.peers import Peers
    from sana_jax.training.loop import train
    from sana_jax.training.settings import check_folder
    from sana_jax.training.startup import Spans, keep_compiled
    from sana_jax.training.termination import Preempted

    spans = Spans(STARTED)
    spans.end("imports")
    show_own_log()
    if _AOT.value:
        sys.exit(report_ahead())
    try:
        check_folder("--workdir", _WORKDIR.value)
        keep_compiled(_CONFIG.value.train.compilation_cache, _WORKDIR.value)
        multihost.start(_CONFIG.value.mesh)
        spans.end("join")
    except ValueError as error:
        fail(error)
    peers = Peers()
    try:
        train(_CONFIG.value, _WORKDIR.value, spans)
    except Preempted as notice:
        say(notice)
        peers.leave(PREEMPTED)
    except Exception as error:  # noqa: BLE001 - it is told, and its kind decides the exit code
        code = exit_code(error)
        if code is None:
            traceback.print_exc()
        else:
            say(error)
        peers.ask()  # where another process is lost, that is the cause, and this one ends here
        peers.leave(code or 1, timeout=10)
    peers.leave(0)


def exit_code(error) -> int | None:
    """The code for an error that this project raised, which speaks for itself; None: it needs its traceback."""
    from sana_jax.checkpoint import CheckpointError, UnwrittenError
    from sana_jax.training.metrics import NonFiniteError

    if isinstance(error, CheckpointError):
        return UNWRITTEN if isinstance(error, UnwrittenError) else UNUSABLE
    if isinstance(error, NonFiniteError):
        return NOT_FINITE
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    ours = frame.f_globals["__name__"].partition(".")[0] == "sana_jax"  # wherever its files lie
    return 2 if ours and isinstance(error, ValueError | FileNotFoundError | ModuleNotFoundError) else None


def report_ahead() -> int:
    """Compiles for --aot and prints what the step needs; the exit code says whether it fits."""
    from sana_jax import atomic
    from sana_jax.aot.compile import compile_ahead

    file = pathlib.Path(_AOT_JSON.value) if _AOT_JSON.value else None
    if file:
        try:
            atomic.prepare_file(file)  # compiling takes minutes
        except OSError as error:
            say(f"--aot_json={file} cannot be written: {error}. Give a file in a folder that can be written to.")
            return 2
    try:
        report = compile_ahead(_CONFIG.value, _AOT.value, show=_AOT_SHOW.value)
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        say(error)
        return code
    print(report)
    if file:
        atomic.write_file(file, (json.dumps(report.to_json(), indent=1) + "\n").encode())
    return 0 if report.fits else 1


def parse_flags(argv):
    """Reads the flags; every mistake in them is one line and exit code 2."""
    last = {field_of(arg): arg for arg in argv[1:] if field_of(arg)}
    emptied = [field for field, arg in last.items() if arg.endswith("=None")]
    try:
        rest = flags.FLAGS([arg for arg in argv if field_of(arg) not in emptied])
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        fail(unknown_field(argv) or str(error).splitlines()[0])
    for name in ("aot_show", "aot_json"):
        if flags.FLAGS[name].value and not _AOT.value:
            fail(f"--{name} says what --aot does beside, and --aot is missing: --aot=v5e:16x16")
    for flag in (_CONFIG,) if _AOT.value else (_CONFIG, _WORKDIR):
        if flag.value is None:
            fail(f"--{flag.name} is missing: python train.py --config=configs/emoji.py --workdir=DIR")
    if not isinstance(_CONFIG.value, ConfigDict):
        fail(f"--config={flags.FLAGS['config'].config_filename}: no such file")
    for field in emptied:
        empty(field)
    if rest[1:]:
        fail(f"unexpected argument {rest[1]!r}; options are written --NAME=VALUE")
    return rest


def field_of(arg: str) -> str:
    """SECTION.FIELD of an override, "" of other arguments."""
    name = arg.lstrip("-").split("=")[0]
    return name.removeprefix("config.") if arg.startswith("-") and name.startswith("config.") else ""


def empty(field: str):
    """Sets an optional field of the config to None, which the flags library reads as no number."""
    *path, name = field.split(".")
    section = functools.reduce(operator.getitem, path, _CONFIG.value)
    if not isinstance(dict(section.items(preserve_field_references=True))[name], FieldReference):
        fail(f"--config.{field}=None: the field is not optional; give it a value")
    section[name] = None


def unknown_field(argv) -> str:
    """Says which argument names a flag or a field of the config that is not there, and which one was probably meant."""
    from sana_jax.training.settings import nearest

    files = [arg.split("=", 1)[1] for arg in argv[1:] if arg.lstrip("-").startswith("config=")]
    if not files or not pathlib.Path(files[-1]).is_file():
        return ""
    config = runpy.run_path(files[-1])["get_config"]()  # the flag's own is empty where an override failed
    for arg in argv[1:]:
        name, section = arg.lstrip("-").split("=")[0], config
        if not name.startswith("config."):
            meant = [f"--config.{field}" for field in fields_of(config) if field == name or field.endswith(f".{name}")]
            if arg.startswith("-") and name not in flags.FLAGS and meant:
                return f"there is no flag --{name}; did you mean {' or '.join(meant)}?"
            continue
        path = name.split(".")
        for depth, part in enumerate(path[1:], start=1):
            if not isinstance(section, ConfigDict) or part not in section:
                parent = ".".join(path[:depth])
                fields = [f"{parent}.{field}" for field in section] if isinstance(section, ConfigDict) else []
                return f"there is no field {name}{nearest(f'{parent}.{part}', fields)}"
            section = section[part]
    return ""


def fields_of(section: ConfigDict):
    """SECTION.FIELD of every field."""
    for name, value in section.items():
        yield from (f"{name}.{field}" for field in fields_of(value)) if isinstance(value, ConfigDict) else [name]


def show_own_log():
    """Logs to the terminal what this project says, and of the libraries only warnings."""
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(lambda record: record.levelno > python_logging.INFO or "sana_jax" in record.pathname)


def say(message):
    print(f"train.py: {message}", file=sys.stderr, flush=True)


def fail(message):
    say(message)
    sys.exit(2)


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:
        say("interrupted")
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # Python would wait for threads, and for the other processes of a job
