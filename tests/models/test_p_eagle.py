"""P-EAGLE's network against its definition in numpy, row by row over a dense mask, and the rows that are sampled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.errors import UserError
from models.heads import p_eagle
from models.heads.eagle import Eagle3Heads
from models.heads.p_eagle import PEagleHeads, Rollouts, every_rollout, sampled_rollouts
from models.layout import Layout
from tests.models.test_eagle import CONFIG, layer, rms
from tests.noise import drawn

pytestmark = pytest.mark.usefixtures("x64")

HEADS = PEagleHeads(0, 2, 3, num_layers=2)


def network(heads) -> dict:
    """Parameters of `heads`, every one drawn."""
    target = transformer.param_shapes(CONFIG, jnp.float64)
    return drawn(jax.eval_shape(lambda t: heads.init(CONFIG, t, jax.random.key(0)), target), 0.3, seed=1)


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(heads, params, feature, embedding, layout, rollouts):
    """What the head reads of all rows, those of the text first."""
    text, rows = heads.run_layers(CONFIG, params, feature, embedding, layout)
    return jnp.concatenate([text, *heads.roll_out(CONFIG, params, rows, layout, rollouts)], axis=1)


def by_hand(params: dict, feature: np.ndarray, embedding: np.ndarray, positions: np.ndarray, seen: np.ndarray):
    """The network of two layers on one text's rows, masks behind it included, who sees whom as a dense mask."""
    p = jax.tree.map(np.asarray, params)
    count = len(seen) - len(feature)
    f = np.concatenate([feature, np.tile(p["mask_hidden"] @ p["fc"]["kernel"], (count, 1))])
    e = np.concatenate([embedding, np.tile(p["mask_embedding"], (count, 1))])
    x = np.concatenate([rms(e, p["input_norm"]["scale"]), rms(f, p["hidden_norm"]["scale"])], axis=-1)
    g = layer(p["layer"], x, f, positions, seen)
    block = p["blocks"][0]
    return layer(block, rms(g, block["attention_norm"]["scale"]), g, positions, seen)


# The example of the mask: a text of five rows, anchors 0, 1 and 3 with a row of depth 1 and 0 with one of depth 2.
TABLE = """
x........  xx.......  xxx......  xxxx.....  xxxxx....
x....x...  xx....x..  xxxx...x.
x....x..x
"""


def test_rows_see_what_the_table_says() -> None:
    params, rng = network(HEADS), np.random.default_rng(0)
    feature, embedding = rng.normal(size=(2, 1, 5, 8))
    chain = jnp.array([[[0, -1], [1, -1], [2, -1], [0, 3]]], jnp.int32)
    anchors = [jnp.array([[0, 1, 3]], jnp.int32), jnp.array([[0]], jnp.int32)]
    rollouts = Rollouts(anchors, [jnp.ones_like(at, bool) for at in anchors], chain)
    found = hidden_of(HEADS, params, jnp.array(feature), jnp.array(embedding), Layout.causal(1, 5), rollouts)
    seen = np.array([[mark == "x" for mark in row] for row in TABLE.split()])
    positions = np.array([0, 1, 2, 3, 4, 1, 2, 4, 2])
    np.testing.assert_allclose(found[0], by_hand(params, feature[0], embedding[0], positions, seen), atol=1e-10)


def test_packed_texts_and_pieces_equal_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p_eagle, "BLOCK", 100)
    rows, depth, params, rng = 7, 2, network(HEADS), np.random.default_rng(1)
    feature, embedding = rng.normal(size=(2, 1, rows, 8))
    document = np.array([1, 1, 1, 2, 2, 2, 2])
    layout = Layout.causal(1, rows, jnp.array(document)[None])
    run = hidden_of.__wrapped__  # Compiled with the smaller pieces.
    found = jax.jit(run, static_argnums=0)(
        HEADS, params, jnp.array(feature), jnp.array(embedding), layout, every_rollout(1, rows, depth)
    )
    at, of = np.tile(np.arange(rows), depth + 1), np.repeat(np.arange(depth + 1), rows)
    same = document[at][:, None] == document[at]
    text = (of == 0) & (at <= at[:, None])
    seen = same & (text | (at == at[:, None]) & (of <= of[:, None]))
    positions = np.asarray(layout.positions)[0][at] + of
    np.testing.assert_allclose(found[0], by_hand(params, feature[0], embedding[0], positions, seen), atol=1e-10)


def test_one_token_of_one_layer_is_the_first_step_of_eagle3() -> None:
    heads = dataclasses.replace(HEADS, num_layers=1)
    params, rng = network(heads), np.random.default_rng(2)
    feature, embedding = map(jnp.array, rng.normal(size=(2, 1, 5, 8)))

    @jax.jit
    def both(params):
        layout = Layout.causal(1, 5)
        plain, _ = Eagle3Heads(0, 2, 3).run(CONFIG, params, feature, embedding, layout)
        return plain, heads.run_layers(CONFIG, params, feature, embedding, layout)[0]

    np.testing.assert_array_equal(*both(params))


def test_rollouts_are_nested_counted_and_equally_likely() -> None:
    length, sizes = 8, (6, 4, 2)
    counted = [jnp.array([[True] * 7 + [False], [False] * 8])] * 2 + [jnp.arange(16).reshape(2, 8) % 8 < 5]
    most = jnp.array([[5, 3, 2], [6, 4, 2]])

    @jax.jit
    @jax.vmap
    def sample(key):
        return sampled_rollouts(key, counted, sizes, most)

    drawn = jax.device_get(sample(jax.random.split(jax.random.key(0), 1000)))
    offsets, numbers = (0, 6, 10), range(3)
    for one in range(20):
        kept = [[set(drawn.anchors[d][one, b][drawn.counted[d][one, b]]) for d in numbers] for b in range(2)]
        assert kept[1] == [set()] * 3, "a text without labels has no rows"
        assert [len(found) for found in kept[0][:2]] == [5, 3] and kept[0][1] < kept[0][0]
        assert kept[0][2] <= kept[0][1] - {5, 6, 7}
        for d in numbers:
            for place in np.flatnonzero(drawn.counted[d][one, 0]):
                chain = drawn.chain[one, 0, offsets[d] + place]
                assert chain[d] == offsets[d] + place and (chain[d + 1 :] == -1).all()
                at = [drawn.anchors[e][one, 0, chain[e] - offsets[e]] for e in range(d + 1)]
                assert len(set(at)) == 1, "rows of a chain stand behind one anchor"
    # 3 of 7 anchors have a row of depth 2: each in 429 of 1000 draws, with a standard deviation of 16.
    there = drawn.anchors[1][:, 0][drawn.counted[1][:, 0]]
    assert np.abs(np.bincount(there, minlength=length)[:7] - 3000 / 7).max() < 80


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="needs at least one layer, got 0"):
        PEagleHeads(0, 2, 3, num_layers=0).check(CONFIG)
