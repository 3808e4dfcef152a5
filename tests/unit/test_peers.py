"""The watch over the other processes of a job, with a service whose meetings end as the test says; and a job without one."""

import contextlib
import logging
import queue
import threading
import types

import jax
import pytest

from sana_jax.parallel import peers
from sana_jax.parallel.peers import Peers, lost
from sana_jax.training.termination import Termination

TIMED_OUT = (
    "DEADLINE_EXCEEDED: Barrier timed out. Id: sana_jax: meeting::1. # of tasks that reached the barrier: 2/4. The first "
    "task at the barrier: 0. Some timed out task names:\n1\n3\n"
)


class Service:
    """JAX's coordination service, as far as it is asked."""

    def __init__(self):
        self._barriers, self._outcomes = queue.Queue(), queue.Queue()
        self.values, self.all_leave = {}, True

    def wait_at_barrier(self, name, timeout):
        if name == "sana_jax: leaving":
            if not self.all_leave:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out.")
            return
        self._barriers.put(name)
        error = self._outcomes.get(timeout=20)
        if error:
            raise jax.errors.JaxRuntimeError(error)

    def key_value_set(self, key, value):
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def shutdown(self):
        self.end("UNAVAILABLE: the service has ended")

    def end(self, error=None, timeout=20):
        """Ends the meeting that is held, or the next within `timeout` seconds; returns its name."""
        name = self._barriers.get(timeout=timeout)
        self._outcomes.put(error)
        return name


@pytest.fixture
def service(monkeypatch):
    """Of a job of four processes, in which this is the second."""
    service = Service()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(peers, "PERIOD", 0)
    monkeypatch.setattr(
        peers.distributed, "global_state", types.SimpleNamespace(client=service, shutdown=service.shutdown)
    )
    return service


@pytest.fixture
def exits(monkeypatch):
    """Codes with which the process would have ended on the spot."""
    codes = queue.Queue()

    def end(code):
        codes.put(code)
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(code)

    monkeypatch.setattr(peers.os, "_exit", end)
    return codes


def test_who_was_missing_is_named():
    assert lost(TIMED_OUT, 4).startswith("lost process 1, 3 of 4: no sign of life for 40 s")


def test_a_lost_process_is_noticed_within_a_minute():
    assert peers.PERIOD + peers.TIMEOUT < 60


def test_an_error_that_names_nobody_is_told_as_it_is():
    assert lost("UNAVAILABLE: no connection", 4) == "the other processes cannot be reached: UNAVAILABLE: no connection"


def test_a_process_on_its_own_asks_nobody_and_ends_with_its_code():
    alone = Peers()
    alone.ask()
    with pytest.raises(SystemExit, match="3"):
        alone.leave(3)


def test_a_meeting_that_somebody_misses_ends_the_process_with_a_word_of_who(service, exits, caplog):
    Peers()
    service.end()
    with caplog.at_level(logging.ERROR, logger="absl"):
        service.end(TIMED_OUT)
        assert exits.get(timeout=20) == peers.LOST == 76
    assert "lost process 1, 3 of 4" in caplog.text


def test_all_meetings_have_one_name_because_the_service_keeps_every_name(service, exits):
    Peers()
    assert {service.end() for _ in range(3)} == {"sana_jax: meeting"}
    service.end(TIMED_OUT)
    exits.get(timeout=20)


def test_asking_waits_for_a_meeting_that_began_after_it(service, exits):
    asking = threading.Thread(target=Peers().ask)
    asking.start()
    service.end()  # held already, perhaps, when the question came
    asking.join(timeout=0.5)
    assert asking.is_alive()
    service.end()
    asking.join(timeout=20)
    assert not asking.is_alive()
    service.end(TIMED_OUT)
    exits.get(timeout=20)


def test_a_meeting_that_fails_because_all_have_left_is_no_loss(service, exits):
    threads = set(threading.enumerate())
    leaving = Peers()
    (watch,) = set(threading.enumerate()) - threads
    with pytest.raises(SystemExit, match="75"):
        leaving.leave(75)
    assert not watch.is_alive(), "it would abort Python's end"
    assert exits.empty()


def test_an_error_that_others_have_alone_ends_this_process_with_the_highest_of_their_codes(service, exits, caplog):
    Peers()
    service.key_value_set("sana_jax/ended/2", "2")
    service.key_value_set("sana_jax/ended/3", "74")
    with caplog.at_level(logging.ERROR, logger="absl"):
        service.end()
        assert exits.get(timeout=20) == 74
    assert "process 3 of 4 ended with exit code 74" in caplog.text


def test_a_process_with_an_error_of_its_own_tells_its_code_before_a_meeting_and_ends_after_it(service, exits):
    service.all_leave = False

    def meet():
        while exits.empty():
            with contextlib.suppress(queue.Empty):
                service.end(timeout=0.1)

    leaving, meetings = Peers(), threading.Thread(target=meet)
    meetings.start()
    with pytest.raises(SystemExit, match="2"):
        leaving.leave(2)
    meetings.join(timeout=20)
    assert service.values == {"sana_jax/ended/1": "2"}
    assert exits.get(timeout=20) == 2


def test_a_process_that_has_done_its_work_ends_no_other(service, exits):
    service.all_leave = False
    with pytest.raises(SystemExit, match="0"):
        Peers().leave(0)
    assert exits.get(timeout=20) == 0
    service.end()
    assert not service.values
    service.end(TIMED_OUT)
    exits.get(timeout=20)


def test_a_job_whose_processes_cannot_agree_on_its_end_does_not_start(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="jax_enable_preemption_service is off"), Termination():
        pass
