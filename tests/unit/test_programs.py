"""Compiled programs in files: found again, and refused where they are of something else."""

import dataclasses
import functools
import json
import logging
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_pipeline import compilation_cache_off, tiny_binned_parts, tiny_parts, tiny_sprint_parts

from sana_jax import SanaPipeline
from sana_jax.models.transformer import SanaTransformer
from sana_jax.parallel.mesh import make_mesh
from sana_jax.sampling import compiled, program
from sana_jax.sampling.cover_crop import cover_and_crop
from sana_jax.weights import folder
from sana_jax.weights.reading import Reading


@pytest.fixture(scope="module", autouse=True)
def no_compilation_cache():
    """What comes out of the tests' compilation cache cannot be saved."""
    with compilation_cache_off():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of executables, the picture that was drawn with them)."""
    pipe = SanaPipeline(tiny_parts())
    picture = draw(pipe)
    pipe("fox", progress=lambda done, steps: None)  # which no file can hold
    path = tmp_path_factory.mktemp("executables")
    assert len(pipe.programs.save(path)) == 2
    return path, picture


def executable(folder, function="draw"):
    """The file in a folder whose program is of this function."""
    (file,) = [
        file for file in folder.iterdir() if json.loads(file.open("rb").readline())["call"]["function"] == function
    ]
    return file


def draw(pipe, prompt="a red apple", **arguments):
    return pipe(prompt, output_type="np", **arguments)


def no_lowering(monkeypatch):
    def refusing(function):
        @functools.wraps(function)
        def refuse(*args, **kwargs):
            raise AssertionError(f"{function.__name__} is compiled")

        return refuse

    for name in ("draw", "fit", "encode_text", "encode_prefix"):
        monkeypatch.setattr(program, name, refusing(getattr(program, name)))


@pytest.fixture
def cheap(monkeypatch):
    """Programs that are compiled in no time, and draw black pictures."""

    def draw(modules, params, inputs, *, sampling, report):
        count, height, width, _ = inputs.noise.shape
        return program.Drawn(jnp.zeros((count, 4 * height, 4 * width, 3)), jnp.ones(count, bool))

    monkeypatch.setattr(program, "draw", draw)


@pytest.fixture
def two_at_once(monkeypatch):
    """(pipe, a function that draws it twice at the same time and gives both futures, what is done while that compiles)."""
    pipe = SanaPipeline(tiny_parts())
    draw(pipe, num_inference_steps=1)  # the text encoder's program
    compile_it, arrived, while_compiling = pipe.programs.compile, threading.Semaphore(0), []

    def arrive(function, *args, sampling=None):
        if function is program.draw and sampling.num_steps == 3:
            arrived.release()
        return compile_it(function, *args, sampling=sampling)

    def slow(modules, params, inputs, *, sampling, report):
        if sampling.num_steps == 3:
            assert arrived.acquire(timeout=20) and arrived.acquire(timeout=20), "both wait for the program"
            while_compiling.pop()()
        return program.Drawn(jnp.zeros((1, 16, 16, 3)), jnp.ones(1, bool))

    def draw_twice():
        with ThreadPoolExecutor(2) as pool:
            return [pool.submit(draw, pipe) for _ in range(2)]

    monkeypatch.setattr(pipe.programs, "compile", arrive)
    monkeypatch.setattr(program, "draw", slow)
    return pipe, draw_twice, while_compiling


def test_two_threads_that_make_the_same_first_call_compile_it_once_and_hold_up_no_other_call(two_at_once):
    pipe, draw_twice, while_compiling = two_at_once

    def draw_another():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(draw, pipe, num_inference_steps=2).result(20)

    while_compiling.append(draw_another)  # once: a second compilation finds nothing to do and fails
    for picture in draw_twice():
        assert picture.result().shape == (1, 16, 16, 3)


def test_an_error_of_a_compilation_reaches_all_who_wait_and_is_not_kept(two_at_once):
    pipe, draw_twice, while_compiling = two_at_once

    def fail():
        raise ValueError("too large")

    while_compiling.append(fail)
    for picture in draw_twice():
        with pytest.raises(ValueError, match="too large"):
            picture.result()
    while_compiling.append(lambda: None)
    draw_twice()[0].result()


def test_programs_that_were_not_used_for_longest_are_dropped(monkeypatch):
    traced = []

    def cheap_draw(modules, params, inputs, *, sampling, report):
        traced.append(sampling.num_steps)
        return program.Drawn(jnp.zeros((1, 16, 16, 3)), jnp.ones(1, bool))

    monkeypatch.setattr(program, "draw", cheap_draw)
    monkeypatch.setattr(compiled, "KEPT", 2)
    pipe = SanaPipeline(tiny_parts())
    for steps in (1, 2, 1, 3, 1, 2, 2):
        draw(pipe, num_inference_steps=steps)
    assert traced == [1, 2, 3, 2]
    assert len(pipe.programs) == 3, "the text encoder's program is not counted with them"


def test_another_process_draws_the_same_picture_and_compiles_nothing(saved, monkeypatch):
    path, picture = saved
    no_lowering(monkeypatch)
    pipe = SanaPipeline(tiny_parts(), executables=path)
    np.testing.assert_array_equal(draw(pipe), picture)
    assert np.abs(draw(pipe, "fox", seed=1, guidance_scale=2.0) - picture).max() > 1e-3


@pytest.mark.parametrize(
    "arguments", [{"num_inference_steps": 2}, {"height": 8}, {"guidance_scale": 1.0}, {"solver": "flow_euler"}]
)
def test_a_call_of_another_kind_is_compiled_with_a_warning_that_says_what_there_is(saved, caplog, cheap, arguments):
    pipe = SanaPipeline(tiny_parts(), executables=saved[0])
    with caplog.at_level(logging.WARNING):
        draw(pipe, **arguments)
    assert "compiling it. There are: 1 pictures of 16x16 in 3 steps (flow_dpm, guided, 12 text tokens)" in caplog.text


def test_the_warning_says_in_what_another_model_differs(saved, caplog, cheap):
    parts = tiny_parts()
    config = dataclasses.replace(parts.transformer[0].config, clamp_fp16=True)
    pipe = SanaPipeline(
        parts._replace(transformer=(SanaTransformer(config), parts.transformer[1])), executables=saved[0]
    )
    with caplog.at_level(logging.WARNING):
        draw(pipe)
    assert "The nearest differs (modules.transformer.clamp_fp16: False, here True)." in caplog.text


def test_parameters_of_another_dtype_are_another_call(saved, caplog, cheap):
    pipe = SanaPipeline(tiny_parts(), executables=saved[0])
    pipe.params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pipe.params)
    with caplog.at_level(logging.WARNING):
        draw(pipe)
    assert "compiling it" in caplog.text
    assert re.search(
        r"The nearest differs \(arrays\.\S*\['autoencoder'\]\S*: .*float32.*, here .*bfloat16", caplog.text
    )
    assert re.search(r"; and \d+ more\)", caplog.text)


@pytest.mark.parametrize("field", compiled.maker(jax.devices()[:1]))
def test_an_executable_of_another_maker_is_not_run(saved, caplog, cheap, tmp_path, field):
    file = executable(saved[0])
    header, payload = file.read_bytes().split(b"\n", 1)
    header = json.loads(header)
    header["maker"][field] = "0.0.1"
    (tmp_path / file.name).write_bytes(json.dumps(header).encode() + b"\n" + b"never read" + payload)
    pipe = SanaPipeline(tiny_parts(), executables=tmp_path)
    with caplog.at_level(logging.WARNING):
        assert not draw(pipe).any(), "it is compiled"
    assert f"made by something else ({field}: '0.0.1', here" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\x80\x81\n"])
def test_a_file_without_a_header_is_an_error_that_names_it(saved, tmp_path, content):
    file = executable(saved[0])
    (tmp_path / file.name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file.name} is no executable of sana_jax"):
        draw(SanaPipeline(tiny_parts(), executables=tmp_path))


def test_a_truncated_file_is_an_error_that_names_it(saved, tmp_path):
    file = executable(saved[0])
    content = file.read_bytes()
    (tmp_path / file.name).write_bytes(content[: content.index(b"\n") + 100])
    with pytest.raises(ValueError, match=f"{file.name} is damaged"):
        draw(SanaPipeline(tiny_parts(), executables=tmp_path))


def test_what_cannot_be_saved_is_an_error_before_a_file_is_written(tmp_path, cheap):
    pipe = SanaPipeline(tiny_parts())
    with pytest.raises(ValueError, match="there is no compiled program to write"):
        pipe.programs.save(tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="is no folder; `python -m sana_jax.export"):
        SanaPipeline(tiny_parts(), executables=tmp_path / "new")
    draw(pipe, progress=lambda done, steps: None)  # which leaves the text encoder's program alone
    with pytest.raises(ValueError, match="draw a picture first, without progress="):
        pipe.programs.save(tmp_path / "new")
    draw(pipe)
    jax.config.update("jax_enable_compilation_cache", True)
    try:
        with pytest.raises(ValueError, match="the compilation cache .* is on"):
            pipe.programs.save(tmp_path / "new")
    finally:
        jax.config.update("jax_enable_compilation_cache", False)
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    parts = tiny_parts()
    path = tmp_path_factory.mktemp("model")
    named = dict(zip(("transformer", "autoencoder", "text_encoder"), parts[:3], strict=True))
    instruction = folder.SamplingDefaults(
        complex_human_instruction=("Think of a picture:", "User Prompt: "),
        max_sequence_length=12,
        num_inference_steps=3,
    )
    folder.save_pipeline(path, tokenizer=parts.tokenizer, defaults=instruction, **named)
    return path


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16", "quantization": "int8"}])
def test_a_program_is_compiled_while_the_weights_are_still_read(model, monkeypatch, settings):
    expected = draw(SanaPipeline.from_pretrained(model, **settings))
    all_compiled, read = threading.Event(), folder.read_pipeline

    def read_late(*args, **kwargs):
        assert all_compiled.wait(60)
        return read(*args, **kwargs)

    monkeypatch.setattr(folder, "read_pipeline", read_late)
    pipe = SanaPipeline.from_pretrained(model, background=True, **settings)
    compile_it = pipe.programs.compile

    def compile_and_tell(function, *args, **kwargs):
        compiled_program = compile_it(function, *args, **kwargs)
        if function is program.draw:  # the last of them
            all_compiled.set()
        return compiled_program

    monkeypatch.setattr(pipe.programs, "compile", compile_and_tell)
    np.testing.assert_array_equal(draw(pipe), expected)
    assert len(pipe.programs) == 3, "what was compiled for the shapes is what runs"


def test_an_error_while_reading_in_the_background_is_raised_by_the_call(model, monkeypatch):
    def damaged(*args, **kwargs):
        raise ValueError("model.safetensors is damaged")

    monkeypatch.setattr(folder, "read_pipeline", damaged)
    pipe = SanaPipeline.from_pretrained(model, background=True)
    with pytest.raises(ValueError, match="is damaged"):
        draw(pipe)
    with pytest.raises(ValueError, match="is damaged"):
        _ = pipe.params


def test_shapes_of_a_background_reading_are_those_of_what_it_reads(model):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for settings in ({"mesh": mesh}, {"mesh": mesh, "quantization": "fp8"}, {"dtype": "bfloat16"}):
        pipe = SanaPipeline.from_pretrained(model, background=True, **settings)
        assert isinstance(pipe._params, Reading)
        shapes, arrays = pipe._params.shapes, pipe.params
        assert jax.tree.structure(shapes) == jax.tree.structure(arrays)
        for shape, array in zip(*map(jax.tree.leaves, (shapes, arrays)), strict=True):
            assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
            assert shape.sharding == (array.sharding if "mesh" in settings else None)


def test_executables_of_an_instruction_and_of_negative_prompts_compile_nothing(model, tmp_path, monkeypatch, caplog):
    pipe = SanaPipeline.from_pretrained(model)
    picture = draw(pipe)
    assert len(pipe.programs.save(tmp_path)) == 3
    with monkeypatch.context() as patch:
        no_lowering(patch)
        np.testing.assert_array_equal(draw(SanaPipeline.from_pretrained(model, executables=tmp_path)), picture)
    executable(tmp_path, "encode_prefix").unlink()
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(draw(SanaPipeline.from_pretrained(model, executables=tmp_path)), picture)
    assert re.search(r"no executable for an instruction of \d+ tokens; compiling it. There are: none", caplog.text)


def test_sprint_and_a_mesh_have_executables_too(tmp_path, monkeypatch):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    pipe = SanaPipeline(tiny_sprint_parts(), mesh)
    picture = draw(pipe)
    pipe.programs.save(tmp_path)
    no_lowering(monkeypatch)
    np.testing.assert_array_equal(draw(SanaPipeline(tiny_sprint_parts(), mesh, tmp_path)), picture)


def test_sizes_of_one_bucket_share_the_large_program(monkeypatch):
    traced, whole = [], program.draw

    def draw_and_tell(modules, params, inputs, **kwargs):
        traced.append(inputs.noise.shape[1:3])
        return whole(modules, params, inputs, **kwargs)

    monkeypatch.setattr(program, "draw", draw_and_tell)
    pipe = SanaPipeline(tiny_binned_parts())
    for size in ((300, 300), (301, 299), (600, 610)):
        assert draw(pipe, height=size[0], width=size[1], num_inference_steps=1).shape == (1, *size, 3)
    assert pipe("fox", height=79, width=80, num_inference_steps=1)[0].size == (80, 79)
    assert traced == [(16, 16)]
    latents = pipe("fox", height=79, width=80, num_inference_steps=1, output_type="latent")
    exact = pipe("fox", height=512, width=512, num_inference_steps=1, output_type="latent")
    np.testing.assert_array_equal(latents, exact)
    assert len(traced) == 2, "latents know no size"


def test_a_picture_of_another_size_than_its_bucket_is_the_decoded_one_cropped():
    pipe, arguments = SanaPipeline(tiny_binned_parts()), dict(height=301, width=499, num_inference_steps=1)
    module, params = tiny_binned_parts().autoencoder
    latents = pipe("fox", output_type="latent", **arguments) / module.config.scaling_factor
    decoded = jax.jit(lambda params, x: module.apply({"params": params}, x, method="decode"))(params, latents)
    assert np.abs(decoded).max() > 1, "clipped before it is cropped it would be another picture"
    expected = np.clip(np.asarray(cover_and_crop(decoded, 301, 499)) / 2 + 0.5, 0, 1)
    array, pil = (pipe("fox", output_type=kind, **arguments) for kind in ("np", "pil"))
    np.testing.assert_allclose(array, expected, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(pil[0]), np.rint(255 * array[0]))


@pytest.mark.parametrize("meshed", [False, True])
def test_executables_of_a_size_that_is_no_bucket_compile_nothing(tmp_path, monkeypatch, caplog, meshed):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1]) if meshed else None
    pipe, arguments = SanaPipeline(tiny_binned_parts(), mesh), dict(height=305, width=310, num_inference_steps=1)
    picture = draw(pipe, **arguments)
    assert len(pipe.programs.save(tmp_path)) == 3
    again = SanaPipeline(tiny_binned_parts(), mesh, tmp_path)
    with monkeypatch.context() as patch:
        no_lowering(patch)
        np.testing.assert_array_equal(draw(again, **arguments), picture)
    with caplog.at_level(logging.WARNING):
        assert draw(again, **arguments | dict(height=306)).shape == (1, 306, 310, 3)
    message = "no executable for 1 pictures of 512x512 made 306x310; compiling it. There are: 1 pictures of 512x512 made 305x310"
    assert message in caplog.text
