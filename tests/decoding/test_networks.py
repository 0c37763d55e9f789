"""Every draft network with every policy that it accepts: trees are traced, nothing is compiled."""

import jax
import jax.numpy as jnp
import pytest

from decoding.cache import init_cache
from decoding.drafter import TargetView
from decoding.drafters.network_drafter import NetworkDrafter
from decoding.place import Place
from decoding.policies import Confidence, DySpec, Expanding, Scheduled, Slots, Static, StochasticBeam, TreePolicy
from decoding.sampling import Sampling, batch_sampling
from models.errors import UserError
from tests.decoding.drafter_cases import CASES, LOPSIDED, random_target

DEPTH, VOCAB, ROWS = 3, 12, 2
POLICIES: dict[str, TreePolicy] = {
    **{f"static {draws}": Static(LOPSIDED, draws) for draws in ("top", "without", "with")},
    "confidence": Confidence(3, DEPTH, 10),
    "dyspec": DySpec(8, DEPTH, 3, 3),
    "rsd_s": StochasticBeam(3, DEPTH),
    "scheduled": Scheduled(DEPTH, threshold=0.3, speed=(2.0, 1.0)),
    "slots": Slots(DEPTH, 10),
    "accum_logp": Expanding(DEPTH, 10, 3),
}
SURE = {"dspark", "nested"}
BLIND = {"p_eagle", "dflash", "dflash slots", "jetspec"}
QUICK = {"dspark", "falcon"}

pytestmark = pytest.mark.usefixtures("x64")


def accepted(drafter: NetworkDrafter) -> set[str]:
    """The policies with which the drafter passes its check."""
    config, found = random_target(vocab_size=VOCAB).config, set()
    for kind, policy in POLICIES.items():
        try:
            drafter.with_policy(policy).check(config)
            found.add(kind)
        except UserError:
            pass
    return found


def test_a_policy_is_refused_by_networks_that_lack_what_it_asks_for() -> None:
    for name in sorted({*SURE, *BLIND, *QUICK, "dflash2", "eagle3"}):
        drafter, _ = CASES[name](random_target(vocab_size=VOCAB), jax.random.key(0))
        assert isinstance(drafter, NetworkDrafter)
        needs = {"scheduled": name in SURE, "slots": name in BLIND, "accum_logp": name in BLIND}
        assert accepted(drafter) == {kind for kind in POLICIES if needs.get(kind, True)}, name


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CASES]
)
def test_policies_that_are_accepted_grow_trees(name: str) -> None:
    target = random_target(vocab_size=VOCAB)
    whole, params = CASES[name](target, jax.random.key(0))
    if not isinstance(whole, NetworkDrafter):
        return
    sampling = batch_sampling([Sampling(temperature=1.0)] * ROWS)
    for kind in accepted(whole):
        drafter = whole.with_policy(POLICIES[kind])

        def grow(params, drafter=drafter):
            cache = init_cache(target.config, ROWS, 8, jnp.float64)
            text, length = jnp.zeros((ROWS, 8), jnp.int32), jnp.full(ROWS, 4, jnp.int32)
            view = TargetView(target.config, target.params, cache, Place.of_text(length), text, sampling)
            state = drafter.init(target.config, ROWS, 8, jnp.float64)
            keys = jax.vmap(jax.random.key)(jnp.arange(ROWS))
            tree = drafter.draft(params, view, state, length, keys)[0]
            assert tree.rule == drafter.rule(False)
            return tree.tokens

        assert jax.eval_shape(grow, params).shape == (ROWS, drafter.max_nodes)
