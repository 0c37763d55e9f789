"""DFlash's drafter where the battery does not look: drawn from a few candidates per slot, and in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.dflash import DFlash
from decoding.policies import Static
from decoding.sampling import Sampling
from decoding.trees import Topology, chain
from eval.losslessness import check_losslessness, tiny_target
from models import transformer
from models.errors import UserError
from models.heads.dflash import DFlashHeads, Selector
from tests.decoding.test_sampled_rules import SMALLEST_P, filled, judge, p_value
from tests.noise import noisy

HEADS = DFlashHeads((0, 1), 4, num_layers=1, block=4, selector=Selector(rank=3, candidates=2), vocab_size=4)


def test_chains_drawn_from_a_few_candidates_follow_the_target(x64: None) -> None:
    """Two candidates, of the four of five tokens that are scored, per slot, by the token before: q is 0 elsewhere."""
    target = tiny_target(5, dtype=jnp.float64)
    fresh = jax.eval_shape(lambda: HEADS.init(target.config, target.params, jax.random.key(0)))
    params = noisy(jax.tree.map(lambda leaf: np.ones(leaf.shape) * (leaf.ndim < 2), fresh), 0.4)
    params["draft_vocab"] = jnp.array([0, 1, 3, 4], jnp.int32)
    drafter = DFlash(HEADS, Static(chain(3), "without"))
    (result,) = check_losslessness(target, drafter, params, [1, 2, 3], 3, [Sampling(temperature=1.5)], 2048, seed=1)
    assert result.rule == "swor" and result.passed and result.test.degrees > 5, result
    assert result.acceptance_length > 1.1


def test_drafts_of_a_rounded_distribution_are_caught_where_verification_knows_another() -> None:
    """As where a drafter draws in bfloat16 and the verifier reads its scores in float32: q is off by a few percent."""
    logits = np.array([20.06, 19.44, 18.81, 18.2])
    exact, rounded = (np.exp(x - x.max()) for x in (logits, np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64)))
    exact, rounded = exact / exact.sum(), rounded / rounded.sum()
    assert 0.01 < np.abs(exact - rounded).max() < 0.03
    rows = 2**16
    children = np.random.default_rng(0).choice(4, (rows, 1), p=rounded)
    told = np.repeat(np.stack([rounded, exact])[:, None, None], rows, axis=1).reshape(-1, 1, 4)
    tree = filled(chain(1), "swor", np.concatenate([children] * 2), told)
    verdict = judge(tree, np.broadcast_to(np.log(exact), (2 * rows, 2, 4)), 1)
    token = np.asarray(verdict.tokens[:, 0]).reshape(2, rows)
    honest, biased = (p_value(np.bincount(drawn, minlength=4), exact) for drawn in token)
    assert honest > SMALLEST_P and biased < 1e-12


def test_scores_of_a_network_in_bfloat16_are_float32() -> None:
    """One array is drawn from and told to the verifier, and it is the head's product as it comes."""
    target = tiny_target(5)
    config, half = target.config, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), target.params)
    heads, place = DFlashHeads((0, 1), 4, num_layers=1, block=4), jnp.ones((1, 1), jnp.int32)

    def scores():
        params = heads.init(config, half, jax.random.key(0))
        context = DFlash(heads, Static(chain(3))).init(config, 1, 8, jnp.bfloat16)["context"]
        hidden = heads.run(config, params, heads.inputs(half, place), heads.layout(place, place), context)
        return hidden, transformer.head(config, half, hidden)

    hidden, logits = jax.eval_shape(scores)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32


def test_a_tree_that_a_block_does_not_reach_is_refused() -> None:
    config = tiny_target(5).config
    with pytest.raises(UserError, match="the draft tree is 4 deep, but a block of 4 drafts 3 tokens"):
        DFlash(HEADS, Static(chain(4), "top")).check(config)
    with pytest.raises(UserError, match="3 candidates, but the vocabulary has 2 tokens"):
        DFlash(HEADS, Static(Topology(((0,), (1,), (2,))), "top")).check(config)
