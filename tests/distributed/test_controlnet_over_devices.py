"""A ControlNet over several (fake) devices draws the pictures of one."""

from processes import run_script

SCRIPT = """
import json, tempfile
import jax, numpy as np
from tiny_pipeline import TRANSFORMER, random_params, tiny_parts
from sana_jax import SanaPipeline
from sana_jax.models.controlnet import ControlNetConfig, SanaControlNet
from sana_jax.models.transformer import SanaTransformer, TransformerConfig
from sana_jax.parallel import sharding
from sana_jax.parallel.mesh import make_mesh
from sana_jax.weights import folder

sharding.MIN_SHARDED = 2**10
base = SanaTransformer(TransformerConfig(**TRANSFORMER | {"num_layers": 3}))
net = SanaControlNet(ControlNetConfig(**TRANSFORMER | {"num_layers": 2}, wiring="original"))
parts = tiny_parts()._replace(transformer=(base, random_params(base, 0)), controlnet=(net, random_params(net, 1, 0.2)))
pictures = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
call = dict(prompt=["a fox", "an apple"], num_images_per_prompt=2, num_inference_steps=2, output_type="latent")
expected = SanaPipeline(parts)(control_image=pictures, **call)
path = tempfile.mkdtemp()
folder.save_pipeline(path, **parts._asdict())
several = SanaPipeline.from_pretrained(path, mesh=make_mesh(data=2, fsdp=2), background=True)
found = several(control_image=pictures, **call)
spec = several.params["controlnet"]["blocks"]["residual"]["kernel"].sharding.spec
rows = SanaPipeline.from_pretrained(path, mesh=make_mesh(data=2, seq=2))(control_image=pictures, **call)
error = [float(np.abs(drawn - expected).max() / np.abs(expected).max()) for drawn in (found, rows)]
print(json.dumps({"error": error, "spec": list(map(str, spec))}))
"""


def test_pictures_weights_and_rows_are_split():
    found = run_script(SCRIPT, devices=4)
    assert max(found["error"]) < 1e-5
    assert "fsdp" in found["spec"]
