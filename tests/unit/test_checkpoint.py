"""Checkpoints: what comes back, what is kept, what must agree."""

import copy
import os
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from configs import base
from sana_jax import checkpoint
from sana_jax.checkpoint import CheckpointError, Checkpoints, UnwrittenError
from sana_jax.parallel.mesh import make_mesh
from sana_jax.training.claim import Claim
from sana_jax.training.optimizers.came import scale_by_came
from sana_jax.training.resume import check_resumable, contradictions, make_record, plain
from sana_jax.training.state import init_state


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch):
    monkeypatch.setattr(checkpoint, "_WAITS", (0, 0))


@pytest.fixture
def state():
    params = {"blocks": {"kernel": jax.random.normal(jax.random.key(0), (2, 64, 96))}, "bias": jnp.arange(3.0)}
    return init_state(params, optax.chain(optax.clip(1.0), scale_by_came()), with_ema=True)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def checkpoints(path, **kwargs):
    return Checkpoints(path, **{"keep": 2} | kwargs)


@pytest.fixture
def saved(tmp_path, state):
    """A run's folder with the states of steps 3 and 7, which differ."""
    with checkpoints(tmp_path) as written:
        for step in (3, 7):
            numbered = state._replace(step=jnp.int32(step))
            mesh = make_mesh(devices=jax.devices()[:1])
            written.save(step, numbered, make_record(base.get_config(), step, mesh, pictures=24))
    return tmp_path


def test_state_and_record_come_back_bit_for_bit(saved, state):
    with checkpoints(saved) as read:
        restored, record = read.restore(abstract(state)), read.record()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state._replace(step=jnp.int32(7)))
    assert record["data_position"] == 7 and record["pictures"] == 24
    assert {"jax", "jaxlib", "sana_jax", "commit"} == record["versions"].keys()
    assert contradictions(record["config"], base.get_config()) == []


def test_what_another_run_may_be_saving_is_removed_only_once_this_one_has_taken_over(saved, state):
    unfinished = saved / "checkpoints" / "9.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "array").write_text("half")
    with checkpoints(saved) as opened:
        assert opened.record()["data_position"] == 7 and (unfinished / "array").exists()
        opened.remove_unfinished()
        assert not unfinished.exists()
        opened.save(9, state, {"data_position": 9})
    with checkpoints(saved) as opened:
        assert opened.steps() == [9, 7]


def test_a_new_run_has_no_checkpoint(tmp_path):
    with checkpoints(tmp_path) as empty:
        assert empty.steps() == [] and empty.record() is None


def test_the_newest_are_kept_and_every_so_many_steps_one_for_ever(tmp_path, state):
    with checkpoints(tmp_path, keep_every=2) as written:
        for step in range(1, 6):
            written.save(step, state, {})
        written.check()
    with checkpoints(tmp_path) as read:
        assert read.steps() == [5, 4, 2]


def test_every_file_that_is_truncated_or_missing_does_no_harm_or_leads_to_the_checkpoint_before(
    saved, state, tmp_path_factory
):
    """Orbax notices some of them on listing, others on reading; what it cannot miss it reads as it was."""
    newest = saved / "checkpoints" / "7"
    outcomes = set()
    for file in sorted(path.relative_to(saved) for path in newest.rglob("*") if path.is_file()):
        for harm in (pathlib.Path.unlink, lambda path: os.truncate(path, path.stat().st_size // 2)):
            copied = tmp_path_factory.mktemp("copy") / "run"
            shutil.copytree(saved, copied)
            harm(copied / file)
            with checkpoints(copied) as read:
                restored = read.restore(abstract(state))
                aside = [path.name.split("-")[0] for path in (copied / "checkpoints").glob("7.*")]
                assert (int(restored.step), read.steps(), aside) in ((7, [7, 3], []), (3, [3], ["7.unreadable"]))
            jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
            outcomes.add(int(restored.step))
    assert outcomes == {3, 7}


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_file_system_that_fails_for_a_moment_breaks_no_checkpoint(saved, state, monkeypatch, failures):
    load, attempts = ocp.load, []

    def failing(path, wanted):
        attempts.append(path.name)
        if len(attempts) <= failures:
            raise OSError("Stale file handle")
        return load(path, wanted)

    monkeypatch.setattr(ocp, "load", failing)
    with checkpoints(saved) as read:
        assert int(read.restore(abstract(state)).step) == (7 if failures < 3 else 3)
    assert attempts == (["7"] * (failures + 1) if failures < 3 else ["7"] * 3 + ["3"])


def test_a_flipped_bit_that_is_read_without_an_error_is_noticed(saved, state, caplog):
    arrays = saved / "checkpoints" / "7" / "state" / "ocdbt.process_0"
    file = max(arrays.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with checkpoints(saved) as read:
        assert int(read.restore(abstract(state)).step) == 3
    assert "7 CANNOT BE USED" in caplog.text and "differ from what was saved" in caplog.text


def test_where_no_checkpoint_can_be_read_the_error_lists_them_and_all_stay(saved, state):
    for step in ("3", "7"):
        (saved / "checkpoints" / step / "state" / "manifest.ocdbt").unlink()
    with checkpoints(saved) as read:
        with pytest.raises(CheckpointError, match=r"(?s)another --workdir:\n  7: .*NOT_FOUND.*\n  3: .*NOT_FOUND"):
            read.restore(abstract(state))
        assert read.steps() == [7, 3]


def test_a_step_whose_broken_checkpoint_was_passed_over_is_saved_again(saved, state):
    (saved / "checkpoints" / "7" / "state" / "manifest.ocdbt").unlink()
    with checkpoints(saved) as read:
        restored = read.restore(abstract(state))
        read.save(7, restored, {"config": {}})
    with checkpoints(saved) as read:
        assert read.steps() == [7, 3]
        jax.tree.map(np.testing.assert_array_equal, read.restore(abstract(state)), restored)


def test_a_save_that_fails_is_an_error_that_names_the_step_and_the_one_to_go_on_from(saved, state):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = r"step 8 could not be written: .*File too large.* goes on from step 7"
    try:
        with pytest.raises(UnwrittenError, match=message), checkpoints(saved) as written:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            written.save(8, state, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with checkpoints(saved) as read:
        assert int(read.restore(abstract(state)).step) == 7


def test_contradictions_list_every_field_that_changes_the_model_or_its_updates():
    config = base.get_config()
    saved = copy.deepcopy(plain(config))
    config.data.batch_size = 8
    config.optimizer.learning_rate = 1.0
    config.mesh.fsdp = 2
    config.train.log_every = 1
    config.train.num_steps = 5
    config.sample.prompts = ("a cat",)
    assert contradictions(saved, config) == [
        "data.batch_size: 1024 -> 8",
        "optimizer.learning_rate: 0.0001 -> 1.0",
    ]


def test_a_run_with_a_decay_to_its_end_may_not_change_its_length():
    config = base.get_config()
    config.optimizer.schedule = "cosine"
    saved = plain(config)
    config.train.num_steps = 5
    assert contradictions(saved, config) == ["train.num_steps: 100000 -> 5"]


@pytest.mark.parametrize(("before", "now"), [("came", "came8bit"), ("adamw8bit", "adamw")])
def test_the_other_form_of_an_optimizers_state_is_refused_with_the_way_to_convert_it(before, now):
    config = base.get_config()
    config.optimizer.name = before
    record = {"config": plain(config), "mesh": {}, "versions": {}}
    config.optimizer.name = now
    with pytest.raises(ValueError, match=f"{before} into that of {now} with --config.optimizer.convert_state=True"):
        check_resumable(record, config, make_mesh(), "runs/x")
    config.optimizer.convert_state = True
    check_resumable(record, config, make_mesh(), "runs/x")


def test_another_optimizer_is_refused_whatever_the_config_says_of_conversion():
    config = base.get_config()
    record = {"config": plain(config), "mesh": {}, "versions": {}}
    config.optimizer.name, config.optimizer.convert_state = "came8bit", True
    with pytest.raises(ValueError, match="Restore these fields, or start a new run"):
        check_resumable(record, config, make_mesh(), "runs/x")


def test_fields_that_went_are_contradictions_and_newer_ones_are_not():
    saved = {"model": {"width": 64, "old": 1}}
    assert contradictions(saved, ConfigDict({"model": {"width": 64, "new": 2}})) == [
        "model.old: 1 -> '(absent)'",
    ]


def test_a_run_on_squares_from_before_there_were_other_ratios_goes_on_with_squares_alone():
    config = base.get_config()
    saved = plain(config)
    del saved["data"]["aspect_ratios"]
    assert contradictions(saved, config) == []
    config.data.aspect_ratios = (0.57, 1.0)
    assert contradictions(saved, config) == ["data.aspect_ratios: [1.0] -> [0.57, 1.0]"]


def test_a_run_that_another_one_has_followed_saves_nothing_more(tmp_path):
    first = Claim(tmp_path)
    first.check()
    second = Claim(tmp_path)
    second.check()
    with pytest.raises(CheckpointError, match="belongs to another run by now"):
        first.check()


def test_a_folder_that_has_no_room_for_the_runs_name_is_told_as_one_for_checkpoints(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(UnwrittenError, match="run.json could not be written: "):
        Claim(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{}", "[]", "null", '"text"', "[[1, 2, 3]]"])
def test_a_folder_that_names_no_run_belongs_to_whoever_saves(tmp_path, content):
    claim = Claim(tmp_path)
    (tmp_path / "run.json").unlink()
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    claim.check()
