"""The classifier: what its features are, that it learns, and that its directory reads back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.errors import UserError
from models.formats import image_models as files
from models.images import classifier
from models.images.classifier import ClassifierConfig
from tests.noise import drawn

CONFIG = ClassifierConfig(num_classes=3, image_size=8, width=4, multipliers=(1, 2))


forward = jax.jit(classifier.forward, static_argnums=0)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, 8, 8, 3)).astype(np.float32)


def test_scores_are_linear_in_the_pooled_features() -> None:
    params = drawn(classifier.param_shapes(CONFIG), 0.3)
    features, scores = forward(CONFIG, params, images(5))
    assert features.shape == (5, CONFIG.features) == (5, 8) and scores.shape == (5, 3)
    head = params["classes"]
    expected = np.asarray(features) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    alone = forward(CONFIG, params, images(5)[2:3])
    np.testing.assert_allclose(alone[0][0], features[2], atol=1e-5)


def test_narrow_parameters_give_wide_results() -> None:
    params = classifier.param_shapes(CONFIG, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    results = jax.eval_shape(lambda p: classifier.forward(CONFIG, p, jnp.array(images(2))), params)
    assert [x.dtype for x in results] == [jnp.float32] * 2


def test_learns_which_channel_is_bright() -> None:
    labels = np.arange(30) % 3
    pixels = images(30) * 0.3 + np.eye(3, dtype=np.float32)[labels][:, None, None, :] * 0.5
    rule = optax.adam(1e-2)

    def loss(params):
        _, scores = classifier.forward(CONFIG, params, jnp.asarray(pixels))
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    @jax.jit
    def step(params, state):
        value, slope = jax.value_and_grad(loss)(params)
        updates, state = rule.update(slope, state)
        return optax.apply_updates(params, updates), state, value

    params = jax.jit(classifier.init, static_argnums=0)(CONFIG, jax.random.key(1))
    state, losses = jax.jit(rule.init)(params), []
    for _ in range(31):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.2 * losses[0]
    assert (np.argmax(forward(CONFIG, params, pixels)[1], axis=-1) == labels).mean() > 0.9


def test_reads_what_was_written(tmp_path) -> None:
    params = drawn(classifier.param_shapes(CONFIG), 0.3)
    files.save(tmp_path / "classifier", CONFIG, params)
    config, read = files.load(tmp_path / "classifier", ClassifierConfig)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"image_size": 10}, "image_size must be a multiple of 4, got 10"),
        ({"multipliers": ()}, "multipliers must be one or more"),
    ],
)
def test_sizes_that_cannot_be(change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClassifierConfig(**{"num_classes": 3, "image_size": 8, "multipliers": (1, 2), **change})
