"""A quantised dense layer, compiled by XLA's TPU compiler on a machine without a TPU."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from sana_jax.kernels.dense.quantized import quantized_dense

pytest.importorskip("libtpu")

from sana_jax.aot.topologies import open_topology

pytestmark = pytest.mark.tpu_aot


@pytest.mark.parametrize(("codes", "narrow", "wide"), [("int8", "s8", "s32"), ("float8_e4m3fn", "f8e4m3fn", "f32")])
def test_the_matrix_unit_is_given_codes(codes, narrow, wide):
    place = SingleDeviceSharding(open_topology("v5e:2x2").devices[0])
    shapes = [((256, 512), "bfloat16"), ((384, 512), codes), ((384,), "float32"), ((384,), "bfloat16")]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place) for shape, dtype in shapes]
    program = jax.jit(quantized_dense).lower(*arguments).compile().as_text()
    ((result, left, right),) = re.findall(r"= (\w+)\[[^=]* convolution\((%[\w.]+), (%[\w.]+)\)", program)
    operands = [re.search(rf"{re.escape(name)} = (\w+)\[", program).group(1) for name in (left, right)]
    assert (result, operands) == (wide, [narrow, narrow])
