"""The pipeline on a tiny random model: arguments, shapes, determinism, errors."""

import dataclasses
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import tiny_parts

from sana_jax import SanaPipeline, pipeline
from sana_jax.diffusion import solvers, trigflow
from sana_jax.diffusion.noise import initial_noise
from sana_jax.prompts import tokenize_prompts
from sana_jax.sampling import program


@pytest.fixture(scope="module")
def pipe():
    return SanaPipeline(tiny_parts())


def latents_of(pipe, *args, **kwargs):
    return pipe(*args, output_type="latent", **kwargs)


def test_output_types_agree(pipe):
    pil = pipe("a red apple")
    array = pipe("a red apple", output_type="np")
    latents = latents_of(pipe, "a red apple")
    assert isinstance(pil[0], Image.Image) and pil[0].size == (16, 16)
    assert array.shape == (1, 16, 16, 3) and array.dtype == np.float32 and 0 <= array.min() <= array.max() <= 1
    assert latents.shape == (1, 4, 4, 8) and latents.dtype == np.float32
    # Two programs, whose pixels differ by float32's rounding: a value between two bytes may go either way.
    np.testing.assert_allclose(np.asarray(pil[0], np.float32), 255 * array[0], atol=0.5 + 1e-3)


def test_pixels_are_the_decoded_latents(pipe):
    module, params = tiny_parts().autoencoder
    latents = latents_of(pipe, "a red apple") / 0.7
    decoded = jax.jit(lambda params, x: module.apply({"params": params}, x, method="decode"))(params, latents)
    expected = np.clip(np.asarray(decoded) / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(pipe("a red apple", output_type="np"), expected, atol=2e-5)


@pytest.mark.parametrize("null_mask", ["own", "prompt"])
def test_latents_are_the_solvers_on_the_guided_model(null_mask):
    """The same arithmetic written out: two encoder passes, two model calls a step, guidance, the solver's steps."""
    parts = tiny_parts()
    parts = parts._replace(defaults=dataclasses.replace(parts.defaults, null_mask=null_mask))
    model = jax.jit(lambda params, *inputs: parts.transformer[0].apply({"params": params}, *inputs))
    encode = jax.jit(lambda params, *inputs: parts.text_encoder[0].apply({"params": params}, *inputs))
    features = {}
    for name, text in (("text", "a red apple"), ("null", "blurry")):
        ids, mask = tokenize_prompts(parts.tokenizer, [text], None, 12)
        features[name] = encode(parts.text_encoder[1], ids, mask), mask
    if null_mask == "prompt":
        features["null"] = features["null"][0], features["text"][1]
    solver = solvers.flow_dpm(3, 3.0)
    state = solver.init(initial_noise(5, np.arange(1), (4, 4, 8)))
    for i in range(3):
        level = jax.tree.map(lambda x, i=i: x[i], solver.levels)
        timesteps = jnp.full((1,), level.timesteps, jnp.float32)
        text, null = (
            model(parts.transformer[1], state.latents, timesteps, *features[name]) for name in ("text", "null")
        )
        state = solver.step(state, null + 2.5 * (text - null), level)
    ours = latents_of(SanaPipeline(parts), "A red apple ", negative_prompt="blurry", guidance_scale=2.5, seed=5)
    np.testing.assert_allclose(ours, state.latents, rtol=1e-4, atol=1e-4)


def test_the_seed_decides(pipe):
    first, again, other = (latents_of(pipe, "a red apple", seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_a_pictures_noise_depends_on_seed_and_its_number_alone():
    shape = (4, 4, 8)
    whole = initial_noise(3, np.arange(5), shape)
    np.testing.assert_array_equal(initial_noise(3, np.array([4, 2]), shape), whole[np.array([4, 2])])
    assert abs(float(whole.std()) - 1) < 0.1 and not np.allclose(whole[0], whole[1])


def test_a_batch_is_its_pictures_drawn_alone_those_of_one_prompt_next_to_each_other(pipe):
    prompts, negatives = ["a red apple", "a green pear"], ["x", "y"]
    batch = latents_of(pipe, prompts, num_images_per_prompt=2, seed=4, negative_prompt=negatives)
    for i in range(4):
        noise = initial_noise(4, np.array([i]), (4, 4, 8))
        alone = latents_of(pipe, prompts[i // 2], latents=noise, negative_prompt=negatives[i // 2])
        np.testing.assert_allclose(batch[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_given_latents_replace_the_seed(pipe):
    noise = initial_noise(9, np.arange(1), (4, 4, 8))
    np.testing.assert_array_equal(
        latents_of(pipe, "a red apple", latents=noise, seed=1), latents_of(pipe, "a red apple", seed=9)
    )


def test_the_prompt_the_negative_prompt_and_the_guidance_scale_matter(pipe):
    plain = latents_of(pipe, "a red apple")
    for changed in (
        latents_of(pipe, "a green pear"),
        latents_of(pipe, "a red apple", negative_prompt="fox"),
        latents_of(pipe, "a red apple", guidance_scale=2.0),
        latents_of(pipe, "a red apple", solver="flow_euler"),
        latents_of(pipe, "a red apple", guidance_interval=(0.0, 0.5)),
    ):
        assert np.abs(changed - plain).max() > 1e-4


def test_one_warning_says_what_is_left_out_of_the_prompts(pipe, caplog):
    words = " ".join(["apple"] * 12)
    with caplog.at_level("WARNING"):
        latents_of(pipe, ["a red apple", "fox"], "pear")
        assert not caplog.records
        latents_of(pipe, [f"{words} at the end", "fox"], f"{words} here")
    (record,) = caplog.records
    assert record.getMessage().startswith("max_sequence_length=12 tokens of a prompt are read; left out: '")
    assert "at the end'" in record.getMessage() and "here'" in record.getMessage()


def test_the_warning_shows_the_beginning_of_a_long_rest(pipe, caplog):
    with caplog.at_level("WARNING"):
        latents_of(pipe, "apple " * 12 + "x" * 10_000)
    (record,) = caplog.records
    assert len(record.getMessage()) < 250
    assert re.search(r"x{50}x*\.\.\.$", record.getMessage())


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
def test_a_warning_names_the_pictures_that_are_not_of_finite_numbers(pipe, caplog, output_type):
    noise = np.array(initial_noise(0, np.arange(3), (4, 4, 8)))
    with caplog.at_level("WARNING"):
        pipe("fox", latents=noise, num_images_per_prompt=3, output_type=output_type)
        assert not caplog.records
        noise[1, 2, 0, 3] = np.nan
        pipe("fox", latents=noise, num_images_per_prompt=3, output_type=output_type)
    (record,) = caplog.records
    assert record.getMessage() == (
        "of 3 pictures these, counted from 0, are not of finite numbers and come out black or broken: 1. Likely the checkpoint "
        "was trained in float16 and needs clamp_fp16=True of from_pretrained, or guidance_scale=4.5 is too large."
    )


def test_a_seed_of_each_picture_draws_what_the_seed_alone_draws_first(pipe):
    seeds, prompts = [7, 2**32 - 1, 7], ["fox", "a red apple", "a red apple"]
    together = latents_of(pipe, prompts, seed=seeds)
    for picture, prompt, seed in zip(together, prompts, seeds, strict=True):
        np.testing.assert_allclose(picture, latents_of(pipe, prompt, seed=seed)[0], atol=1e-5)
    noise = initial_noise(tuple(seeds), np.zeros(3, int), (4, 4, 8))
    for one, seed in zip(noise, seeds, strict=True):
        np.testing.assert_array_equal(one, initial_noise(seed, [0], (4, 4, 8))[0])
        folded = jax.random.fold_in(jax.random.key(seed), 0)
        np.testing.assert_array_equal(one, jax.random.normal(folded, (4, 4, 8)))
    between = trigflow.step_noise(tuple(seeds), np.zeros(3, int), 3, (4, 4, 8))
    np.testing.assert_array_equal(between[:, 1:2], trigflow.step_noise(2**32 - 1, [0], 3, (4, 4, 8)))


def test_two_guidance_intervals_are_one_program(pipe):
    found = [latents_of(pipe, "a red apple", guidance_interval=interval) for interval in ((0.0, 0.5), (0.5, 0.9))]
    assert np.abs(found[0] - found[1]).max() > 1e-4
    count = len(pipe.programs)
    third = latents_of(pipe, "a red apple", guidance_interval=(0.9, 1.0))
    assert len(pipe.programs) == count
    assert min(np.abs(third - one).max() for one in found) > 1e-4


def test_without_guidance_the_negative_prompt_is_not_used(pipe):
    plain = latents_of(pipe, "a red apple", guidance_scale=1.0)
    np.testing.assert_array_equal(latents_of(pipe, "a red apple", guidance_scale=1.0, negative_prompt="fox"), plain)
    nearly = latents_of(pipe, "a red apple", guidance_scale=1.000001)
    np.testing.assert_allclose(nearly, plain, atol=1e-3)


def test_one_program_serves_every_prompt_seed_and_scale(pipe):
    latents_of(pipe, "a red apple")
    programs = len(pipe.programs)
    latents_of(pipe, "fox", seed=1, guidance_scale=3.0, negative_prompt="a green pear")
    assert len(pipe.programs) == programs
    latents_of(pipe, "fox", num_inference_steps=2)
    assert len(pipe.programs) == programs + 1


def test_other_sizes_than_that_of_training_are_drawn(pipe):
    assert latents_of(pipe, "fox", height=8, width=24).shape == (1, 2, 6, 8)


def test_progress_is_reported_step_by_step(pipe):
    seen = []
    latents_of(pipe, "fox", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_what_progress_raises_ends_the_call_and_reaches_the_caller(pipe):
    class Enough(Exception):
        pass

    seen = []

    def stop(done, total):
        seen.append(done)
        if done == 2:
            raise Enough

    with pytest.raises(Enough):
        pipe("fox", progress=stop)
    assert seen == [1, 2]
    pipe("fox", progress=lambda done, total: seen.append(done))
    assert seen == [1, 2, 1, 2, 3]


def test_a_call_that_progress_ended_leaves_its_thread_able_to_draw_while_others_draw(pipe):
    def stop(done, total):
        if done == 2:
            raise InterruptedError

    ended, steps = threading.Event(), dict(num_inference_steps=8)
    latents_of(pipe, "a green pear", **steps)  # compiles

    def draw_on():
        while not ended.is_set():
            latents_of(pipe, "a green pear", **steps)

    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(draw_on) for _ in range(3)]
        try:
            for _ in range(15):
                with pytest.raises(InterruptedError):
                    latents_of(pipe, "fox", progress=stop, **steps)
                seen = []
                latents_of(pipe, "fox", progress=lambda done, total: seen.append(done), **steps)
                assert seen == [*range(1, 9)]
        finally:
            ended.set()
        for other in others:
            other.result()


def test_a_progress_that_draws_with_a_progress_is_refused(pipe):
    with pytest.raises(ValueError, match="leave the inner one out"):
        pipe("fox", progress=lambda done, total: pipe("pear", progress=print))


def test_a_progress_that_cannot_be_called_is_refused_before_anything_is_compiled(pipe, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users call it
    monkeypatch.setattr(pipe, "programs", None)
    with pytest.raises(ValueError, match="progress=3 cannot be called"):
        pipe("fox", progress=3)


def test_another_progress_is_not_another_program(pipe):
    first, second = [], []
    latents_of(pipe, "fox", progress=lambda *step: first.append(step))
    programs = len(pipe.programs)
    latents_of(pipe, "pear", progress=lambda *step: second.append(step))
    assert len(pipe.programs) == programs
    assert first == second == [(1, 3), (2, 3), (3, 3)]


def test_an_instruction_before_the_prompt_changes_the_picture_and_not_the_number_of_features(pipe):
    defaults = dataclasses.replace(tiny_parts().defaults, complex_human_instruction=("the quick fox", "apple: "))
    instructed = SanaPipeline(tiny_parts()._replace(defaults=defaults))
    changed = latents_of(instructed, "a red apple")
    assert changed.shape == (1, 4, 4, 8)
    assert np.abs(changed - latents_of(pipe, "a red apple")).max() > 1e-4


@pytest.fixture(scope="module")
def instructed():
    defaults = dataclasses.replace(tiny_parts().defaults, complex_human_instruction=("the quick fox is", "apple: "))
    return SanaPipeline(tiny_parts()._replace(defaults=defaults))


def remembered(pipe, name):
    """What the text cache holds as the result of the program of this name."""
    return pipe._text_cache._known[1][name][-1]


def test_the_instruction_encoded_once_changes_no_picture(instructed, monkeypatch):
    """Prompts of several lengths, one of them longer than the text window."""
    prompts = ["a", "a red apple on a blue background, a green pear, glossy"]
    cached = latents_of(instructed, prompts)
    prefix = remembered(instructed, "encode_prefix")
    assert prefix.hidden.shape[1] > 5
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "constant_tokens", lambda *args: 0)
        plain = latents_of(instructed, prompts)
    np.testing.assert_allclose(cached, plain, rtol=1e-5, atol=1e-5)
    latents_of(instructed, ["pear", "fox"])
    assert remembered(instructed, "encode_prefix") is prefix


def test_negative_prompts_are_encoded_once_and_others_anew(pipe):
    """A new pipeline that has seen no other negative prompt draws the same."""
    plain = latents_of(pipe, "fox")
    null = remembered(pipe, "encode_text")
    latents_of(pipe, "a red apple", guidance_scale=3.0)
    assert remembered(pipe, "encode_text") is null
    negative = latents_of(pipe, "fox", negative_prompt="a green pear")
    assert remembered(pipe, "encode_text") is not null
    assert np.abs(negative - plain).max() > 1e-4
    np.testing.assert_array_equal(latents_of(pipe, "fox"), plain)
    np.testing.assert_array_equal(
        latents_of(SanaPipeline(tiny_parts()), "fox", negative_prompt="a green pear"), negative
    )


def test_new_weights_or_another_instruction_are_encoded_anew(instructed):
    before = latents_of(instructed, "a red apple")
    params = instructed.params["text_encoder"]
    instructed.params["text_encoder"] = jax.tree.map(lambda x: 1.1 * x, params)
    changed = latents_of(instructed, "a red apple")
    fresh = SanaPipeline(tiny_parts()._replace(defaults=instructed.defaults))
    fresh.params["text_encoder"] = instructed.params["text_encoder"]
    np.testing.assert_array_equal(changed, latents_of(fresh, "a red apple"))
    instructed.params["text_encoder"] = params
    np.testing.assert_array_equal(latents_of(instructed, "a red apple"), before)
    other = latents_of(instructed, "a red apple", complex_human_instruction=["the quick fox it", "apple: "])
    assert np.abs(other - before).max() > 1e-4


def test_instruction_and_lower_case_are_arguments(pipe, instructed):
    lines = ["the quick fox is", "apple: "]
    given = latents_of(pipe, "A Red Apple", complex_human_instruction=lines)
    np.testing.assert_array_equal(given, latents_of(instructed, "a red apple"))
    assert (
        np.abs(latents_of(pipe, "A Red Apple", complex_human_instruction=lines, lower_case=False) - given).max() > 1e-4
    )
    plain = latents_of(instructed, "a red apple", complex_human_instruction=None)
    np.testing.assert_array_equal(plain, latents_of(pipe, "a red apple"))


def test_a_saved_pipeline_draws_the_same_picture(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = SanaPipeline.from_pretrained(tmp_path)
    np.testing.assert_array_equal(latents_of(again, "a red apple"), latents_of(pipe, "a red apple"))


def test_bfloat16_gives_nearly_the_same_picture(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = SanaPipeline.from_pretrained(tmp_path, dtype="bfloat16")
    assert half.transformer.config.dtype == "bfloat16"
    ours, exact = latents_of(half, "a red apple"), latents_of(pipe, "a red apple")
    assert ours.dtype == np.float32
    assert np.abs(ours - exact).mean() < 0.05 * np.abs(exact).mean()


def test_the_float16_clamp_is_a_switch_of_from_pretrained(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert SanaPipeline.from_pretrained(tmp_path, clamp_fp16=True).transformer.config.clamp_fp16
    assert not SanaPipeline.from_pretrained(tmp_path).transformer.config.clamp_fp16


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(prompt=""), "the prompt is empty"),
        (dict(prompt=["fox", "  "]), "prompt 2 of 2 is empty"),
        (dict(prompt=[]), "no prompt is given"),
        (dict(height=18), "height 18 is not a positive multiple of 4; use 16 or 20"),
        (dict(width=0), "width 0 is not a positive multiple of 4; use 4"),
        (dict(num_inference_steps=0), "steps 0: at least 1"),
        (dict(guidance_scale=-1.0), "guidance -1.0 is not a number of at least 0"),
        (dict(guidance_scale=float("nan")), "guidance nan"),
        (dict(guidance_scale=float("inf")), "guidance inf"),
        (dict(num_images_per_prompt=0), "number of images 0"),
        (dict(seed=-1), "seed -1"),
        (dict(complex_human_instruction="native"), "complex_human_instruction='native' is not one of diffusers"),
        (dict(pag_scale=-1.0), "pag_scale=-1.0 is not"),
        (dict(pag_scale=1.0, pag_layers=(2,)), r"pag_layers=\(2,\): name at least one of this model's blocks, 0 to 1"),
        (dict(use_resolution_binning=True), "this one has sample_size 4 and factor 4"),
        (dict(output_type="jpg"), "output_type='jpg' is not one of pil, np, latent"),
        (dict(solver="ddim"), "solver='ddim' is not one of flow_dpm, flow_euler"),
        (dict(guidance_interval=(0.8, 0.2)), r"guidance_interval=\(0.8, 0.2\) is empty"),
        (dict(negative_prompt=["a", "b"]), "2 negative prompts for 1 prompts"),
        (dict(latents=np.zeros((1, 8, 4, 4), np.float32)), r"latents have the shape \(1, 8, 4, 4\)"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named_before_anything_is_compiled(pipe, arguments, message, monkeypatch):
    monkeypatch.setattr(pipe, "programs", None)
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "fox", **arguments})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompt=b"abc"), "prompt=b'abc' is not a text, nor a list"),
        (dict(prompt=["fox", None]), "prompt=.'fox', None. is not a text, nor a list"),
        (dict(prompt=None), "prompt=None is not a text"),
        (dict(negative_prompt=3), "negative_prompt=3 is not a text"),
        (
            dict(prompt=json.loads(r'"\ud83d cat"')),
            r"^prompt='.ud83d cat' is not Unicode text: its character 0 is the surr",
        ),
        (
            dict(prompt=["fox", "a \udce9"]),
            r"^prompt\[1\]='a .udce9' is not Unicode text: its character 2 is the surrogate",
        ),
        (dict(negative_prompt="\udce9"), r"^negative_prompt='.udce9' is not Unicode text"),
        (dict(complex_human_instruction=5), "complex_human_instruction=5 is not a text, nor a list"),
        (dict(complex_human_instruction=["a", 1]), r"complex_human_instruction=\['a', 1\] is not a text, nor a list"),
        (dict(timesteps=1.5), "timesteps=1.5 is not a sequence of numbers"),
        (dict(seed=range(2)), "2 seeds for 1 pictures: give one for all, or one for each"),
        (dict(seed=None), "seed=None is not a whole number"),
        (dict(seed=[1, 2]), "2 seeds for 1 pictures: give one for all, or one for each"),
        (dict(seed=[1.5]), r"seed\[0\]=1.5 is not a whole number"),
        (dict(seed=[-1]), "seed -1 is not in"),
        (dict(seed=3.5), "seed=3.5 is not a whole number"),
        (dict(num_images_per_prompt=1.0), "num_images_per_prompt=1.0 is not a whole number"),
        (dict(num_inference_steps=2.5), "num_inference_steps=2.5 is not a whole number"),
        (dict(guidance_scale=[1, 2]), "guidance_scale=.1, 2. is not a number"),
        (dict(guidance_scale="4"), "guidance_scale='4' is not a number"),
        (dict(height="96"), "height='96' is not a whole number"),
        (dict(width=96.0), "width=96.0 is not a whole number"),
        (dict(pag_scale="3"), "pag_scale='3' is not a number"),
        (dict(pag_scale=1.0, pag_layers=2), "pag_layers=2 is not a sequence of whole numbers"),
        (dict(pag_scale=1.0, pag_layers=(0.5,)), r"pag_layers\[0\]=0.5 is not a whole number"),
        (dict(guidance_interval=0.5), "guidance_interval=0.5 is not a pair"),
        (dict(guidance_interval=(0.5, "1")), r"guidance_interval\[1\]='1' is not a number"),
        (dict(autoencoder_tiles=32), "autoencoder_tiles=32 is not a pair"),
        (dict(decode_strips="2"), "decode_strips='2' is not a whole number"),
        (dict(strength="0.5"), "strength='0.5' is not a number"),
    ],
)
def test_an_argument_of_another_kind_is_named_before_anything_is_compiled(pipe, changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(pipe, "programs", None)
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "fox", **changes})


def test_a_mesh_that_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="mesh='data=2' is not a mesh"):
        SanaPipeline.from_pretrained(mesh="data=2")


def test_numbers_of_numpy_are_those_of_python_and_no_negative_prompt_is_the_empty_one(pipe, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    numbers = dict(height=16, width=16, num_inference_steps=3, seed=5, num_images_per_prompt=1)
    plain = latents_of(pipe, "a red apple", **numbers)
    count = len(pipe.programs)
    theirs = {name: np.int64(value) for name, value in numbers.items()}
    found = latents_of(pipe, "a red apple", None, guidance_scale=np.float32(4.5), **theirs)
    np.testing.assert_array_equal(found, plain)
    assert len(pipe.programs) == count


def test_a_dtype_that_sana_overflows_in_is_refused(tmp_path):
    with pytest.raises(ValueError, match="float16 overflows"):
        SanaPipeline.from_pretrained(tmp_path, dtype="float16")


def test_a_picture_that_memory_does_not_suffice_for_is_an_error(pipe, monkeypatch):
    """And does not abort the process, as a copy of a result does that failed after its call had returned."""
    busy = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, y: y @ y / 500, x))
    huge = jax.jit(lambda x: program.Drawn(jnp.broadcast_to(x[0, 0], (10**7, 10**7)) + jnp.arange(1e7), x[0, :1] > 0))
    monkeypatch.setattr(pipe, "_run", lambda *_: huge(busy(jnp.ones((500, 500)))))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        pipe("fox")
