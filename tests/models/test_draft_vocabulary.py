"""Outputs of a draft vocabulary and the tokens that they stand for; and its head, which begins as the target's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import TransformerConfig
from models.heads import vocabulary
from tests.noise import drawn

CONFIG = TransformerConfig(vocab_size=9, width=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4, mlp_width=4)


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


class Network(vocabulary.DraftVocabulary):
    """Of some tokens."""

    vocab_size = 5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [{}, {"logit_softcap": 2.0}, {"tied_embeddings": True, "logit_softcap": 2.0}])
def test_a_fresh_head_scores_its_tokens_as_the_target_does(shape: dict) -> None:
    """Soft caps are the target's, too."""
    config = TransformerConfig(**{**vars(CONFIG), **shape})
    target = drawn(transformer.param_shapes(config, jnp.float64), 0.7)
    hidden = 3 * np.random.default_rng(0).normal(size=(2, 3, 4))
    map_ = target["embed"]["embedding"].T if config.tied_embeddings else target["head"]["kernel"]
    scores = hidden @ np.asarray(map_)[:, :5]
    if shape:
        scores = 2 * np.tanh(scores / 2)
    params = vocabulary.init(5, target)
    np.testing.assert_allclose(Network().logits(config, params, target, jnp.asarray(hidden)), scores, atol=1e-12)
    assert Network().vocabulary(params).tolist() == [*range(5)] and np.abs(scores).max() > 1.5
