"""DSpark's drafter beyond the battery: what its slots are conditioned on, by every serial head, and sampled drafts."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafter import TargetView
from decoding.drafters.dspark import DSpark
from decoding.drafters.registry import build
from decoding.place import Place
from decoding.policies import Confidence, DySpec, Scheduled, Static, StochasticBeam, parse_policy
from decoding.sampling import Sampling, batch_sampling
from decoding.trees import chain
from eval.losslessness import check_losslessness, tiny_target
from models import transformer
from models.errors import UserError
from models.heads.dflash import DFlashHeads, Selector
from models.heads.serial import SerialHead
from tests.decoding.drafter_cases import LOPSIDED
from tests.noise import drawn

pytestmark = pytest.mark.usefixtures("x64")

V, DEPTH = 5, 3
BLOCK = DFlashHeads((0, 1), V - 1, num_layers=1, block=DEPTH, shifted=True)
UNSHIFTED = dataclasses.replace(BLOCK, block=DEPTH + 1, shifted=False)
CASES = {
    "vanilla": DSpark(BLOCK, Static(LOPSIDED, "without"), SerialHead("vanilla", 4)),
    "vanilla, candidates": DSpark(BLOCK, Confidence(3, DEPTH, 12), SerialHead("vanilla", 4), candidates=4),
    "gated": DSpark(BLOCK, DySpec(8, DEPTH, 3, 3), SerialHead("gated", 4)),
    "rnn": DSpark(BLOCK, StochasticBeam(3, DEPTH), SerialHead("rnn", 4, confidence="hidden")),
    "scheduled": DSpark(BLOCK, Scheduled(DEPTH, draws="top"), SerialHead("gated", 4)),
    "gru": DSpark(
        UNSHIFTED, Static(LOPSIDED, "with"), SerialHead("gru", 4, 6, plain=1, confidence="none"), candidates=3
    ),
}


@functools.cache
def target():
    with jax.enable_x64(True):
        return tiny_target(V, dtype=jnp.float64)


def params_of(drafter: DSpark):
    with jax.enable_x64(True):
        shapes = jax.eval_shape(
            functools.partial(drafter.init_params, target().config), target().params, jax.random.key(0)
        )
        return drawn(shapes, 0.7)


def view() -> TargetView:
    length, text = jnp.array([2, 4]), jnp.zeros((2, 8), jnp.int32)
    sampling = batch_sampling([Sampling(temperature=1.0)] * 2)
    return TargetView(target().config, target().params, [], Place.of_text(length), text, sampling)


def state_of(drafter: DSpark):
    """As if texts had been read that left noise."""
    shapes = jax.eval_shape(lambda: drafter.init(target().config, 2, 8, jnp.float64))
    return drawn(shapes, 1.0)


@functools.cache
def grown() -> dict[str, tuple[Any, np.ndarray, np.ndarray, Any]]:
    """By case a tree, the tokens that lead to every node, and what the next slot says there: its own logits, and what
    the head's form for whole texts adds; of a scheduled chain how sure the head is of its slots, and what it reads."""

    def one(name, params, root, keys):
        drafter = CASES[name]
        network = drafter.network(params, view(), state_of(drafter))
        made, sure, ended = drafter.policy.grow(network, root, keys, view().sampling), None, None
        if isinstance(drafter.policy, Scheduled):
            made, sure = drafter.policy.uncut(network, root, keys, view().sampling)
            one_ended = dataclasses.replace(view(), done=jnp.array([False, True]))
            network = drafter.network(params, one_ended, state_of(drafter))
            ended = drafter.policy.uncut(network, root, keys, view().sampling)[1]
        tree = made.tree
        whole = {
            field.name: jnp.broadcast_to(x, (2, *x.shape[1:]))
            for field in dataclasses.fields(tree)
            if hasattr(x := getattr(tree, field.name), "shape")
        }
        hidden_BDH, _ = network.filled_block(root)
        # A row per node: its ancestors, itself included, in the order of depth.
        place = jnp.where(whole["ancestors"], whole["depth"][:, None], DEPTH + 1)
        path_BND = jnp.take_along_axis(whole["tokens"][:, None], jnp.argsort(place, axis=2)[:, :, :DEPTH], axis=2)
        hidden_BNDH = jnp.broadcast_to(hidden_BDH[:, None], (*path_BND.shape, hidden_BDH.shape[2]))
        own = params["serial"]
        latent = drafter.serial.latents(own, hidden_BNDH, drafter.serial.embed(own, target().params, path_BND))
        logits = transformer.head(target().config, target().params, hidden_BDH)
        read = None if sure is None else (sure, ended, hidden_BDH, own["confidence"], own["embed"]["embedding"])
        return whole, logits, latent @ own["vocab"]["kernel"], read

    with jax.enable_x64(True):
        every = {name: params_of(drafter) for name, drafter in CASES.items()}
        program = jax.jit(lambda every, *rest: {name: one(name, own, *rest) for name, own in every.items()})
        found = program(every, jnp.array([1, 3]), jax.vmap(jax.random.key)(jnp.arange(2)))
        return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("name", CASES)
def test_every_branch_is_conditioned_on_its_path(name: str) -> None:
    """Children are drawn from, or are the best of, what the head says in its form for whole texts."""
    tree, logits, added, _ = grown()[name]
    candidates, seen = CASES[name].candidates, 0
    for row, node in zip(*np.nonzero(tree["valid"]), strict=True):
        children, slot = tree["children"][row, node], tree["depth"][row, node]
        children = children[(children >= 0) & tree["valid"][row, children]]
        if not len(children):
            continue
        expected = logits[row, slot] + added[row, node, slot]
        if candidates:
            expected[np.argsort(-logits[row, slot])[candidates:]] = -np.inf
        seen += 1
        if "proposals" not in tree:
            assert tree["tokens"][row, children].tolist() == np.argsort(-expected)[: len(children)].tolist()
            continue
        q = np.exp(expected - expected.max())
        np.testing.assert_allclose(tree["proposals"][row, tree["proposal_of"][row, node]], q / q.sum(), atol=1e-9)
    assert seen >= 6
    # Unlike a block's by itself, a slot depends on the parent.
    assert np.ptp(added[:, 1:, 1], axis=(0, 1)).max() > 0.01


def test_a_slot_is_as_sure_as_its_own_output_and_predecessor_say() -> None:
    tree, *_, (sure, ended, hidden, weights, table) = grown()["scheduled"]
    before = table[tree["tokens"][:, :DEPTH]]  # Of a chain: the root, and all drafts but the last.
    logit = np.concatenate([hidden, before], axis=2) @ weights["kernel"][:, 0] + weights["bias"]
    np.testing.assert_allclose(sure, 1 / (1 + np.exp(-logit)), atol=1e-12)
    assert np.ptp(sure, axis=1).min() > 0.05
    np.testing.assert_array_equal(ended, sure * [[1], [0]])  # A text that has ended vouches for nothing.


# Twice as slow for 3,000 rows more than for one.
SPEED = tuple(1 / (3000 + n) for n in range(8000))
SCHEDULED = Scheduled(DEPTH, threshold=0.4, speed=SPEED, temperatures=(2.0,) * DEPTH)
SETTINGS = [Sampling(temperature=1.0), Sampling(temperature=2.0, top_p=0.7)]


@pytest.mark.parametrize(
    ("policy", "candidates"),
    [(SCHEDULED, None), (Static(LOPSIDED, "without"), 3)],
    ids=["scheduled chain", "lattice tree"],
)
def test_sampled_drafts_are_lossless(policy, candidates) -> None:
    drafter = DSpark(BLOCK, policy, SerialHead("vanilla", 4), candidates)
    for result in check_losslessness(target(), drafter, params_of(drafter), [1, 2, 3], 3, SETTINGS, 1024, seed=1):
        assert result.rule == "swor" and result.test.degrees > 5 and result.passed, result
        assert 1.1 < result.acceptance_length < 2.9


def test_a_schedule_needs_confidences_and_sound_numbers() -> None:
    silent = DSpark(BLOCK, Scheduled(DEPTH), SerialHead("vanilla", 4, confidence="none"))
    network = silent.network(params_of(silent), view(), state_of(silent))
    with pytest.raises(UserError, match="no confidence head"):
        jax.eval_shape(
            lambda: silent.policy.grow(
                network, jnp.array([1, 3]), jax.vmap(jax.random.key)(jnp.arange(2)), view().sampling
            )
        )
    for text, words in {
        "scheduled:depth=0": "depth of at least 1",
        "scheduled:threshold=2": r"threshold must lie in \[0, 1\]",
        "scheduled:speed=(0.0,)": "steps per second above 0",
        "scheduled:temperatures=(1.0,)": "needs 7 temperatures",
    }.items():
        with pytest.raises(UserError, match=words):
            parse_policy(text)
    cut = Scheduled(3, temperatures=(1.0, 2.0, 3.0))
    assert cut.with_budget(2) == Scheduled(2, temperatures=(1.0, 2.0)) and cut.with_budget(4) is None


@pytest.mark.parametrize(
    ("drafter", "words"),
    [
        (DSpark(BLOCK, Static(chain(DEPTH + 1)), SerialHead()), "the draft tree is 4 deep, but a block of 3 drafts 3"),
        (DSpark(BLOCK, Static(chain(1)), candidates=V + 1), "candidates must be from 1 to 5"),
        (DSpark(BLOCK, Confidence(3, 2, 4), candidates=2), "asks for the 3 best of 2 tokens"),
        (DSpark(dataclasses.replace(BLOCK, selector=Selector(2, 2)), Static(chain(1))), "has one of them"),
        (DSpark(BLOCK, Static(chain(1)), SerialHead("gru")), "no table of tokens"),
    ],
)
def test_what_does_not_fit_is_refused(drafter: DSpark, words: str) -> None:
    with pytest.raises(UserError, match=words):
        drafter.check(target().config)


def test_trees_that_are_fitted_are_no_deeper_than_a_block() -> None:
    drafter = DSpark(BLOCK, Static(chain(2)))
    probing = drafter.probing()
    assert probing is not None and probing.max_depth == DEPTH and probing.policy.draws == "without"
    scheduled = drafter.with_policy(Scheduled(2))
    assert scheduled.probing() is None
    assert scheduled.with_budget(DEPTH) == drafter.with_policy(Scheduled(DEPTH))
    assert scheduled.with_budget(DEPTH + 1) is None


@pytest.mark.parametrize("name", CASES)
def test_a_record_is_read_back(name: str) -> None:
    assert build(CASES[name].to_record(), "drafter.json") == CASES[name]
