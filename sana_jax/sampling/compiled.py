"""The compiled programs of a sampler, one for each kind of call: kept in memory and, where asked for, in files.

Memory holds the KEPT last used ones of each function of `sampling.program`; one that was dropped is compiled again.

A file holds an executable, after a line of JSON that says for what call it is and by what it was made. It is the machine
code of one kind of device, one release of JAX and these sources: anything else compiles anew, with a warning that says why.
Starting from such a file traces nothing and compiles nothing. Like a pickle, which it contains, it can run anything: load
only files that you made.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from sana_jax import atomic
from sana_jax.compiler_options import compiler_options, cpuinfo
from sana_jax.models.text_encoder import TextPrefix
from sana_jax.sampling import program
from sana_jax.sampling.devices import in_force
from sana_jax.sampling.program import Drawn, Fit, Modules, Sampling

SUFFIX = ".executable"
KEPT = 64  # programs of each function: more than there are aspect buckets of a model
_SHOWN = 4  # differences of two calls that a warning names


class _Steps:
    """Takes the reports of compiled programs to the callable of the call that runs; such calls wait for each other."""

    def __init__(self):
        self._turn = threading.Lock()
        self._progress: Callable[[int, int], None] | None = None
        self._reporter: int | None = None  # thread in which the callable runs, one of XLA's
        self._error: BaseException | None = None

    @contextlib.contextmanager
    def told_to(self, progress: Callable[[int, int], None]):
        """Within it reports go to `progress`; what that raises ends the program, and is raised here."""
        if threading.get_ident() == self._reporter:
            raise ValueError("progress= drew pictures with a progress= of their own; leave the inner one out.")
        with self._turn:
            self._progress, self._error = progress, None
            try:
                yield
            except jax.errors.JaxRuntimeError:
                if self._error is None:
                    raise
                raise self._error from None
            finally:
                self._progress = self._error = None

    def report(self, done: int, total: int) -> None:
        self._reporter = threading.get_ident()
        try:
            self._progress(done, total)
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._reporter = None


class Programs:
    """What a pipeline runs, compiled at the first call of a kind, for its modules and devices."""

    def __init__(self, modules: Modules, mesh: Mesh | None = None, folder: str | pathlib.Path | None = None):
        """`folder`: where executables are looked for, before one is compiled; None: nowhere.

        Raises:
          FileNotFoundError: there is no such folder.
        """
        self._modules, self._mesh = modules, mesh
        self._folder = None if folder is None else pathlib.Path(folder)
        if self._folder is not None and not self._folder.is_dir():
            raise FileNotFoundError(
                f"executables={str(folder)!r} is no folder; `python -m sana_jax.export executable` makes one."
            )
        self._compiled: dict[tuple, Future] = {}  # of (jax.stages.Compiled, its call as JSON)
        self._lock = threading.Lock()  # of the dict: programs of different calls are compiled at the same time
        self._steps = _Steps()

    def __len__(self) -> int:
        """The programs that are in memory."""
        return len(self._ready())

    def __call__(
        self,
        function: Callable,
        *arguments: Any,
        sampling: Sampling | Fit | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Any:
        """What the function of `sampling.program` gives, called with the modules and the arguments.

        `sampling` is for `draw` and `fit`; `progress` is called where it `reports_steps`.
        """
        compiled = self.compile(function, *arguments, sampling=sampling)
        if not _reports(sampling):
            return compiled(*arguments)
        # In a thread of its own: JAX keeps the token by which reports stay in order for each thread, and after a report
        # that raised the token is an error, which would end every later call of the thread too.
        with self._steps.told_to(progress), ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: jax.block_until_ready(compiled(*arguments))).result()

    def compile(self, function: Callable, *arguments: Any, sampling: Sampling | Fit | None = None) -> Callable:
        """The program of a call, whose arrays may be given as shapes (`jax.ShapeDtypeStruct`) alone.

        Threads that ask for the same one wait for the first of them to compile it. An error of that is raised in all of
        them and is not kept: the next call compiles again.
        """
        arrays, tree = jax.tree.flatten((arguments, {}))
        key = (function.__name__, sampling, tree, tuple(map(_describe_array, arrays)))
        with self._lock:
            is_first = key not in self._compiled
            entry = self._compiled[key] = self._compiled.pop(key, None) or Future()  # the last is the last used
            alike = [other for other in self._compiled if other[0] == key[0]]
            for oldest in alike[:-KEPT]:
                del self._compiled[oldest]
        if is_first:
            try:
                entry.set_result(self._make(function, arguments, tree, sampling))
            except BaseException as error:
                with self._lock:
                    self._compiled.pop(key, None)
                entry.set_exception(error)
        return entry.result()[0]

    def _make(
        self, function: Callable, arguments: tuple, tree: jax.tree_util.PyTreeDef, sampling: Sampling | Fit | None
    ) -> tuple[jax.stages.Compiled, dict]:
        """The program, from its file or compiled, and its call as JSON."""
        call = _describe_call(function.__name__, self._modules, sampling, arguments, self._mesh)
        compiled = self._read(call, tree) if self._folder is not None and call["keeps"] else None
        if compiled is None:
            settings = {} if sampling is None else {"sampling": sampling}
            if isinstance(sampling, Sampling):
                settings["report"] = self._steps.report
            with in_force(self._mesh):
                options = compiler_options(self._devices()[0].platform)
                lowered = jax.jit(functools.partial(function, self._modules, **settings)).lower(*arguments)
                compiled = lowered.compile(compiler_options=options)
        return compiled, call

    def _ready(self) -> list[tuple[jax.stages.Compiled, dict]]:
        """What is compiled, without what is being compiled."""
        with self._lock:
            return [entry.result() for entry in self._compiled.values() if entry.done()]

    def save(self, folder: str | pathlib.Path) -> list[pathlib.Path]:
        """Writes every program in memory, but those that report their steps, to a file each; returns the files.

        Each is read back before it gets its name.

        Raises:
          ValueError: there is nothing to write, or JAX's compilation cache is on: an executable that comes out of it
            cannot be written again.
        """
        programs = [(compiled, call) for compiled, call in self._ready() if call["keeps"]]
        if not any(call["function"] == program.draw.__name__ for _, call in programs):
            raise ValueError("there is no compiled program to write; draw a picture first, without progress=.")
        if jax.config.jax_compilation_cache_dir and jax.config.jax_enable_compilation_cache:
            raise ValueError(
                f"the compilation cache {jax.config.jax_compilation_cache_dir} is on, and what comes out of it cannot be "
                'written again; jax.config.update("jax_enable_compilation_cache", False) before the first call.'
            )
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = []
        for compiled, call in programs:
            payload, arguments, _ = serialize_executable.serialize(compiled)
            self._load(payload, arguments, call)
            header = {"maker": maker(self._devices()), "call": call}
            files.append(_file(folder, call))
            atomic.write_file(files[-1], [json.dumps(header).encode() + b"\n", payload])
        return files

    def _read(self, call: dict, arguments: jax.tree_util.PyTreeDef) -> jax.stages.Compiled | None:
        file = _file(self._folder, call)
        if not file.is_file():
            known = [other for other in self._calls() if other["function"] == call["function"]]
            logging.warning(
                "%s has no executable for %s; compiling it. There are: %s%s",
                self._folder,
                call["title"],
                "; ".join(other["title"] for other in known) or "none",
                _nearest(call, known),
            )
            return None
        with file.open("rb") as stream:
            made_by, here = _header(stream.readline(), file)["maker"], maker(self._devices())
            different = [
                f"{name}: {made_by.get(name)!r}, here {here[name]!r}"
                for name in here
                if made_by.get(name) != here[name]
            ]
            if different:
                logging.warning("%s was made by something else (%s); compiling anew.", file, "; ".join(different))
                return None
            try:
                return self._load(stream.read(), arguments, call)
            except (jax.errors.JaxRuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
                raise ValueError(f"{file} is damaged ({str(error).splitlines()[0]}); make it again.") from error

    def _load(self, payload: bytes, arguments: jax.tree_util.PyTreeDef, call: dict) -> jax.stages.Compiled:
        trees = {program.encode_prefix.__name__: TextPrefix(0, 0, 0), program.draw.__name__: Drawn(0, 0)}
        result = trees.get(call["function"], 0)
        devices = self._devices()
        return serialize_executable.deserialize_and_load(
            payload, arguments, jax.tree.structure(result), backend=devices[0].client, execution_devices=devices
        )

    def _devices(self) -> list[jax.Device]:
        return list(jnp.zeros(()).devices() if self._mesh is None else self._mesh.devices.flat)

    def _calls(self) -> list[dict]:
        """What the files of the folder are for."""
        calls = []
        for file in sorted(self._folder.glob(f"*{SUFFIX}")):
            with file.open("rb") as stream:
                calls.append(_header(stream.readline(), file)["call"])
        return calls


def _reports(sampling: Sampling | Fit | None) -> bool:
    return isinstance(sampling, Sampling) and sampling.reports_steps


def maker(devices: list[jax.Device]) -> dict[str, str]:
    """What machine code depends on besides the call: releases, devices, flags and our sources."""
    import jaxlib

    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "compiler": devices[0].client.platform_version,
        "devices": f"{len(devices)} {devices[0].device_kind}",
        "processor": _processor() if devices[0].platform == "cpu" else "",
        "flags": os.environ.get("XLA_FLAGS", ""),
        "matmul precision": str(jax.config.jax_default_matmul_precision),
        "sources": _sources(),
    }


def _processor() -> str:
    """Fingerprint of the processor's instruction set, which code for a CPU is made of."""
    import platform

    features = {line for line in cpuinfo() if line.startswith(("flags", "Features", "model name"))}
    return _digest("\n".join([platform.machine(), platform.processor(), *sorted(features)]).encode())


@functools.cache
def _sources() -> str:
    """Fingerprint of this package, kernels included."""
    import sana_jax
    from sana_jax import kernels

    folders = [pathlib.Path(package.__file__).parent for package in (sana_jax, kernels)]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return _digest(b"\0".join(file.read_bytes() for file in files))


def _describe_array(array) -> tuple:
    """What a program is compiled for: shape, dtype, and the place where one was given."""
    placed = isinstance(array, jax.ShapeDtypeStruct) or (isinstance(array, jax.Array) and array.committed)
    return array.shape, array.dtype, array.sharding if placed else None


def _describe_call(
    function: str, modules: Modules, sampling: Sampling | Fit | None, arguments: tuple, mesh: Mesh | None
) -> dict:
    """A call as JSON; `title` is for people, `keeps` says whether its program can outlive the process."""
    return {
        "function": function,
        "title": _title(function, modules, sampling, arguments),
        "keeps": not _reports(sampling),
        "sampling": {} if sampling is None else _fields(sampling),
        "mesh": None if mesh is None else dict(mesh.shape),
        "modules": {name: _fields(module.config) for name, module in modules._asdict().items() if module},
        "arrays": {
            jax.tree_util.keystr(path): ", ".join(map(str, _describe_array(array)))
            for path, array in jax.tree_util.tree_leaves_with_path(arguments)
        },
    }


def _title(function: str, modules: Modules, sampling: Sampling | Fit | None, arguments: tuple) -> str:
    if function == program.fit.__name__:
        (count, *drawn, _), size = arguments[0].shape, sampling.size
        return f"{count} pictures of {_by(drawn)} made {_by(size)}"
    given = arguments[1]
    if function == program.encode_prefix.__name__:
        return f"an instruction of {len(given)} tokens"
    if function == program.encode_text.__name__:
        return f"negative prompts, {len(given)} of {given.shape[1]} tokens"
    count, *grid, _ = given.noise.shape
    drawn = [side * modules.autoencoder.config.downsample_factor for side in grid]
    return (
        f"{count} pictures of {_by(drawn)} in {sampling.num_steps} steps ({sampling.solver}, "
        f"{'guided' if sampling.guided else 'not guided'}, {sampling.max_sequence_length} text tokens)"
    )


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _fields(settings) -> dict[str, str]:
    return {field.name: repr(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def _nearest(call: dict, known: list[dict]) -> str:
    """In what the most similar of the calls differs, as the end of a message."""
    if not known:
        return ""
    ours = _flat(call)
    differences = []
    for other in known:
        theirs = _flat(other)
        names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        differences.append([f"{name}: {theirs.get(name)}, here {ours.get(name)}" for name in names])
    nearest = min(differences, key=len)
    more = f"; and {len(nearest) - _SHOWN} more" if len(nearest) > _SHOWN else ""
    return f". The nearest differs ({'; '.join(nearest[:_SHOWN])}{more})."


def _flat(call: dict) -> dict:
    """{"sampling.order": ...} of nested objects; the title is left out, which says nothing that they do not."""
    flat = {}
    for name, value in call.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in _flat(value).items()}
        elif name != "title":
            flat[name] = value
    return flat


def _file(folder: pathlib.Path, call: dict) -> pathlib.Path:
    return folder / (_digest(json.dumps(call, sort_keys=True).encode()) + SUFFIX)


def _header(line: bytes, file: pathlib.Path) -> dict:
    try:
        header = json.loads(line)
        return {"maker": dict(header["maker"]), "call": dict(header["call"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no executable of sana_jax, or a damaged one; make it again.") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
