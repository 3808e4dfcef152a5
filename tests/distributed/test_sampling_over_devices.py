"""The pipeline over several (fake) devices draws the pictures of one, and its programs send no more than they must."""

import jax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from processes import QUICK, run_script

from sana_jax.parallel.mesh import make_mesh
from sana_jax.sampling.devices import check_mesh

SCRIPT = """
import dataclasses, json, math, pathlib, re, sys, tempfile
import jax, numpy as np
from jax.sharding import Mesh
from tiny_pipeline import AUTOENCODER, random_params, tiny_parts, tiny_sprint_parts
from sana_jax import SanaPipeline
from sana_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from sana_jax.models.transformer import SanaTransformer
from sana_jax.parallel import sharding
from sana_jax.parallel.mesh import make_mesh
from sana_jax.sampling.devices import input_shardings
from sana_jax.sampling.program import Features, Inputs, Text
from sana_jax.weights import folder

assert jax.device_count() == 8
sharding.MIN_SHARDED = 2**10
dump = pathlib.Path(sys.argv[1])
attention = ("ResBlock", "ResBlock", "EfficientViTBlock")
blocks = dict(decoder_block_types=attention, encoder_block_types=attention)
module = Autoencoder(AutoencoderConfig(**AUTOENCODER | blocks))
defaults = dict(complex_human_instruction=("the quick fox is", "apple: "), num_inference_steps=2)
parts = tiny_parts()._replace(
    autoencoder=(module, random_params(module, 5)), defaults=dataclasses.replace(tiny_parts().defaults, **defaults)
)
start = np.random.default_rng(0).random((32, 16, 3)).astype(np.float32)
PROMPTS = ["fox", "a red apple"]
SIZE = dict(height=32, width=16, seed=3)

def mesh_of(**axes):
    axes = dict(data=1) | axes
    return make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])

def programs():
    return set(dump.glob("*draw*after_optimizations.txt"))

def collectives(file):
    kinds = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter|collective-broadcast"
    return sorted(set(re.findall(f" ({kinds})[a-z-]*[(]", file.read_text())))

def compare(one, several, **call):
    expected = one(**SIZE | call)
    before = programs()
    found = several(**SIZE | call)
    (program,) = programs() - before
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return dict(error=error, collectives=collectives(program))

out = {}
one, data, seq = SanaPipeline(parts), SanaPipeline(parts, mesh_of(data=4)), SanaPipeline(parts, mesh_of(seq=4))
out["data"] = compare(one, data, prompt=PROMPTS, num_images_per_prompt=2, output_type="np", decode_strips=2)
out["seq"] = compare(one, seq, prompt=PROMPTS, output_type="np", pag_scale=2.0, guidance_interval=(0.1, 0.9))
sprint, mesh = tiny_sprint_parts(), mesh_of(data=2, seq=2)
out["sprint"] = compare(SanaPipeline(sprint), SanaPipeline(sprint, mesh), prompt=PROMPTS, output_type="latent")
with tempfile.TemporaryDirectory() as path:
    folder.save_pipeline(path, **parts._asdict())
    every = SanaPipeline.from_pretrained(path, mesh=mesh_of(data=2, fsdp=2, seq=2))
negatives = dict(prompt=["fox"] * 4, negative_prompt=["a", "red", "apple", "the quick"], output_type="latent")
whole, part = one(**SIZE | negatives), one(**SIZE | negatives | dict(negative_prompt="a"))
assert np.abs(whole[1:] - part[1:]).max() > 1e-3
out["negatives"] = [compare(one, pipe, **negatives)["error"] for pipe in (data, every)]
out["places"] = []
for pipe, count in ((data, 4), (every, 4), (data, 1)):
    hidden = jax.ShapeDtypeStruct((count, 12, 32), np.float32)
    null = Features(hidden, jax.ShapeDtypeStruct((count, 12), np.int32))
    text = Text(null.mask, null.mask, None)
    inputs = Inputs(text, null, hidden, hidden, None, None, None, None)
    out["places"].append(str(input_shardings(inputs, pipe.mesh).null.hidden.spec))
out["all"] = compare(one, every, prompt=["fox"] * 4, output_type="np", image=start, strength=0.5)
out["shares"] = {}
for name, params in every.params.items():
    largest = max(jax.tree.leaves(params), key=lambda x: x.size)
    out["shares"][name] = largest.size // largest.addressable_shards[0].data.size

def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)

before = programs()
config = dataclasses.replace(parts.transformer[0].config, self_attention="softmax")
softmax = parts._replace(transformer=(SanaTransformer(config), parts.transformer[1]))
axes = Mesh(np.array(jax.devices()[:2]), ("batch",))
out["refusals"] = [
    refusal(lambda: data("fox", num_images_per_prompt=3)),
    refusal(lambda: seq("fox", height=24, width=16)),
    refusal(lambda: seq("fox", **SIZE, decode_strips=2)),
    refusal(lambda: seq("fox", **SIZE, autoencoder_tiles=(16, 12))),
    refusal(lambda: seq("fox", **SIZE, progress=print)),
    refusal(lambda: seq("fox", height=16, width=16)),
    refusal(lambda: SanaPipeline(softmax, seq.mesh)("fox", **SIZE)),
    refusal(lambda: SanaPipeline.from_pretrained(mesh=axes)),
]
out["compiled for refusals"] = len(programs() - before)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory):
    dump = tmp_path_factory.mktemp("programs")
    flags = f"{QUICK} --xla_dump_to={dump} --xla_dump_hlo_module_re=.*draw.*"
    return run_script(SCRIPT, dump, devices=8, XLA_FLAGS=flags)


@pytest.mark.parametrize("run", ["data", "seq", "sprint", "all"])
def test_several_devices_draw_the_pictures_of_one(eight_devices, run):
    """Guidance, in an interval too, PAG, Sprint, img2img, a cached instruction; parameters given or read in parts."""
    assert eight_devices[run]["error"] < 1e-5


def test_each_picture_has_its_own_negative_prompt_on_its_device(eight_devices):
    assert max(eight_devices["negatives"]) < 1e-5
    several, both, single = eight_devices["places"]
    assert several == both == str(P(("data", "fsdp"))) and single == str(P(None))


def test_pictures_on_devices_of_their_own_send_nothing(eight_devices):
    assert eight_devices["data"]["collectives"] == []


@pytest.mark.parametrize("run", ["seq", "sprint"])
def test_the_rows_of_a_picture_are_never_gathered(eight_devices, run):
    assert eight_devices[run]["collectives"] == ["all-reduce", "collective-permute"]


def test_parameters_are_split_over_fsdp(eight_devices):
    assert eight_devices["shares"] == {"transformer": 2, "autoencoder": 2, "text_encoder": 2}


def test_what_the_devices_cannot_share_is_refused_before_anything_is_compiled(eight_devices):
    pictures, rows, strips, tiles, progress, few, softmax, axes = eight_devices["refusals"]
    assert pictures == (
        "3 pictures cannot be split over mesh.data * mesh.fsdp = 4 devices. Draw a multiple of 4 "
        "(num_images_per_prompt), or put the devices on mesh.seq, which splits each picture."
    )
    assert rows == "mesh.seq=4 does not divide the 6 rows of tokens. Use mesh.seq=3."
    assert "decode_strips=2 needs whole pictures, and mesh.seq=4 splits them" in strips
    assert "autoencoder_tiles=(16, 12) needs whole pictures" in tiles
    assert "progress is called in the order of the steps" in progress
    assert "a device holds 1 rows and its neighbour needs 2. Use a smaller mesh.seq, or larger pictures." in few
    assert "self_attention='softmax' needs all tokens of a picture on one device" in softmax
    assert "the mesh has the axes ('batch',)" in axes
    assert eight_devices["compiled for refusals"] == 0


def test_a_mesh_over_several_processes_is_refused(monkeypatch):
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(Mesh, "is_multi_process", True)
    monkeypatch.delitem(
        mesh.__dict__, "is_multi_process", raising=False
    )  # meshes are shared, and keep what they were asked
    with pytest.raises(ValueError, match="the mesh has devices of several of the 1 processes"):
        check_mesh(mesh)
