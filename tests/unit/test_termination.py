"""What SIGTERM and Ctrl-C do to a run."""

import signal

import pytest

from sana_jax.training.termination import Termination


@pytest.fixture(autouse=True)
def in_the_foreground():
    """A shell lets what it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_the_run_to_save_and_end(number):
    with Termination() as termination:
        assert not termination.due()
        signal.raise_signal(number)
        assert termination.due()


def test_the_second_interrupt_ends_the_run_at_once():
    with pytest.raises(KeyboardInterrupt), Termination():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_signals_do_after_a_run_what_they_did_before():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Termination():
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
