"""DFlash's network against its definition in numpy, who sees whom in it, and which layers of a target it reads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.heads.dflash import DFlashHeads, Selector, dflash_layers
from models.layers import apply_rope, rope_angles
from tests.noise import drawn

CONFIG = TransformerConfig(
    vocab_size=19, width=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=12, rope_theta=50.0
)
PLAIN = DFlashHeads((1, 3), mask_token=18, num_layers=2, block=3)
# All that may differ from it.
FULL = dataclasses.replace(PLAIN, window=3, causal=True, convolution=True, selector=Selector(5, 4))
TEXT, ANCHORS = 8, np.array([[2, 5]])

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def case(heads: DFlashHeads):
    """Parameters of a target and of the network, features of a text, and the network on two blocks of it."""
    target = drawn(transformer.param_shapes(CONFIG, jnp.float64), 0.5)
    params = drawn(jax.eval_shape(lambda t: heads.init(CONFIG, t, jax.random.key(0)), target), 0.4, seed=1)
    rng = np.random.default_rng(2)
    taps = {name: rng.normal(size=(1, TEXT, CONFIG.width)) for name in heads.taps}

    @jax.jit
    def run(taps, inputs, horizon):
        context = heads.context_rows(CONFIG, params, heads.fuse(CONFIG, params, taps), jnp.arange(TEXT)[None])
        return heads.run(CONFIG, params, inputs, heads.layout(jnp.asarray(ANCHORS), horizon), context)

    inputs = heads.inputs(target, jnp.array([[4, 7]]))
    return target, jax.tree.map(np.asarray, params), taps, inputs, run


def tables(heads: DFlashHeads) -> tuple[list[str], list[str]]:
    """What every row of the two blocks sees of the context, and of the blocks."""

    @jax.jit
    def seen(anchors):
        layout = heads.layout(anchors, anchors)
        return layout.sees_prefix(TEXT, heads.window)[0], layout.sees_rows(heads.window)[0]

    context, blocks = ([("".join("x" if see else "." for see in row)) for row in table] for table in seen(ANCHORS))
    return context, blocks


def test_masks_of_two_anchors_by_hand() -> None:
    assert tables(PLAIN) == (
        ["xx......"] * 3 + ["xxxxx..."] * 3,
        ["xxx..."] * 3 + ["...xxx"] * 3,
    )
    assert tables(FULL) == (
        ["xx......", ".x......", "........", "...xx...", "....x...", "........"],
        ["x.....", "xx....", "xxx...", "...x..", "...xx.", "...xxx"],
    )


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + CONFIG.norm_eps) * scale


rotate = jax.jit(lambda x, positions: apply_rope(x, rope_angles(CONFIG, positions)))


def rotated(x_TND: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.asarray(rotate(jnp.asarray(x_TND)[None], jnp.asarray(positions)[None])[0])


def by_hand(heads: DFlashHeads, params: dict, taps: dict, inputs: np.ndarray, anchor: int) -> np.ndarray:
    """The outputs of one block alone, every sum written out."""
    joined = np.concatenate([taps[f"layer:{k}"][0] for k in heads.target_layers], axis=-1)
    c = rms(joined @ params["fc"]["kernel"], params["hidden_norm"]["scale"])[:anchor]
    y, positions = inputs, np.concatenate([np.arange(anchor), anchor + np.arange(heads.block)])
    place = positions[anchor:]
    seen = (positions < anchor) | ~(heads.causal & (positions > place[:, None]))
    seen &= place[:, None] - positions < (heads.window or 99)
    for p in params["layers"]:

        def halves(name, y, function, p=p):
            x = rms(y, p[f"{name}_norm"]["scale"])
            if not heads.convolution:
                return y + function(x)
            conv = p[f"{name}_conv"]
            shift = (x @ conv["projection"]["kernel"]).reshape(len(x), 2, 2, -1)
            kernel = conv["base"] + np.repeat(shift, 16, axis=3)

            def around(side, z):
                before = np.concatenate([np.zeros_like(z[:1]), z[:-1]])
                return kernel[:, side, 0] * z + kernel[:, side, 1] * before

            return y + around(1, function(around(0, x)))

        def attention(x, p=p["attention"]):
            q = (x @ p["q"]["kernel"]).reshape(len(x), 4, 4)
            k, v = (np.concatenate([c, x]) @ p[n]["kernel"] for n in ("k", "v"))
            k, v = (np.repeat(z.reshape(len(z), 2, 4), 2, axis=1) for z in (k, v))
            q, k = rotated(rms(q, p["q_norm"]["scale"]), place), rotated(rms(k, p["k_norm"]["scale"]), positions)
            scores = np.where(seen, np.einsum("tnd,snd->nts", q, k) / 2, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            return np.einsum("nts,snd->tnd", weights, v).reshape(len(x), -1) @ p["o"]["kernel"]

        def mlp(x, p=p["mlp"]):
            gate = x @ p["gate"]["kernel"]
            return (gate / (1 + np.exp(-gate)) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]

        y = halves("mlp", halves("attention", y, attention), mlp)
    return rms(y, params["norm"]["scale"])


@pytest.mark.parametrize("heads", [PLAIN, FULL], ids=["plain", "full"])
def test_packed_blocks_are_single_blocks_and_see_nothing_else(heads: DFlashHeads) -> None:
    target, params, taps, inputs, run = case(heads)
    table = np.asarray(target["embed"]["embedding"])
    assert np.array_equal(inputs[0], table[[4, 18, 18, 7, 18, 18]])
    found = np.asarray(run(taps, inputs, ANCHORS))[0]
    first, second = found[:3], found[3:]
    np.testing.assert_allclose(first, by_hand(heads, params, taps, np.asarray(inputs)[0, :3], 2), atol=1e-10)
    np.testing.assert_allclose(second, by_hand(heads, params, taps, np.asarray(inputs)[0, 3:], 5), atol=1e-10)
    # Another block, a dropped one, and features of the anchor and what follows it change nothing.
    later = {name: np.where(np.arange(TEXT)[None, :, None] < 2, x, 7.0) for name, x in taps.items()}
    other = np.asarray(run(later, inputs.at[:, 3:].set(1.0), np.array([[2, 0]])))[0]
    np.testing.assert_allclose(other[:3], first, atol=1e-12)
    # A row that changes leaves those before it, if the block is causal: shorter blocks are beginnings of longer ones.
    changed = np.asarray(run(taps, inputs.at[:, 2].set(1.0), ANCHORS))[0]
    assert np.allclose(changed[:2], first[:2], atol=1e-12) == heads.causal and not np.allclose(changed[2], first[2])


def test_fresh_convolutions_and_selectors_change_nothing() -> None:
    """What the network fills is what it fills without them, and a slot's candidates keep their scores."""
    target, _, taps, inputs, _ = case(PLAIN)
    heads = dataclasses.replace(PLAIN, num_layers=1, convolution=True, selector=Selector(5, 4))
    fresh = jax.jit(lambda target: heads.init(CONFIG, target, jax.random.key(0)))(target)
    conv = fresh["layers"][0]["mlp_conv"]
    assert (conv["base"][:, 0] == 1).all() and not conv["base"][:, 1].any() and not conv["projection"]["kernel"].any()
    assert np.array_equal(fresh["norm"]["scale"], target["final_norm"]["scale"])

    @jax.jit
    def both(taps, inputs):
        context = heads.context_rows(CONFIG, fresh, heads.fuse(CONFIG, fresh, taps), jnp.arange(TEXT)[None])
        layout = heads.layout(jnp.asarray(ANCHORS), jnp.asarray(ANCHORS))
        shapes = heads, dataclasses.replace(heads, convolution=False, selector=None)
        filled = [shape.run(CONFIG, fresh, inputs, layout, context) for shape in shapes]
        scores = jnp.arange(4.0)[None]
        return filled, heads.scores_after(fresh, scores, jnp.array([[0, 3, 5, 7]]), filled[0][:, 1], jnp.array([[2]]))

    (found, plain), scores = both(taps, inputs)
    assert np.array_equal(found, plain) and np.ptp(found) > 1
    assert np.array_equal(scores[0, 0], np.arange(4.0)) and np.asarray(fresh["selector"]["predecessor"]).any()


def test_scores_of_pairs_of_tokens() -> None:
    rng = np.random.default_rng(0)
    params = {"selector": case(FULL)[1]["selector"]}
    best, hidden = rng.normal(size=(2, 4)), rng.normal(size=(2, 32))
    tokens, before = rng.integers(19, size=(2, 4)), np.array([[3, 5, 3], [0, 1, 2]])
    scores = jax.jit(FULL.scores_after)(params, *map(jnp.asarray, (best, tokens, hidden, before)))
    chosen = params["selector"]
    for b in range(2):
        gate = hidden[b] @ chosen["hidden"]["kernel"]
        pairs = (chosen["predecessor"][before[b]] * gate) @ chosen["successor"][tokens[b]].T
        np.testing.assert_allclose(scores[b], best[b] + pairs, atol=1e-10)


def test_rows_that_draft() -> None:
    hidden = jnp.arange(6.0)[None, :, None]
    assert PLAIN.depth == 2 and PLAIN.drafting(hidden)[0, :, :, 0].tolist() == [[1, 2], [4, 5]]
    shifted = dataclasses.replace(PLAIN, shifted=True)
    assert shifted.depth == 3 and shifted.drafting(hidden)[0, :, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    # Of a causal block what stands behind the slots that are asked for is not run.
    assert PLAIN.down_to(1) == PLAIN and FULL.down_to(1) == dataclasses.replace(FULL, block=2)
    causal = dataclasses.replace(shifted, causal=True)
    assert causal.down_to(2) == dataclasses.replace(causal, block=2) and causal.down_to(3) == causal


def test_layers_that_are_read_exist() -> None:
    assert dflash_layers(36, 5) == (2, 10, 18, 26, 34) and dflash_layers(36, 1) == (19,)
    assert dflash_layers(30, 5) == (2, 9, 15, 21, 28) and dflash_layers(4, 5) == (1, 2, 3)
    for layers in range(1, 40):
        for count in range(1, 7):
            chosen = dflash_layers(layers, count)
            assert list(chosen) == sorted(set(chosen)) and set(chosen) <= set(range(layers))
            assert len(chosen) == min(count, max(layers - 1, 1))
            DFlashHeads(chosen, 0).check(dataclasses.replace(CONFIG, num_layers=layers))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_layers": (1, 4)}, "reads what enters layer 4, but the target has layers 0 to 3"),
        ({"target_layers": ()}, "at least one layer of the target"),
        ({"mask_token": 19}, "fills blocks with token 19, but the target has tokens 0 to 18"),
        ({"block": 1}, "drafts at least one token, got 2 layers and a block of 1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"selector": Selector(4, 20)}, "1 to 19 candidates, got 4 and 20"),
        ({"selector": Selector(4, 9), "vocab_size": 8}, "1 to 8 candidates, got 4 and 9"),
        ({"vocab_size": 20}, "vocabulary must have 0 .all. to 19 tokens, as many as the target's, got 20"),
    ],
)
def test_a_network_for_another_target_is_refused(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(PLAIN, **change).check(CONFIG)
    narrow = dataclasses.replace(CONFIG, width=8)
    with pytest.raises(UserError, match="multiple of 16, got 8"):
        FULL.check(narrow)
