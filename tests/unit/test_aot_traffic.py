"""The account of a compiled program's memory traffic, on small programs written as XLA writes them."""

import jax
import jax.numpy as jnp
import pytest

from sana_jax.aot.traffic import traffic

FUSED = """%inside (a: f32[20,1024], b: f32[1,1024], i: s32[]) -> f32[20,1024] {
  %a = f32[20,1024]{1,0} parameter(0)
  %b = f32[1,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  INSIDE
}
"""


def program(body, computations=""):
    return f"""HloModule jit_step

{computations}
ENTRY %main (x: f32[20,1024], y: f32[1,1024], i: s32[]) -> f32[1024] {{
  %x = f32[20,1024]{{1,0:T(8,128)}} parameter(0)
  %y = f32[1,1024]{{1,0:T(8,128)}} parameter(1)
  %v = f32[1,1024]{{1,0:T(8,128)S(1)}} parameter(2)
  %i = s32[]{{:T(128)S(1)}} parameter(3)
  ROOT %end = {body}
}}
"""


KB4, WHOLE = 4 * 1024, 20 * 4 * 1024


@pytest.mark.parametrize(
    "body, bytes_moved",
    [
        ("f32[1,1024]{1,0} add(%y, %y)", 3 * KB4),
        ("f32[1,1024]{1,0} add(%y, %v)", 2 * KB4),
        ("f32[1,1024]{1,0:S(1)} add(%v, %v)", 0),
        ("f32[1024]{0} bitcast(%y)", 0),
        ("f32[1,1024]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,1024}", 2 * KB4),
        ("f32[1,1024]{1,0:S(1)} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,1024}", KB4),
        ("f32[20,1024]{1,0} dynamic-update-slice(%x, %y, %i, %i)", 2 * KB4),
        ("(f32[1,1024]{1,0:S(1)}, f32[1,1024]{1,0}, u32[]{:S(2)}) copy-start(%y)", KB4),
        ("(f32[1,1024]{1,0}, f32[1,1024]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%v)", KB4),
        ('f32[1,1024]{1,0} custom-call(%x, %x), custom_call_target="kernel"', 2 * WHOLE + KB4),
        ('f32[1,1024]{1,0} custom-call(%x), custom_call_target="kernel", frontend_attributes={bytes_accessed="7"}', 7),
        ("((f32[20,1024]{1,0}), f32[2,1024]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x)", 2 * KB4),
        ("((f32[20,1024]{1,0}), f32[1,1024]{1,0}) reduce-scatter-start(%x), replica_groups=[1,20]<=[20]", WHOLE + KB4),
        ("f32[20,1024]{1,0} all-reduce-start(%x), replica_groups=[1,8]<=[8], to_apply=%add", 2 * WHOLE),
    ],
)
def test_operands_are_read_and_results_written_once_unless_they_stay_on_the_chip(body, bytes_moved):
    assert traffic(program(body)) == bytes_moved


@pytest.mark.parametrize(
    "inside, result, bytes_moved",
    [
        (
            "%s = f32[1,1024]{1,0} dynamic-slice(%a, %i, %zero)\n  ROOT %o = f32[1,1024]{1,0} add(%s, %b)",
            "1,1024",
            3 * KB4,
        ),
        (
            "%n = f32[20,1024]{1,0} negate(%a)\n  ROOT %o = f32[1,1024]{1,0} dynamic-slice(%n, %i, %i)",
            "1,1024",
            WHOLE + KB4,
        ),
        ("ROOT %o = f32[20,1024]{1,0} dynamic-update-slice(%a, %b, %i, %zero)", "20,1024", 2 * KB4),
        ("ROOT %o = f32[20,1024]{1,0} add(%a, %a)", "20,1024", 2 * WHOLE),
    ],
)
def test_a_fusion_reads_the_slices_it_takes_and_writes_the_updates_it_makes(inside, result, bytes_moved):
    fusion = f"f32[{result}]{{1,0}} fusion(%x, %y, %i), kind=kLoop, calls=%inside"
    assert traffic(program(fusion, FUSED.replace("INSIDE", inside))) == bytes_moved


def test_a_loop_moves_a_turn_as_often_as_it_turns():
    def step(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0]

    def moved(layers):
        x, weights = jax.ShapeDtypeStruct((256, 256), "float32"), jax.ShapeDtypeStruct((layers, 256, 256), "float32")
        return traffic(jax.jit(step).lower(x, weights).compile().as_text())

    few, many = moved(4), moved(12)
    turn = (many - few) / 8
    matrix = 256 * 256 * 4
    assert 4 * matrix <= turn <= 9 * matrix  # weights taken out, product, sine: not the stack of weights each time
    assert few < 6 * turn
