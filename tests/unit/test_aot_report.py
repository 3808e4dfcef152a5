"""What --aot prints, without a compiler."""

import json

import pytest

from sana_jax.aot import stand_ins
from sana_jax.aot.collectives import Total
from sana_jax.aot.report import Memory, Report, out_of_memory
from sana_jax.aot.topologies import MEMORY_VARIABLES, gpu_memory_share, open_topology
from sana_jax.parallel.chips import chip_of_topology
from sana_jax.prompts import COMPLEX_HUMAN_INSTRUCTION, tokenize_prompts

GB = 10**9


def report(**changes):
    values = dict(
        topology="v5e:2x4",
        chip=chip_of_topology("v5e:2x4"),
        compiler="libtpu 1",
        devices=8,
        mesh={"data": 2, "fsdp": 4, "seq": 1},
        batch_size=64,
        parameters=1_000_000,
        frozen_parameters=2_000_000,
        step_flops=int(8 * 197e12 * 0.1),
        memory=Memory(arguments=3 * GB, outputs=2 * GB, aliased=2 * GB, temporaries=4 * GB, program=0),
        traffic=41 * GB,
        collectives={"all-gather": Total(40, 10 * GB), "between slices": Total(2, 90 * GB)},
        refusal=(),
        compile_seconds=1.0,
    )
    return Report(**values | changes)


def test_outputs_in_the_place_of_arguments_take_no_memory():
    assert report().memory.peak == 7 * GB


def test_what_lives_beside_the_program_has_to_fit_too():
    waiting = report(memory=Memory(3 * GB, 2 * GB, 2 * GB, 4 * GB, 0, beside=8 * GB))
    assert waiting.memory.peak == 15 * GB and waiting.fits
    assert not report(memory=Memory(3 * GB, 2 * GB, 2 * GB, 4 * GB, 0, beside=10 * GB)).fits
    assert "batches beside the step's own 8.00 GB" in str(waiting)


@pytest.mark.parametrize(
    ("environment", "share"),
    [({}, 0.75), ({"XLA_CLIENT_MEM_FRACTION": "0.92"}, 0.92), ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}, 0.9)],
)
def test_a_run_gets_the_part_of_a_gpu_that_jax_takes(environment, share, monkeypatch):
    for variable in MEMORY_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert gpu_memory_share() == share


@pytest.mark.parametrize("value", ["75%", "0", "1.1"])
def test_a_part_of_a_gpu_that_cannot_be_is_an_error(value, monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", value)
    with pytest.raises(ValueError, match=r"XLA_CLIENT_MEM_FRACTION=.* is no part of a GPU's memory"):
        gpu_memory_share()


def test_a_step_that_fits_the_card_and_not_what_jax_takes_of_it_does_not_fit():
    memory = Memory(arguments=70 * GB, outputs=0, aliased=0, temporaries=0, program=0)
    card = dict(topology="h100", chip=chip_of_topology("h100"), memory=memory)
    assert report(**card).fits
    less = report(**card, memory_share=0.75)
    assert not less.fits and "DOES NOT FIT: 70.00 of 60.0 GB (75% of the card" in str(less)


def test_the_step_takes_as_long_as_its_longest_bound():
    bounds = report().bounds
    assert bounds == pytest.approx({"compute": 0.1, "memory": 41 / 819, "interconnect": 10 / 200})
    assert report().step_seconds == bounds["compute"] and report().mfu == 1
    slow = report(collectives={"all-reduce": Total(1, 40 * GB)})
    assert (slow.step_seconds, slow.mfu) == pytest.approx((0.2, 0.5))


def test_two_devices_of_a_chip_share_its_memory_and_its_peaks():
    whole = report(topology="tpu7x:2x2x1", chip=chip_of_topology("tpu7x"))
    assert whole.hbm == 96 * 2**30
    assert whole.bounds["compute"] == pytest.approx(8 * 197e12 * 0.1 / 4 / 2307e12)
    assert whole.bounds["interconnect"] == pytest.approx(2 * 10 / 600)


def test_a_configuration_fits_where_the_compiler_takes_it_and_the_memory_suffices():
    assert report().fits
    assert not report(memory=Memory(15 * GB, 0, 0, 4 * GB, 0)).fits
    assert not report(memory=None, refusal=("Ran out of memory",)).fits


def test_the_report_says_what_was_found_and_that_it_is_no_measurement():
    text = str(report())
    for part in (
        "fits: 7.00 of 16.0 GB",
        "41.0 GB a step",
        "all-gather",
        "at least 0.100 s",
        "MFU at most 100%",
        "not measurements",
    ):
        assert part in text
    refused = str(report(memory=None, refusal=("Used 20G of 15.75G hbm",), collectives={}))
    assert "DOES NOT FIT" in refused and "Used 20G of 15.75G hbm" in refused


def test_the_report_is_json_with_the_derived_numbers():
    values = json.loads(json.dumps(report().to_json()))
    assert values["memory"]["peak"] == 7 * GB and values["collectives"]["all-gather"] == {"count": 40, "sent": 10 * GB}
    assert values["fits"] and values["step_seconds"] == 0.1 and values["chip"] == "v5e"


def test_a_refusal_is_told_in_few_lines():
    message = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.

Total hbm usage >= 20.75G:
    reserved        258.00M

Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(step)/conv"
     Shape: f32[16,1024,1024,128]{3,2,1,0:T(8,128)}
     Unpadded size: 8.00G
     XLA label: fusion.1
     Allocation type: HLO temp
     ==========================
"""
    first, second = out_of_memory(message)
    assert first == (
        "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    assert "8.00G" in second and "f32[16,1024,1024,128]" in second and "jit(step)/conv" in second


@pytest.mark.parametrize("name", ["v5e", "v5e:16", "v5e:2x2x2", "v5p:4x4", "v9:2x2", "v5e:2x4*0", "2x4", "v5e:2x4x"])
def test_a_topology_that_does_not_exist_is_an_error_that_names_some_that_do(name):
    with pytest.raises(ValueError, match=r"is no topology; known are v5e:16x16, .*v5p:8x8x8"):
        open_topology(name)


def test_the_stand_in_tokenizer_has_gemmas_conventions():
    ids, mask = tokenize_prompts(stand_ins.word_tokenizer(), ["a red apple", ""], COMPLEX_HUMAN_INSTRUCTION, 300)
    assert ids.shape == (2, 197 + 300 - 2) and ids[0, 0] == 2 and mask[0].sum() == 200
    ids, mask = tokenize_prompts(stand_ins.word_tokenizer(), [""], None, 300)
    assert ids.shape == (1, 300) and mask.sum() == 1
