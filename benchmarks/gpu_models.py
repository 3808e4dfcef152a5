"""The card's ceilings, and public sizes with random weights on it, for `gpu_session.py`: what a user waits for, part by part."""

import dataclasses
import functools
import re
import statistics
import time

# Model -> its preset, side of the latents, pictures of a step.
TRAINED = {"1.6B at 1024": ("sana_1600m", 32, 16), "0.6B at 512": ("sana_600m", 16, 64)}
QUEUES, QUEUED = 7, 10


def measure_ceilings(report, tiny: bool, only: str = "") -> None:
    """A large product, and a large array read and written."""
    import jax
    import jax.numpy as jnp

    side = 512 if tiny else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product, copy = f"matrix product {side}, bf16", "read and write, bf16"
    if re.search(only, product):
        seconds, _ = timed(functools.partial(jax.jit(lambda x: x @ x), a))
        report.add(name=product, seconds=seconds, tflops=2 * side**3 / seconds / 1e12)
    if re.search(only, copy):
        add = jax.jit(lambda x: x + 1)
        jax.block_until_ready(add(a))
        seconds = median_of_queues(lambda: add(a), jax.block_until_ready)
        report.add(name=copy, seconds=seconds, gigabytes_per_second=4 * side**2 / seconds / 1e9)


def measure_all(report, tiny: bool) -> None:
    """What a user waits for, part by part."""
    from sana_jax.models import presets

    sizes = [(presets.sana_600m(16), 512), (presets.sana_600m(32), 1024), (presets.sana_1600m(32), 1024)]
    for config, pixels in sizes:
        config = dataclasses.replace(config, dtype="bfloat16", **shrunk(tiny))
        guarded(report, f"transformer {pixels}", functools.partial(measure_transformer, config, pixels, report))
    for pixels in (512, 1024):
        guarded(report, f"DC-AE {pixels}", functools.partial(measure_autoencoder, pixels, tiny, report))
    for model in TRAINED:
        guarded(report, f"training step of {model}", functools.partial(measure_step, model, tiny, report))


def shrunk(tiny: bool) -> dict:
    return {"num_layers": 2, "width": 224, "num_cross_attention_heads": 7} if tiny else {}


def guarded(report, name, run):
    """One measurement that fails (memory, a compiler's bug) must not cost the session the others."""
    try:
        run()
    except Exception as error:  # noqa: BLE001 - reported as the result
        report.add(name=name, error=f"{type(error).__name__}: {error}"[:2000])


def measure_transformer(config, pixels, report):
    """One guided evaluation (batch 2, 300 text tokens), and a trajectory of 20 Flow-DPM steps."""
    import jax
    import jax.numpy as jnp

    from sana_jax.diffusion import guidance, solvers
    from sana_jax.models import layers
    from sana_jax.models.transformer import SanaTransformer

    module, side = SanaTransformer(config), pixels // 32
    latents, text = random_inputs(config, 2, side)
    params = random_parameters(module, jnp.bfloat16, latents, jnp.zeros(2), *text)
    params = layers.take_apart(params)  # as the sampler has them
    count = sum(x.size for x in jax.tree.leaves(params))
    name = f"transformer {count / 1e6:,.0f}M at {pixels}, bf16"
    forward = jax.jit(lambda params, x, *text: module.apply({"params": params}, x, jnp.full(2, 500.0), *text))
    seconds, compilation = timed(functools.partial(forward, params, latents, *text))
    report.add(name=f"{name}: forward, batch 2", seconds=seconds, compilation_seconds=compilation)

    @jax.jit
    def draw(params, noise, features, mask):
        velocity = guidance.classifier_free_guidance(
            lambda x, t, condition: module.apply({"params": params}, x, t, *condition),
            (features[:1], mask[:1]),
            (features[1:], mask[1:]),
            4.5,
        )
        return solvers.sample(velocity, noise, solvers.flow_dpm(20, 3.0))

    seconds, compilation = timed(functools.partial(draw, params, latents[:1], *text))
    report.add(name=f"{name}: 20 guided steps, one picture", seconds=seconds, compilation_seconds=compilation)


def measure_autoencoder(pixels, tiny, report):
    import jax
    import jax.numpy as jnp

    from sana_jax.models import presets
    from sana_jax.models.autoencoder import Autoencoder

    widths = {f"{side}_block_out_channels": (32, 32, 32, 32, 64, 64) for side in ("encoder", "decoder")} if tiny else {}
    config = dataclasses.replace(presets.dc_ae_f32c32_sana_1_1(), dtype="bfloat16", **widths)
    module, key = Autoencoder(config), jax.random.key(2)  # random inputs: zeros can run faster
    images = jax.random.normal(key, (1, pixels, pixels, 3))
    params = random_parameters(module, jnp.bfloat16, images)
    for method, x in (("encode", images), ("decode", jax.random.normal(key, (1, pixels // 32, pixels // 32, 32)))):
        run = jax.jit(lambda params, x, method=method: module.apply({"params": params}, x, method=method))
        seconds, compilation = timed(functools.partial(run, params, x))
        memory = run.lower(params, x).compile().memory_analysis().temp_size_in_bytes / 2**30
        name = f"DC-AE f32c32 {method} at {pixels}, bf16"
        report.add(name=name, seconds=seconds, compilation_seconds=compilation, temporary_gib=memory)


def measure_step(model, tiny, report):
    """The training step of the published recipe on given latents and text features: loss, gradients, CAME."""
    import jax
    import jax.numpy as jnp
    import optax

    from configs import base
    from sana_jax.diffusion import flow
    from sana_jax.models.transformer import SanaTransformer
    from sana_jax.training.optimizers.recipe import make_optimizer

    config, batch = trained(model, tiny, dtype="bfloat16", remat="minimal")
    recipe = base.get_config().optimizer
    recipe.name, recipe.betas = "came", (0.9, 0.999, 0.9999)
    module, (tx, _) = SanaTransformer(config), make_optimizer(recipe, 1000)
    latents, text = random_inputs(config, batch, config.sample_size)
    params = random_parameters(module, jnp.float32, latents[:1], jnp.zeros(1), text[0][:1], text[1][:1])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key):
        def loss(params):
            key_sigma, key_noise = jax.random.split(key)
            sigma, timesteps = flow.sample_sigmas(jax.random.split(key_sigma, batch), 3.0)
            noise = jax.random.normal(key_noise, latents.shape)
            velocity = module.apply({"params": params}, flow.interpolate(latents, noise, sigma), timesteps, *text)
            return jnp.mean(flow.flow_loss(velocity, latents, noise))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, key, times = jax.jit(tx.init)(params), jax.random.key(0), []
    for _ in range(8):
        began = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, key))
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[2:])
    report.add(
        name=f"sana_jax: training step of {model}, bf16, CAME, remat {config.remat}, batch {batch}",
        seconds=seconds,
        images_per_second=batch / seconds,
        compilation_seconds=times[0],
    )


def trained(model: str, tiny: bool, **fields):
    """(transformer's config, pictures of a step) of one of TRAINED."""
    from sana_jax.models import presets

    preset, side, batch = TRAINED[model]
    return getattr(presets, preset)(side, **fields, **shrunk(tiny)), 4 if tiny else batch


def random_inputs(config, batch, side):
    """Latents, and text features with their mask; random, because ones and zeros can run faster than real data."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(2))
    latents = jax.random.normal(keys[0], (batch, side, side, config.in_channels))
    features = jax.random.normal(keys[1], (batch, 300, config.caption_channels), jnp.bfloat16)
    return latents, (features, jnp.ones((batch, 300), jnp.int32))


def random_parameters(module, dtype, *example):
    """Random values in the parameters' shapes: initialising a large model itself would take longer than timing it."""
    import jax

    shapes = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=1)
    return tree.unflatten([draw(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])


def timed(call, repeats: int = 7) -> tuple[float, float]:
    """(median seconds of a call, seconds of the first call, which compiles)."""
    import jax

    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]), times[0]


def median_of_queues(call, wait) -> float:
    """Seconds of a call, many of which are queued before the host waits: its own time does not count."""
    times = []
    for _ in range(QUEUES):
        began = time.perf_counter()
        for _ in range(QUEUED):
            last = call()
        wait(last)
        times.append((time.perf_counter() - began) / QUEUED)
    return statistics.median(times[1:])
