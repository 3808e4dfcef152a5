"""Where public implementations of SANA disagree, or invite a mistake: the reading that is ours and its switch.

Trap (T1 to T12 of the reference)            Ours; the switch for the other             Pinned by
T1  releases of float16 clip their           on for these releases; `clamp_fp16`        here; unit/test_fp16_releases
    self-attention
T2  q, k, v of DC-AE's attention: 96         one reading                                test_autoencoder_parity
    channels a head, not thirds of all
T3  timesteps are truncated                  yes, but not in a folder with an Euler     here; unit/test_folder
                                             scheduler; `integer_timesteps`
T4  tokens that the null branch sees         its own; `null_mask`                       here; unit/test_class_dropout
T5  quotes of the instruction, lower case    diffusers'; `complex_human_instruction`,   here; test_prompts_parity
                                             `lower_case`
T6  two epsilons                             diffusers'; `attention_eps`,               here; test_native_parity
                                             `cross_norm_eps`
T7  Gemma's soft-cap                         applied; "attn_logit_softcapping": null    here; test_text_encoder_parity
                                             in config.json
T8  position table at 2K and 4K, width       one reading; `interpolation_scale`         here; unit/test_transformer
    half first
T9  flow shift                               the folder's scheduler; `flow_shift`       here; unit/test_folder
T10 last layer, order of the modulation,     one reading                                here; test_transformer_parity
    norms
T11 statistics of BatchNorm                  one reading                                test_autoencoder_parity
T12 masked text: a bias, or packed tokens    the bias; equal, but for pictures without  here; test_transformer_parity
                                             any token
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from parity_errors import relative_error
from test_transformer_parity import SPRINT, TINY, make_inputs, make_pair, run_ours, run_theirs
from tiny_diffusers import allow_any_size, draw, save_tiny

from sana_jax import SanaPipeline, load_text_encoder, load_transformer, prompts
from sana_jax.diffusion import solvers
from sana_jax.models.norms import rms_normalise
from sana_jax.weights.folder import load_defaults
from sana_jax.weights.transformer import config_to_json

pytestmark = pytest.mark.parity

PROMPTS = ["A Red apple on a blue background", "Pear"]
TEXT = dict(max_sequence_length=12, complex_human_instruction=None)
TWO_STEPS = dict(num_inference_steps=2, guidance_scale=3.0, negative_prompt="blurry")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    path = tmp_path_factory.mktemp("traps")
    return save_tiny(diffusers.SanaPipeline, path, own=TEXT), path


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    allow_any_size(monkeypatch, diffusers.SanaPipeline)


@pytest.fixture
def with_defaults(ours, monkeypatch):
    """Our pipeline with other defaults than its folder's, until the end of a test."""

    def changed(**changes):
        monkeypatch.setattr(ours, "defaults", dataclasses.replace(ours.defaults, **changes))
        return ours

    return changed


def run_pipeline(pipe, noise, **arguments):
    return pipe(PROMPTS, latents=noise, output_type="latent", **TWO_STEPS | arguments)


def draw_theirs(pipe, noise, **arguments):
    return draw(pipe, PROMPTS, noise, **TWO_STEPS | TEXT | arguments)


def test_t1_a_release_of_float16_is_clipped_as_diffusers_does_in_float16_alone(tmp_path, measured):
    """A transformer that needs it, under the name of such a release."""
    folder = tmp_path / "Sana_1600M_512px_MultiLing_diffusers" / "transformer"
    model = diffusers.SanaTransformer2DModel.from_config(config_to_json(TINY)).eval()
    model.load_state_dict(make_pair(TINY)[0].state_dict())
    block, size = model.transformer_blocks[0], TINY.width
    with torch.no_grad():  # one channel of the attention's output is too large, and its gate as small
        block.attn1.to_out[0].weight[0].mul_(1e5)
        model.time_embed.linear.weight[2 * size].mul_(1e-3)
        model.time_embed.linear.bias[2 * size] = block.scale_shift_table[2, 0] = 1e-4
    model.to(torch.float16).save_pretrained(folder, variant="fp16")
    inputs = make_inputs(TINY)
    in_float16 = run_theirs(model, TINY, inputs, torch.float16)
    unclipped = run_theirs(model.to(torch.float32), TINY, inputs)
    block.attn1.register_forward_hook(lambda module, inputs, output: output.clip(-65504, 65504))
    clipped = run_theirs(model, TINY, inputs)

    def velocity(**options):
        module, params = load_transformer(folder, **options)
        return jax.jit(module.apply)({"params": params}, **inputs)

    measured("SANA of float16", "velocity with the clip, tiny model", relative_error(velocity(), clipped), 5e-5)
    assert relative_error(velocity(clamp_fp16=False), unclipped) < 5e-5
    assert relative_error(clipped, in_float16) < 0.01
    assert relative_error(unclipped, in_float16) > 0.1


def test_t3_the_transformer_truncates_timesteps_as_in_the_stock_models_unless_they_are_continuous():
    """diffusers' transformer takes what it is given."""
    model, tensors = make_pair(TINY)
    fractional = make_inputs(TINY) | {"timesteps": jnp.asarray([3.7, 420.5, 998.9])}
    truncated = run_ours(TINY, tensors, fractional)
    whole = run_theirs(model, TINY, fractional | {"timesteps": jnp.asarray([3.0, 420.0, 998.0])})
    assert relative_error(truncated, whole) < 5e-5
    config = dataclasses.replace(TINY, integer_timesteps=False)
    continuous = run_ours(config, tensors, fractional)
    assert relative_error(continuous, run_theirs(model, config, fractional)) < 5e-5
    assert relative_error(truncated, continuous) > 1e-4


def test_t3_a_folder_with_an_euler_scheduler_is_sampled_without_truncation_as_in_diffusers(
    theirs, noise, tmp_path, measured
):
    """Its DPM scheduler truncates: every other comparison of pipelines."""
    folder, steps = shutil.copytree(theirs[1], tmp_path / "euler"), dict(num_inference_steps=5)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    pipe = diffusers.SanaPipeline(**theirs[0].components | {"scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    expected = draw_theirs(pipe, noise, **steps)
    ours = SanaPipeline.from_pretrained(folder)
    measured(
        "SANA pipeline, Flow-Euler", "final latents", relative_error(run_pipeline(ours, noise, **steps), expected), 1e-3
    )
    ours.defaults = dataclasses.replace(ours.defaults, integer_timesteps=True)
    assert relative_error(run_pipeline(ours, noise, **steps), expected) > 1e-3


def test_t4_the_null_branch_sees_its_own_tokens_as_in_diffusers_or_as_many_as_the_prompt(
    theirs, with_defaults, noise, measured
):
    """The original code's reading in diffusers: the negative prompt's features with the prompt's mask."""
    with torch.no_grad():
        features, mask, null, _ = theirs[0].encode_prompt(PROMPTS, negative_prompt="blurry", **TEXT)
    encoded = dict(prompt_embeds=features, negative_prompt_embeds=null, negative_prompt=None)
    masks = dict(prompt_attention_mask=mask, negative_prompt_attention_mask=mask)
    expected = {
        "own": draw_theirs(theirs[0], noise),
        "prompt": draw(theirs[0], None, noise, **TWO_STEPS | TEXT | encoded | masks),
    }
    for null_mask, other in (("own", "prompt"), ("prompt", "own")):
        latents = run_pipeline(with_defaults(null_mask=null_mask), noise)
        error = relative_error(latents, expected[null_mask])
        measured("SANA pipeline", f"final latents, null_mask={null_mask!r}", error, 1e-3)
        assert relative_error(latents, expected[other]) > 1e-2


def test_t5_the_instruction_is_quoted_as_asked_for(theirs, ours, noise):
    original = [line.replace("'Enhanced prompt'", '"Enhanced prompt"') for line in prompts.COMPLEX_HUMAN_INSTRUCTION]
    lines = {"diffusers": list(prompts.COMPLEX_HUMAN_INSTRUCTION), "original": original}
    expected = {name: draw_theirs(theirs[0], noise, complex_human_instruction=text) for name, text in lines.items()}
    for name, other in (("diffusers", "original"), ("original", "diffusers")):
        latents = run_pipeline(ours, noise, complex_human_instruction=name)
        assert relative_error(latents, expected[name]) < 1e-3 < relative_error(latents, expected[other])


def test_t5_prompts_are_lower_cased_as_in_diffusers_unless_asked_otherwise(theirs, ours, noise, monkeypatch):
    expected = draw_theirs(theirs[0], noise)
    assert relative_error(run_pipeline(ours, noise), expected) < 1e-3
    as_written = run_pipeline(ours, noise, lower_case=False)
    strip = lambda text, **_: [x.strip() for x in ([text] if isinstance(text, str) else text)]
    monkeypatch.setattr(theirs[0], "_text_preprocessing", strip)
    assert relative_error(as_written, draw_theirs(theirs[0], noise)) < 1e-3
    assert relative_error(as_written, expected) > 1e-2


def attention_with_eps(eps):
    """diffusers' linear attention with another epsilon."""

    def process(attn, hidden_states, **kwargs):
        q, k = (norm(x(hidden_states)) for norm, x in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k)))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q.relu(), k.relu(), attn.to_v(hidden_states)))
        values = torch.einsum("bnhd,bmhd,bmhe->bnhe", q, k, v)
        total = torch.einsum("bnhd,bmhd->bnh", q, k)
        return attn.to_out[0]((values / (total[..., None] + eps)).flatten(2))

    return process


def test_t6_both_epsilons_are_those_of_diffusers_and_the_original_codes_by_their_switches():
    """q and k are so small that both matter; diffusers' modules are given the original code's for its reading."""
    config = dataclasses.replace(TINY, qk_norm=True)
    original = dataclasses.replace(config, attention_eps=1e-8, cross_norm_eps=1e-6)
    _, tensors = make_pair(config)
    inputs = make_inputs(config)
    factors = {".attn1.norm_": 3e-5, ".attn2.to_q": 1e-3, ".attn2.to_k": 1e-3}
    for part, factor in factors.items():
        tensors = {name: value * np.float32(factor if part in name else 1) for name, value in tensors.items()}
    model = diffusers.SanaTransformer2DModel.from_config(make_pair(config)[0].config).eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    as_diffusers, as_original = (run_ours(c, tensors, inputs) for c in (config, original))
    assert relative_error(as_diffusers, run_theirs(model, config, inputs)) < 1e-4
    for block in model.transformer_blocks:
        block.attn1.processor = attention_with_eps(1e-8)
        block.attn2.norm_q.eps = block.attn2.norm_k.eps = 1e-6
    assert relative_error(as_original, run_theirs(model, config, inputs)) < 1e-4
    half = run_ours(dataclasses.replace(config, attention_eps=1e-8), tensors, inputs)
    assert min(relative_error(half, x) for x in (as_diffusers, as_original)) > 1e-3


def test_t7_the_soft_cap_is_applied_unless_config_json_says_null(theirs, tmp_path):
    """As SDPA drops it. 0.5 is low enough to bend the scores of a random model."""
    folder = shutil.copytree(theirs[1] / "text_encoder", tmp_path / "text_encoder")
    values = json.loads((folder / "config.json").read_text())
    ids = np.random.default_rng(0).integers(5, 300, (2, 9))
    hidden, expected = [], []
    for cap in (0.5, None):
        (folder / "config.json").write_text(json.dumps(values | {"attn_logit_softcapping": cap}))
        module, params = load_text_encoder(folder)
        hidden.append(jax.jit(module.apply)({"params": params}, ids.astype(np.int32), np.ones(ids.shape, np.int32)))
        model = transformers.Gemma2Model.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            expected.append(model(torch.tensor(ids))[0].numpy())
    assert all(relative_error(*pair) < 1e-4 for pair in zip(hidden, expected, strict=True))
    assert relative_error(hidden[0], expected[1]) > 1e-3


@pytest.mark.parametrize("change", [dict(interpolation_scale=1.0), dict(interpolation_scale=None)])
def test_t8_another_position_table_breaks_parity(change):
    config = dataclasses.replace(TINY, interpolation_scale=2.0)
    model, tensors = make_pair(config)
    inputs = make_inputs(config)
    expected = run_theirs(model, config, inputs)
    assert relative_error(run_ours(config, tensors, inputs), expected) < 5e-5
    assert relative_error(run_ours(dataclasses.replace(config, **change), tensors, inputs), expected) > 1e-3


@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_t9_the_shift_is_that_of_the_folders_scheduler(theirs, tmp_path, shift):
    folder = shutil.copytree(theirs[1], tmp_path / "shifted")
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(theirs[0].scheduler.config, flow_shift=shift)
    scheduler.save_pretrained(folder / "scheduler")
    scheduler.set_timesteps(20)
    error = lambda shift: np.abs(solvers.dpm_sigmas(20, shift) - scheduler.sigmas.numpy()).max()
    assert error(load_defaults(folder).flow_shift) < 1e-6
    assert error(9.0 - shift) > 0.1


@pytest.mark.parametrize("rows", [[1, 0, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2], [0, 1, 5, 3, 4, 2]])
def test_t10_another_order_of_shift_scale_and_gate_breaks_parity(rows):
    model, tensors = make_pair(TINY)
    inputs = make_inputs(TINY)
    tables = {
        name: value[rows] for name, value in tensors.items() if name.endswith("scale_shift_table") and len(value) == 6
    }
    assert tables
    assert relative_error(run_ours(TINY, {**tensors, **tables}, inputs), run_theirs(model, TINY, inputs)) > 1e-2


def test_t10_the_norm_of_the_caption_and_of_q_and_k_is_the_root_mean_square():
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    norm = diffusers.models.normalization.RMSNorm(8, eps=1e-5, elementwise_affine=False)
    np.testing.assert_allclose(rms_normalise(jnp.asarray(x), 1e-5), norm(torch.tensor(x)).numpy(), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, SPRINT], ids=["sana", "sprint"])
def test_t12_masked_tokens_are_as_good_as_packed_away(options):
    """diffusers on the seen tokens of each picture alone, without a mask; ours on all of them with the mask."""
    config = dataclasses.replace(TINY, **options)
    model, tensors = make_pair(config)
    inputs = {name: np.asarray(value) for name, value in make_inputs(config).items()}
    velocity = run_ours(config, tensors, inputs)
    for i, seen in enumerate(inputs["text_mask"].astype(bool)):
        alone = {name: value[i : i + 1] for name, value in inputs.items()}
        alone |= {"text_features": alone["text_features"][:, seen], "text_mask": alone["text_mask"][:, seen]}
        assert relative_error(velocity[i : i + 1], run_theirs(model, config, alone)) < 5e-5
    seen_all = run_ours(config, tensors, inputs | {"text_mask": np.ones_like(inputs["text_mask"])})
    assert relative_error(seen_all[1:], velocity[1:]) > 1e-3
