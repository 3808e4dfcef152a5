"""From the start of the process to the first step, and the window of steps that is traced."""

import time

import jax
import pytest

from sana_jax.training.profiling import StepProfiler, check_window
from sana_jax.training.startup import Spans, keep_compiled


def test_spans_follow_each_other_from_the_beginning(monkeypatch):
    clock = iter([13.0, 15.5, 15.75])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    spans = Spans(began=10.0)
    for name in ("imports", "compile", "first step"):
        spans.end(name)
    assert spans.line() == "first step after 5.8 s: imports 3.0, compile 2.5, first step 0.2"
    assert spans.metrics() == {"startup/imports": 3.0, "startup/compile": 2.5, "startup/first_step": 0.25}


def test_compiled_programs_are_kept_where_asked_else_where_jax_has_them_else_in_the_workdir(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        for asked, present, expected in (
            ("", None, str(tmp_path / "compilation_cache")),
            ("", "/elsewhere", "/elsewhere"),
            ("/asked", "/elsewhere", "/asked"),
        ):
            jax.config.update("jax_compilation_cache_dir", present)
            keep_compiled(asked, str(tmp_path))
            assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_trace_begins_before_the_first_and_ends_after_the_last_step_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with StepProfiler((3, 4), str(tmp_path), enabled=True) as profiler:
        for step in range(1, 6):
            calls.append(step)
            profiler.at(step, {})
    assert calls == [1, 2, "start", 3, 4, "stop", 5]
    calls.clear()
    with StepProfiler((3, 9), str(tmp_path), enabled=True) as profiler:
        profiler.at(4, {})  # a run that goes on within the window
    assert calls == ["start", "stop"]


@pytest.mark.parametrize("window", [(3,), (4, 3), (0, 2)])
def test_a_window_of_steps_that_cannot_be_is_an_error(window):
    with pytest.raises(ValueError, match="is not .first, last. with 1 <= first <= last"):
        check_window(window)
