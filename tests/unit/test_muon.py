"""Muon: which parameters are matrices, and the direction against singular values and a NumPy restatement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.training.optimizers.muon import ITERATIONS, MOMENTUM, labels, scale_by_muon_and_adam

RMS = 0.3

# Path -> (shape, a function from the array to its matrices [in, out]; None for what Adam takes).
LAYOUTS = {
    ("blocks", "self_attention", "qkv", "kernel"): (
        (2, 24, 3, 24),
        lambda x: x.transpose(0, 2, 1, 3).reshape(6, 24, 24),
    ),
    ("blocks", "feed_forward", "expand", "kernel"): ((2, 24, 40), lambda x: x),
    ("time_embed", "linear_1", "kernel"): ((40, 24), lambda x: x[None]),
    ("decoder", "stage_1_block_0", "conv1", "kernel"): ((3, 3, 16, 24), lambda x: x.reshape(1, 144, 24)),
    ("blocks", "feed_forward", "depthwise", "kernel"): ((2, 3, 3, 40), None),
    ("encoder", "conv_in", "conv", "kernel"): ((3, 3, 3, 16), None),
    ("patch_embed", "kernel"): ((32, 24), None),
    ("embedding", "embedding"): ((50, 24), None),
    ("blocks", "scale_shift_table"): ((2, 6, 24), None),
    ("proj_out", "bias"): ((24,), None),
}


def tree_of(values):
    tree = {}
    for path, value in values.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def leaf(tree, path):
    for name in path:
        tree = tree[name]
    return np.asarray(tree)


def gradients(count):
    rng = np.random.default_rng(1)
    return [
        tree_of({path: rng.normal(size=shape).astype(np.float32) for path, (shape, _) in LAYOUTS.items()})
        for _ in range(count)
    ]


def run(steps):
    tx = scale_by_muon_and_adam(RMS, 0.9, 0.99)
    state = tx.init(jax.tree.map(jnp.asarray, steps[0]))
    update = jax.jit(tx.update)
    for grads in steps:
        directions, state = update(jax.tree.map(jnp.asarray, grads), state)
    return directions


def newton_schulz(g):
    """Three iterations a x + (b A + c A^2) x, A = x x^T, of g [m, n] with m <= n; first each row over the root of A's sum."""
    a, b, c = 3.4445, -4.7750, 2.0315
    gram = g @ g.T
    x = g / np.sqrt(np.abs(gram).sum(1))[:, None]
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def orthogonal(g):
    return newton_schulz(g.T).T if g.shape[0] > g.shape[1] else newton_schulz(g)


def test_kernels_are_matrices_and_the_rest_goes_to_adam():
    found = labels(gradients(1)[0])
    for path, (_, matrices) in LAYOUTS.items():
        node = found
        for name in path:
            node = node[name]
        assert node == ("adam" if matrices is None else "muon"), path


@pytest.mark.parametrize("path", [path for path, (_, matrices) in LAYOUTS.items() if matrices], ids="/".join)
def test_directions_equal_the_formula(path):
    """Nesterov momentum with both parts corrected for their start at zero, then Newton-Schulz, then the scale."""
    steps, matrices = gradients(3), LAYOUTS[path][1]
    momentum = 0.0
    for number, grads in enumerate(steps, start=1):
        g = leaf(grads, path).astype(np.float64)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * g
        ahead = MOMENTUM * momentum / (1 - MOMENTUM ** (number + 1))
        looked = ahead + (1 - MOMENTUM) * g / (1 - MOMENTUM**number)
    wanted = np.stack([orthogonal(x) * RMS * np.sqrt(max(x.shape)) for x in matrices(looked)])
    np.testing.assert_allclose(matrices(leaf(run(steps), path)), wanted, rtol=2e-3, atol=2e-4)


def test_a_directions_singular_values_are_nearly_equal_whatever_the_gradients():
    steps, path = gradients(1), ("blocks", "feed_forward", "expand", "kernel")
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (24, 40))
    spread = np.geomspace(1, 20, 24)
    node = steps[0]["blocks"]["feed_forward"]["expand"]
    node["kernel"] = np.stack([1e-3 * (left * spread) @ right[:24], 1e3 * (left * spread) @ right[:24]]).astype(
        np.float32
    )
    for direction in leaf(run(steps), path):
        values = np.linalg.svd(direction / (RMS * np.sqrt(40)), compute_uv=False)
        assert 0.3 < values.min() and values.max() < 1.3
        assert values.max() / values.min() < 4
    big, small = leaf(run(steps), path)
    np.testing.assert_allclose(big, small, rtol=2e-2, atol=2e-3)


def test_what_is_no_matrix_follows_adam():
    steps, path = gradients(3), ("blocks", "scale_shift_table")
    m = v = 0.0
    for number, grads in enumerate(steps, start=1):
        g = leaf(grads, path).astype(np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        wanted = m / (1 - 0.9**number) / (np.sqrt(v / (1 - 0.99**number)) + 1e-8)
    np.testing.assert_allclose(leaf(run(steps), path), wanted, rtol=1e-4)
