"""DFlash's drafter where the battery does not look: drawn from a few candidates per slot, and in bfloat16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafter import TargetView
from decoding.drafters.dflash import DFlash
from decoding.place import Place
from decoding.policies import Static
from decoding.sampling import Sampling, batch_sampling
from decoding.trees import Topology, chain
from eval.losslessness import check_losslessness, tiny_target
from models.errors import UserError
from models.heads.dflash import DFlashHeads, Selector
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


class Rounded:
    """A network whose scores are those of another in bfloat16, around a large mean, of which softmax knows nothing.

    There bfloat16's steps are of 1, eight times as coarse as below 16, so that thousands of samples are enough to see
    the bias.
    """

    def __init__(self, exact):
        self.exact, self.vocab_size = exact, exact.vocab_size

    def begin(self, root, slots):
        return self.rounded(*self.exact.begin(root, slots))

    def extend(self, *arguments):
        return self.rounded(*self.exact.extend(*arguments))

    def rounded(self, scores, scratch):
        half = (scores.logits + 128).astype(jnp.bfloat16).astype(scores.logits.dtype)
        return dataclasses.replace(scores, logits=half - 128), scratch


@dataclasses.dataclass(frozen=True)
class Rounding(DFlash):
    """Draws from rounded scores, and tells the verifier these if it is `honest`, or else the scores as they were."""

    def init_params(self, config, target, key):
        return {**super().init_params(config, target, key), "honest": jnp.ones(())}

    def draft(self, params, target, state, root, keys):
        exact = self.network(params, target, state)
        drawn, told = (self.policy.grow(one, root, keys, target.sampling).tree for one in (Rounded(exact), exact))
        proposals = jnp.where(params["honest"] > 0, drawn.proposals, told.proposals)
        return dataclasses.replace(drawn, proposals=proposals), None


def test_drafts_of_a_rounded_distribution_are_caught_where_verification_knows_another(x64: None) -> None:
    """As where a drafter draws in bfloat16 and the verifier reads its scores in float32, a published bias."""
    target = tiny_target(5, dtype=jnp.float64)
    drafter = Rounding(DFlashHeads((0, 1), 4, num_layers=1, block=3), Static(chain(2), "without"))
    fresh = jax.eval_shape(lambda: drafter.init_params(target.config, target.params, jax.random.key(0)))
    params = noisy(jax.tree.map(lambda leaf: np.ones(leaf.shape) * (leaf.ndim < 2), fresh), 0.4)
    setting = [Sampling(temperature=1.5)]
    checked = functools.partial(check_losslessness, target, drafter)
    honest, biased = (
        checked({**params, "honest": jnp.asarray(honest)}, [1, 2, 3], 2, setting, 8192, seed=1)[0]
        for honest in (1.0, 0.0)
    )
    assert honest.passed and honest.test.degrees > 5, honest
    assert not biased.passed, biased


def test_scores_of_a_network_in_bfloat16_are_float32() -> None:
    """One array is drawn from and told to the verifier, and it is the head's product as it comes."""
    target = tiny_target(5)
    config, half = target.config, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), target.params)
    drafter = DFlash(DFlashHeads((0, 1), 4, num_layers=1, block=4), Static(chain(3)))

    def scores():
        params = drafter.init_params(config, half, jax.random.key(0))
        state = drafter.init(config, 1, 8, jnp.bfloat16)
        view = TargetView(
            config,
            half,
            [],
            Place.of_text(jnp.ones(1, jnp.int32)),
            jnp.zeros((1, 8), jnp.int32),
            batch_sampling([Sampling()]),
        )
        network = drafter.network(params, view, state)
        first, filled = network.begin(jnp.ones(1, jnp.int32), 3)
        later, _ = network.extend(filled, 1, 1, jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32), None)
        return params["fc"]["kernel"], first.logits, later.logits, filled.logits

    kernel, *logits = jax.eval_shape(scores)
    assert kernel.dtype == jnp.bfloat16 and [each.dtype for each in logits] == [jnp.float32] * 3


def test_a_tree_that_a_block_does_not_reach_is_refused() -> None:
    config = tiny_target(5).config
    with pytest.raises(UserError, match="the draft tree is 4 deep, but a block of 4 drafts 3 tokens"):
        DFlash(HEADS, Static(chain(4), "top")).check(config)
    with pytest.raises(UserError, match="3 candidates, but the vocabulary has 2 tokens"):
        DFlash(HEADS, Static(Topology(((0,), (1,), (2,))), "top")).check(config)
