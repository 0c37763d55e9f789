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

CONFIG = ClassifierConfig(num_classes=3, image_size=8, width=4, multipliers=(1, 2))


def images(count: int, seed: int = 0):
    return jax.random.uniform(jax.random.key(seed), (count, 8, 8, 3), minval=-1, maxval=1)


def test_scores_are_linear_in_the_pooled_features() -> None:
    params = classifier.init(CONFIG, jax.random.key(0))
    features, scores = classifier.forward(CONFIG, params, images(5))
    assert features.shape == (5, CONFIG.features) == (5, 8) and scores.shape == (5, 3)
    head = params["classes"]
    np.testing.assert_allclose(scores, features @ head["kernel"] + head["bias"], atol=1e-5)
    alone = classifier.forward(CONFIG, params, images(5)[2:3])
    np.testing.assert_allclose(alone[0][0], features[2], atol=1e-5)


def test_narrow_parameters_give_wide_results() -> None:
    params = classifier.init(CONFIG, jax.random.key(0), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert [x.dtype for x in classifier.forward(CONFIG, params, images(2))] == [jnp.float32] * 2


def test_learns_which_channel_is_bright() -> None:
    labels = jnp.arange(30) % 3
    pixels = images(30) * 0.3 + jax.nn.one_hot(labels, 3)[:, None, None, :] * 0.5
    rule = optax.adam(1e-2)

    def loss(params):
        _, scores = classifier.forward(CONFIG, params, pixels)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    @jax.jit
    def step(params, state):
        updates, state = rule.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = classifier.init(CONFIG, jax.random.key(1))
    state = rule.init(params)
    before = loss(params)
    for _ in range(30):
        params, state = step(params, state)
    assert loss(params) < 0.2 * before
    assert (classifier.forward(CONFIG, params, pixels)[1].argmax(-1) == labels).mean() > 0.9


def test_reads_what_was_written(tmp_path) -> None:
    params = classifier.init(CONFIG, jax.random.key(0))
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
