"""SANA-Sprint against diffusers: SCMScheduler, SanaSprintPipeline and SanaSprintImg2ImgPipeline, with the same noise."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sana_jax import SanaPipeline
from sana_jax.diffusion import solvers, trigflow
from sana_jax.diffusion.noise import initial_noise

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from diffusers.pipelines.sana import pipeline_sana_sprint_img2img
from diffusers.schedulers import scheduling_scm
from parity_errors import picture_error, relative_error
from tiny_diffusers import allow_any_size, draw, save_tiny

INSTRUCTION = ["the quick brown fox:", "User Prompt: "]
LENGTH = 12
PROMPTS = ["A red apple on a blue background", "pear"]
SIGMA_DATA = 0.5


def set_timesteps(scheduler, num_steps):
    scheduler.set_timesteps(num_steps, intermediate_timesteps=1.3 if num_steps == 2 else None)


def to_torch(x):
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


@pytest.fixture
def use_noise(monkeypatch):
    """Makes diffusers draw the given arrays (NHWC), one after the other, in place of random numbers."""

    def use(arrays):
        left = [to_torch(x) for x in arrays]

        def draw(shape, **kwargs):
            assert tuple(shape) == tuple(left[0].shape)
            return left.pop(0)

        for module in (scheduling_scm, pipeline_sana_sprint_img2img):
            monkeypatch.setattr(module, "randn_tensor", draw)
        return left

    return use


def step_noise(noise, num_steps):
    return np.random.default_rng(1).normal(size=(num_steps - 1, *noise.shape)).astype(np.float32)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10])
def test_angles_equal_the_schedulers_timesteps(num_steps, measured):
    scheduler = diffusers.SCMScheduler()
    set_timesteps(scheduler, num_steps)
    error = np.abs(trigflow.trigflow_angles(num_steps) - scheduler.timesteps.numpy()).max()
    measured("scheduler SCM", "angles of 1 to 10 steps, absolute", error, 1e-6)


@pytest.mark.parametrize("num_steps,start", [(1, 0), (2, 0), (4, 0), (2, 1), (4, 2)])
def test_trajectory_equals_the_scheduler_on_a_fixed_model(num_steps, start, use_noise, measured):
    """The scheduler is given the wrapped network's output F, made from the flow's velocity by the paper's formula."""
    field = lambda x, s: 0.8 * x - 0.3 * x * x * x / (1 + x * x) + 0.4 * s - 0.2
    noise, x0 = (np.random.default_rng(i).normal(size=(2, 4, 4, 3)).astype(np.float32) for i in (0, 2))
    between = step_noise(noise, num_steps)
    scheduler = diffusers.SCMScheduler()
    set_timesteps(scheduler, num_steps)
    scheduler.set_begin_index(start)
    use_noise([*between[start:], noise])  # the last step draws too, and multiplies by sin(0)
    first = scheduler.timesteps[start]
    latents = SIGMA_DATA * to_torch(noise)
    if start:
        latents = torch.cos(first) * SIGMA_DATA * to_torch(x0) + torch.sin(first) * latents
    for t in scheduler.timesteps[start:-1]:
        sigma = torch.sin(t) / (torch.sin(t) + torch.cos(t))
        norm = torch.sqrt(sigma**2 + (1 - sigma) ** 2)
        x = latents / SIGMA_DATA * norm
        wrapped = ((1 - 2 * sigma) * x + (1 - 2 * sigma + 2 * sigma**2) * field(x, sigma)) / norm
        latents, x0_predicted = scheduler.step(SIGMA_DATA * wrapped, t, latents, return_dict=False)
    solver = trigflow.trigflow(trigflow.trigflow_angles(num_steps), jnp.asarray(between), start=start)
    velocity_fn = lambda x, t: field(x, t[:, None, None, None] / 1000)
    start_from = jnp.asarray(x0) if start else None
    ours = jax.jit(lambda x: solvers.sample(velocity_fn, x, solver, x0=start_from))(noise)
    error = relative_error(to_torch(ours), x0_predicted / SIGMA_DATA)
    measured("scheduler SCM", "trajectories on a fixed model", error, 2e-5)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A SanaSprintPipeline with random non-zero values in every parameter, and the folder it saved itself to.

    Its transformer has timestep_scale=1, as the public conversion leaves it.
    """
    path = tmp_path_factory.mktemp("diffusers")
    own = {"complex_human_instruction": INSTRUCTION, "max_sequence_length": LENGTH}
    options = dict(qk_norm="rms_norm_across_heads", guidance_embeds=True)
    pipe = save_tiny(
        diffusers.SanaSprintPipeline, path, transformer=options, own=own, scheduler=diffusers.SCMScheduler()
    )
    return pipe, path


@pytest.fixture(scope="module")
def picture():
    """Smooth, so that resizing it leaves something to see."""
    y, x = np.mgrid[0:24, 0:40] / 40
    pixels = np.stack([x, y, (x + y) / 2], axis=-1)
    return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    allow_any_size(monkeypatch, diffusers.SanaSprintPipeline, diffusers.SanaSprintImg2ImgPipeline)


def run_theirs(pipe, noise, output_type, num_steps=2, **kwargs):
    arguments = dict(num_inference_steps=num_steps, guidance_scale=3.0)
    arguments["intermediate_timesteps"] = 1.3 if num_steps == 2 else None
    text = dict(max_sequence_length=LENGTH, complex_human_instruction=INSTRUCTION)
    return draw(pipe, PROMPTS, noise, output_type, **{**arguments, **text, **kwargs})


def run_ours(pipe, noise, output_type, num_steps=2, **kwargs):
    size = dict(zip(("height", "width"), (4 * side for side in noise.shape[1:3]), strict=True))
    arguments = dict(num_inference_steps=num_steps, guidance_scale=3.0, step_noise=step_noise(noise, num_steps))
    return pipe(PROMPTS, latents=noise, output_type=output_type, **{**size, **arguments, **kwargs})


def drawn_by_both(theirs, ours, use_noise, output_type, num_steps, grid):
    noise = np.asarray(initial_noise(0, np.arange(2), (*grid, 8)))
    left = use_noise([*step_noise(noise, num_steps), noise])
    expected = run_theirs(theirs[0], noise, output_type, num_steps)
    assert not left
    return run_ours(ours, noise, output_type, num_steps), expected


@pytest.mark.parametrize("num_steps,grid", [(1, (4, 4)), (2, (4, 4)), (4, (4, 4)), (5, (2, 6)), (20, (6, 2))])
def test_final_latents_equal_diffusers(theirs, ours, use_noise, num_steps, grid, measured):
    latents, expected = drawn_by_both(theirs, ours, use_noise, "latent", num_steps, grid)
    measured("SANA-Sprint pipeline", "final latents, 1 to 20 steps", relative_error(latents, expected), 1e-3)


@pytest.mark.parametrize("num_steps,grid", [(1, (6, 2)), (2, (2, 6)), (20, (4, 4))])
def test_pictures_equal_diffusers_within_2_of_255(theirs, ours, use_noise, num_steps, grid, measured):
    pictures, expected = drawn_by_both(theirs, ours, use_noise, "pil", num_steps, grid)
    measured("SANA-Sprint pipeline", "pictures, of 255", picture_error(pictures, expected), 2)


@pytest.mark.parametrize("timestep_scale", [1.0, 0.001])
def test_a_folder_of_ours_opens_in_diffusers_and_gives_the_same_latents(
    theirs, ours, noise, use_noise, tmp_path, timestep_scale
):
    """diffusers' pipeline tells the transformer the level itself, whichever scale its configuration states."""
    ours.save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"timestep_scale": timestep_scale}))
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, text_encoder=None, local_files_only=True)
    assert type(again) is diffusers.SanaSprintPipeline and type(again.scheduler) is diffusers.SCMScheduler
    text_encoder = transformers.Gemma2Model.from_pretrained(tmp_path / "text_encoder", attn_implementation="eager")
    again.register_modules(text_encoder=text_encoder)
    outputs = []
    for pipe in (again, theirs[0]):
        use_noise([*step_noise(noise, 2), noise])
        outputs.append(run_theirs(pipe, noise, "latent"))
    assert relative_error(*outputs) < 1e-5
    read_again = SanaPipeline.from_pretrained(tmp_path)
    assert relative_error(run_ours(read_again, noise, "latent"), outputs[0]) < 1e-3


@pytest.mark.parametrize("num_steps,strength,steps_run", [(2, 0.5, 1), (4, 0.6, 3), (2, 0.6, 2)])
def test_img2img_equals_diffusers(theirs, ours, noise, use_noise, picture, num_steps, strength, steps_run, measured):
    pipe = diffusers.SanaSprintImg2ImgPipeline(**theirs[0].components)
    pipe.set_progress_bar_config(disable=True)
    kept = [*step_noise(noise, num_steps), noise][num_steps - steps_run :]
    outputs, start = [], dict(image=picture, strength=strength)
    for output_type in ("latent", "pil") if num_steps == 4 else ("latent",):
        left = use_noise([noise, *kept])
        expected = run_theirs(pipe, noise, output_type, num_steps, latents=None, **start)
        assert not left
        outputs.append((run_ours(ours, noise, output_type, num_steps, **start), expected))
    measured("SANA-Sprint pipeline", "img2img, final latents", relative_error(*outputs[0]), 1e-3)
    if num_steps == 4:
        measured("SANA-Sprint pipeline", "img2img, pictures, of 255", picture_error(*outputs[1]), 2)
    if steps_run < num_steps:
        flipped = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mistaken = run_ours(ours, noise, "latent", num_steps, image=flipped, strength=strength)
        assert relative_error(mistaken, outputs[0][1]) > 3e-3


def test_other_settings_break_parity(theirs, ours, noise, use_noise):
    """Each stands for a mistake the tests above must see."""
    between = step_noise(noise, 4)
    use_noise([*between, noise])
    expected = run_theirs(theirs[0], noise, "latent", 4)
    assert relative_error(run_ours(ours, noise, "latent", 4), expected) < 1e-3
    for mistake in (dict(step_noise=between[::-1]), dict(guidance_scale=3.5)):
        assert relative_error(run_ours(ours, noise, "latent", 4, **mistake), expected) > 3e-3, mistake


def test_a_timestep_in_the_units_of_sana_breaks_parity(theirs, ours, noise, use_noise, monkeypatch):
    use_noise([*step_noise(noise, 2), noise])
    expected = run_theirs(theirs[0], noise, "latent")
    right = trigflow.trigflow
    monkeypatch.setattr(trigflow, "trigflow", lambda *a, timestep_scale, **k: right(*a, timestep_scale=0.001, **k))
    mutated = SanaPipeline.from_pretrained(theirs[1])
    assert relative_error(run_ours(mutated, noise, "latent"), expected) > 3e-3
