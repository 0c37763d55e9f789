"""P-EAGLE's drafter where the battery does not look: a chain drawn from what one pass says of every depth."""

import jax
import jax.numpy as jnp
import pytest

from decoding.drafters.p_eagle import PEagle
from decoding.policies import Static
from decoding.sampling import Sampling
from decoding.trees import chain
from eval.losslessness import check_losslessness, tiny_target
from models.heads.p_eagle import PEagleHeads
from tests.noise import drawn


@pytest.mark.usefixtures("x64")
def test_drawn_chains_follow_the_target() -> None:
    """Of five tokens three are scored: q is 0 elsewhere, and a depth's does not know the token before it."""
    target, heads = tiny_target(5, dtype=jnp.float64), PEagleHeads(0, 1, 1, vocab_size=3, num_layers=2)
    shapes = jax.eval_shape(lambda: heads.init(target.config, target.params, jax.random.key(0)))
    params = {**drawn(shapes, 0.5), "draft_vocab": jnp.array([0, 2, 3], jnp.int32)}
    drafter = PEagle(heads, Static(chain(2), "without"))
    (result,) = check_losslessness(target, drafter, params, [1, 2, 3], 3, [Sampling(temperature=1.0)], 2048, seed=1)
    assert result.rule == "swor" and result.passed and result.test.degrees > 5, result
    assert result.acceptance_length > 1.1
