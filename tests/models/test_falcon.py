"""Falcon's network: its LSTM in numpy, its mask, its reduction to EAGLE-1, and drafts of whole texts at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.heads.eagle import EagleHeads, unroll
from models.heads.falcon import FalconHeads, guesses_everywhere
from models.layout import BlockCausal, Layout
from models.linear import product
from tests.noise import drawn

CONFIG = TransformerConfig(
    vocab_size=19, width=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=12, rope_theta=50.0
)
ROWS, DEPTH = 11, 5

pytestmark = pytest.mark.usefixtures("x64")


def network(heads: FalconHeads) -> dict:
    """Parameters of `heads`, every one drawn."""
    target = transformer.param_shapes(CONFIG, jnp.float64)
    return drawn(jax.eval_shape(lambda t: heads.init(CONFIG, t, jax.random.key(0)), target), 0.4, seed=1)


def pairs(batch: int = 1) -> tuple[jax.Array, jax.Array]:
    """Features and embeddings of the tokens that follow, a few more rows of the latter."""
    rng = np.random.default_rng(2)
    feature, embedding = rng.normal(size=(batch, ROWS, 8)), rng.normal(size=(batch, ROWS + DEPTH, 8))
    return jnp.asarray(feature), jnp.asarray(embedding)


def ahead(embedding: jax.Array) -> list[jax.Array]:
    """For each place of a draft the embeddings that it reads."""
    return [embedding[:, j : j + ROWS] for j in range(DEPTH)]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("mode", ["per_position", "recurrent"])
def test_lstm_is_that_of_numpy(mode: str) -> None:
    heads = FalconHeads(lstm_mode=mode)
    params = network(heads)
    feature, embedding = (np.asarray(x[0, :5]) for x in pairs())
    begins = np.array([False, False, False, True, False])
    found, states = jax.jit(heads.join)(params, feature[None], embedding[None], begins=begins[None])
    x = np.concatenate([embedding, feature], axis=-1)
    c, h = np.zeros((2, 8)), np.zeros((2, 8))
    for t in range(5):
        y = x[t]
        if mode == "per_position" or begins[t]:
            c, h = np.zeros((2, 8)), np.zeros((2, 8))
        for n, part in enumerate(jax.tree.map(np.asarray, params["lstm"])):
            gates = y @ part["input"]["kernel"] + part["input"]["bias"]
            if mode == "recurrent":
                i, f, g, o = np.split(gates + h[n] @ part["state"]["kernel"], 4)
            else:
                (i, g, o), f = np.split(gates, 3), np.zeros(8)
            c[n] = sigmoid(f) * c[n] + sigmoid(i) * np.tanh(g)
            y = h[n] = sigmoid(o) * np.tanh(c[n])
        np.testing.assert_allclose(found[0, t], y, atol=1e-12)
        if mode == "recurrent":
            np.testing.assert_allclose(states[0, t], [c[0], h[0], c[1], h[1]], atol=1e-12)
    assert (states is None) == (mode == "per_position")


def test_a_pair_sees_its_block_and_those_before() -> None:
    """Which outputs depend on which inputs, of two layers, whose second could see further than the first."""
    heads = FalconHeads(layers=2)
    params = network(heads)

    def outputs(x, phase):
        layout = dataclasses.replace(Layout.causal(1, 5), order=BlockCausal(2, phase))
        return heads.run(CONFIG, params, x[None], layout)[0][0].sum(axis=-1)

    slopes = jax.jit(jax.jacobian(outputs))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)))
    even = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    odd = [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    for phase, table in enumerate([even, odd]):
        assert np.any(np.asarray(slopes(x, phase)) != 0, axis=-1).astype(int).tolist() == table


class Joined(FalconHeads):
    """Falcon with EAGLE-1's map of a pair in the place of the LSTM."""

    def join(self, params, feature, embedding, state=None, begins=None, dropout_key=None):
        """fc [embedding; feature]."""
        pair = jnp.concatenate([embedding, feature], axis=-1)
        return product(pair, params["fc"]["kernel"]) + params["fc"]["bias"], None


def test_blocks_of_one_pair_behind_eagles_map_are_eagle() -> None:
    """k = 1 leaves a causal mask, and one layer is EAGLE-1's; with fc in the place of the LSTM all is, to the bit."""
    eagle, falcon = EagleHeads(), Joined(block=1)
    target = transformer.param_shapes(CONFIG, jnp.float64)
    params = drawn(jax.eval_shape(lambda t: eagle.init(CONFIG, t, jax.random.key(0)), target), 0.4)
    ours = {"fc": params["fc"], "layers": [params["layer"]]}
    feature, embedding = pairs()
    layout = Layout.causal(1, ROWS)

    @jax.jit
    def both(feature, embedding):
        y, _ = falcon.join(ours, feature, embedding[:, :ROWS])
        blocks = dataclasses.replace(layout, order=BlockCausal(1))
        return (
            falcon.run(CONFIG, ours, y, blocks)[0],
            eagle.run(CONFIG, params, feature, embedding[:, :ROWS], layout)[0],
            guesses_everywhere(falcon, CONFIG, ours, feature, ahead(embedding), layout, 3),
            unroll(eagle, CONFIG, params, feature, ahead(embedding)[:3], layout),
        )

    one, other, drafts, expected = both(feature, embedding)
    assert np.array_equal(one, other)
    for found, wanted in zip(drafts, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "heads",
    [
        pytest.param(FalconHeads(block=3), marks=pytest.mark.slow),
        FalconHeads(block=2, layers=2, lstm_mode="recurrent"),
    ],
    ids=["k=3", "k=2, two layers, recurrent"],
)
def test_drafts_everywhere_are_those_of_one_text_after_the_other(heads: FalconHeads) -> None:
    """A text that ends behind position p, its blocks lined up there, goes on with what the network put out k rows ago;
    all of it is run anew for every block. Beside it, two texts in one row draft as each alone."""
    params, k = network(heads), heads.block
    feature, embedding = pairs()
    everywhere = functools.partial(guesses_everywhere, heads, CONFIG, params, depth=DEPTH)

    @jax.jit
    def drafted(feature, embedding, segments, phase):
        """And what training reads, blocks of the text itself from a phase on."""
        layout = Layout.causal(1, ROWS, segments)
        blocks = dataclasses.replace(layout, order=BlockCausal(k, phase))
        read = heads.whole(CONFIG, params, feature, embedding[:, :ROWS], blocks)
        return everywhere(feature, ahead(embedding), layout), read

    @jax.jit
    def by_root(feature, embedding):
        roots, length = jnp.arange(ROWS), ROWS + DEPTH
        true = jnp.pad(jnp.repeat(feature, ROWS, axis=0), ((0, 0), (0, DEPTH), (0, 0)))
        layout = dataclasses.replace(Layout.causal(ROWS, length), order=BlockCausal(k, -(roots + 1) % k))
        outputs = jnp.zeros_like(true)
        for _ in range(-(-DEPTH // k)):
            behind = jnp.arange(length) > roots[:, None]
            mixed = jnp.where(behind[:, :, None], jnp.roll(outputs, k, axis=1), true)
            y, _ = heads.join(params, mixed, jnp.repeat(embedding, ROWS, axis=0))
            outputs = heads.run(CONFIG, params, y, layout)[0]
        return outputs

    whole, _ = drafted(feature, embedding, jnp.ones((1, ROWS), jnp.int32), 0)
    expected = by_root(feature, embedding)
    for i, found in enumerate(whole):
        for p in range(ROWS):
            row = p - k + 1 + i
            if p >= k - 1:
                np.testing.assert_allclose(found[0, p], expected[p, row], rtol=0, atol=1e-10)
            elif i % k < k - 1 - p:
                assert not found[0, p].any(), "no pair stands there"

    first = 4
    packed, read = drafted(feature, embedding, jnp.array([[1] * first + [2] * (ROWS - first)]), 0)
    moved = (jnp.roll(x, -first, axis=1) for x in (feature, embedding))
    alone, read_alone = drafted(*moved, jnp.array([[1] * (ROWS - first) + [2] * first]), first % k)
    np.testing.assert_allclose(read[:, first:], read_alone[:, : ROWS - first], rtol=0, atol=1e-10)
    for i in range(DEPTH):
        np.testing.assert_allclose(packed[i][:, : first - k], whole[i][:, : first - k], rtol=0, atol=1e-10)
        np.testing.assert_allclose(packed[i][:, first:], alone[i][:, : ROWS - first], rtol=0, atol=1e-10)


def test_dropout_is_between_the_layers_of_the_lstm() -> None:
    """A quarter is left out, and what is kept is as much larger; without a key nothing is."""
    heads = FalconHeads(dropout=0.25)
    params = network(heads)
    feature, embedding = pairs()
    quiet, loud = (
        heads.join(params, feature, embedding[:, :ROWS], dropout_key=key)[0] for key in (None, jax.random.key(0))
    )
    assert np.array_equal(quiet, FalconHeads().join(params, feature, embedding[:, :ROWS])[0])
    kept = np.asarray(jax.random.bernoulli(jax.random.key(0), 0.75, feature.shape))
    y = np.concatenate([embedding[:, :ROWS], feature], axis=-1)
    for part, drop in zip(params["lstm"], (kept / 0.75, 1.0), strict=True):
        i, g, o = np.split(y @ np.asarray(part["input"]["kernel"]) + np.asarray(part["input"]["bias"]), 3, axis=-1)
        y = sigmoid(o) * np.tanh(sigmoid(i) * np.tanh(g)) * drop
    np.testing.assert_allclose(loud, y, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"block": 0}, "a Falcon network needs a block of at least 1, got 0"),
        ({"layers": 0}, "a Falcon network needs a layers of at least 1"),
        ({"dropout": 1.0}, "dropout must lie in 0..1, 1 excluded, got 1.0"),
    ],
)
def test_a_network_that_cannot_be_is_refused(sizes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        FalconHeads(**sizes)
