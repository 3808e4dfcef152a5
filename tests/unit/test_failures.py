"""Commands that end because a device has too little memory."""

import jax
import pytest

from sana_jax import SanaPipeline
from sana_jax.evaluation.__main__ import main as evaluation
from sana_jax.export.__main__ import main as export
from sana_jax.pruning.__main__ import main as pruning
from sana_jax.weights import efficientnet

EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes."


@pytest.fixture(params=["export", "pruning", "evaluation"])
def run(request, tmp_path, monkeypatch):
    monkeypatch.setattr(efficientnet, "find", lambda: None)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("fox\n")
    return {
        "export": lambda: export(["executable", f"--output={tmp_path / 'out'}"]),
        "pruning": lambda: pruning([f"--prompts_file={prompts}"]),
        "evaluation": lambda: evaluation(["emoji"]),
    }[request.param]


def fail_with(monkeypatch, said):
    def fail(*arguments, **settings):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(SanaPipeline, "from_pretrained", fail)


def test_it_is_one_line_and_an_exit_code_of_its_own(run, monkeypatch, capsys):
    fail_with(monkeypatch, f"{EXHAUSTED}\nmore")
    assert run() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: the device has too little memory for this ({EXHAUSTED}); " in line


def test_another_error_is_raised(run, monkeypatch):
    fail_with(monkeypatch, "INTERNAL: a bug")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: a bug"):
        run()
