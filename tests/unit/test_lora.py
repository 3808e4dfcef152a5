"""LoRAs added to a transformer's weights as they are read, against NumPy; what cannot be one."""

import json
import types

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from tiny_pipeline import tiny_parts

from sana_jax import SanaPipeline
from sana_jax.weights import folder, lora, parts

STEM = "diffusion_pytorch_model.safetensors"
BLOCK = "transformer_blocks.1"
MODULES = {
    f"{BLOCK}.attn1.to_k": (),
    f"{BLOCK}.attn2.to_out.0": (),
    f"{BLOCK}.ff.conv_inverted": (1, 1),
    "proj_out": (),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    folder.save_pipeline(path, **tiny_parts()._asdict())
    return path


@pytest.fixture(scope="module")
def weights(model):
    return safetensors.numpy.load_file(model / "transformer" / STEM)


def write(path, weights, prefix="transformer.", modules=MODULES, rank=3, dtype=np.float32, metadata=None, **more):
    """A LoRA with random factors; returns the changes of the weights that it makes by the formula, where alpha is r."""
    rng, tensors, changes = np.random.default_rng(0), {}, {}
    for module, rest in modules.items():
        out, inside = weights[f"{module}.weight"].shape[:2]
        down, up = rng.normal(size=(rank, inside)).astype(dtype), rng.normal(size=(out, rank)).astype(dtype)
        tensors[f"{prefix}{module}.lora_A.weight"] = down.reshape(*down.shape, *rest)
        tensors[f"{prefix}{module}.lora_B.weight"] = up.reshape(*up.shape, *rest)
        changes[module] = up.astype(np.float64) @ down.astype(np.float64)
    safetensors.numpy.save_file(tensors | more, path, metadata)
    return changes


def read(model, file, dtype="float32", strength=1.0):
    source = folder.find_pipeline(model, lora=file, lora_scale=strength).transformer
    return parts.layout.write(source.entries, parts.read(source, dtype)[1])


def assert_changed(found, weights, changes, scale=1.0):
    for name, before in weights.items():
        module = name.removesuffix(".weight")
        change = scale * changes[module].reshape(before.shape) if module in changes and name.endswith("weight") else 0
        np.testing.assert_allclose(found[name], before + change, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", ""])
@pytest.mark.parametrize("strength", [1.0, -0.5, 0.0])
def test_a_lora_is_added_to_the_weights_that_it_is_of_and_to_no_others(model, weights, tmp_path, prefix, strength):
    changes = write(tmp_path / "x.safetensors", weights, prefix)
    assert_changed(read(model, tmp_path / "x.safetensors", strength=strength), weights, changes, strength)


def test_factors_of_half_precision_are_multiplied_in_float32_and_the_sum_is_rounded_once(model, weights, tmp_path):
    changes = write(tmp_path / "x.safetensors", weights, dtype=np.float16)
    found = read(model, tmp_path / "x.safetensors", "bfloat16")
    for module, change in changes.items():
        before = weights[f"{module}.weight"]
        wanted = before + change.reshape(before.shape)
        np.testing.assert_allclose(found[f"{module}.weight"].astype(np.float32), wanted, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    "settings, scales",
    [
        ({"r": 3, "lora_alpha": 6}, [2, 2, 2, 2]),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, [6 / 3**0.5] * 4),
        ({"r": 3, "lora_alpha": 3, "alpha_pattern": {"attn1.to_k": 12, "conv_inverted": 1.5}}, [4, 1, 0.5, 1]),
    ],
)
@pytest.mark.parametrize("where", ["metadata", "prefixed metadata", "adapter_config.json"])
def test_alpha_scales_the_change(model, weights, tmp_path, settings, scales, where):
    file = tmp_path / lora.FILES[1]
    prefix = "transformer." if where.startswith("prefixed") else ""
    text = json.dumps({f"{prefix}{name}": value for name, value in settings.items()})
    changes = write(file, weights, metadata={"lora_adapter_metadata": text} if "metadata" in where else None)
    if "metadata" not in where:
        (tmp_path / where).write_text(text)
    changes = {module: scale * change for (module, change), scale in zip(changes.items(), scales, strict=True)}
    assert_changed(read(model, tmp_path), weights, changes)


def test_an_alpha_beside_a_modules_factors_is_that_modules(model, weights, tmp_path):
    module = f"{BLOCK}.attn1.to_k"
    alpha = {f"transformer.{module}.alpha": np.array(1.5, np.float32)}
    changes = write(tmp_path / "x.safetensors", weights, **alpha)
    assert_changed(read(model, tmp_path / "x.safetensors"), weights, changes | {module: changes[module] / 2})


def test_rows_of_the_sum_are_read_alone(model, weights, tmp_path):
    write(tmp_path / "x.safetensors", weights)
    tensors = folder.find_pipeline(model, lora=tmp_path / "x.safetensors").transformer.tensors
    for module in MODULES:
        tensor = tensors[f"{module}.weight"]
        assert tensor.shape == weights[f"{module}.weight"].shape
        np.testing.assert_allclose(tensor[2:5], tensor[...][2:5], rtol=1e-6)


def test_converted_weights_are_kept_for_each_strength(model, weights, tmp_path):
    changes = write(tmp_path / "x.safetensors", weights)
    for strength in (1.0, 0.5, 1.0):
        found = folder.find_pipeline(model, lora=tmp_path / "x.safetensors", lora_scale=strength)
        _, params = parts.read(found.transformer, cache_dir=tmp_path / "cache")
        assert_changed(parts.layout.write(found.transformer.entries, params), weights, changes, strength)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_saved_model_has_the_sum(model, weights, tmp_path):
    changes = write(tmp_path / "x.safetensors", weights)
    SanaPipeline.from_pretrained(model, lora=tmp_path / "x.safetensors").save_pretrained(tmp_path / "sum")
    assert_changed(safetensors.numpy.load_file(tmp_path / "sum" / "transformer" / STEM), weights, changes)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.update(x=t["proj_out.lora_A.weight"]),
            "has x beside its factors .* DoRA and biases are not implemented",
        ),
        (
            lambda t: t.update({"proj_out.lora_magnitude_vector": np.ones(8, np.float32)}),
            "has proj_out.lora_magnitude_",
        ),
        (lambda t: t.pop("proj_out.lora_A.weight"), "has lora_B of proj_out and not the other factor"),
        (lambda t: t.clear(), "is no LoRA as .*: it has no MODULE.lora_A.weight"),
        (lambda t: (t.clear(), t.update(x=np.ones(2))), "is no LoRA as .*: it has x, and no MODULE.lora_A.weight"),
        (
            lambda t: t.update({"proj_out.lora_A.weight": np.ones((2, 64), np.float32)}),
            r"lora_A \[2, 64\] and lora_B .* of",
        ),
        (
            lambda t: t.update({"proj_out.lora_A.weight": np.ones((3, 63), np.float32)}),
            r"do not make its weight \[\d+, 64",
        ),
        (
            lambda t: t.update({f"proj_in.lora_{side}.weight": t[f"proj_out.lora_{side}.weight"] for side in "AB"}),
            r"changes proj_in, and this transformer has no proj_in.weight \(nearest: proj_out.weight\)",
        ),
    ],
)
def test_what_is_no_lora_of_this_model_is_refused_before_weights_are_read(
    model, weights, tmp_path, monkeypatch, change, message
):
    file = tmp_path / "x.safetensors"
    write(file, weights, prefix="")
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)
    monkeypatch.setattr(parts.layout, "read", None)
    with pytest.raises(ValueError, match=message):
        SanaPipeline.from_pretrained(model, lora=file)


@pytest.mark.parametrize(
    "settings, message",
    [
        ("{", "its metadata is not readable JSON"),
        ('{"use_dora": true}', "is a DoRA, which is not implemented"),
        ('{"lora_alpha": "six"}', "have the alpha 'six', which is no number"),
        ('{"lora_alpha": 1, "alpha_pattern": {"to_k": null}}', "have the alpha None, which is no number"),
    ],
)
def test_settings_that_cannot_be_are_refused(model, weights, tmp_path, settings, message):
    write(tmp_path / "x.safetensors", weights, metadata={"lora_adapter_metadata": settings})
    with pytest.raises(ValueError, match=message):
        folder.find_pipeline(model, lora=tmp_path / "x.safetensors")


def test_a_place_without_a_lora_is_named(model, weights, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="has neither pytorch_lora_weights.safetensors nor adapter_model.safetensors"
    ):
        folder.find_pipeline(model, lora=tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no LoRA .*absent: give a .safetensors file"):
        folder.find_pipeline(model, lora=tmp_path / "absent")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="x.bin is no .safetensors file, and other files of LoRAs are not read"):
        folder.find_pipeline(model, lora=tmp_path / "x.bin")
    write(tmp_path / "x.safetensors", weights)
    with pytest.raises(ValueError, match="lora_scale=nan is not a finite number"):
        folder.find_pipeline(model, lora=tmp_path, lora_scale=float("nan"))


@pytest.mark.parametrize("names, chosen", [(["README.md", "mine.safetensors"], "mine.safetensors"), (["a.bin"], None)])
def test_a_lora_is_fetched_from_the_hub(model, weights, tmp_path, monkeypatch, names, chosen):
    changes = write(tmp_path / "mine.safetensors", weights)
    files = [types.SimpleNamespace(rfilename=name) for name in names]
    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id, revision: types.SimpleNamespace(siblings=files))

    def snapshot_download(hub_id, revision, allow_patterns):
        assert hub_id == "owner/lora" and chosen in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    if chosen is None:
        with pytest.raises(
            FileNotFoundError, match="owner/lora on the hub has neither pytorch_lora_weights.safetensors"
        ):
            SanaPipeline.from_pretrained(model, lora="owner/lora")
        return
    SanaPipeline.from_pretrained(model, lora="owner/lora").save_pretrained(tmp_path / "sum")
    assert_changed(safetensors.numpy.load_file(tmp_path / "sum" / "transformer" / STEM), weights, changes)
