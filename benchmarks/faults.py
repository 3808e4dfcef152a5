"""Breaks training runs in every way that machines do, starts them again, and compares: the fault table.

    python -m benchmarks.faults [--only=killed,moved,...] [--kills=25] [--terminations=5] [--out=benchmarks/results/faults.json]

A tiny autoencoder is trained by `train.py`, as a user would, with a checkpoint every four steps. After the fault the same
command is started again, until the run ends; then the losses and gradient norms of all steps, and the exported weights,
must be those of a run that nothing interrupted, bit for bit. A fault that loses something saved ends this script with an
error. The disk that fills up is a tmpfs where this process may mount one, else a limit on the size of files. Each fault's
rows are written to the file as soon as they are there, beside those of other faults from before (`--only`).
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time

from benchmarks.lab import EVERY, ROOT, Job, Lab
from sana_jax import atomic
from sana_jax.training.resume import versions
from sana_jax.data import records

NOT_FINITE, UNWRITTEN, UNUSABLE, PREEMPTED, LOST = 70, 73, 74, 75, 76  # exit codes of train.py

BROKEN_RECORD = re.compile(r"pictures-00000\.array_record\[7\] \(.*\) can no longer be read")

# A batch whose pictures are not numbers, in a process that is otherwise train.py.
POISON = """
import runpy, sys
from sana_jax.data.loader import Loader

step, next_batch = int(sys.argv.pop(1)), Loader.__next__

def poisoned(self):
    batch = next_batch(self)
    return batch | {"images": batch["images"].astype("float32") * (float("nan") if self.step == step else 1)}

Loader.__next__ = poisoned
runpy.run_path("train.py", run_name="__main__")
"""


# train.py with other processes that may be late for fewer seconds.
IMPATIENT = """
import runpy, sys
from sana_jax.parallel import peers

peers.TIMEOUT = int(sys.argv.pop(1))
runpy.run_path("train.py", run_name="__main__")
"""


@dataclasses.dataclass
class Row:
    """A line of the table.

    Attributes:
      fault: what was done to the run.
      tried: how often.
      ended: how the run ended, and what it said.
      lost: steps of the newest checkpoint that the fault itself did not destroy, from which the run did not go on.
      repeated: the most steps that were done again, because no checkpoint had them, or none that could still be read.
    """

    fault: str
    tried: int
    ended: str
    lost: int
    repeated: int


def killed(lab: Lab, times: int) -> Row:
    """SIGKILL at random moments: of five, one at start, two within the steps, and two while a checkpoint is written."""
    job, repeated, saving = Job(lab, "killed"), [], 0
    begun = time.monotonic()
    lab.whole(1)
    start_up = (time.monotonic() - begun) / 2
    for number in range(times):
        newest, begun = job.newest(), time.time()
        job.start()
        if number % 5 == 0:
            time.sleep(lab.random.uniform(0, start_up))
        else:
            job.wait_for(newest + 1)
            time.sleep(lab.random.uniform(0, 1.5))
        if number % 5 in (2, 4):
            job.wait_for_saving(begun)
            time.sleep(lab.random.uniform(0, 0.05))
        job.signal(signal.SIGKILL)
        job.check_resumed(newest)
        assert job.newest() >= newest
        repeated.append(job.last_step() - job.newest())
        saving += job.is_saving(begun)
        if job.newest() == lab.steps:  # finished, but for its export perhaps: the next kill hits a run of its own
            job.run()
            job.check_equal()
            shutil.rmtree(job.workdir)
    newest = job.newest()
    job.run()
    job.check_resumed(newest)
    job.check_equal()
    ended = f"killed; {saving} of the kills while a checkpoint was being written"
    return Row("`kill -9` at a random moment", times, ended, 0, max(repeated))


def terminated(lab: Lab, times: int) -> Row:
    """SIGTERM at random moments within the steps."""
    job = Job(lab, "terminated")
    for _ in range(times):
        newest = job.newest()
        job.start()
        job.wait_for(newest + lab.random.randint(1, EVERY))
        time.sleep(lab.random.uniform(0, 0.3))
        job.signal(signal.SIGTERM)
        job.expect(PREEMPTED)
        job.check_resumed(newest)
        assert job.newest() == job.last_step()
    job.run()
    job.check_equal()
    return Row("SIGTERM at a random moment", times, f"exit code {PREEMPTED}, the step it was in saved", 0, 0)


def truncated(lab: Lab, times: int) -> Row:
    """The newest checkpoint's largest file is cut in half; the run goes on from the one before."""
    return _damaged(lab, "truncated", lambda file: os.truncate(file, file.stat().st_size // 2), times, "truncated")


def missing(lab: Lab, times: int) -> Row:
    """The newest checkpoint's largest file is gone."""
    return _damaged(lab, "missing", pathlib.Path.unlink, times, "lacks a file")


def flipped(lab: Lab, times: int) -> Row:
    """One bit of the newest checkpoint's arrays is another."""

    def flip(file):
        content = bytearray(file.read_bytes())
        content[lab.random.randrange(len(content) // 2)] ^= 1 << lab.random.randrange(8)
        file.write_bytes(content)

    return _damaged(lab, "flipped", flip, times, "has a flipped bit")


def _damaged(lab: Lab, name: str, harm, times: int, what: str) -> Row:
    job = Job(lab, name)
    job.take_up(lab.begun())
    for number in range(times):
        before, newest = job.saved()[-2:]
        harm(max((job.workdir / "checkpoints" / str(newest)).rglob("d/*"), key=lambda path: path.stat().st_size))
        job.run(steps=newest + 2 * EVERY if number < times - 1 else None)
        assert job.resumed() == before and f"checkpoints/{newest} CANNOT BE USED" in job.said()
    job.check_equal()
    ended = "a warning names the checkpoint and why, goes on from the one before"
    return Row(f"newest checkpoint {what}", times, ended, 0, EVERY)


def all_broken(lab: Lab) -> Row:
    """Every checkpoint lacks a file: the run refuses to start, and starts once one is restored."""
    job = Job(lab, "all-broken")
    job.take_up(lab.begun())
    manifests = [job.workdir / "checkpoints" / str(step) / "state" / "manifest.ocdbt" for step in job.saved()]
    for file in manifests:
        file.rename(file.with_name("moved"))
    job.run(code=UNUSABLE)
    assert all(re.search(rf"\n  {step}: .*NOT_FOUND", job.said()) for step in job.saved())
    manifests[0].with_name("moved").rename(manifests[0])
    job.run()
    job.check_equal()
    return Row(
        "every checkpoint broken", 1, f"exit code {UNUSABLE}, each named with the reason; never from step 0", 0, EVERY
    )


def moved(lab: Lab) -> Row:
    """The machine that is left has another number of devices."""
    job = Job(lab, "moved")
    job.take_up(lab.begun())
    job.run("--config.mesh.fsdp=2", devices=2)
    assert (
        "other rounding than before: mesh {'data': 1, 'fsdp': 1, 'seq': 1} -> {'data': 1, 'fsdp': 2, 'seq': 1}"
        in job.said()
    )
    (steps, losses, _), (_, whole, _) = zip(*job.curve(), strict=True), zip(*lab.whole(1).curve(), strict=True)
    assert steps == tuple(range(1, lab.steps + 1))
    worst = max(abs(a / b - 1) for a, b in zip(losses, whole, strict=True))
    assert worst < 1e-5, worst
    return Row("started again on another mesh", 1, f"losses within {worst:.0e} of those on the old one", 0, 0)


def disk_full(lab: Lab) -> Row:
    """No room for the next checkpoint."""
    with _small_disk(lab.folder / "disk") as mounted:
        job = Job(lab, "disk-full", workdir=lab.folder / "disk" / "run")
        job.take_up(lab.begun())
        newest = job.newest()
        if mounted:
            free, ballast = shutil.disk_usage(job.workdir).free, lab.folder / "disk" / "ballast"
            ballast.write_bytes(bytes(free - 200_000))
            job.run(code=UNWRITTEN)
            ballast.unlink()
        else:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            job.run(code=UNWRITTEN)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said = job.said().splitlines()[-1]
        assert f"step {newest + EVERY} could not be written" in said and f"goes on from step {newest}" in said, said
        assert ("No space left on device" if mounted else "File too large") in said, said
        assert job.newest() == newest
        repeated = job.last_step() - newest
        job.run()
        job.check_resumed(newest)
        job.check_equal()
    how = "tmpfs" if mounted else "RLIMIT_FSIZE"
    return Row(
        f"disk full while saving ({how})", 1, f"exit code {UNWRITTEN}, says so; the one before is kept", 0, repeated
    )


@contextlib.contextmanager
def _small_disk(folder: pathlib.Path):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def not_a_number(lab: Lab) -> list[Row]:
    """A batch of pictures that are not numbers, which is an error, or skipped where the config allows it."""
    job, skipping = Job(lab, "nan"), Job(lab, "nan-skipped")
    job.run(code=NOT_FINITE, program=("-c", POISON, str(EVERY + 2)))
    assert re.search(rf"became nan within steps .* first at step {EVERY + 2}", job.said().splitlines()[-1])
    assert job.newest() == EVERY
    job.run()
    job.check_equal()
    skipping.run("--config.train.skip_nonfinite=2", program=("-c", POISON, str(EVERY + 2)))
    assert re.search(rf"step {EVERY + 2} skipped: \w+ is nan", skipping.said())
    assert [step for step, *_ in skipping.curve()] == [n + 1 for n in range(lab.steps) if n != EVERY + 1]
    what = "a batch that is not a number"
    return [
        Row(what, 1, f"exit code {NOT_FINITE}, names the metric and the step", 0, 1),
        Row(f"{what}, train.skip_nonfinite=2", 1, "the update is skipped, a warning names the step", 0, 0),
    ]


@contextlib.contextmanager
def _breakable_record(lab: Lab):
    """A function that changes a byte of record 7, which is sound again afterwards."""
    shard = lab.data / "pictures-00000.array_record"
    sound, record = shard.read_bytes(), records.read_one(records.open_shard(shard), 7)

    def harm():
        """Changes one byte where it lies: a reader at work sees the file before or after, never half of it."""
        at = sound.index(record) + len(record) // 2
        with shard.open("r+b") as file:
            file.seek(at)
            file.write(bytes([sound[at] ^ 0xFF]))

    try:
        yield harm
    finally:
        shard.write_bytes(sound)


def corrupt_record(lab: Lab) -> list[Row]:
    """A record's bytes change: while it runs, between two starts, and before the first."""
    rows, job = [], Job(lab, "corrupt")
    with _breakable_record(lab) as harm:
        job.start("--config.data.cache_mb=0")
        job.wait_for(EVERY + 1)
        harm()
        job.expect(2)
        assert BROKEN_RECORD.search(job.said().splitlines()[-1]), job.said()[-2000:]
        ended = "exit code 2, names shard and record"
        rows.append(Row("record corrupt while running", 1, ended, 0, job.last_step() - job.newest()))
        job.run(code=2)
        assert re.search(r"has \d+ usable pictures, the run so far has 24", job.said())
        assert re.search(r"pictures-00000\.array_record\[7\]: ", job.said().split("Unreadable now:")[1])
        rows.append(Row("record corrupt at a restart", 1, f"{ended}: the batches would be others", 0, 0))
        fresh = Job(lab, "corrupt-from-the-start")
        fresh.run(steps=1)
        assert re.search(r"skipped 1 of 24 pictures:\n.*pictures-00000\.array_record\[7\]: ", fresh.said())
        rows.append(Row("record corrupt before the first start", 1, "skipped; a warning names shard and record", 0, 0))
    job.run()
    job.check_equal()
    return rows


def lost_processes(lab: Lab, kills: int, freezes: int, timeout: int | None = None) -> list[Row]:
    """Four processes on localhost, of which one is killed, frozen, terminated, cannot read its pictures, or is the coordinator
    and killed.

    `timeout`: seconds that a process may be late, in place of train.py's.
    """
    job, rows = Job(lab, "four", processes=4), []
    program = ("-c", IMPATIENT, str(timeout)) if timeout else ("train.py",)

    def strike(number: int, victim: int) -> int:
        newest = job.newest()
        job.start(program=program)
        job.wait_for(newest + EVERY + 1)
        job.signal(number, victim)
        job.check_resumed(newest)
        return job.last_step()

    def others(victim: int, code: int) -> float:
        begun = time.monotonic()
        everyone, job.processes = job.processes, [p for i, p in enumerate(job.processes) if i != victim]
        job.expect(code, timeout=60)
        job.processes = everyone
        return time.monotonic() - begun

    for what, number, times in (("killed", signal.SIGKILL, kills), ("frozen", signal.SIGSTOP, freezes)):
        seconds, repeated = [], []
        for _ in range(times):
            victim = lab.random.randint(1, 3)
            done = strike(number, victim)
            seconds.append(others(victim, LOST))
            job.processes[victim].kill()
            assert all(f"lost process {victim} of 4" in job.said(i).splitlines()[-1] for i in range(4) if i != victim)
            repeated.append(done - job.newest())
        ended = f"the others within {max(seconds):.0f} s, exit code {LOST}, their last line names it"
        rows.append(Row(f"one of four processes {what}", times, ended, 0, max(repeated)))
    done = strike(signal.SIGKILL, 0)
    seconds = others(0, -signal.SIGABRT)
    assert all("leader task" in job.said(i) for i in (1, 2, 3))
    ended = f"the others within {seconds:.0f} s, aborted by JAX (134), which names the leader"
    rows.append(Row("the coordinator (process 0) killed", 1, ended, 0, done - job.newest()))
    strike(signal.SIGTERM, 2)
    job.expect(PREEMPTED)
    assert job.newest() == job.last_step()
    rows.append(Row("SIGTERM to one of four processes", 1, f"all save the same step, exit code {PREEMPTED}", 0, 0))
    newest = job.newest()
    job.start()
    while " parameters\n" not in job.said(1):  # joined, and about to restore and compile
        time.sleep(0.02)
    job.signal(signal.SIGTERM, 1)
    job.expect(PREEMPTED)
    job.check_resumed(newest)
    assert newest < job.newest() == job.last_step() <= newest + 2
    ended = f"all save the same step, one of the first two, exit code {PREEMPTED}"
    rows.append(Row("SIGTERM to one of four processes while they start", 1, ended, 0, 0))
    newest = job.newest()
    with _breakable_record(lab) as harm:
        job.start("--config.data.cache_mb=0")
        job.wait_for(newest + 1)
        begun = time.monotonic()
        harm()
        job.expect(2)
    seconds, last = time.monotonic() - begun, [job.said(i).splitlines()[-1] for i in range(4)]
    (reader,) = (i for i in range(4) if BROKEN_RECORD.search(last[i]))
    assert all(f"process {reader} of 4 ended with exit code 2" in last[i] for i in range(4) if i != reader), last
    ended = f"the others within {seconds:.0f} s, exit code 2, their last line names it"
    rows.append(
        Row("record corrupt while running, read by one of four processes", 1, ended, 0, job.last_step() - job.newest())
    )
    newest = job.newest()
    job.run()
    job.check_resumed(newest)
    job.check_equal()
    return rows


def table(rows: list[dict]) -> str:
    """Markdown, from rows of the file."""
    lines = ["| fault | times | what happens | saved steps lost | steps done again, at most |", "|---|---|---|---|---|"]
    lines += ["| {fault} | {tried} | {ended} | {lost} | {repeated} |".format(**row) for row in rows]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of faults, separated by commas; all by default")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--terminations", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    args = parser.parse_args()
    one, four = 200, 60  # steps
    faults = {
        "killed": (one, lambda lab: [killed(lab, args.kills)]),
        "terminated": (one, lambda lab: [terminated(lab, args.terminations)]),
        "truncated": (one, lambda lab: [truncated(lab, 3)]),
        "missing": (one, lambda lab: [missing(lab, 3)]),
        "flipped": (one, lambda lab: [flipped(lab, 3)]),
        "all_broken": (one, lambda lab: [all_broken(lab)]),
        "moved": (one, lambda lab: [moved(lab)]),
        "disk_full": (one, lambda lab: [disk_full(lab)]),
        "not_a_number": (one, not_a_number),
        "corrupt_record": (one, corrupt_record),
        "lost_processes": (four, lambda lab: lost_processes(lab, 3, 3)),
    }
    chosen = args.only.split(",") if args.only else list(faults)
    if unknown := set(chosen) - set(faults):
        parser.error(f"--only={','.join(unknown)}: not one of {', '.join(faults)}")
    host = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    about = versions() | {"orbax-checkpoint": importlib.metadata.version("orbax-checkpoint"), "host": host}
    measured = json.loads(args.out.read_text())["faults"] if args.out.exists() else {}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def lab(steps):
            return Lab(pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())), steps)

        for name in chosen:
            steps, experiment = faults[name]
            begun = time.monotonic()
            rows = [dataclasses.asdict(row) for row in experiment(lab(steps))]
            print(table(rows), flush=True)
            measured[name] = about | {"minutes": round((time.monotonic() - begun) / 60, 1), "rows": rows}
            found = {name: measured[name] for name in faults if name in measured}
            text = json.dumps({"command": "python -m benchmarks.faults", "faults": found}, indent=1)
            atomic.write_file(args.out, f"{text}\n".encode())
    print(table([row for name in faults if name in measured for row in measured[name]["rows"]]))


if __name__ == "__main__":
    main()
