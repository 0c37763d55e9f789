"""The VAR transformer against the NumPy reference, every tensor drawn anew: initial values would hide most mistakes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.images import var
from models.images.config import VARConfig, scale_starts
from models.transformer import stack_layers
from tests import image_reference as reference

CONFIG = VARConfig(
    depth=2, width=24, num_heads=3, num_classes=5, vocab_size=17, latent_channels=6, scales=(1, 2, 3, 4, 5)
)
CONFIGS = [CONFIG, dataclasses.replace(CONFIG, shared_modulation=True, mlp_ratio=2)]
IDS = ["per block", "shared"]
STARTS = scale_starts(CONFIG.scales)
LABELS = np.array([0, 3, 5, 2])

pytestmark = pytest.mark.usefixtures("x64")
each_config = pytest.mark.parametrize("config", CONFIGS, ids=IDS)


def model(config: VARConfig):
    with jax.enable_x64(True):
        return jax.device_put(reference.random_var(config))


def features(scales: int) -> np.ndarray:
    drawn = np.random.default_rng(3).normal(size=(len(LABELS), CONFIG.length - 1, CONFIG.latent_channels))
    return drawn[:, : STARTS[scales] - 1]


teacher_forced = jax.jit(var.teacher_forced, static_argnums=(0, 4, 5))


@each_config
@pytest.mark.parametrize("last", [1, 3, 5])
def test_teacher_forced_scores(config: VARConfig, last: int) -> None:
    expected = reference.logits(config, reference.random_var(config), LABELS, features(last))
    assert expected.std() > 0.5

    @jax.jit
    def scores(params, labels, features):
        """As a list and stacked, and from these scales' features and from more."""
        layouts, exact = (params, stack_layers(params)), features[:, : STARTS[last] - 1]
        ways = [(layout, *given) for layout in layouts for given in ((exact, 0), (features, last - 1))]
        return [var.teacher_forced(config, layout, labels, x, first, last) for layout, x, first in ways]

    for found, first in zip(scores(model(config), LABELS, features(5)), (0, last - 1) * 2, strict=True):
        np.testing.assert_allclose(found, expected[:, STARTS[first] :], rtol=0, atol=1e-11)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def cached_scores(config, first, last, params, labels, part, cache):
    """Scores of some scales after those in the cache, whose modulations are known already."""
    c = var.class_features(params, labels)
    known = var.modulations(config, params, c) if first else None
    hidden, cache = var.forward(
        config, params, c, var.inputs(config, params, c, part, first, last), first, last, cache, known
    )
    return var.logits(config, params, hidden, c), cache


@each_config
@pytest.mark.parametrize("calls", [[1, 2, 3, 4, 5], [3, 4, 5], [1, 4, 5], [5]], ids=str)
def test_cached_calls_score_like_one_forward(config: VARConfig, calls: list[int]) -> None:
    """Scale by scale, or the first ones together as a refiner reads its prefix."""
    params, labels = model(config), jnp.array(LABELS)
    expected = teacher_forced(config, params, labels, jnp.array(features(5)), 0, 5)
    cache = var.init_cache(config, len(LABELS), config.length, jnp.float64)
    first = 0
    for last in calls:
        part = jnp.array(features(5)[:, max(0, STARTS[first] - 1) : STARTS[last] - 1])
        scores, cache = cached_scores(config, first, last, params, labels, part, cache)
        np.testing.assert_allclose(scores, expected[:, STARTS[first] : STARTS[last]], rtol=0, atol=1e-11)
        assert all(not np.any(layer["k"][:, :, STARTS[last] :]) for layer in cache)
        first = last


def test_stochastic_depth_leaves_out_halves_of_blocks() -> None:
    """A batch row of which everything is dropped keeps what it read; a factor of 1 changes nothing."""
    keep = np.ones((CONFIG.depth, 2, len(LABELS)))
    keep[:, :, 1] = 0.0

    @jax.jit
    def run(params, features, keep):
        c = var.class_features(params, jnp.array(LABELS))
        x = var.inputs(CONFIG, params, c, features, 0, 2)
        ways = ((params, None), (params, keep), (stack_layers(params), keep))
        return x, *(var.forward(CONFIG, layout, c, x, 0, 2, keep=kept)[0] for layout, kept in ways)

    x, whole, *dropped = map(np.asarray, run(model(CONFIG), features(2), keep))
    for found in dropped:
        np.testing.assert_allclose(found[1], x[1], atol=1e-12)
        np.testing.assert_allclose(found[[0, 2, 3]], whole[[0, 2, 3]], atol=1e-12)
    assert np.abs(whole[1] - x[1]).max() > 1e-3


def test_narrow_kernels_keep_a_wide_stream() -> None:
    params = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), reference.random_var(CONFIG)))
    scores = teacher_forced(CONFIG, params, jnp.array(LABELS), jnp.array(features(5), jnp.bfloat16), 0, 5)
    exact = teacher_forced(CONFIG, model(CONFIG), jnp.array(LABELS), jnp.array(features(5)), 0, 5)
    assert scores.dtype == jnp.float32
    assert float(jnp.abs(scores - exact).mean()) < 0.1 * float(exact.std())


@each_config
def test_initial_values_follow_the_published_scheme(config: VARConfig) -> None:
    config = dataclasses.replace(config, width=96, depth=2)
    params = jax.jit(functools.partial(var.init, config, gate=0.01))(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, var.param_shapes(config))
    std = (3 * config.width) ** -0.5
    layer, branch = params["layers"][1], (2 * config.depth) ** -0.5
    factors = {1.0: layer["attention"]["qkv"], branch: layer["attention"]["out"], 0.02: params["head"]["vocab"]}
    for factor, dense in factors.items():
        assert float(np.std(dense["kernel"])) == pytest.approx(factor * std, rel=0.05)
    made = layer["modulation"]
    rows = made["offset"].T if config.shared_modulation else made["kernel"]
    halves = np.split(np.asarray(rows), [2 * rows.shape[1] // 6], axis=1)
    # Offsets have the std of an embedding, maps that of kernels.
    unit = config.width**-0.5 if config.shared_modulation else std
    assert [float(np.std(half)) for half in halves] == pytest.approx([0.01 * unit, 0.5 * unit], rel=0.15)
    if config.shared_modulation:
        assert float(np.std(params["modulation"]["kernel"])) == pytest.approx(std, rel=0.05)
    assert float(jnp.exp(layer["attention"]["log_scale"][0])) == pytest.approx(4)
