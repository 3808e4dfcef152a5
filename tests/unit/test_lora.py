"""LoRAs added to a transformer's weights as they are read, against NumPy; what cannot be one."""

import json
import types

import huggingface_hub
import jaxtyping
import numpy as np
import pytest
import safetensors.numpy
from tiny_pipeline import tiny_parts

from sana_jax import SanaPipeline
from sana_jax.weights import folder, hub, lora, parts, tensor_files

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
    source = folder.find_pipeline(model, lora=lora.open_lora(file), lora_scale=strength).transformer
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
    tensors = folder.find_pipeline(model, lora=lora.open_lora(tmp_path / "x.safetensors")).transformer.tensors
    for module in MODULES:
        tensor = tensors[f"{module}.weight"]
        assert tensor.shape == weights[f"{module}.weight"].shape
        np.testing.assert_allclose(tensor[2:5], tensor[...][2:5], rtol=1e-6)


def test_converted_weights_are_kept_for_each_strength(model, weights, tmp_path):
    changes = write(tmp_path / "x.safetensors", weights)
    for strength in (1.0, 0.5, 1.0):
        change = lora.open_lora(tmp_path / "x.safetensors")
        found = folder.find_pipeline(model, lora=change, lora_scale=strength)
        _, params = parts.read(found.transformer, cache_dir=tmp_path / "cache")
        assert_changed(parts.layout.write(found.transformer.entries, params), weights, changes, strength)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_saved_model_has_the_sum(model, weights, tmp_path):
    changes = write(tmp_path / "x.safetensors", weights)
    SanaPipeline.from_pretrained(model, lora=tmp_path / "x.safetensors").save_pretrained(tmp_path / "sum")
    assert_changed(safetensors.numpy.load_file(tmp_path / "sum" / "transformer" / STEM), weights, changes)


def rename(tensors, before, after):
    for name in list(tensors):
        tensors[name.replace(before, after)] = tensors.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: rename(t, ".weight", ".default.weight"),
        lambda t: (rename(t, "lora_A", "lora_down"), rename(t, "lora_B", "lora_up")),
        lambda t: rename(t, "transformer.", "diffusion_model."),
    ],
)
def test_other_names_of_the_factors_are_known(model, weights, tmp_path, change):
    file = tmp_path / "x.safetensors"
    changes = write(file, weights)
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)
    assert_changed(read(model, file), weights, changes)


def test_a_kernel_of_several_pixels_is_changed_as_a_matrix(tmp_path):
    rng = np.random.default_rng(0)
    w, down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 4, 2, 2), (3, 4, 2, 2), (6, 3, 1, 1)))
    safetensors.numpy.save_file({"patch_embed.proj.weight": w}, tmp_path / "model.safetensors")
    file = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"patch_embed.proj.lora_A.weight": down, "patch_embed.proj.lora_B.weight": up}, file)
    sums = lora.add(tensor_files.open_file(tmp_path / "model.safetensors"), lora.open_lora(file), 0.5)
    wanted = w + 0.5 * np.einsum("or,rihw->oihw", up[..., 0, 0], down)
    np.testing.assert_allclose(sums["patch_embed.proj.weight"][...], wanted, rtol=1e-5, atol=1e-5)


FACTORS = {side: f"proj_out.lora_{side}.weight" for side in "AB"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update(x=t[FACTORS["A"]]), "has x beside its factors .* DoRA, biases and whole weights are not"),
        (
            lambda t: t.update({"proj_out.lora_magnitude_vector": np.ones(8, np.float32)}),
            "has proj_out.lora_magnitude_",
        ),
        (lambda t: t.pop(FACTORS["A"]), "has lora_B of proj_out and not the other factor"),
        (lambda t: t.clear(), "is no LoRA as .*: it has no MODULE.lora_A.weight"),
        (lambda t: (t.clear(), t.update(x=np.ones(2))), "is no LoRA as .*: it has x, and no MODULE.lora_A.weight"),
        (lambda t: t.update({FACTORS["A"]: np.ones((2, 64), np.float32)}), r"lora_A \[2, 64\] and .* have no product"),
        (lambda t: t.update({FACTORS["A"]: np.ones((0, 64), np.float32)}), r"lora_A \[0, 64\] and .* have no product"),
        (lambda t: t.update({FACTORS["B"]: np.ones((8, 3, 2, 2), np.float32)}), "of proj_out have no product"),
        (
            lambda t: t.update({FACTORS["A"]: np.ones((3, 63), np.float32)}),
            r"do not make its weight \[\d+, 64.*another model",
        ),
        (
            lambda t: t.update({f"proj_in.lora_{side}.weight": t[name] for side, name in FACTORS.items()}),
            r"changes proj_in, which this transformer has not \(nearest: proj_out.weight\)",
        ),
        (
            lambda t: t.update({f"text_encoder.q.lora_{side}.weight": t[name] for side, name in FACTORS.items()}),
            "changes text_encoder.q, which is the text encoder's.* LoRAs of the transformer alone are read",
        ),
        (
            lambda t: t.update(
                {
                    f"{BLOCK}.ff.conv_depth.lora_A.weight": np.ones((320, 320, 3, 3), np.float32),
                    f"{BLOCK}.ff.conv_depth.lora_B.weight": np.ones((320, 320, 1, 1), np.float32),
                }
            ),
            "of transformer_blocks.1.ff.conv_depth do not make .* a grouped convolution, of which LoRAs are not impl",
        ),
        (lambda t: t.update({"proj.alpha": np.ones(1, np.float32)}), "has an alpha of proj and no factors of it"),
        (lambda t: t.update({"proj_out.alpha": np.ones(2, np.float32)}), "proj_out.alpha is not one finite number"),
        (lambda t: t.update({"proj_out.alpha": np.full(1, np.nan)}), "proj_out.alpha is not one finite number"),
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
        ("[" * 100_000, "its metadata is not readable JSON"),
        ("[1]", "its metadata is no object of JSON"),
        ('{"use_dora": true}', "its metadata says that it is a DoRA, which is not implemented"),
        ('{"lora_alpha": "six"}', "has the alpha 'six', which is no number"),
        (f'{{"lora_alpha": {"9" * 400}}}', "has the alpha 9999999999.*, which is no number"),
        ('{"lora_alpha": 1, "alpha_pattern": {"to_k": null}}', "has the alpha None, which is no number"),
        ('{"lora_alpha": 1, "alpha_pattern": [2]}', r"has the alpha_pattern \[2\], which is no object"),
        ('{"lora_alpha": 1, "alpha_pattern": {"((a|.)+)+!": 2}}', "has an alpha for .*; only whole names of modules"),
        (
            '{"init_lora_weights": "pissa_niter_4"}',
            "init_lora_weights='pissa_niter_4': it was trained beside other weights",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(weights, tmp_path, settings, message):
    write(tmp_path / "x.safetensors", weights, metadata={"lora_adapter_metadata": settings})
    with pytest.raises(ValueError, match=message):
        lora.open_lora(tmp_path / "x.safetensors")


def test_a_place_without_a_lora_is_named_before_the_model_is_looked_at(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "download", None)

    def load(**arguments):
        SanaPipeline.from_pretrained("owner/model", **arguments)

    with pytest.raises(
        FileNotFoundError, match="has neither pytorch_lora_weights.safetensors nor adapter_model.safetens"
    ):
        load(lora=tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no LoRA .*absent: give a .safetensors file"):
        load(lora=tmp_path / "absent")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="x.bin is no .safetensors file, and other files of LoRAs are not read"):
        load(lora=tmp_path / "x.bin")
    with pytest.raises(ValueError, match="lora_scale=0.5 is given and no lora"):
        load(lora_scale=0.5)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for wrong in ("", [tmp_path, tmp_path]):
        with pytest.raises(ValueError, match="is no path. Give one .safetensors file"):
            load(lora=wrong)
    with pytest.raises(ValueError, match="lora_scale='1' is not a number"):
        load(lora_scale="1")


def test_a_strength_without_end_is_refused(model, weights, tmp_path):
    write(tmp_path / "x.safetensors", weights)
    with pytest.raises(ValueError, match="lora_scale=nan is not a finite number"):
        SanaPipeline.from_pretrained(model, lora=tmp_path, lora_scale=float("nan"))


@pytest.mark.parametrize(
    "names, chosen",
    [
        (["README.md", "mine.safetensors"], "mine.safetensors"),
        (["a.safetensors", "adapter_model.safetensors", "z/b.safetensors"], "adapter_model.safetensors"),
        (["z/b.safetensors", "a.bin"], None),
        (["a.safetensors", "b.safetensors"], None),
    ],
)
def test_of_several_files_a_known_name_or_the_only_one_is_a_loras(names, chosen):
    assert lora.choose_file(names) == chosen


def test_a_lora_of_peft_is_fetched_from_the_hub_with_its_settings(model, weights, tmp_path, monkeypatch):
    name = "[mine] adapter.safetensors"
    changes = write(tmp_path / name, weights)
    files = [types.SimpleNamespace(rfilename=each) for each in ("README.md", name, "adapter_config.json")]
    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id, revision: types.SimpleNamespace(siblings=files))

    def snapshot_download(hub_id, revision, allow_patterns):
        kept = set(
            huggingface_hub.utils.filter_repo_objects([x.rfilename for x in files], allow_patterns=allow_patterns)
        )
        assert hub_id == "owner/lora" and kept == {name, "adapter_config.json"}
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    SanaPipeline.from_pretrained(model, lora="owner/lora").save_pretrained(tmp_path / "sum")
    assert_changed(safetensors.numpy.load_file(tmp_path / "sum" / "transformer" / STEM), weights, changes)


def test_without_a_network_the_cached_lora_is_taken_and_one_that_is_not_there_is_named(tmp_path, monkeypatch):
    def fail(hub_id, revision):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, revision, local_files_only: str(tmp_path))
    assert hub.download_lora("owner/lora") == str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id, revision: types.SimpleNamespace(siblings=[]))
    with pytest.raises(FileNotFoundError, match="owner/lora on the hub has neither pytorch_lora_weights.safetensors"):
        hub.download_lora("owner/lora")
