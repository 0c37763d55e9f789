"""The shift and mask contract, read off a table written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.objectives.shift import ahead, label_mask, labels_at, log_likelihood

# Two documents and padding; of the second only its last two tokens are an assistant's.
TOKENS = [[10, 11, 12, 13, 20, 21, 22, 23, 0, 0]]
SEGMENTS = [[1, 1, 1, 1, 2, 2, 2, 2, 0, 0]]
MASK = [[0, 1, 1, 1, 0, 0, 1, 1, 0, 0]]
BATCH = {"tokens": jnp.array(TOKENS), "segments": jnp.array(SEGMENTS), "mask": jnp.array(MASK, jnp.uint8)}

# distance -> the label that each position answers for, 0 where it answers for none.
GOLDEN = {
    1: [11, 12, 13, 0, 0, 22, 23, 0, 0, 0],
    2: [12, 13, 0, 0, 22, 23, 0, 0, 0, 0],
    3: [13, 0, 0, 0, 23, 0, 0, 0, 0, 0],
    4: [0] * 10,
    12: [0] * 10,
}


@pytest.mark.parametrize("distance", GOLDEN)
def test_labels_and_weights_follow_the_table(distance):
    labels, weights = labels_at(BATCH, distance)
    assert np.where(weights, labels, 0).tolist() == [GOLDEN[distance]]


def test_all_labels_take_every_token_but_padding():
    everything = {**BATCH, "mask": label_mask(BATCH, "all")}
    labels, weights = labels_at(everything, 1)
    assert np.where(weights, labels, 0).tolist() == [[11, 12, 13, 0, 21, 22, 23, 0, 0, 0]]
    assert label_mask(BATCH, "assistant").tolist() == np.array(MASK, bool).tolist()


def test_teacher_of_head_i_stands_one_before_its_label():
    # At every row that counts, the token after the teacher's position is the label: p + 1 + i, then p + 2 + i.
    for head in range(2):
        labels, weights = labels_at(BATCH, head + 2)
        next_token = ahead(BATCH["tokens"], 1)
        teacher = ahead(next_token, head + 1)
        assert bool(jnp.all((teacher == labels) | ~weights))


def test_ahead_moves_features_and_fills_with_zeros():
    features = jnp.arange(1.0, 13.0).reshape(1, 4, 3)
    assert ahead(features, 1).tolist() == [[*features[0, 1:].tolist(), [0.0, 0.0, 0.0]]]
    assert ahead(features, 0) is features


def test_log_likelihood_and_its_gradient_equal_log_softmax():
    logits = 5 * jax.random.normal(jax.random.key(0), (2, 3, 7))
    labels = jnp.array([[0, 3, 6], [2, 2, 5]])

    def reference(x):
        return jnp.take_along_axis(jax.nn.log_softmax(x), labels[..., None], axis=-1)[..., 0]

    np.testing.assert_allclose(log_likelihood(logits, labels), reference(logits), rtol=1e-5)
    ours = jax.grad(lambda x: jnp.sum(log_likelihood(x, labels)))(logits)
    theirs = jax.grad(lambda x: jnp.sum(reference(x)))(logits)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
