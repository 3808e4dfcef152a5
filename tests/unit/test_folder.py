"""Model folders: what is written is read again, and what is wrong with a folder is named."""

import dataclasses
import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from tiny_pipeline import tiny_parts

import sana_jax
from sana_jax.prompts import INSTRUCTIONS
from sana_jax.weights import folder, model_index
from sana_jax.weights.scheduler import scheduler_to_json

PARTS = ("transformer", "autoencoder", "text_encoder")


def save(name, path, **kwargs):
    module, params = getattr(tiny_parts(), name)
    getattr(sana_jax, f"save_{name}")(module, params, path, **kwargs)


def load(name, path, **kwargs):
    return getattr(sana_jax, f"load_{name}")(path, **kwargs)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    folder.save_pipeline(path, **tiny_parts()._asdict())
    return path


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def edit(file, **changes):
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | changes))


def leave_out(file, key):
    values = json.loads(file.read_text())
    del values[key]
    file.write_text(json.dumps(values))


def assert_same(params, expected, rtol=0.0):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=rtol, atol=rtol), params, expected
    )


@pytest.mark.parametrize("name", PARTS)
def test_each_part_is_read_back_from_its_own_folder(name, tmp_path):
    save(name, tmp_path / "part")
    module, params = load(name, tmp_path / "part")
    assert module == getattr(tiny_parts(), name)[0]
    assert_same(params, getattr(tiny_parts(), name)[1])


@pytest.mark.parametrize("name", PARTS)
def test_each_part_is_read_back_from_the_pipeline_folder(name, written):
    assert_same(load(name, written)[1], getattr(tiny_parts(), name)[1])


@pytest.mark.parametrize("dtype,rtol", [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_half_precision_files_are_read_as_float32(dtype, rtol, tmp_path):
    save("transformer", tmp_path, dtype=dtype)
    stored = safetensors.numpy.load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {jnp.dtype(dtype)}
    params = load("transformer", tmp_path)[1]
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert_same(params, tiny_parts().transformer[1], rtol)


def test_parameters_are_had_in_the_dtype_asked_for(written):
    params = load("text_encoder", written, dtype="bfloat16")[1]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_shards_have_an_index_and_read_back_as_the_single_file(tmp_path):
    save("transformer", tmp_path, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert shards[0].name == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    total = sum(x.nbytes for shard in shards for x in safetensors.numpy.load_file(shard).values())
    assert index["metadata"]["total_size"] == total
    assert_same(load("transformer", tmp_path)[1], tiny_parts().transformer[1])


def test_writing_again_leaves_no_weights_of_the_earlier_form(tmp_path):
    save("transformer", tmp_path, max_shard_bytes=100_000)
    save("transformer", tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_half_precision_variant_is_read_where_there_is_no_plain_file(copy):
    vae = copy / "vae"
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.bf16.safetensors")
    assert_same(load("autoencoder", copy)[1], tiny_parts().autoencoder[1])


def test_a_language_model_with_prefix_and_head_is_read_as_its_trunk(copy):
    file = copy / "text_encoder" / "model.safetensors"
    tensors = {f"model.{name}": value for name, value in safetensors.numpy.load_file(file).items()}
    tensors["lm_head.weight"] = np.zeros((2, 2), np.float32)
    safetensors.numpy.save_file(tensors, file)
    assert_same(load("text_encoder", copy)[1], tiny_parts().text_encoder[1])


@pytest.mark.parametrize("links", [True, False])
def test_parts_of_a_folder_that_is_there_are_taken_over(links, written, tmp_path, monkeypatch):
    def no_links(source, target):
        raise PermissionError(f"{source}: no links here")

    if not links:
        monkeypatch.setattr("os.link", no_links)
    stored = {"autoencoder": written, "text_encoder": written}
    folder.save_pipeline(tmp_path / "new", **tiny_parts()._asdict() | stored)
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "new" / weights).samefile(written / weights) == links
    index = "model_index.json"
    assert (tmp_path / "new" / index).read_bytes() == (written / index).read_bytes()
    for name in PARTS:
        read = folder.read_pipeline(folder.find_pipeline(tmp_path / "new"))
        assert_same(getattr(read, name)[1], getattr(tiny_parts(), name)[1])


def test_the_whole_pipeline_is_read_back(written):
    parts = folder.read_pipeline(folder.find_pipeline(written))
    for name in PARTS:
        assert_same(getattr(parts, name)[1], getattr(tiny_parts(), name)[1])
    assert parts.defaults == tiny_parts().defaults
    assert parts.tokenizer.encode("a red apple").ids == tiny_parts().tokenizer.encode("a red apple").ids


def test_a_training_runs_folder_is_read_through_its_export(written, tmp_path):
    shutil.copytree(written, tmp_path / "run" / "export")
    assert_same(load("transformer", tmp_path / "run")[1], tiny_parts().transformer[1])
    assert folder.find_pipeline(tmp_path / "run").defaults == tiny_parts().defaults


def test_a_public_folder_without_our_file_has_the_public_defaults(copy):
    (copy / "sana_jax.json").unlink()
    defaults = folder.load_defaults(copy)
    assert defaults == folder.SamplingDefaults()
    assert defaults.complex_human_instruction[-1] == "User Prompt: " and defaults.max_sequence_length == 300
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.flow_shift) == (20, 4.5, 3.0)


@pytest.mark.parametrize("changes", [dict(flow_shift=6.0, solver_order=3), dict(solver="flow_euler", flow_shift=4.0)])
def test_solver_and_shift_are_kept_in_the_scheduler_file(changes, tmp_path):
    defaults = dataclasses.replace(tiny_parts().defaults, **changes)
    folder.save_pipeline(tmp_path, **tiny_parts()._replace(defaults=defaults)._asdict())
    assert folder.load_defaults(tmp_path) == defaults


def test_a_scheduler_without_a_shift_has_none(copy):
    leave_out(copy / "scheduler" / "scheduler_config.json", "flow_shift")
    assert folder.load_defaults(copy).flow_shift == 1.0


def test_a_transformer_without_a_head_dimension_has_32(copy):
    leave_out(copy / "transformer" / "config.json", "attention_head_dim")
    assert load("transformer", copy)[0].config.attention_head_dim == 32


def test_a_public_folder_with_an_euler_scheduler_has_continuous_timesteps_unless_our_file_says_otherwise(copy):
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_to_json("flow_euler", 2, 3.0)))
    (copy / "sana_jax.json").unlink()
    assert not folder.load_defaults(copy).integer_timesteps
    (copy / "sana_jax.json").write_text(json.dumps({"integer_timesteps": True}))
    assert folder.load_defaults(copy).integer_timesteps


def test_picture_size_comes_from_the_configuration_unless_ours_says_otherwise(copy):
    model = model_index.picture_geometry(copy)
    assert (model.height, model.width, model.multiple) == (16, 16, 4)
    assert (model.sample_size, model.downsample_factor, model.patch_size) == (4, 4, 1)
    edit(copy / "sana_jax.json", height=24, width=32)
    model = model_index.picture_geometry(copy)
    assert (model.height, model.width, model.multiple) == (24, 32, 4)


def test_every_missing_file_is_named(written, tmp_path):
    for missing in ("transformer/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json",
                    "scheduler/scheduler_config.json", "model_index.json"):  # fmt: skip
        path = shutil.copytree(written, tmp_path / missing.replace("/", "_"))
        (path / missing).unlink()
        with pytest.raises(FileNotFoundError) as error:
            folder.read_pipeline(folder.find_pipeline(path))
        assert missing.split("/")[-1] in str(error.value) and str(path) in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    for read in (folder.load_transformer, folder.find_pipeline):
        with pytest.raises(FileNotFoundError, match=str(tmp_path / "nowhere")):
            read(tmp_path / "nowhere")


def test_a_truncated_file_is_named(copy):
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file} .* is truncated or damaged"):
        load("transformer", copy)


def test_a_missing_shard_is_named(tmp_path):
    save("transformer", tmp_path, max_shard_bytes=100_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load("transformer", tmp_path)


def test_an_index_without_its_shards_gives_way_to_a_complete_variant(tmp_path):
    save("transformer", tmp_path, max_shard_bytes=100_000)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    save("transformer", tmp_path / "other", dtype="bfloat16")
    copy = "diffusion_pytorch_model.bf16.safetensors"
    (tmp_path / "other" / "diffusion_pytorch_model.safetensors").rename(tmp_path / copy)
    assert_same(load("transformer", tmp_path)[1], tiny_parts().transformer[1], rtol=1e-2)
    (tmp_path / copy).unlink()
    with pytest.raises(
        FileNotFoundError, match="index.json names diffusion_pytorch_model-00001.*which the folder lacks"
    ):
        load("transformer", tmp_path)


def test_a_damaged_index_of_a_variant_that_is_not_read_does_not_matter(tmp_path):
    save("transformer", tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.bf16.json").write_text("{")
    assert_same(load("transformer", tmp_path)[1], tiny_parts().transformer[1])


@pytest.mark.parametrize("places", [None, ["a"], {"a": None}, {"a": "../x.safetensors"}, {"a": ""}])
def test_an_index_that_names_no_files_is_refused(places, tmp_path):
    save("transformer", tmp_path, max_shard_bytes=100_000)
    (index,) = tmp_path.glob("*.index.json")
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=f"{index}: its weight_map is not one of tensors to files beside it"):
        load("transformer", tmp_path)


def test_a_file_of_objects_in_objects_is_refused(copy):
    file = copy / "model_index.json"
    file.write_text('{"a":' * 100_000)
    with pytest.raises(ValueError, match=f"{file} is not readable JSON"):
        folder.find_pipeline(copy)


@pytest.mark.parametrize(
    "name, message",
    [("SANA.pth", "a file of the original code.*_diffusers"), ("pytorch_lora_weights.safetensors", "a LoRA")],
)
def test_what_is_often_taken_for_a_model_is_named(name, message, tmp_path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"no model_index.json.*{name} is {message}"):
        folder.find_pipeline(tmp_path)
    with pytest.raises(ValueError, match=f"{name} is a file; .*{name}"):
        folder.find_pipeline(tmp_path / name)


def test_missing_and_surplus_tensors_are_listed(copy):
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["proj_out.weigth"] = tensors.pop("proj_out.weight")
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(ValueError, match=r"missing proj_out.weight \(nearest: proj_out.weigth\)"):
        load("transformer", copy)


WRONG = [
    ("complex_human_instruction", 5),
    ("complex_human_instruction", "difusers"),
    ("complex_human_instruction", ["draw:", 5]),
    ("lower_case", 0),
    ("lower_case", None),
    ("null_mask", "typo"),
    ("null_mask", ["own"]),
    ("max_sequence_length", 1),
    ("max_sequence_length", 12.0),
    ("height", "64"),
    ("height", -5),
    ("height", True),
    ("width", 0),
    ("num_inference_steps", 0),
    ("num_inference_steps", True),
    ("num_inference_steps", None),
    ("guidance_scale", -1),
    ("guidance_scale", float("nan")),
    ("guidance_scale", "4.5"),
    ("integer_timesteps", "no"),
    ("pag_scale", float("inf")),
    ("pag_adaptive_scale", False),
    ("pag_layers", 3),
    ("pag_layers", []),
    ("pag_layers", [0, -1]),
]


@pytest.mark.parametrize("key, value", WRONG, ids=str)
def test_a_default_of_another_kind_or_out_of_range_is_an_error(copy, key, value):
    edit(copy / "sana_jax.json", **{key: value})
    with pytest.raises(ValueError, match=re.escape(f"{copy / 'sana_jax.json'}: {key} is {value!r}; give it ")):
        folder.load_defaults(copy)


@pytest.mark.parametrize(
    "key, value", [("null_mask", "typo"), ("height", 0), ("solver_order", 4), ("flow_shift", -1.0)]
)
def test_a_default_that_would_not_be_read_again_is_not_written(key, value, tmp_path):
    defaults = dataclasses.replace(tiny_parts().defaults, **{key: value})
    with pytest.raises(ValueError, match=f"{key} is {value!r}; give it "):
        folder.save_pipeline(tmp_path / "new", **tiny_parts()._replace(defaults=defaults)._asdict())
    assert not (tmp_path / "new").exists()


def contents(path):
    return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "part, dtype, message", [("text_encoder", "float16", "exceeds the range"), (None, "foo", "foo")]
)
def test_a_model_that_cannot_be_written_leaves_the_earlier_one_as_it_was(part, dtype, message, copy):
    before = contents(copy)
    parts = tiny_parts()._asdict()
    module, params = parts["transformer"]
    parts["transformer"] = module, jax.tree.map(lambda x: 2 * x, params)
    if part is not None:
        module, params = parts[part]
        parts[part] = module, jax.tree.map(lambda x: np.full_like(x, 1e6), params)
    with pytest.raises(ValueError, match=message):
        folder.save_pipeline(copy, **parts, dtype=dtype)
    assert contents(copy) == before
    assert list(copy.parent.iterdir()) == [copy]


def test_a_model_takes_the_place_of_another_and_other_files_stay(copy):
    (copy / "vae" / "of_the_old_one").touch()
    (copy / "notes").mkdir()
    (copy / "notes" / "README.md").write_text("mine")
    folder.save_pipeline(copy, **tiny_parts()._asdict(), dtype="bfloat16")
    assert not (copy / "vae" / "of_the_old_one").exists()
    assert (copy / "notes" / "README.md").read_text() == "mine"
    assert folder.find_pipeline(copy).defaults == tiny_parts().defaults
    assert list(copy.parent.iterdir()) == [copy]


def test_a_save_that_was_killed_in_the_exchange_is_not_opened_and_may_be_repeated(copy, monkeypatch):
    def kill(source, target):
        if pathlib.Path(target).name == "tokenizer":
            raise SystemExit  # as far as the folder is concerned
        replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", kill)
        with pytest.raises(SystemExit):
            folder.save_pipeline(copy, **tiny_parts()._asdict())
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        folder.find_pipeline(copy)
    folder.save_pipeline(copy, **tiny_parts()._asdict())
    assert folder.find_pipeline(copy).defaults == tiny_parts().defaults


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for place, message in ((tmp_path, "holds notes and no model"), (tmp_path / "notes", "is a file")):
        with pytest.raises(ValueError, match=message):
            folder.save_pipeline(place, **tiny_parts()._asdict())
    assert contents(tmp_path) == {pathlib.Path("notes"): b"mine"}


def test_every_default_at_the_border_of_its_range_is_read(copy):
    values = {
        "complex_human_instruction": [],
        "lower_case": False,
        "null_mask": "prompt",
        "max_sequence_length": 2,
        "height": 1,
        "width": None,
        "num_inference_steps": 1,
        "guidance_scale": 0.0,
        "integer_timesteps": False,
        "pag_scale": 0.0,
        "pag_adaptive_scale": 0.0,
        "pag_layers": [0],
    }
    edit(copy / "sana_jax.json", **values)
    defaults = dataclasses.asdict(folder.load_defaults(copy))
    kept_apart = {"solver", "solver_order", "flow_shift"}
    assert defaults.keys() - kept_apart == values.keys() == folder.OWN_RULES.keys()
    assert folder.OWN_RULES["guidance_scale"].holds(4)  # a whole number is a number
    assert {key: defaults[key] for key in values} == values | {"complex_human_instruction": None, "pag_layers": (0,)}


@pytest.mark.parametrize("name", ["diffusers", "original"])
def test_a_published_instruction_is_asked_for_by_its_name(copy, name):
    edit(copy / "sana_jax.json", complex_human_instruction=name)
    assert folder.load_defaults(copy).complex_human_instruction == INSTRUCTIONS[name]


@pytest.mark.parametrize("solver, key, values", [
    ("flow_dpm", "solver_order", [7, 0, "2", 2.0, True, None]),
    ("flow_dpm", "flow_shift", [None, -1, 0, "3", float("inf"), True]),
    ("flow_euler", "shift", [None, -1, 0, "3", float("nan"), True]),
])  # fmt: skip
def test_an_order_or_shift_that_no_solver_has_is_an_error(copy, solver, key, values):
    file = copy / "scheduler" / "scheduler_config.json"
    for value in values:
        file.write_text(json.dumps(scheduler_to_json(solver, 2, 3.0) | {key: value}))
        with pytest.raises(ValueError, match=re.escape(f"{file}: {key} is {value!r}; give it ")):
            folder.load_defaults(copy)


@pytest.mark.parametrize(
    "file, key, value",
    [
        ("sana_jax.json", "height", "64"),
        ("sana_jax.json", "width", -5),
        ("transformer/config.json", "sample_size", "32"),
        ("transformer/config.json", "patch_size", 0),
        ("vae/config.json", "encoder_block_out_channels", 6),
    ],
)
def test_a_size_that_is_none_is_named_before_anything_is_loaded(copy, file, key, value):
    edit(copy / file, **{key: value})
    with pytest.raises(ValueError, match=re.escape(f"{copy / file}: {key} is {value!r}; give it ")):
        model_index.picture_geometry(copy)


@pytest.mark.parametrize(
    "part, key, value, rule",
    [
        ("transformer", "num_layers", "3", "a whole number of at least 1, as 20"),
        ("transformer", "num_attention_heads", "8", "a whole number of at least 1"),
        ("transformer", "interpolation_scale", "1", "a number above 0, or null, as null"),
        ("transformer", "guidance_embeds", "no", "true or false, as false"),
        ("vae", "latent_channels", "8", "a whole number of at least 1, as 32"),
        ("vae", "decoder_layers_per_block", [1, "2"], "a list, each item a whole number of at least 0"),
        ("text_encoder", "num_hidden_layers", "2", "a whole number of at least 1, as 26"),
    ],
)
def test_a_mistyped_value_of_a_part_is_named_with_its_file_and_rule(copy, part, key, value, rule):
    edit(copy / part / "config.json", **{key: value})
    message = f"{copy / part / 'config.json'}: {key} is {value!r}; give it {rule}"
    with pytest.raises(ValueError, match=re.escape(message)):
        folder.find_pipeline(copy)


@pytest.mark.parametrize("file", ["transformer/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"])
def test_a_git_lfs_pointer_in_the_place_of_a_file_is_told_from_damage(copy, file):
    (copy / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=f"{copy / file} is the Git LFS pointer .* Run `git lfs pull` in "):
        folder.find_pipeline(copy)


def test_unknown_keys_are_named(copy):
    edit(copy / "transformer" / "config.json", num_experts=8)
    with pytest.raises(ValueError, match="num_experts"):
        load("transformer", copy)
    edit(copy / "sana_jax.json", guidence_scale=3.0)
    with pytest.raises(ValueError, match=r"'guidence_scale' \(nearest: guidance_scale\)"):
        folder.load_defaults(copy)


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            dict(_class_name="DDIMScheduler"),
            "asks for the scheduler DDIMScheduler; implemented are DPMSolver.*SCMScheduler",
        ),
        (dict(prediction_type="epsilon"), "prediction_type='epsilon'; the solvers here implement 'flow_prediction'"),
        (dict(solver_type="heun"), "solver_type='heun'"),
    ],
)
def test_a_scheduler_that_is_not_ours_is_an_error(changes, message, copy):
    edit(copy / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        folder.load_defaults(copy)


def test_parts_of_two_models_are_refused(copy):
    edit(copy / "text_encoder" / "config.json", vocab_size=10)
    module, params = tiny_parts().text_encoder
    small = type(module)(dataclasses.replace(module.config, vocab_size=10))
    embedding = params["embedding"]["embedding"][:10]
    folder.save_text_encoder(small, {**params, "embedding": {"embedding": embedding}}, copy / "text_encoder")
    with pytest.raises(ValueError, match="the tokenizer has .* tokens and the text encoder embeds 10"):
        folder.read_pipeline(folder.find_pipeline(copy))


def test_the_wrong_part_is_named(copy):
    with pytest.raises(ValueError, match="holds a AutoencoderDC, not a SanaTransformer2DModel"):
        load("transformer", copy / "vae")


@pytest.mark.parametrize(
    "value,dtype,message", [(1e6, "float16", "exceeds the range of float16"), (np.nan, "float32", "is not finite")]
)
def test_weights_that_the_file_cannot_hold_are_not_written(value, dtype, message, tmp_path):
    module, params = tiny_parts().transformer
    broken = {**params, "scale_shift_table": np.full_like(params["scale_shift_table"], value)}
    with pytest.raises(ValueError, match=f"scale_shift_table {message}"):
        sana_jax.save_transformer(module, broken, tmp_path / "part", dtype=dtype)


@pytest.mark.parametrize(
    "path,is_id",
    [("owner/name", True), ("owner", False), ("./owner/name", False), ("a/b/c", False), ("tests/unit", False)],
)
def test_a_hub_name_is_two_words_that_are_no_place_here(path, is_id, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    assert model_index.is_hub_id(path) == is_id
