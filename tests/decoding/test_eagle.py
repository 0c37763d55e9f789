"""EAGLE's drafters beyond the battery: sampled children, a draft vocabulary, the published tree, joined kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.eagle import Eagle, Eagle3
from decoding.generate import generate
from decoding.policies import Confidence, Static
from decoding.replay import replay_acceptance
from decoding.sampling import Sampling
from decoding.trees import EAGLE_25
from eval.losslessness import check_losslessness
from models.errors import UserError
from models.heads.eagle import Eagle3Heads, EagleHeads
from tests.decoding.drafter_cases import CASES, LOPSIDED, random_target

pytestmark = pytest.mark.usefixtures("x64")


def test_published_tree() -> None:
    assert [len(EAGLE_25.level(depth)) for depth in range(6)] == [1, 4, 8, 8, 3, 2]
    assert Eagle().max_nodes == 26 and Eagle().ranked_tree == EAGLE_25
    assert Eagle3(Eagle3Heads(2, 16, 29)).max_nodes == 60 and Eagle3(Eagle3Heads(2, 16, 29)).ranked_tree is None


each = pytest.mark.parametrize("name", [pytest.param("eagle", marks=pytest.mark.slow), "eagle3"])


@each
def test_sampled_children_are_lossless(name: str) -> None:
    """EAGLE-1 draws its children without replacement; a draft vocabulary offers some tokens only, by their own q."""
    target = random_target(vocab_size=6, scale=6.0)
    heads = EagleHeads() if name == "eagle" else Eagle3Heads(0, 1, 1, 3)
    drafter = {"eagle": Eagle, "eagle3": Eagle3}[name](heads, Static(LOPSIDED, "without"))
    params = jax.jit(drafter.init_params, static_argnums=0)(target.config, target.params, jax.random.key(1))
    if name == "eagle3":
        params["draft_vocab"] = jnp.array([1, 2, 5], jnp.int32)
    settings = [Sampling(temperature=1.0), Sampling(temperature=1.3, top_p=0.9)]
    for result in check_losslessness(target, drafter, params, [1, 2], 3, settings, 1024, seed=1):
        assert result.test.degrees > 5 and result.passed, result


@pytest.mark.parametrize("name", [pytest.param("eagle", marks=pytest.mark.slow), "eagle3.1"])
def test_joined_kernels_draft_the_same(name: str) -> None:
    """And, of EAGLE-3.1, with every norm that EAGLE-3 can have, what the unrolled network of training does."""
    target, prompts = random_target(vocab_size=12), [[1, 2, 3], [4]]
    drafter, params = CASES[name](target, jax.random.key(7))
    joined = drafter.for_decoding(params)
    assert set(joined["layer"]["attention"]) == {"q_k_v", "o"} and set(joined["layer"]["mlp"]) == {"gate_up", "down"}
    both = [generate(target, prompts, drafter=drafter, drafter_params=p, max_new_tokens=60) for p in (params, joined)]
    assert both[0].writers == both[1].writers and both[0].tokens == both[1].tokens
    assert np.count_nonzero(both[0].writers) > 10
    counted = np.stack([stats.accepted_by_depth for stats in both[0].stats])
    assert np.array_equal(replay_acceptance(target, drafter, params, prompts, both[0]), counted)


@pytest.mark.parametrize(
    ("drafter", "words"),
    [
        (Eagle3(Eagle3Heads(0, 1, 1, 5), Confidence()), "asks for the 10 best of 5 tokens"),
        (Eagle3(Eagle3Heads(0, 1, 2)), r"reads what enters layer 2 \(high\), but the target has layers 0 to 1"),
        (Eagle(EagleHeads(), Static(EAGLE_25, "top")), "asks for 4 candidates, but the vocabulary has 3 tokens"),
    ],
)
def test_what_does_not_fit_the_target_is_refused(drafter, words: str) -> None:
    size = 3 if drafter.name == "eagle" else 12
    with pytest.raises(UserError, match=words):
        drafter.check(random_target(vocab_size=size).config)
