"""Whole training runs on pictures of several aspect ratios."""

import jax
import numpy as np
import pytest
import tiny_run

from sana_jax.training import loop
from sana_jax.training.text_to_image import check_sizes

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def pictures_of_three_shapes(tmp_path_factory):
    """A set of 21 squares, 12 wide and 9 tall photographs."""
    path = tmp_path_factory.mktemp("data") / "photographs"
    tiny_run.write_photographs(path, [(20, 20)] * 21 + [(18, 30)] * 12 + [(40, 24)] * 9)
    return path


def test_a_run_trains_on_pictures_of_several_aspect_ratios_and_goes_on_bit_for_bit(
    config, pictures_of_three_shapes, tmp_path, monkeypatch
):
    config.data.update(path=str(pictures_of_three_shapes), aspect_ratios=(0.6, 1.0))
    config.train.update(cache_latents=True, num_steps=6, sample_every=0)
    sizes = {(3, 5), (4, 4)}
    seen, compiled, put_batch = [], [], loop.sharding.put_batch
    monkeypatch.setattr(
        loop.sharding,
        "put_batch",
        lambda batch, *rest: seen.append(batch["latents"].shape[1:3]) or put_batch(batch, *rest),
    )
    make_program = loop.make_program

    def counted(*args):
        program = make_program(*args)

        class Step:
            def lower(self, state, frozen, batch):
                compiled.append(batch["latents"].shape[1:3])
                return program.step.lower(state, frozen, batch)

            def __call__(self, *arrays):
                assert set(compiled) == sizes, "all are compiled before the first step"
                return program.step(*arrays)

        return program._replace(step=Step())

    monkeypatch.setattr(loop, "make_program", counted)
    whole = loop.train(config, str(tmp_path / "whole"))
    assert set(seen[:6]) == sizes

    config.train.num_steps = 2
    loop.train(config, str(tmp_path / "parts"))
    config.train.num_steps = 6
    resumed = loop.train(config, str(tmp_path / "parts"))
    assert tiny_run.losses(tmp_path / "parts") == tiny_run.losses(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


def test_the_autoencoder_trains_on_pictures_of_several_aspect_ratios(pictures_of_three_shapes, tmp_path):
    config = tiny_run.config(pictures_of_three_shapes)
    config.data.aspect_ratios = (0.78, 1.0)
    with pytest.raises(ValueError, match="14x18 pixels, and 4 .the autoencoder's factor. does not divide both"):
        loop.train(config, str(tmp_path))
    config.data.aspect_ratios = (0.6, 1.0, 1.67)
    config.train.update(num_steps=3, sample_every=0)
    config.gan.weight = 0.1
    loop.train(config, str(tmp_path))
    assert len(tiny_run.losses(tmp_path)) == 3


@pytest.mark.parametrize(
    "ratios, seq, message",
    [
        ((0.61,), 1, r"aspect_ratios has 0.61, .* The nearest are 0.57 and 0.6; all are in"),
        ((), 1, r"aspect_ratios=\(\) leaves no picture. Use \(1.0,\)"),
        ((0.78,), 1, r"0.78, which at data.image_size=16 is 14x18 pixels, and 4 .* does not divide both. Leave this"),
        ((0.6, 1.0), 2, r"mesh.seq=2 does not divide the 3 rows .* Use mesh.seq=1. Or leave 0.6 out of .*12x20 pixels"),
    ],
)
def test_aspect_ratios_that_do_not_fit_are_an_error_with_the_fix(config, tmp_path, ratios, seq, message):
    config.train.cache_latents = True
    config.data.aspect_ratios = ratios
    config.mesh.seq = seq
    with pytest.raises(ValueError, match=message):
        check_sizes(config, tiny_run.TRANSFORMER, tiny_run.AUTOENCODER)
    if seq == 1:
        with pytest.raises(ValueError, match=message):
            loop.train(config, str(tmp_path))
        assert not (tmp_path / "latents").exists()
