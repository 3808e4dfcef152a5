"""What every device does with its own pictures amounts to doing it with all of them on one."""

import pytest
from processes import run_script

SCRIPT = """
import functools, json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from sana_jax.kernels.softmax_attention import blocks
from sana_jax.models.attention import attend
from sana_jax.models.placement import on_own_pictures
from sana_jax.parallel.mesh import make_mesh

def scaled(x, w):
    return jnp.tanh(x * w).sum(-1, keepdims=True) * x

def scalar(call, x, w):
    return (call((x,), (w,)) * jnp.cos(x)).sum()

def over_rows(pictures, shared):
    island = functools.partial(jax.shard_map, axis_names={"seq"}, in_specs=(P(None, "seq"), P()), check_vma=False)
    return island(lambda x, w: on_own_pictures(scaled, (x,), (w,)), out_specs=P(None, "seq"))(*pictures, *shared)

out, w = {}, jnp.arange(3.0) + 1
calls = {"auto": functools.partial(on_own_pictures, scaled), "within seq": over_rows}
for name, call in calls.items():
    for pictures in (8, 3):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((pictures, 4, 3)), jnp.float32)
        expected = jax.grad(functools.partial(scalar, lambda p, s: scaled(*p, *s)), (0, 1))(x, w)
        with jax.set_mesh(make_mesh(data=2, fsdp=2, seq=2)):
            found = jax.jit(jax.grad(functools.partial(scalar, call), (0, 1)))(x, w)
        out[f"{name}, {pictures} pictures"] = max(float(abs(a - b).max()) for a, b in zip(found, expected))

blocks.LOGITS = 36  # a loop over the heads of all pictures, which the partitioner would gather

def text_gradients(mask, q, k, v):
    return jax.grad(lambda *x: jnp.sin(attend(*x, mask, heads=2)).sum(), (0, 1, 2))(q, k, v)

q, k, v = (jnp.asarray(np.random.default_rng(seed).standard_normal((8, 6, 8)), jnp.float32) for seed in range(3))
for mask in (None, jnp.arange(6) < jnp.arange(8)[:, None]):
    expected = text_gradients(mask, q, k, v)
    with jax.set_mesh(make_mesh(data=4, fsdp=2)):
        placed = jax.device_put((q, k, v), jax.NamedSharding(jax.sharding.get_mesh(), P(("data", "fsdp"))))
        compiled = jax.jit(functools.partial(text_gradients, mask)).lower(*placed).compile()
        found = compiled(*placed)
    name = f"softmax attention, {'all' if mask is None else 'some'} seen"
    out[name] = max(float(abs(a - b).max()) for a, b in zip(found, expected))
    out[f"{name}, exchanged"] = [
        word for word in ("all-gather", "all-to-all", "collective-permute") if f" {word}(" in compiled.as_text()
    ]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def errors():
    return run_script(SCRIPT, devices=8)


@pytest.mark.parametrize("where", ["auto", "within seq"])
@pytest.mark.parametrize("pictures", [8, 3])  # the second are not divided by the four devices
def test_gradients_of_pictures_and_of_what_they_share_are_those_of_one_device(errors, where, pictures):
    assert errors[f"{where}, {pictures} pictures"] < 5e-6


@pytest.mark.parametrize("seen", ["all", "some"])
def test_softmax_attention_exchanges_nothing_between_pictures(errors, seen):
    assert errors[f"softmax attention, {seen} seen"] < 1e-5
    assert errors[f"softmax attention, {seen} seen, exchanged"] == []
