"""The account of a compiled program's collectives, on small programs written as XLA writes them."""

import pytest

from sana_jax.aot import hlo
from sana_jax.aot.collectives import Total, collectives, group_size, totals

LOOP = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%body (p: (s32[], f32[8,16], /*index=2*/f32[4])) -> (s32[], f32[8,16], f32[4]) {
  %p = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, /*index=2*/f32[4]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %y = f32[4]{0} get-tuple-element(%p), index=2
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  BODY
  ROOT %out = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, /*index=2*/f32[4]{0}) tuple(%next, %x, %y)
}

%condition (q: (s32[], f32[8,16], f32[4])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[4]{0}) parameter(0)
  %limit = s32[]{:T(128)} constant(20)
  %counter = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

ENTRY %main (x: f32[8,16], y: f32[4]) -> f32[8,16] {
  %x.1 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %y.1 = f32[4]{0} parameter(1)
  %zero = s32[]{:T(128)} constant(START)
  %start = s32[]{:T(128)} copy(%zero)
  %init = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[4]{0}) tuple(%start, %x.1, %y.1)
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, f32[4]{0}) while(%init), condition=%condition, body=%body NOTE
  ROOT %result = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def loop(body: str = "", start: int = 0, note: str = "") -> str:
    return LOOP.replace("BODY", body).replace("START", str(start)).replace("NOTE", note)


def straight(body: str, computations: str = "") -> str:
    return (
        f"HloModule jit_step, num_partitions=8\n\n{computations}\n"
        f"ENTRY %main (x: f32[8,16]) -> f32[8,16] {{\n  %x = f32[8,16]{{1,0}} parameter(0)\n{body}\n"
        "  ROOT %end = f32[8,16]{1,0} copy(%x)\n}\n"
    )


GATHER = "%g = f32[64,16]{1,0:T(8,128)} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}"


def test_sizes_of_types():
    assert hlo.array_bytes("f32[2,3]{1,0:T(8,128)}") == [24]
    assert hlo.array_bytes("(bf16[4]{0}, pred[], /*index=2*/s4[8], token[])") == [8, 1, 4, 0]
    assert hlo.array_bytes("(f8e4m3fn[16], u32[], f32[<=4])") == [16, 4, 16]


def test_a_collective_in_a_loop_counts_once_a_turn():
    assert totals(collectives(loop(GATHER))) == {"all-gather": Total(20, 20 * 4096 * 7 // 8)}


def test_a_loop_whose_first_turn_was_taken_out_turns_once_less():
    assert totals(collectives(loop(GATHER, start=1)))["all-gather"].count == 19


def test_xlas_own_count_of_turns_is_believed():
    noted = loop(GATHER, note=', backend_config={"known_trip_count":{"n":"7"}}')
    assert totals(collectives(noted))["all-gather"].count == 7


def test_loops_count_down_and_by_larger_steps():
    down = loop(GATHER, start=39).replace("add(%i, %one)", "subtract(%i, %one)").replace("direction=LT", "direction=GE")
    assert totals(collectives(down))["all-gather"].count == 20
    by_three = loop(GATHER).replace("%one = s32[]{:T(128)} constant(1)", "%one = s32[]{:T(128)} constant(3)")
    assert totals(collectives(by_three))["all-gather"].count == 7


def test_a_comparison_in_a_fusion_is_seen_through():
    fused = """%compare_fusion (a.1: s32[], b.1: s32[]) -> pred[] {
  %a.1 = s32[] parameter(0)
  %b.1 = s32[] parameter(1)
  ROOT %less.1 = pred[] compare(%a.1, %b.1), direction=LT
}

%condition (q"""
    text = loop(GATHER).replace("%condition (q", fused)
    text = text.replace(
        "compare(%counter, %limit), direction=LT", "fusion(%counter, %limit), kind=kLoop, calls=%compare_fusion"
    )
    assert totals(collectives(text))["all-gather"].count == 20


def test_a_loop_that_ends_by_its_data_is_an_error_that_names_it():
    text = loop(GATHER).replace("%limit = s32[]{:T(128)} constant(20)", "%limit = s32[] get-tuple-element(%q), index=1")
    with pytest.raises(hlo.Trips, match="the loop loop does not count between constants"):
        collectives(text)


def test_an_asynchronous_gather_counts_once_by_its_result():
    text = straight(
        "  %s = (f32[8,16]{1,0}, f32[64,16]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}\n"
        "  %d = f32[64,16]{1,0} all-gather-done(%s)"
    )
    assert totals(collectives(text)) == {"all-gather": Total(1, 3584)}


def test_the_parts_of_a_collective_that_is_fused_with_computation_count_once():
    parts = "\n".join(
        f"%part_{n} (p.{n}: f32[8,16]) -> f32[64,16] {{\n  %p.{n} = f32[8,16]{{1,0}} parameter(0)\n"
        f"  ROOT %g.{n} = f32[64,16]{{1,0}} all-gather(%p.{n}), channel_id=5, replica_groups=[1,8]<=[8], dimensions={{0}}\n}}\n"
        for n in range(3)
    )
    calls = "\n".join(
        f"  %f.{n} = f32[64,16]{{1,0}} fusion(%x), kind=kCustom, calls=%part_{n}, backend_config={{}}" for n in range(3)
    )
    assert totals(collectives(straight(calls, parts))) == {"all-gather": Total(1, 3584)}


def test_an_all_reduce_cut_to_a_shard_in_its_fusion_is_a_reduce_scatter():
    fusion = """%all-reduce-scatter (p.1: f32[8,16]) -> f32[1,16] {
  %p.1 = f32[8,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %r = f32[8,16]{1,0} all-reduce(%p.1), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %cut = f32[SHARD,16]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={SHARD,16}
}
"""
    call = "  %f = f32[1,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter"
    whole = totals(collectives(straight(call, fusion.replace("SHARD", "1"))))
    assert whole == {"reduce-scatter": Total(1, 512 * 7 // 8)}
    # Four shards among eight devices: the two that keep the same shard exchange the halves of it.
    quarter = totals(collectives(straight(call, fusion.replace("SHARD", "2"))))
    assert quarter == {"reduce-scatter": Total(1, 512 * 7 // 8 + 128 - 64)}


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("f32[8,16]{1,0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add", "all-reduce", 768),
        ("(f32[8,16], f32[4]) all-reduce(%x, %x), replica_groups={{0,1}}, to_apply=%add", "all-reduce", 528),
        ("f32[1,16]{1,0} reduce-scatter(%x), replica_groups=[1,8]<=[8], dimensions={0}", "reduce-scatter", 448),
        ("f32[8,16]{1,0} all-to-all(%x), replica_groups=[1,8]<=[8], dimensions={0}", "all-to-all", 448),
        ("f32[8,16]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,2}}", "collective-permute", 512),
        (
            "(f32[8,16]{1,0}, f32[8,16]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}",
            "collective-permute",
            512,
        ),
        (
            "((f32[8,16]{1,0}), f32[1,16]{1,0}) reduce-scatter-start(%x), replica_groups=[1,8]<=[8]",
            "reduce-scatter",
            448,
        ),
        (
            "((f32[8,16], f32[8,4]), (f32[1,16], f32[1,4])) reduce-scatter-start(%x, %x), replica_groups=[1,8]<=[8]",
            "reduce-scatter",
            560,
        ),
        (
            "((f32[8,16]{1,0}), f32[8,16]{1,0}, u32[]) all-to-all-start(%x), replica_groups=[1,8]<=[8]",
            "all-to-all",
            448,
        ),
        ("f32[8,16]{1,0} all-reduce-start(%x), replica_groups=[1,8]<=[8], to_apply=%add", "all-reduce", 896),
        ("(f32[8,16]{1,0}, u32[], token[]) send(%x, %t), channel_id=6, is_host_transfer=true", "between slices", 512),
    ],
)
def test_bytes_that_a_device_sends_by_the_ring(line, kind, sent):
    assert totals(collectives(straight(f"  %c = {line}"))) == {kind: Total(1, sent)}


def test_what_stays_on_one_device_is_no_traffic():
    assert collectives(straight(f"  {GATHER.replace('[1,8]<=[8]', '[8,1]<=[8]')}")) == []


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("{}", 8),
    ],
)
def test_groups_in_every_notation(groups, size):
    assert group_size(f", channel_id=3, replica_groups={groups}, use_global_device_ids=true", 8) == size


def test_every_branch_of_a_conditional_is_counted():
    branches = "".join(
        f"%branch_{n} (b.{n}: f32[8,16]) -> f32[64,16] {{\n  %x = f32[8,16]{{1,0}} parameter(0)\n  ROOT {GATHER}\n}}\n\n"
        for n in range(2)
    )
    call = "  %c = f32[64,16] conditional(%i, %x, %x), branch_computations={%branch_0, %branch_1}"
    assert totals(collectives(straight(call, branches)))["all-gather"].count == 2
