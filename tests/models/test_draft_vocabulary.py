"""Outputs of a draft vocabulary and the tokens that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np

from models.heads import vocabulary


def test_outputs_and_tokens_are_each_others_inverse() -> None:
    known = jnp.array([0, 3, 4, 9])

    @jax.jit
    def run(tokens):
        outputs = vocabulary.outputs_of(known, tokens)
        return outputs, vocabulary.tokens_of(known, outputs)

    outputs, tokens = run(jnp.arange(12).reshape(3, 4))
    assert outputs.tolist() == [[0, -1, -1, 1], [2, -1, -1, -1], [-1, 3, -1, -1]]
    assert np.asarray(tokens)[np.asarray(outputs) >= 0].tolist() == known.tolist()
    assert vocabulary.outputs_of(None, tokens) is tokens and vocabulary.tokens_of(None, outputs) is outputs
