"""ControlNets in the pipeline: the two wirings, files, several pictures and prompts, what cannot be."""

import dataclasses
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from test_native import write
from test_torch_pickle import Call, Global, write_zip
from tiny_pipeline import TRANSFORMER, compilation_cache_off, random_params, tiny_parts, tiny_sprint_parts

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import sample
from sana_jax import SanaPipeline
from sana_jax.export import stablehlo
from sana_jax.export.__main__ import main as export_main
from sana_jax.models.conditioning import CaptionProjection, ScalarEmbedder
from sana_jax.models.controlnet import Branch, ControlNetConfig, SanaControlNet, control
from sana_jax.models.layers import BLOCKS, take_apart
from sana_jax.models.transformer import SanaTransformer, TransformerConfig, patchify
from sana_jax.models.transformer_block import TransformerBlock
from sana_jax.weights import controlnet_files, folder, hub, layout, native, native_controlnet, parts
from sana_jax.weights.__main__ import main as weights_main

LAYERS = 4
PROMPTS = ["a red apple", "the quick brown fox"]
DRAW = dict(output_type="latent", num_inference_steps=2)


def transformer():
    module = SanaTransformer(TransformerConfig(**TRANSFORMER | {"num_layers": LAYERS}))
    return module, random_params(module, 0)


def branch(wiring="diffusers", num_layers=2):
    module = SanaControlNet(ControlNetConfig(**TRANSFORMER | {"num_layers": num_layers}, wiring=wiring))
    return module, random_params(module, 9, 0.2)


def pipeline(wiring="diffusers", **changes):
    return SanaPipeline(tiny_parts()._replace(transformer=transformer(), controlnet=branch(wiring), **changes))


@functools.cache
def kept(wiring="diffusers"):
    """A pipeline for all tests that only draw with it: what one has traced, others need not."""
    return pipeline(wiring)


@functools.cache
def alone():
    """The same without its ControlNet."""
    return SanaPipeline(tiny_parts()._replace(transformer=transformer()))


def pictures(count=1, seed=0):
    return np.random.default_rng(seed).random((count, 16, 16, 3), np.float32)


def inputs():
    rng = np.random.default_rng(5)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    mask = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return normal(2, 4, 4, 8), jnp.asarray([300.0, 900.0]), normal(2, 4, 4, 8), normal(2, 5, 32), mask


def test_the_original_wiring_begins_after_block_0_and_copy_i_adds_to_the_output_of_block_i():
    """Restated block by block from the original code's loop."""
    (base, weights), (net, copies) = transformer(), branch("original")
    weights, copies = (jax.tree.map(jnp.asarray, params) for params in (weights, copies))
    latents, timesteps, hint, text, mask = inputs()
    apart = take_apart(dict(weights))
    call = latents, timesteps, text, mask
    by_block = control(Branch(net, take_apart(dict(copies)), 0.5, hint, text), latents, timesteps, mask)
    found = base.apply({"params": apart}, *call, control=by_block)
    stacked = control(Branch(net, copies, 0.5, hint, text), latents, timesteps, mask)
    np.testing.assert_allclose(base.apply({"params": weights}, *call, control=stacked), found, rtol=1e-4, atol=1e-4)

    def embedded(config, params):
        """Condition, modulation and text of a model, read off its parts."""
        condition = ScalarEmbedder(64, dtype=jnp.dtype("float32")).apply({"params": params["time_embed"]}, timesteps)
        dense = params["modulation"]
        modulation = jax.nn.silu(condition) @ dense["kernel"] + dense["bias"]
        caption = CaptionProjection(64, dtype=jnp.dtype("float32")).apply({"params": params["caption"]}, text)
        return condition, modulation.reshape(-1, 6, 64), caption

    def run(params, stream, modulation, caption, number):
        own = jax.tree.map(lambda x: x[number], {k: v for k, v in params[BLOCKS].items() if k != "residual"})
        return TransformerBlock(base.config).apply({"params": own}, stream, caption, mask != 0, modulation)[0]

    dense = lambda params, x: x @ params["kernel"] + params["bias"]
    condition, *own = embedded(base.config, weights)
    _, *copied = embedded(net.config, copies)
    x = run(weights, dense(weights["patch_embed"], patchify(latents, 1)), *own, 0)
    signal = x + dense(copies["hint"], dense(copies["patch_embed"], patchify(hint, 1)))
    for number in range(2):
        signal = run(copies, signal, *copied, number)
        residual = dense(jax.tree.map(lambda x, number=number: x[number], copies[BLOCKS]["residual"]), signal)
        x = run(weights, x + 0.5 * residual, *own, number + 1)
    x = run(weights, x, *own, 3)
    shift, scale = (row[:, None, None] for row in jnp.moveaxis(weights["scale_shift_table"] + condition[:, None], 1, 0))
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    expected = dense(weights["proj_out"], normed * (1 + scale) + shift)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def test_a_strength_of_zero_draws_the_model_alone_and_others_do_not():
    pipe, expected = pipeline(), alone()(PROMPTS, **DRAW)
    call = dict(control_image=pictures(), **DRAW)
    np.testing.assert_allclose(pipe(PROMPTS, controlnet_conditioning_scale=0.0, **call), expected, atol=1e-5)
    weak, strong = (pipe(PROMPTS, controlnet_conditioning_scale=scale, **call) for scale in (0.5, 1.0))
    assert 1e-3 < np.abs(weak - expected).max() < np.abs(strong - expected).max()
    assert len(pipe.programs) == 2, "another strength compiles nothing"  # with the negative prompts'


@pytest.mark.parametrize(
    "call",
    [
        {"pag_scale": 2.0, "pag_layers": (1,)},
        {"guidance_interval": (0.0, 0.5)},
        {"image": pictures(seed=3), "strength": 0.7},
        {"solver": "flow_euler", "guidance_scale": 1.0},
    ],
    ids=lambda call: next(iter(call)),
)
def test_a_strength_of_zero_draws_the_model_alone_whatever_else_is_asked(call):
    call = DRAW | call
    expected = alone()(PROMPTS, **call)
    found = kept()(PROMPTS, control_image=pictures(), controlnet_conditioning_scale=0.0, **call)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected - alone()(PROMPTS, **DRAW)).max() > 1e-3


def test_the_branch_sees_the_timesteps_that_the_model_does():
    """Whole ones, or all of them where the model's solver has such."""
    drawn = []
    for whole in (True, False):
        defaults = dataclasses.replace(
            tiny_parts().defaults, integer_timesteps=whole, solver="flow_euler", flow_shift=3.3
        )
        base, weights = transformer()
        quiet = weights | {
            "time_embed": jax.tree.map(np.zeros_like, weights["time_embed"])
        }  # only the branch is told the time
        pipe = SanaPipeline(tiny_parts()._replace(transformer=(base, quiet), controlnet=branch(), defaults=defaults))
        drawn.append(pipe(PROMPTS, control_image=pictures(), output_type="latent", num_inference_steps=3))
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-5


def test_the_two_wirings_draw_different_pictures():
    drawn = [kept(wiring)(PROMPTS, control_image=pictures(), **DRAW) for wiring in ("diffusers", "original")]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-2


@pytest.mark.parametrize("call", [{}, {"guidance_scale": 1.0}, {"pag_scale": 2.0}, {"guidance_interval": (0.0, 0.9)}])
def test_each_prompt_has_its_own_picture(call):
    pipe, images = kept("original"), pictures(2)
    call = {**DRAW, **call}
    both = pipe(PROMPTS, control_image=images, num_images_per_prompt=2, seed=[1, 2, 3, 4], **call)
    for number, prompt in enumerate(PROMPTS):
        own = slice(2 * number, 2 * number + 2)
        one = pipe(prompt, control_image=images[number], num_images_per_prompt=2, seed=[1, 2, 3, 4][own], **call)
        np.testing.assert_allclose(both[own], one, atol=2e-5)
    exchanged = pipe(PROMPTS, control_image=images[::-1], num_images_per_prompt=2, seed=[1, 2, 3, 4], **call)
    assert np.abs(both - exchanged).max() > 1e-3


def test_a_picture_of_another_size_is_resized_and_img2img_goes_with_it():
    pipe = kept()
    picture = Image.fromarray((255 * pictures()[0]).astype(np.uint8)).resize((40, 24), Image.Resampling.NEAREST)
    image = np.asarray(picture.resize((16, 16), Image.Resampling.LANCZOS), np.float32) / 255
    call = dict(image=pictures(seed=3), strength=0.9, **DRAW)
    np.testing.assert_allclose(
        pipe("a fox", control_image=picture, **call), pipe("a fox", control_image=image, **call), atol=1e-5
    )


def original_config(saved):
    return parts.find(parts.CONTROLNET, saved / "both").module.config


def test_the_branch_has_the_timesteps_scale_of_its_base(tmp_path):
    continuous = {"num_layers": LAYERS, "timestep_scale": 0.001, "integer_timesteps": False}
    base = SanaTransformer(TransformerConfig(**TRANSFORMER | continuous))
    SanaPipeline(tiny_parts()._replace(transformer=(base, random_params(base, 0)))).save_pretrained(tmp_path / "base")
    parts.save(parts.CONTROLNET, *branch(), tmp_path / "net")
    found = SanaPipeline.from_pretrained(tmp_path / "base", controlnet=tmp_path / "net").controlnet.config
    assert (found.timestep_scale, found.integer_timesteps) == (0.001, False)


def test_a_lora_changes_the_base_of_a_controlnet(saved):
    rng = np.random.default_rng(0)
    factors = {
        f"transformer.transformer_blocks.0.attn1.to_q.lora_{side}.weight": rng.normal(size=shape).astype(np.float32)
        for side, shape in (("A", (2, 64)), ("B", (64, 2)))
    }
    safetensors.numpy.save_file(factors, saved / "lora.safetensors")
    call = dict(control_image=pictures(), controlnet_conditioning_scale=0.0, **DRAW)
    found = SanaPipeline.from_pretrained(saved / "both", lora=saved / "lora.safetensors")(PROMPTS, **call)
    expected = SanaPipeline.from_pretrained(saved / "base", lora=saved / "lora.safetensors")(PROMPTS, **DRAW)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - SanaPipeline.from_pretrained(saved / "base")(PROMPTS, **DRAW)).max() > 1e-4


def test_a_folder_that_is_saved_again_without_one_has_none(saved):
    SanaPipeline.from_pretrained(saved / "both", controlnet=False).save_pretrained(saved / "both")
    assert not (saved / "both" / "controlnet").exists()
    assert SanaPipeline.from_pretrained(saved / "both").controlnet is None


def test_what_is_no_controlnet_is_told_before_the_model_is_fetched(saved, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("the model was fetched"))
    write_zip(file := saved / "net.pth", {"a": Call(Global("os", "system"), "true")}, {})
    for given, message in (
        ({"controlnet": saved / "nowhere"}, "there is no folder"),
        ({"controlnet": ""}, "controlnet='' is no path"),
        ({"controlnet": file}, "names os.system, which a file of tensors does not need"),
        ({"controlnet": saved / "both", "controlnet_wiring": "native"}, "wiring='native' is unknown; use one of"),
        (
            {"controlnet": saved / "both" / "transformer"},
            "not a SanaControlNetModel; give the folder of one, or of a pipeline",
        ),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            SanaPipeline.from_pretrained("owner/model", **given)


@pytest.fixture
def saved(tmp_path):
    kept().save_pretrained(tmp_path / "both")
    alone().save_pretrained(tmp_path / "base")
    return tmp_path


def test_a_folder_has_its_controlnet_and_another_model_takes_it(saved):
    drawn = kept()(PROMPTS, control_image=pictures(), **DRAW)
    for opened in (
        SanaPipeline.from_pretrained(saved / "both"),
        SanaPipeline.from_pretrained(saved / "base", controlnet=saved / "both", background=True),
        SanaPipeline.from_pretrained(saved / "base", controlnet=saved / "both" / "controlnet"),
    ):
        np.testing.assert_allclose(opened(PROMPTS, control_image=pictures(), **DRAW), drawn, atol=1e-5)
    without = SanaPipeline.from_pretrained(saved / "both", controlnet=False)
    assert without.controlnet is None and "controlnet" not in without.params
    clipped = SanaPipeline.from_pretrained(saved / "both", clamp_fp16=True)
    assert clipped.controlnet.config.clamp_fp16 and not original_config(saved).clamp_fp16
    original = SanaPipeline.from_pretrained(saved / "both", controlnet_wiring="original")
    assert original.controlnet.config.wiring == "original"
    original.save_pretrained(saved / "again")
    assert SanaPipeline.from_pretrained(saved / "again").controlnet.config.wiring == "original"


def test_a_file_of_the_original_code_has_both_models(tmp_path):
    base, net = (random_params(module, seed, 0.2) for seed, module in enumerate((transformer()[0], branch()[0])))
    net |= {name: base[name] for name in ("patch_embed", "time_embed", "modulation", "caption")}
    tensors = layout.write(native.entries(transformer()[0].config), base)
    tensors |= layout.write(native_controlnet.entries(branch()[0].config), net)
    file = write(
        tmp_path / "net.pth",
        {name: np.ascontiguousarray(x) for name, x in tensors.items()},
        lambda x: {"state_dict": x},
    )
    heads = dict(num_cross_attention_heads=4)
    module, params = parts.read(parts.find(parts.CONTROLNET, file, fields=heads))
    jax.tree.map(np.testing.assert_array_equal, params, net)
    assert (
        dataclasses.replace(module.config, attention_eps=1e-15, cross_norm_eps=1e-5, sample_size=4)
        == branch("original")[0].config
    )
    jax.tree.map(np.testing.assert_array_equal, folder.load_transformer(file, **heads)[1], base)
    assert parts.native_kind(file) is parts.CONTROLNET
    alone().save_pretrained(tmp_path / "base")
    pipe = SanaPipeline.from_pretrained(tmp_path / "base", controlnet=file)  # heads and grid are the base's
    assert pipe.controlnet.config.wiring == "original" and pipe.controlnet.config.num_cross_attention_heads == 4
    assert np.isfinite(pipe("a fox", control_image=pictures(), **DRAW)).all()
    table = dataclasses.replace(transformer()[0].config, interpolation_scale=1.0)
    assert controlnet_files.find(file, table).module.config.interpolation_scale is None
    with pytest.raises(ValueError, match="'diffusers' begins the branch before the first block"):
        controlnet_files.find(file, table, "diffusers")
    plain = write(tmp_path / "base.pth", {k: v for k, v in tensors.items() if not k.startswith("controlnet.")})
    with pytest.raises(ValueError, match="no tensor is named controlnet.0.*: the file has no ControlNet"):
        parts.find(parts.CONTROLNET, plain, fields=heads)
    with pytest.raises(ValueError, match="base.pth has no ControlNet: no tensor is named"):
        SanaPipeline.from_pretrained(tmp_path / "base", controlnet=plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32, "num_cross_attention_heads": 2}, "has width=32 and the transformer 64; give one of this model"),
        ({"num_layers": 4}, "has 4 blocks for the 4 of the transformer"),
        ({"in_channels": 16}, "has in_channels=16 and the transformer 8"),
        ({"patch_size": 2}, "has patch_size=2 and the transformer 1"),
        ({"caption_channels": 48}, "has caption_channels=48 and the transformer 32"),
    ],
)
def test_another_models_controlnet_is_refused(saved, changes, message):
    net = SanaControlNet(ControlNetConfig(**TRANSFORMER | {"num_layers": 2} | changes))
    parts.save(parts.CONTROLNET, net, random_params(net, 0), saved / "net")
    with pytest.raises(ValueError, match=message):
        SanaPipeline.from_pretrained(saved / "base", controlnet=saved / "net")


def test_calls_that_cannot_be_are_told(saved):
    pipe = kept()
    with pytest.raises(ValueError, match="has a ControlNet and no control image is given"):
        pipe("a fox")
    with pytest.raises(ValueError, match="a control image is given, and the model has no ControlNet"):
        alone()("a fox", control_image=pictures())
    with pytest.raises(ValueError, match="ControlNet scale inf is not a finite number"):
        pipe("a fox", control_image=pictures(), controlnet_conditioning_scale=float("inf"))
    with pytest.raises(ValueError, match="control_image is 2 pictures for 1 prompts"):
        pipe("a fox", control_image=pictures(2))
    with pytest.raises(ValueError, match="wiring='native' is unknown; use one of diffusers, original"):
        SanaPipeline.from_pretrained(saved / "both", controlnet_wiring="native")
    with pytest.raises(ValueError, match="controlnet_wiring='original' is given and no controlnet"):
        SanaPipeline.from_pretrained(saved / "base", controlnet_wiring="original")
    with pytest.raises(ValueError, match="guidance_embeds=True: ControlNets are of models without it"):
        ControlNetConfig(guidance_embeds=True)
    with pytest.raises(FileNotFoundError, match="no config.json in it, in controlnet/"):
        SanaPipeline.from_pretrained(saved / "base", controlnet=saved / "base")
    sprint = tiny_sprint_parts()
    SanaPipeline(sprint).save_pretrained(saved / "sprint")
    with pytest.raises(ValueError, match="SANA-Sprint"):
        SanaPipeline.from_pretrained(saved / "sprint", controlnet=saved / "both")


def test_sample_draws_with_it(saved, monkeypatch, capsys):
    monkeypatch.setattr(sample, "_keep_compiled_programs", lambda jax: None)
    picture = Image.fromarray((255 * pictures()[0]).astype(np.uint8))
    picture.save(saved / "edges.png")
    call = [
        "--prompt=a fox",
        "--steps=2",
        f"--model={saved / 'base'}",
        f"--controlnet={saved / 'both'}",
        f"--out={saved / 'fox.png'}",
    ]
    call += [f"--control_image={saved / 'edges.png'}", "--controlnet_scale=0.5", "--controlnet_wiring=original"]
    assert sample.main(call) == 0
    drawn = Image.open(saved / "fox.png")
    pipe = SanaPipeline.from_pretrained(saved / "both", controlnet_wiring="original")
    asked = dict(num_inference_steps=2, control_image=picture, controlnet_conditioning_scale=0.5)
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(pipe("a fox", **asked)[0]))
    settings = json.loads(drawn.text["settings"])
    assert (settings["controlnet_wiring"], settings["controlnet_scale"]) == ("original", 0.5)
    assert settings["control_image"].endswith("edges.png") and settings["controlnet"].endswith("both")
    Image.new("RGB", (16, 16)).save(saved / "edges.png")
    assert sample.main([*call, "--resume"]) == 2 and "control_image_digest" in capsys.readouterr().err


def test_a_model_with_a_controlnet_is_exported_and_drawn_without_it(saved, monkeypatch):
    with pytest.raises(ValueError, match="takes no picture for a ControlNet; open the model with controlnet=False"):
        stablehlo.write(saved / "out", SanaPipeline.from_pretrained(saved / "both"))
    monkeypatch.setattr(sample, "_keep_compiled_programs", lambda jax: None)
    call = ["--prompt=a fox", "--steps=2", f"--model={saved / 'both'}", f"--out={saved / 'fox.png'}"]
    assert sample.main(call) == 2
    assert sample.main([*call, "--controlnet=none"]) == 0
    with compilation_cache_off():
        assert (
            export_main(["executable", f"--output={saved / 'programs'}", "--steps=2", f"--model={saved / 'both'}"]) == 0
        )


def test_it_is_described(saved, capsys):
    assert weights_main(["inspect", str(saved / "both")]) == 0
    whole = capsys.readouterr().out
    assert "(SanaControlNetPipeline, diffusers layout)" in whole.splitlines()[0]
    described = next(line for line in whole.splitlines() if line.startswith("  controlnet: "))
    assert weights_main(["inspect", str(saved / "both" / "controlnet")]) == 0
    found = capsys.readouterr().out.splitlines()
    assert (
        "controlnet alone, in the diffusers layout" in found[0] and found[1].split(": ")[1] == described.split(": ")[1]
    )
    assert "width 64, 2 blocks" in found[2] and found[2].endswith("wiring diffusers")
