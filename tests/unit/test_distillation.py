"""What a student and its critic learn from a teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from configs import base
from sana_jax.diffusion import consistency, trigflow
from sana_jax.models.latent_critic import LatentCritic, largest_singular_value
from sana_jax.models.transformer import SanaTransformer
from sana_jax.sampling.program import Features
from sana_jax.training import distillation, latent_adversary
from sana_jax.training.distillation import log_variance, make_distillation
from sana_jax.training.objective import normal_like
from sana_jax.training.ranges import check_ranges
from sana_jax.training.step import split_each
from sana_jax.weights import folder

TEACHER = dataclasses.replace(
    tiny_run.TRANSFORMER, width=32, num_layers=2, timestep_scale=0.001, integer_timesteps=False
)
STUDENT = dataclasses.replace(TEACHER, guidance_embeds=True)


def normal(shapes, seed, std=0.2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape, scale=std), jnp.float32), shapes)


def make_config(**changes):
    config = base.get_config()
    config.model = base.fields(STUDENT)
    config.text_encoder.mode, config.text_encoder.path = "frozen", "somewhere"
    config.distillation.update(teacher="somewhere", critic_blocks=(0, 1), tangent_warmup=0)
    config.update_from_flattened_dict(changes)
    return config


class Case:
    """An objective, random weights of all players, and inputs."""

    def __init__(self, **changes):
        student, teacher = SanaTransformer(STUDENT), SanaTransformer(TEACHER)
        self.objective = make_distillation(make_config(**changes), student, teacher)
        beside = jax.eval_shape(self.objective.init, jax.random.key(0))
        shapes = {"transformer": folder.abstract_params(student)} | beside
        seeds = {"transformer": 0, "log_variance": 1, "critic": 2}
        self.params = {name: normal(shapes[name], seeds[name]) for name in shapes}
        self.frozen = {"teacher": normal(folder.abstract_params(teacher), 9)}
        self.latents, hidden, null = normal(
            (jnp.zeros((4, 4, 4, 8)), jnp.zeros((4, 5, 32)), jnp.zeros((1, 5, 32))), 7, 1
        )
        self.text = Features(hidden, jnp.ones((4, 5), jnp.int32))
        self.null = Features(null, jnp.ones((1, 5), jnp.int32))
        self.keys = jax.random.split(jax.random.key(5), 4)

    def losses(self, params, step=100):
        return self.objective.losses(params, self.frozen, self.latents, None, self.text, self.null, self.keys, step)

    def heldout(self, null):
        return self.objective.heldout(self.params, self.frozen, self.latents, None, self.text, null, self.keys)


def assert_close(found, wanted):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 + 1e-4 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


def test_each_player_has_the_gradient_of_its_own_terms():
    case, names = Case(), ("consistency", "generator", "critic")

    @jax.jit
    def gradients(params):
        def terms(params):
            losses, metrics = case.losses(params)
            return jnp.stack([jnp.mean(losses), *(metrics[name] for name in names)])

        values, vjp = jax.vjp(terms, params)
        (rows,) = jax.vmap(vjp)(jnp.eye(len(values)))
        return rows

    rows = gradients(case.params)
    whole, consistent, fooling, telling = (jax.tree.map(lambda x, i=i: x[i], rows) for i in range(4))
    assert not any(
        np.any(x) for x in jax.tree.leaves((telling["transformer"], fooling["critic"], consistent["critic"]))
    )
    assert_close(whole["critic"], telling["critic"])
    assert_close(
        whole["transformer"],
        jax.tree.map(lambda a, b: a + 0.5 * b, consistent["transformer"], fooling["transformer"]),
    )
    for part in (consistent["transformer"], fooling["transformer"], telling["critic"]):
        assert max(np.abs(x).max() for x in jax.tree.leaves(part)) > 1e-3


def test_without_a_critic_there_is_none():
    case = Case(**{"distillation.adversarial_weight": 0.0, "distillation.critic_blocks": (2, 8, 14, 19)})
    assert set(case.params) == {"transformer", "log_variance"}


def over(x):
    return x[:, None, None, None]


@pytest.mark.parametrize(("null_mask", "tokens"), [("own", 2), ("prompt", 5)])
def test_networks_see_noise_levels_as_fractions_the_scale_and_the_masks_that_sampling_has(
    monkeypatch, null_mask, tokens
):
    """Both in place of transformers that say what they are given, against the formula."""

    def said(module, params, latents, timesteps, hidden, mask, guidance=None):
        del params, hidden
        level = over(timesteps * module.config.timestep_scale)
        if guidance is None:
            return latents * level + over(jnp.sum(mask, axis=1) / 10)
        return jnp.sin(latents) * level**2 + over(guidance) * level

    monkeypatch.setattr(distillation, "apply_transformer", said)
    case = Case(**{"distillation.guidance_scales": (3.0,), "text_encoder.null_mask": null_mask})
    found = case.heldout(Features(case.null.hidden, jnp.asarray([[1, 1, 0, 0, 0]])))

    keys_angle, keys_noise, _ = split_each(case.keys, 3)
    angles = consistency.sample_angles(keys_angle, 0.2, 1.6)
    y = consistency.on_circle(case.latents, normal_like(case.latents, keys_noise), angles)
    shift = tokens / 10 + 3.0 * (5 - tokens) / 10  # the guided sum of what the masks of null and text say
    slope = consistency.circle_velocity(lambda x, sigma: x * over(sigma) + shift, y, angles)

    def student(y, angles):
        return consistency.circle_velocity(
            lambda x, sigma: jnp.sin(x) * over(sigma) ** 2 + 3.0 * over(sigma), y, angles
        )

    g = consistency.tangent(student, y, angles, slope)
    np.testing.assert_allclose(found, jnp.mean(g**2, axis=(1, 2, 3)), rtol=1e-4)


def test_the_critic_sees_the_blocks_that_are_named_under_its_own_noise(monkeypatch):
    class Mean:
        """Its logits are the means of the features, each head's by a weight of its own."""

        def __init__(self, dtype):
            pass

        def apply(self, params, features):
            del params
            return features.mean(-1) * (1 + jnp.arange(len(features)))[:, None, None]

    case = Case()
    monkeypatch.setattr(latent_adversary, "LatentCritic", Mean)
    adversary = latent_adversary.make_adversary(
        make_config(**{"distillation.critic_blocks": (1, 0), "distillation.pure_noise_share": 1.0}),
        SanaTransformer(TEACHER),
    )
    seen = []

    def student(points, angles):
        seen.append((points, angles))
        return jnp.zeros_like(points)

    fooling, _ = adversary.losses({"critic": {}}, case.frozen, student, case.latents, case.text, case.keys)
    np.testing.assert_allclose(seen[0][1], trigflow.MAX_ANGLE, rtol=1e-6)

    fake = np.cos(trigflow.MAX_ANGLE) * seen[0][0]  # what the student's zeros predict
    keys_angle, keys_noise = split_each(split_each(case.keys, 3)[1], 2)
    angles = consistency.sample_angles(keys_angle, -0.6, 1.0)
    noise = normal_like(case.latents, keys_noise)
    both = over(jnp.sin(angles) + jnp.cos(angles))
    x = (over(jnp.cos(angles)) * fake + over(jnp.sin(angles)) * noise) / both
    timesteps = 1000 * (jnp.sin(angles) / both[:, 0, 0, 0])
    means = []
    for count in (1, 2):  # of a model that ends with this block
        params = case.frozen["teacher"] | {
            "blocks": jax.tree.map(lambda x: x[:count], case.frozen["teacher"]["blocks"])
        }
        module = SanaTransformer(dataclasses.replace(TEACHER, num_layers=count))
        kept = module.apply({"params": params}, x, timesteps, *case.text, mutable=["intermediates"])[1]
        means.append(kept["intermediates"]["blocks"]["output"][0][-1].mean((1, 2, 3)))
    np.testing.assert_allclose(fooling, -(means[1] + 2 * means[0]) / 2, rtol=1e-4, atol=1e-6)


def test_slopes_are_guided_by_the_scale_that_is_drawn():
    other = Features(-jnp.ones((1, 5, 32)), jnp.ones((1, 5), jnp.int32))
    for scale, differs in ((1.0, False), (4.5, True)):
        case = Case(**{"distillation.guidance_scales": (scale,)})
        heldout = jax.jit(case.heldout)
        found, wanted = heldout(other), heldout(case.null)
        assert np.allclose(found, wanted, rtol=1e-4) != differs


def test_the_tangent_grows_whole_within_the_warm_up():
    case = Case(**{"distillation.tangent_warmup": 100})
    losses = jax.jit(lambda step: case.losses(case.params, step)[1]["tangent_rms"])
    first, half, whole, later = (float(losses(step)) for step in (0, 50, 100, 900))
    assert whole == later and len({first, half, whole}) == 3


def test_the_variance_starts_at_one_and_is_a_function_of_the_angle():
    case = Case()
    angles = jnp.asarray([0.01, 0.7, 1.56])
    start = case.objective.init(jax.random.key(0))["log_variance"]
    np.testing.assert_array_equal(log_variance(start, angles), 0)
    assert len(set(np.asarray(log_variance(case.params["log_variance"], angles)).tolist())) == 3


def test_the_largest_singular_value_is_numpys():
    rng = np.random.default_rng(0)
    for shape in ((48, 32), (288, 32), (32, 1)):
        matrix = jnp.asarray(rng.normal(size=shape), jnp.float32)
        found, wanted = float(largest_singular_value(matrix)), np.linalg.norm(np.asarray(matrix), 2)
        assert 0.9 * wanted < found <= wanted * (1 + 1e-5)


def test_a_critic_is_on_a_circle_of_tokens_and_knows_no_scale_of_its_kernels():
    critic, features = LatentCritic(), normal(jnp.zeros((2, 3, 16, 32)), 0, 1)
    params = normal(jax.eval_shape(critic.init, jax.random.key(0), features)["params"], 1)
    logits = critic.apply({"params": params}, features)
    assert logits.shape == (2, 3, 16)
    rolled = critic.apply({"params": params}, jnp.roll(features, 5, axis=2))
    np.testing.assert_allclose(rolled, jnp.roll(logits, 5, axis=2), atol=1e-5)
    larger = jax.tree_util.tree_map_with_path(lambda path, x: 3 * x if path[-1].key == "kernel" else x, params)
    np.testing.assert_allclose(critic.apply({"params": larger}, features), logits, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder.mode": "train", "text_encoder.path": ""}, "text_encoder.mode='train'. Use text_encoder.mode='frozen'"),
        ({"model.guidance_embeds": False}, "takes a guidance scale .* Use model.guidance_embeds=True"),
        ({"model.integer_timesteps": True}, "model.integer_timesteps=False"),
        ({"lora.rank": 4, "init_from": "x", "model.guidance_embeds": False}, "lora.rank=4 a LoRA. Use one of them"),
        ({"lora.rank": 4, "init_from": "x"}, "lora.rank=4: a LoRA is trained by flow matching"),
        ({"model.timestep_scale": 1.0}, "in 0..1. Use .*model.timestep_scale=0.001"),
        ({"distillation.critic_blocks": (True, 0)}, r"critic_blocks=\(True, 0\): name one block"),
        ({"train.class_dropout_prob": 0.2}, "train.class_dropout_prob=0.2 is not read with distillation.teacher"),
        ({"distillation.guidance_scales": ()}, r"guidance_scales=\(\): give one number or more"),
        ({"distillation.guidance_scales": (float("nan"),)}, "give one number or more"),
        ({"distillation.critic_blocks": (1, 2)}, r"critic_blocks=\(1, 2\): name one block .* of 0 to 1"),
        ({"distillation.critic_blocks": (1, 1)}, "each once"),
        ({"distillation.adversarial_weight": 0.0}, r"critic_blocks=\(0, 1\) is not read with .*adversarial_weight=0"),
        ({"distillation.angle_std": 0.0}, "angle_std=0.0: use more than 0"),
        ({"mesh.seq": 2}, "mesh.seq=2: the critic's convolutions need all tokens"),
        ({"init_adapts": ("qk_norms",), "init_from": "x"}, "'qk_norms', which is none of .*; did you mean qk_norm?"),
        ({"init_adapts": ("qk_norm",)}, "trains from the weights at init_from"),
        ({"init_blocks": (0, 1)}, r"init_blocks=\(0, 1\) is of a transformer that trains from the weights at init_from"),
        ({"init_blocks": (-1,), "init_from": "x"}, r"init_blocks=\(-1,\): give the numbers, from 0, of the blocks"),
        ({"init_blocks": ("0",), "init_from": "x"}, "init_blocks=.* give the numbers"),
        (
            {"distillation.teacher": "", "model.guidance_embeds": False},
            r"distillation.tangent_warmup=0 is not read with distillation.teacher=''",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_told(changes, message):
    check_ranges(make_config())
    with pytest.raises(ValueError, match=message):
        check_ranges(make_config(**changes))
