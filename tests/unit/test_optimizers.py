"""CAME, AdamW and the schedules against NumPy restatements."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from sana_jax.models.autoencoder_blocks import FrozenBatchNorm
from sana_jax.training.optimizers.came import matrix_axes, scale_by_came
from sana_jax.training.optimizers.recipe import make_optimizer, make_schedule

# Path -> (shape in our layout, how it stands publicly: one function from a layer's array to the public tensor).
LAYOUTS = {
    ("blocks", "attention", "qkv", "kernel"): ((2, 6, 3, 6), lambda x: x.reshape(6, 18).T),
    ("blocks", "attention", "kv", "bias"): ((2, 2, 6), lambda x: x.reshape(12)),
    ("blocks", "feed_forward", "expand", "kernel"): ((2, 6, 10), lambda x: x.T),
    ("blocks", "feed_forward", "depthwise", "kernel"): ((2, 3, 3, 10), lambda x: x.transpose(2, 0, 1)[:, None]),
    ("blocks", "scale_shift_table"): ((2, 6, 8), lambda x: x),
    ("layers", "norm", "scale"): ((2, 8), lambda x: x),
    ("embedding",): ((12, 8), lambda x: x),
    ("encoder", "attention", "group"): ((3, 4, 5), lambda x: x.transpose(0, 2, 1).reshape(15, 4)),
    ("encoder", "conv", "kernel"): ((3, 3, 4, 6), lambda x: x.transpose(3, 2, 0, 1)),
    ("encoder", "scale_0", "depth"): ((5, 5, 6), lambda x: x.transpose(2, 0, 1)[:, None]),
}


def tree_of(make):
    tree = {}
    for path, (shape, _) in LAYOUTS.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = make(shape)
    return tree


def leaf(tree, path):
    for name in path:
        tree = tree[name]
    return np.asarray(tree)


class NumpyCame:
    """`CAMEWrapper` of NVlabs/Sana for one public tensor, in float64; matrices are [out, in]."""

    def __init__(self, shape, b1=0.9, b2=0.999, b3=0.9999, eps0=1e-30, eps1=1e-16, clip=1.0):
        self.b1, self.b2, self.b3, self.eps0, self.eps1, self.clip = b1, b2, b3, eps0, eps1, clip
        self.matrix = len(shape) == 2
        self.m = np.zeros(shape)
        if self.matrix:
            self.R, self.C, self.Rr, self.Cr = (np.zeros(n) for n in (*shape, *shape))
        else:
            self.V = np.zeros(shape)

    def step(self, g):
        u = g**2 + self.eps0
        if self.matrix:
            self.R = self.b2 * self.R + (1 - self.b2) * u.mean(1)
            self.C = self.b2 * self.C + (1 - self.b2) * u.mean(0)
            g = g / np.sqrt(self.R / self.R.mean())[:, None] / np.sqrt(self.C)[None]
        else:
            self.V = self.b2 * self.V + (1 - self.b2) * u
            g = g / np.sqrt(self.V)
        g = g / max(1.0, math.sqrt((g**2).mean()) / self.clip)
        self.m = self.b1 * self.m + (1 - self.b1) * g
        if not self.matrix:
            return self.m
        r = (g - self.m) ** 2 + self.eps1
        self.Rr = self.b3 * self.Rr + (1 - self.b3) * r.mean(1)
        self.Cr = self.b3 * self.Cr + (1 - self.b3) * r.mean(0)
        return self.m / np.sqrt(self.Rr / self.Rr.mean())[:, None] / np.sqrt(self.Cr)[None]


def largest_difference_from_numpy(tx, steps=50):
    rng = np.random.default_rng(0)
    params = tree_of(lambda shape: jnp.zeros(shape))
    state, update = tx.init(params), jax.jit(tx.update)
    references = {}
    worst = 0.0
    for _ in range(steps):
        grads = tree_of(lambda shape: rng.normal(size=shape) * np.exp(rng.normal(size=shape)))
        steps_taken, state = update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads), state)
        for path, (_, public) in LAYOUTS.items():
            g, ours = leaf(grads, path), leaf(steps_taken, path)
            scanned = path[0] in ("blocks", "layers")
            for layer in range(len(g) if scanned else 1):
                g_public, ours_public = (public(x[layer] if scanned else x) for x in (g, ours))
                reference = references.setdefault((path, layer), NumpyCame(g_public.shape))
                expected = reference.step(g_public)
                worst = max(worst, np.abs(ours_public - expected).max() / np.abs(expected).max())
    return worst


def test_came_follows_the_published_algorithm_for_50_steps():
    assert largest_difference_from_numpy(scale_by_came()) < 2e-5


def test_a_different_third_beta_breaks_the_comparison():
    assert largest_difference_from_numpy(scale_by_came(b3=0.999), steps=3) > 1e-2


def test_the_first_came_update_of_a_matrix_is_about_eleven_times_the_learning_rate():
    g = {"kernel": jax.random.normal(jax.random.key(0), (64, 48))}
    tx = scale_by_came()
    update, _ = tx.update(g, tx.init(g))
    assert 9 < float(jnp.sqrt(jnp.mean(update["kernel"] ** 2))) < 13


def test_came_keeps_no_full_second_moment_for_a_matrix():
    state = scale_by_came().init({"kernel": jnp.zeros((64, 48))})
    sizes = sorted(x.size for x in jax.tree.leaves(state))
    assert sizes == [48, 48, 64, 64, 64 * 48]


def test_biases_of_stacked_projections_are_not_matrices():
    key = jax.tree_util.DictKey
    assert matrix_axes((key("blocks"), key("kv"), key("bias")), (4, 2, 16)) is None
    for rank in (1, 2, 16):  # of stacked projections too, whatever the rank
        up, down = ((key("blocks"), key("qkv"), key(name)) for name in ("lora_up", "lora_down"))
        assert matrix_axes(up, (4, 3, rank, 64)) == ((1, 2), (3,))
        assert matrix_axes(down, (4, 64, 3, rank)) == ((1,), (2, 3))


def optimizer_config(**changes):
    config = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-2,
            "warmup_steps": 4,
            "schedule": "constant",
            "final_fraction": 0.0,
            "betas": (0.9, 0.99),
            "adamw_eps": 1e-8,
            "weight_decay": 0.1,
            "grad_clip_norm": 0.5,
        }
    )
    config.update(changes)
    return config


def test_adamw_clips_warms_up_and_decays_as_written():
    tx, _ = make_optimizer(optimizer_config(), 100)
    rng = np.random.default_rng(1)
    p = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)}
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), p)
    state = tx.init(ours)
    m = {k: np.zeros_like(v) for k, v in p.items()}
    v = {k: np.zeros_like(x) for k, x in p.items()}
    for t in range(10):
        g = {k: rng.normal(size=x.shape) for k, x in p.items()}
        updates, state = tx.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g), state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        lr = 1e-2 * min(t / 4, 1)
        for k in list(p):
            clipped = g[k] * min(1, 0.5 / norm)
            m[k] = 0.9 * m[k] + 0.1 * clipped
            v[k] = 0.99 * v[k] + 0.01 * clipped**2
            direction = m[k] / (1 - 0.9 ** (t + 1)) / (np.sqrt(v[k] / (1 - 0.99 ** (t + 1))) + 1e-8)
            p[k] = p[k] - lr * (direction + 0.1 * p[k])
    for k, expected in p.items():
        np.testing.assert_allclose(ours[k], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 60: 1.0, 110: 1.0}),
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.55, 110: 0.1}),
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.55, 110: 0.1}),
    ],
)
def test_schedule_warms_up_then_follows_its_name(name, values):
    config = optimizer_config(schedule=name, learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    schedule = make_schedule(config, 110)
    for step, value in values.items():
        assert float(schedule(step)) == pytest.approx(value, abs=1e-6), step


def test_a_run_cut_short_shortens_its_warm_up_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        schedule = make_schedule(optimizer_config(schedule="cosine", learning_rate=1.0, warmup_steps=1000), 50)
    assert float(schedule(5)) == pytest.approx(1.0)
    assert "optimizer.warmup_steps=1000: 5 of 50 steps are taken" in caplog.text


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_run_without_steps_has_a_schedule(schedule):
    assert math.isfinite(make_schedule(optimizer_config(schedule=schedule), 0)(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam"}, "optimizer.name='adam' is not one of adamw, adamw8bit, came, came8bit, muon"),
        ({"name": "came"}, "Use (0.9, 0.999, 0.9999)"),
        ({"name": "adamw8bit", "betas": (0.9,)}, "Use (0.9, 0.999)"),
        ({"name": "adamw", "betas": ("a", "b")}, "optimizer.betas=('a', 'b'): 'a' is no number from 0 to below 1"),
        ({"name": "adamw", "betas": (1.5, 0.9)}, "1.5 is no number from 0 to below 1"),
        (
            {"name": "came", "betas": (0.9, 0.999, 0.9999), "came_eps": (1e-30,)},
            "optimizer.came_eps=(1e-30,) are not two numbers above 0, as (1e-30, 1e-16)",
        ),
        (
            {"name": "came", "betas": (0.9, 0.999, 0.9999), "came_eps": (0.0, 1e-16)},
            "optimizer.came_eps=(0.0, 1e-16) are not two",
        ),
        ({"schedule": "step"}, "optimizer.schedule='step' is not one of constant, cosine, linear"),
    ],
)
def test_impossible_optimizer_is_an_error_that_names_the_fix(changes, message):
    with pytest.raises(ValueError, match="optimizer") as error:
        make_optimizer(optimizer_config(**changes), 10)
    assert message in str(error.value)


@pytest.mark.parametrize("changes", [{"came_eps": (1.0, 1e-16)}, {"came_eps": (1e-30, 1.0)}, {"came_clip": 0.1}])
def test_the_constants_of_came_are_the_configs(changes):
    config = base.get_config().optimizer
    config.update(name="came", betas=(0.9, 0.999, 0.9999), warmup_steps=0, learning_rate=1.0, grad_clip_norm=0.0)
    grads = {"kernel": jax.random.normal(jax.random.key(0), (6, 4)), "bias": jnp.ones(4)}
    params = jax.tree.map(jnp.zeros_like, grads)

    def update(tx):
        return np.concatenate([x.ravel() for x in tx.update(grads, tx.init(params), params)[0].values()])

    tx = scale_by_came(eps=changes.get("came_eps", (1e-30, 1e-16)), clip_threshold=changes.get("came_clip", 1.0))
    wanted, default = -update(tx), update(make_optimizer(config, 10)[0])
    config.update(changes)
    np.testing.assert_allclose(update(make_optimizer(config, 10)[0]), wanted, rtol=1e-6)
    assert not np.allclose(default, wanted, rtol=1e-2)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "came", "came8bit", "muon"])
def test_weight_decay_leaves_running_statistics_as_they_are(name):
    config = base.get_config().optimizer
    config.name, config.schedule, config.warmup_steps, config.learning_rate, config.weight_decay = (
        name,
        "constant",
        0,
        0.1,
        0.5,
    )
    config.betas = (0.9, 0.999, 0.9999)[: 3 if name.startswith("came") else 2]
    norm = FrozenBatchNorm(dtype=np.dtype(np.float32))
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    params = {"norm_out": jax.tree.map(lambda p: p + 2, norm.init(jax.random.key(0), x)["params"])}
    grads = jax.grad(lambda p: jnp.sum(norm.apply({"params": p["norm_out"]}, x) ** 2))(params)
    tx, _ = make_optimizer(config, 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    changed = {leaf: bool(jnp.any(update != 0)) for leaf, update in updates["norm_out"].items()}
    assert changed == {"scale": True, "bias": True, "mean": False, "var": False}
