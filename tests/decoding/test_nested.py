"""A draft model with exits: which of them speaks, and that it says what the network cut off there says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.calibration import recorded_drafts
from decoding.drafter import TargetView
from decoding.drafters.nested import Nested
from decoding.drafters.registry import build
from decoding.place import Place
from decoding.policies import Scheduled, Static
from decoding.sampling import Sampling, batch_sampling
from decoding.trees import from_child_counts
from models import transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.target import Target
from models.layout import Layout
from models.transformer import param_shapes
from tests.decoding.drafter_cases import random_target
from tests.noise import drawn

pytestmark = pytest.mark.usefixtures("x64")

MODEL = TransformerConfig(
    vocab_size=12, width=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24, windows=(5, None) * 2
)
TREE = from_child_counts({(): 2, (0,): 2, (1,): 1, (1, 0): 2})
LENGTH = 9


@pytest.mark.parametrize(("exits", "limits"), [((1, 2, 3), (0.55, 0.65)), ((2,), ())], ids=["where sure", "one"])
def test_the_tree_carries_what_the_network_cut_off_at_the_exit_says(exits, limits) -> None:
    """Of every path the first exit whose largest probability reaches its limit, whatever other rows take and whatever
    limits later exits have, and the first where the text has ended; what a network is sure of is that exit's largest
    probability, or nothing where the text has ended."""
    target = random_target(vocab_size=12)
    drafter = Nested(MODEL, Static(TREE, "without"), exits, limits)
    params = drawn(param_shapes(MODEL, jnp.float64), 0.6)
    text = np.random.default_rng(1).integers(0, 12, (6, 16)).astype(np.int32)
    length = np.array([LENGTH, 1, 4, 7, 3, LENGTH], np.int32)
    forward = jax.jit(transformer.forward, static_argnames=("config", "layers"))

    @jax.jit
    def draft(text, length):
        cache = transformer.forward(MODEL, params, text, Layout.causal(*text.shape), layers=(0, exits[-1])).rows
        sampling, ended = batch_sampling([Sampling(1.0)] * 6), jnp.arange(6) == 5
        view = TargetView(target.config, target.params, [], Place.of_text(length), text, sampling, done=ended)
        root = jnp.take_along_axis(text, length[:, None], axis=1)[:, 0]
        keys = jax.vmap(jax.random.key)(jnp.arange(6))
        own, state = drafter.for_decoding(params), {"cache": cache, "memory": None}
        return drafter.draft(own, view, state, root, keys)[0], drafter.network(own, view, state).begin(root, TREE.size)[
            0
        ]

    tree, scores = draft(jnp.asarray(text), jnp.asarray(length))
    inner = np.flatnonzero(TREE.children[:, 0] >= 0)
    tokens, proposals, row = (np.asarray(x) for x in (tree.tokens, tree.proposals, tree.proposal_of))
    paths = [[*text[b, : length[b]], *tokens[b, TREE.ancestors[node]]] for b in range(6) for node in inner]
    whole = np.array([[*path, *[0] * (16 - len(path))] for path in paths], np.int32)
    said = []
    for layers in exits:
        logits = forward(MODEL, params, jnp.asarray(whole), Layout.causal(*whole.shape), layers=(0, layers)).logits
        said.append(jax.nn.softmax(logits[np.arange(len(paths)), [len(path) - 1 for path in paths]]))
    said = np.asarray(jnp.stack(said))
    sure = np.max(said, axis=-1) >= np.array([*limits, 0.0])[:, None]
    taken = np.argmax(sure, axis=0)
    taken[-len(inner) :] = 0
    assert set(taken) == {*range(len(exits))}
    found = [proposals[b, row[0, node]] for b in range(6) for node in inner]
    np.testing.assert_allclose(found, said[taken, np.arange(len(paths))], rtol=0, atol=1e-12)
    roots = said[taken, np.arange(len(paths))][:: len(inner)]
    np.testing.assert_allclose(scores.confidence[:, 0], [*roots.max(axis=-1)[:5], 0.0], rtol=0, atol=1e-12)


def test_layers_behind_the_last_exit_are_stored_and_never_run() -> None:
    drafter = Nested(MODEL, exits=(2,))
    params = drawn(param_shapes(MODEL), 0.1)
    assert len(drafter.for_decoding(params)["layers"]) == 2 == len(drafter.init(MODEL, 1, 8, jnp.float32)["cache"])
    assert drafter.running.windows == (5, None)
    shapes = jax.eval_shape(lambda: drafter.init_params(MODEL, {"embed": params["embed"]}, jax.random.key(0)))
    assert len(shapes["layers"]) == 4


def test_its_chains_may_be_recorded() -> None:
    """As `eval.tree --calibrate` does: what the recorder keeps of a draft is not what the drafter itself would."""
    shape = dataclasses.replace(MODEL, num_layers=1, windows=())
    target = Target(shape, drawn(param_shapes(shape), 0.3))
    drafter = Nested(shape, exits=(1,), policy=Scheduled(2, 0.2))
    confidence, survived = recorded_drafts(target, drafter, target.params, [[1, 2, 3]], 6)
    assert confidence.shape == survived.shape and confidence.shape[1] == 2 and np.all(survived == 1), "its own target"


@pytest.mark.parametrize(
    ("exits", "limits", "complaint"),
    [
        ((2, 1), (0.5,), r"exits that rise from 1 to at most 4 layers, got \[2, 1\]"),
        ((0, 2), (0.5,), "exits that rise from 1"),
        ((5,), (), "exits that rise from 1 to at most 4 layers"),
        ((1, 2), (), "nested of 2 exits needs 1 thresholds in 0..1"),
        ((1, 2), (1.5,), r"got \[1.5\]"),
    ],
)
def test_exits_that_make_no_sense_are_refused(exits, limits, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Nested(MODEL, exits=exits, thresholds=limits)


def test_a_record_brings_it_back() -> None:
    drafter = Nested(dataclasses.replace(MODEL, windows=()), exits=(1, 4), thresholds=(0.7,))
    assert build(drafter.to_record(), "drafter.json") == drafter
