"""Models on the Hugging Face hub: which files are fetched. The hub is played by a listing and a folder."""

import pathlib
import shutil
import sys
import types

import huggingface_hub
import pytest
from tiny_pipeline import TRANSFORMER, random_params, tiny_parts

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import sample
from sana_jax import SanaPipeline
from sana_jax.models.controlnet import ControlNetConfig, SanaControlNet
from sana_jax.weights import folder, hub, model_index, parts

ALWAYS = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer.model",
    "transformer/config.json",
    "vae/config.json",
]
BESIDES = [
    "README.md",
    "asset/a.png",
    "vae/diffusion_pytorch_model.bin",
    "controlnet/diffusion_pytorch_model.safetensors",
]
STEM = "diffusion_pytorch_model"
PLAIN = [f"transformer/{STEM}.safetensors", f"vae/{STEM}.safetensors"]
TEXT = ["text_encoder/model.safetensors.index.json", "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors"]  # fmt: skip


def variant(name, tag):
    """The name that diffusers gives to a variant of a file."""
    if name.endswith(".json"):
        return name.replace(".index", f".index.{tag}")
    end = "-0000" if "-0000" in name else ".safetensors"
    return name.replace(end, f".{tag}{end}", 1)


BF16, FP16 = ([variant(name, tag) for name in PLAIN + TEXT] for tag in ("bf16", "fp16"))


def fetched(names, hub_id="owner/model"):
    """The weights that are wanted; what is always wanted is."""
    wanted = hub.wanted_files(hub_id, names)
    assert set(ALWAYS) <= set(wanted) <= set(names)
    return sorted(set(wanted) - set(ALWAYS))


def test_of_several_variants_the_plain_files_are_fetched_alone():
    assert fetched(ALWAYS + BESIDES + PLAIN + TEXT + BF16 + FP16) == sorted(PLAIN + TEXT)


@pytest.mark.parametrize("names", [BF16, FP16])
def test_a_repository_with_one_variant_gives_that(names):
    assert fetched(ALWAYS + BESIDES + names) == sorted(names)


def test_bf16_is_fetched_before_fp16():
    assert fetched(ALWAYS + BF16 + FP16) == sorted(BF16)


def test_each_part_is_chosen_for_itself():
    text = [variant(name, "bf16") for name in TEXT]
    assert fetched(ALWAYS + PLAIN + text + FP16, "owner/Sana_600M_512px_diffusers") == sorted(PLAIN + text)


def test_one_file_is_fetched_before_shards():
    shards = [f"transformer/{STEM}.safetensors.index.json", f"transformer/{STEM}-00001-of-00001.safetensors"]
    assert fetched(ALWAYS + PLAIN + shards) == sorted(PLAIN)


def test_shards_with_the_variant_after_the_number_are_fetched():
    names = [f"transformer/{STEM}.safetensors.index.fp16.json", f"transformer/{STEM}-00001-of-00001.fp16.safetensors"]
    assert fetched(ALWAYS + names) == sorted(names)


@pytest.mark.parametrize(
    "hub_id, wanted",
    [("owner/mine", True), ("owner/Sana_1600M_1024px_diffusers", False), ("owner/Sana_1600M_1024px_BF16", False)],
)
def test_an_fp16_copy_that_alone_shows_how_the_model_was_trained_is_fetched_too(hub_id, wanted):
    copy = FP16[:1]
    assert fetched(ALWAYS + PLAIN + TEXT + FP16, hub_id) == sorted(PLAIN + TEXT + copy * wanted)


def test_a_training_runs_folder_is_fetched_through_its_export():
    names = [f"export/{name}" for name in ALWAYS + PLAIN + BF16]
    wanted = hub.wanted_files("owner/run", names)
    assert wanted == sorted(f"export/{name}" for name in ALWAYS + PLAIN + [n for n in BF16 if n.startswith("text")])


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "repository"
    folder.save_pipeline(path, **tiny_parts()._asdict())
    part = path / "transformer"
    (part / f"{STEM}.safetensors").rename(part / f"{STEM}.bf16.safetensors")  # a variant alone
    (path / "vae" / f"{STEM}.fp16.safetensors").write_bytes(b"not read")
    return path


@pytest.fixture
def hub_of(repository, tmp_path, monkeypatch):
    """A hub with one repository; what is fetched of it is copied to tmp_path / "cache"."""

    def model_info(hub_id, revision):
        if revision not in (None, "v1"):
            raise OSError("no such revision")
        files = [file.relative_to(repository).as_posix() for file in repository.rglob("*") if file.is_file()]
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in files])

    def snapshot_download(hub_id, revision, allow_patterns=(), local_files_only=False):
        if revision not in (None, "v1"):
            raise OSError("nor in the cache")
        for name in allow_patterns:
            target = tmp_path / "cache" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, target)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return tmp_path / "cache"


def test_a_model_is_loaded_from_what_is_fetched_of_its_repository(hub_of):
    pipe = SanaPipeline.from_pretrained("owner/model")
    assert pipe.defaults == tiny_parts().defaults
    assert (hub_of / "transformer" / f"{STEM}.bf16.safetensors").is_file()
    assert not (hub_of / "vae" / f"{STEM}.fp16.safetensors").exists()


@pytest.fixture(scope="module")
def branch(tmp_path_factory):
    """A ControlNet's repository, in controlnet/ as in its root."""
    path = tmp_path_factory.mktemp("branch")
    net = SanaControlNet(ControlNetConfig(**TRANSFORMER | {"num_layers": 1}))
    parts.save(parts.CONTROLNET, net, random_params(net, 0), path / "controlnet")
    shutil.copytree(path / "controlnet", path, dirs_exist_ok=True)
    return path


def play(monkeypatch, repository, cache, names):
    """A hub with one repository, of which only `names` are listed."""
    siblings = [types.SimpleNamespace(rfilename=name) for name in names]
    monkeypatch.setattr(
        huggingface_hub, "model_info", lambda hub_id, revision: types.SimpleNamespace(siblings=siblings)
    )

    def snapshot_download(hub_id, revision, allow_patterns):
        for name in allow_patterns:
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@pytest.mark.parametrize("root", ["", "controlnet/"])
def test_a_controlnet_is_fetched_from_the_root_or_its_folder(branch, tmp_path, monkeypatch, root):
    wanted = [f"{root}config.json", f"{root}{STEM}.safetensors"]
    play(monkeypatch, branch, tmp_path / "cache", [*wanted, "README.md", "transformer/config.json"])
    folder.save_pipeline(tmp_path / "model", **tiny_parts()._asdict())
    pipe = SanaPipeline.from_pretrained(tmp_path / "model", controlnet="owner/net")
    assert pipe.controlnet.config.num_layers == 1
    fetched = [
        file.relative_to(tmp_path / "cache").as_posix() for file in (tmp_path / "cache").rglob("*") if file.is_file()
    ]
    assert sorted(fetched) == sorted(wanted)


def test_a_controlnet_of_the_original_code_is_its_file(branch, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "net.pth").write_bytes(b"weights")
    play(monkeypatch, tmp_path, tmp_path / "cache", ["README.md", "checkpoints/net.pth"])
    assert hub.download_controlnet("owner/net") == str(tmp_path / "cache" / "checkpoints/net.pth")
    play(monkeypatch, tmp_path, tmp_path / "cache", ["a.pth", "b.pth"])
    with pytest.raises(
        FileNotFoundError, match="owner/net on the hub has no ControlNet .*, nor a single .pth or .pt file"
    ):
        hub.download_controlnet("owner/net")


def test_the_controlnet_of_a_pipeline_is_fetched_with_it(branch, tmp_path, monkeypatch):
    whole = tiny_parts()._replace(controlnet=parts.read(parts.find(parts.CONTROLNET, branch)))
    folder.save_pipeline(tmp_path / "model", **whole._asdict())
    names = [
        file.relative_to(tmp_path / "model").as_posix() for file in (tmp_path / "model").rglob("*") if file.is_file()
    ]
    play(monkeypatch, tmp_path / "model", tmp_path / "cache", names)
    assert SanaPipeline.from_pretrained("owner/model").controlnet.config.num_layers == 1


def test_without_a_network_the_cached_files_are_taken(repository, monkeypatch):
    def fail(hub_id, revision):
        raise RuntimeError("no route to host")

    def cached(hub_id, revision, local_files_only):
        assert local_files_only and revision == "1a2b3c"
        return str(repository)

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert hub.download("owner/model", "1a2b3c") == str(repository)


def test_a_revision_is_asked_for_and_belongs_to_the_hub_alone(hub_of, repository):
    assert SanaPipeline.from_pretrained("owner/model", revision="v1").defaults == tiny_parts().defaults
    with pytest.raises(FileNotFoundError, match="nothing by that name and revision v2: no such revision"):
        SanaPipeline.from_pretrained("owner/model", revision="v2")
    with pytest.raises(ValueError, match="revision='v1' is of a model on the hub, and .*repository is a folder"):
        SanaPipeline.from_pretrained(repository, revision="v1")


def test_a_bf16_copy_is_fetched_for_weights_of_bfloat16():
    plain, copy = (f"transformer/{STEM}{infix}.safetensors" for infix in ("", ".bf16"))
    assert copy in hub.wanted_files("owner/model", [*ALWAYS, plain, copy], "bfloat16")
    assert plain not in hub.wanted_files("owner/model", [*ALWAYS, plain, copy], "bfloat16")
    assert plain in hub.wanted_files("owner/model", [*ALWAYS, plain], "bfloat16")


def test_of_another_kind_of_model_no_weights_are_fetched(hub_of, repository, monkeypatch):
    monkeypatch.setattr(model_index, "FAMILIES", {"OtherPipeline": "other"})
    with pytest.raises(ValueError, match="is of a SanaPipeline; implemented are OtherPipeline"):
        SanaPipeline.from_pretrained("owner/model")
    assert (hub_of / "model_index.json").is_file() and not list(hub_of.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--height=18"], "height 18 is not a positive multiple of 4"),
        (["--solver=scm"], "solver scm does not fit this SANA"),
    ],
)
def test_what_a_model_cannot_draw_is_refused_before_its_weights_are_fetched(hub_of, tmp_path, capsys, flags, message):
    arguments = ["--prompt=fox", "--model=owner/model", f"--out={tmp_path / 'fox.png'}"]
    assert sample.main([*arguments, *flags]) == 2
    assert message in capsys.readouterr().err
    assert (hub_of / "model_index.json").is_file() and not list(hub_of.rglob("*.safetensors"))


def test_a_repository_of_the_original_code_is_refused_before_anything_is_fetched(hub_of, monkeypatch):
    files = [types.SimpleNamespace(rfilename=name) for name in ("README.md", "checkpoints/Sana.pth")]
    monkeypatch.setattr(huggingface_hub, "model_info", lambda hub_id, revision: types.SimpleNamespace(siblings=files))
    with pytest.raises(FileNotFoundError, match="owner/model on the hub has no model_index.json.*checkpoints/Sana.pth"):
        SanaPipeline.from_pretrained("owner/model")
    assert not hub_of.exists()


def test_a_hub_name_that_gives_nothing_is_one_clear_error(monkeypatch):
    def fail(hub_id, revision, local_files_only=False):
        raise OSError(("not cached" if local_files_only else "no route to host") + "\nmore lines")

    monkeypatch.setattr(huggingface_hub, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="no folder owner/model here, and the hub .*: no route to host$"):
        SanaPipeline.from_pretrained("owner/model")
