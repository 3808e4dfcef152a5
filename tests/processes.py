"""Scripts of tests in Python processes of their own, because the number of devices is fixed once JAX has started."""

import importlib.metadata
import json
import os
import pathlib
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

TESTS = pathlib.Path(__file__).parent
ONE_COMPILER = TESTS / "one_compiler"
TIMEOUT = 1500
# Most of the suite's time is compilation of small programs that run once: without LLVM's optimisations it is almost halved, and
# again without MLIR's fusions, which JAX 0.10 can do without.
OLD = importlib.metadata.version("jaxlib").startswith("0.10.")
QUICK = "--xla_backend_optimization_level=0" + OLD * " --xla_cpu_use_fusion_emitters=false"


def run_script(script: str, *arguments, devices: int, **environment: str):
    """Runs it with so many devices; returns what it printed last, read as JSON."""
    (said,) = _run(script, [arguments], devices, environment)
    return said


def run_job(script: str, *arguments, processes: int, devices: int, code: int = 0, **environment: str) -> list:
    """Runs it as a job of several processes (gloo on localhost) with so many devices each; returns what each printed last.

    The first argument that each is given is its config section `mesh`, in JSON. All must end with this exit code.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = {"multihost": True, "coordinator": f"127.0.0.1:{free.getsockname()[1]}", "num_processes": processes}
    own = [(json.dumps(job | {"process_id": number}), *arguments) for number in range(processes)]
    return _run(script, own, devices, environment, code)


def _run(script, arguments, devices, environment, code=0):
    settings = {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environment = os.environ | settings | environment
    folders = [TESTS.parent, TESTS, TESTS / "unit", TESTS / "distributed"] + [ONE_COMPILER] * (len(arguments) > 1)
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = []
    try:
        for own in arguments:
            command = [sys.executable, "-c", script, *map(str, own)]
            running.append(subprocess.Popen(command, env=environment, **pipes))
        with ThreadPoolExecutor(len(running)) as pool:  # all at once: a full pipe would hold its process up
            said = list(pool.map(lambda process: process.communicate(timeout=TIMEOUT), running))
    finally:
        for process in running:
            process.kill()
    codes = [process.returncode for process in running]
    ends = "\n".join(f"process {number}: {errors[-3000:]}" for number, (_, errors) in enumerate(said))
    assert codes == [code] * len(codes), f"processes ended with {codes}\n{ends}"
    return [json.loads(out.splitlines()[-1]) for out, _ in said]
