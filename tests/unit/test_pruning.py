"""Which blocks of a model matter, and the model without the others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipeline import TRANSFORMER, random_params, tiny_parts, tiny_sprint_parts

from sana_jax import SanaPipeline
from sana_jax.diffusion.noise import initial_noise
from sana_jax.diffusion.solvers import flow_euler
from sana_jax.models.controlnet import ControlNetConfig, SanaControlNet
from sana_jax.models.depth import with_depth
from sana_jax.models.layers import BLOCKS, stack
from sana_jax.models.transformer import SanaTransformer
from sana_jax.models.transformer_block import BLOCK_OUTPUT
from sana_jax.parallel.mesh import make_mesh
from sana_jax.prompts import read_features, tokenize_prompts
from sana_jax.pruning.__main__ import main
from sana_jax.pruning.blocks import block_importance, most_important, with_blocks

PROMPTS = ["a red apple", "the quick brown fox"]


def pipeline(num_layers=3, parts=None, **defaults):
    """A tiny model, with a block's rotation of the stream of any size."""
    parts = parts or tiny_parts()
    module = SanaTransformer(dataclasses.replace(parts.transformer[0].config, num_layers=num_layers))
    found = dataclasses.replace(parts.defaults, **defaults)
    return SanaPipeline(parts._replace(transformer=(module, random_params(module, 3, 0.3)), defaults=found))


def test_importance_is_one_less_the_cosine_of_the_tokens_before_and_after():
    """Against the outputs that blocks keep, in a loop of Euler's own."""
    pipe = pipeline()
    params, c = stack(pipe.params["transformer"]), pipe.transformer.config
    solver, by_evaluation = flow_euler(2, pipe.defaults.flow_shift), []
    for seed, prompt in enumerate(PROMPTS, start=7):
        tokens = map(jnp.asarray, tokenize_prompts(pipe.tokenizer, [prompt], None, 12))
        text = read_features(pipe.text_encoder, stack(pipe.params["text_encoder"]), *tokens, None, 12)
        state = solver.init(jnp.asarray(initial_noise(seed, [0], (4, 4, 8))))
        for level in range(2):
            row = jax.tree.map(lambda x, level=level: x[level], solver.levels)
            timesteps = jnp.full(1, row.timesteps, jnp.float32)
            velocity, kept = pipe.transformer.apply(
                {"params": params}, state.latents, timesteps, *text, mutable=["intermediates"]
            )
            kernel, bias = params["patch_embed"]["kernel"], params["patch_embed"]["bias"]
            stream = [np.asarray(state.latents @ kernel + bias), *kept["intermediates"][BLOCKS][BLOCK_OUTPUT][0]]
            unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in map(np.asarray, stream)]
            by_evaluation.append([1 - np.mean(np.sum(a * b, -1)) for a, b in zip(unit, unit[1:], strict=False)])
            state = solver.step(state, velocity, row)
    found = block_importance(pipe, PROMPTS, seed=7, solver="flow_euler", num_inference_steps=2, guidance_scale=1.0)
    assert found.shape == (c.num_layers,) and min(found) > 1e-3
    np.testing.assert_allclose(found, np.mean(by_evaluation, 0), rtol=1e-4)


def test_both_branches_of_guidance_count_and_earlier_calls_do_not():
    pipe = pipeline()
    params = pipe.params["transformer"]
    caption = params["caption"] | {"norm": {"scale": 100 * params["caption"]["norm"]["scale"]}}
    pipe.params = pipe.params | {"transformer": params | {"caption": caption}}  # or texts would hardly differ
    call = dict(num_inference_steps=1, seed=3)
    pipe(PROMPTS[0], output_type="latent", **call)  # compiled before it is measured
    text, null = (block_importance(pipe, [prompt], **call, guidance_scale=1.0) for prompt in PROMPTS)
    both = block_importance(pipe, [PROMPTS[0]], **call, guidance_scale=4.0, negative_prompt=PROMPTS[1])
    np.testing.assert_allclose(both, (text + null) / 2, rtol=1e-4)
    assert not np.allclose(text, null, rtol=1e-2)


@pytest.mark.parametrize("parts", [tiny_parts, tiny_sprint_parts])
def test_new_blocks_are_the_least_important(parts):
    pipe = pipeline(2, parts())
    params = stack(pipe.params["transformer"])
    grown = SanaTransformer(dataclasses.replace(pipe.transformer.config, num_layers=4))
    blocks = with_depth(params[BLOCKS], (0, 1), 4, jax.random.key(0))
    pieces = tiny_parts() if parts is tiny_parts else tiny_sprint_parts()
    pipe = SanaPipeline(pieces._replace(transformer=(grown, params | {BLOCKS: blocks})))
    importance = block_importance(pipe, PROMPTS)
    np.testing.assert_allclose(importance[2:], 0, atol=1e-6)
    assert most_important(importance, 2) == (0, 1)


def test_blocks_are_kept_in_the_models_order_and_the_earlier_of_equal_ones():
    assert most_important(np.asarray([0.1, 0.5, 0.1, 0.9]), 3) == (0, 1, 3)
    assert most_important(np.asarray([0.3, 0.2, 0.9]), 1) == (2,)


@pytest.mark.parametrize("apart", [True, False])
def test_the_smaller_model_has_the_kept_blocks(apart):
    pipe = pipeline()
    whole = stack(pipe.params["transformer"])
    if not apart:
        pipe.params = pipe.params | {"transformer": whole}
    small = with_blocks(pipe, (0, 2))
    kept = jax.tree.map(lambda x: x[np.asarray([0, 2])], whole[BLOCKS])
    jax.tree.map(np.testing.assert_array_equal, stack(small.params["transformer"]), whole | {BLOCKS: kept})
    assert small.transformer.config.num_layers == 2
    drawn = [p(PROMPTS, output_type="latent", num_inference_steps=2) for p in (small, pipe)]
    assert np.isfinite(drawn[0]).all() and not np.allclose(*drawn)


def test_perturbed_blocks_keep_their_weights_under_their_new_numbers(caplog):
    pipe = pipeline(pag_scale=2.0, pag_layers=(1, 2))
    assert with_blocks(pipe, (0, 2)).defaults.pag_layers == (1,)
    assert with_blocks(pipe, (0,)).defaults.pag_scale == 0
    assert "perturbed attention guidance is off: of the blocks (1, 2) none is kept" in caplog.text
    call = dict(num_inference_steps=1, seed=3)
    np.testing.assert_allclose(block_importance(pipe, PROMPTS, **call), block_importance(pipeline(), PROMPTS, **call))


@pytest.mark.parametrize("kept", [(), (0, 3), (-1, 0)])
def test_blocks_that_are_not_there_are_told(kept):
    with pytest.raises(ValueError, match="name one block or more of this model, 0 to 2"):
        with_blocks(pipeline(), kept)


def test_a_controlnet_is_left_out(tmp_path):
    net = SanaControlNet(ControlNetConfig(**TRANSFORMER | {"num_layers": 1}))
    whole = tiny_parts()._replace(controlnet=(net, random_params(net, 0)))
    small = with_blocks(SanaPipeline(whole), (1,))
    assert small.controlnet is None and small("a fox", output_type="latent", num_inference_steps=1).size
    assert block_importance(SanaPipeline(whole), PROMPTS, num_inference_steps=1).shape == (2,)


def test_a_model_on_several_devices_is_not_measured():
    parts = tiny_parts()
    with pytest.raises(ValueError, match="open the model without mesh"):
        block_importance(SanaPipeline(parts, make_mesh(data=1)), PROMPTS)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    pipeline().save_pretrained(path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return path


def test_the_command_writes_a_model_that_draws(folder, tmp_path, capsys):
    call = [f"--model={folder}", f"--prompts_file={tmp_path / 'prompts.txt'}", "--steps=2", "--seed=4"]
    assert main(call) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    importance = [float(line[1]) for line in printed[1:]]
    expected = block_importance(SanaPipeline.from_pretrained(folder), PROMPTS, 4, num_inference_steps=2)
    np.testing.assert_allclose(importance, expected, atol=6e-5)
    assert main([*call, "--blocks=2", f"--output={tmp_path / 'small'}"]) == 0
    out = capsys.readouterr().out
    assert out.count("left out") == 1 and f"    {int(np.argmin(expected))}  " in next(
        x for x in out.splitlines() if "left" in x
    )
    small = SanaPipeline.from_pretrained(tmp_path / "small")
    kept = with_blocks(SanaPipeline.from_pretrained(folder), most_important(expected, 2))
    call = dict(prompt=PROMPTS, output_type="latent", num_inference_steps=2)
    np.testing.assert_allclose(small(**call), kept(**call), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks=2"], "give --blocks=N and --output=DIR together"),
        (["--blocks=3", "--output={tmp}/new"], "--blocks=3: the model has 3 blocks; keep 1 to 2"),
        (["--blocks=0", "--output={tmp}/new"], "--blocks=0: the model has 3 blocks"),
        (["--blocks=2", "--output={tmp}"], "holds model, prompts.txt and no model"),
        (["--steps=0"], "0"),
        (["--prompts_file=nowhere.txt"], "--prompts_file=nowhere.txt cannot be read"),
        (["--model=nowhere"], "nowhere"),
    ],
)
def test_unusable_input_is_one_line(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("sana_jax.pruning.blocks.block_importance", lambda *_, **__: pytest.fail("it was drawn"))
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert main([f"--model={folder}", f"--prompts_file={tmp_path / 'prompts.txt'}", *given]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "new").exists()
