"""Which folders get the clip of the float16 releases, and why."""

import json

import pytest
from tiny_pipeline import tiny_parts

from sana_jax import SanaPipeline
from sana_jax.weights import folder, fp16_releases

NAME = "Sana_1600M_1024px_MultiLing"


@pytest.fixture
def warnings(monkeypatch):
    seen = []
    monkeypatch.setattr(fp16_releases.logging, "warning", lambda text, *args: seen.append(text % args))
    return seen


def transformer(path, files=("diffusion_pytorch_model.safetensors",), index=None, **config):
    """A pipeline folder as far as the choice looks at it."""
    part = path / "transformer"
    part.mkdir(parents=True)
    (part / "config.json").write_text(json.dumps(config))
    for name in files:
        (part / name).touch()
    if index is not None:
        (path / "model_index.json").write_text(json.dumps(index))
    return part


def public(path):
    """A pipeline folder that says nothing about the clip, as the releases."""
    folder.save_pipeline(path, **tiny_parts()._asdict())
    file = path / "transformer" / "config.json"
    values = json.loads(file.read_text())
    del values["clamp_fp16"]
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("name", fp16_releases.NAMES)
def test_a_release_is_known_by_its_folder_and_by_its_place_in_the_hubs_cache(name, tmp_path, warnings):
    cached = tmp_path / f"models--Efficient-Large-Model--{name}_diffusers" / "snapshots" / "0a1b"
    for place in (tmp_path / name, tmp_path / f"{name.lower()}_diffusers", cached):
        assert fp16_releases.choose_clamp(transformer(place), None)
        assert f"and {name} was trained in float16" in warnings.pop() and not warnings


@pytest.mark.parametrize(
    "file",
    [
        "Sana_600M_512px/checkpoints/Sana_600M_512px_MultiLing.pth",
        "Sana_600M_1024px/checkpoints/Sana_600M_1024px_MultiLing.pth",
        "Sana_1600M_1024px/checkpoints/Sana_1600M_1024px.pth",
        "Sana_1600M_1024px.safetensors",
    ],
)
def test_files_of_the_releases_are_known_as_they_are_called(file, warnings):
    assert fp16_releases.choose_clamp(file, None) and warnings


def test_sprints_teacher_is_known_by_its_name():
    assert fp16_releases.is_sprint_teacher("checkpoints/Sana_Sprint_1.6B_1024px_teacher.pth")
    assert not fp16_releases.is_sprint_teacher("checkpoints/Sana_Sprint_1.6B_1024px.pth")


def test_a_link_to_a_release_is_known_by_what_it_points_to(tmp_path, warnings):
    transformer(tmp_path / NAME)
    (tmp_path / "mine").symlink_to(tmp_path / NAME)
    assert fp16_releases.choose_clamp(tmp_path / "mine" / "transformer", None)


@pytest.mark.parametrize("origin", [f"Efficient-Large-Model/{NAME}_diffusers", f"/models/{NAME}/transformer"])
def test_the_name_diffusers_leaves_in_config_or_index_is_read(origin, tmp_path, warnings):
    assert fp16_releases.choose_clamp(transformer(tmp_path / "a", _name_or_path=origin), None)
    assert f"config.json has _name_or_path {origin!r}" in warnings.pop()
    assert fp16_releases.choose_clamp(transformer(tmp_path / "b", index={"_name_or_path": origin}), None)
    assert f"model_index.json has _name_or_path {origin!r}" in warnings.pop()


def test_weights_in_an_fp16_variant_alone_show_a_release(tmp_path, warnings):
    half, plain = "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"
    shard = "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"
    assert fp16_releases.choose_clamp(transformer(tmp_path / "a", [plain, half]), None)
    assert half in warnings[0] and "pass clamp_fp16=False" in warnings[0]
    assert fp16_releases.choose_clamp(transformer(tmp_path / "b", [shard]), None)
    for name, arguments in {
        "both": dict(files=[half, "diffusion_pytorch_model.bf16.safetensors"]),
        "sana15": dict(files=[half], qk_norm="rms_norm_across_heads"),
        "sprint": dict(files=[half], guidance_embeds=True),
        "4k": dict(files=[half], interpolation_scale=2.0),
        "Sana_1600M_1024px_BF16_diffusers": dict(files=[half]),
    }.items():
        assert not fp16_releases.choose_clamp(transformer(tmp_path / name, **arguments), None), name


@pytest.mark.parametrize(
    "name",
    [
        "Sana_1600M_1024px_BF16_diffusers",
        "Sana_1600M_2Kpx_BF16",
        "SANA1.5_1.6B_1024px",
        "Sana_Sprint_0.6B_1024px",
        "mine",
    ],
)
def test_other_models_are_left_alone(name, tmp_path, warnings):
    inside = tmp_path / "Sana_1600M_1024px" / name  # what stands in a folder of that name is not that release
    assert not fp16_releases.choose_clamp(transformer(inside), None)
    assert not warnings


def test_the_call_decides_before_the_configuration_and_that_before_the_name(tmp_path, warnings):
    place = transformer(tmp_path / NAME, clamp_fp16=False)
    assert not fp16_releases.choose_clamp(place, None)
    assert fp16_releases.choose_clamp(place, True)
    assert not fp16_releases.choose_clamp(transformer(tmp_path / "b" / NAME), False)
    assert not warnings


def test_from_pretrained_and_load_transformer_choose(tmp_path, warnings):
    public(tmp_path / NAME)
    pipe = SanaPipeline.from_pretrained(tmp_path / NAME)
    assert pipe.transformer.config.clamp_fp16 and len(warnings) == 1
    assert folder.load_transformer(tmp_path / NAME / "transformer")[0].config.clamp_fp16 and len(warnings) == 2
    assert not SanaPipeline.from_pretrained(tmp_path / NAME, clamp_fp16=False).transformer.config.clamp_fp16
    pipe.save_pretrained(tmp_path / "copy")
    assert SanaPipeline.from_pretrained(tmp_path / "copy").transformer.config.clamp_fp16
    assert len(warnings) == 2  # settled by the copy's config.json


def test_a_model_without_the_clip_keeps_so_in_a_folder_of_a_releases_name(tmp_path, warnings):
    folder.save_pipeline(tmp_path / NAME, **tiny_parts()._asdict())
    folder.save_transformer(*tiny_parts().transformer, tmp_path / "alone" / NAME)
    for place in (tmp_path / NAME, tmp_path / "alone" / NAME):
        assert not folder.load_transformer(place)[0].config.clamp_fp16
    assert not warnings


def test_the_clip_is_not_mentioned_where_nothing_would_turn_it_on(tmp_path):
    folder.save_transformer(*tiny_parts().transformer, tmp_path / "mine")
    assert "clamp_fp16" not in json.loads((tmp_path / "mine" / "config.json").read_text())


def test_a_pth_file_is_known_by_its_name(tmp_path, warnings):
    (tmp_path / f"{NAME}.pth").touch()
    assert fp16_releases.choose_clamp(tmp_path / f"{NAME}.pth", None)
    assert f"{NAME} was trained in float16" in warnings.pop()
    (tmp_path / "mine.pth").touch()
    assert not fp16_releases.choose_clamp(tmp_path / "mine.pth", None)
    assert not warnings
