"""EAGLE's networks against their definition in numpy, and the unrolled forward against drafting step by step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.attention import Sources
from models.config import TransformerConfig
from models.errors import UserError
from models.heads.eagle import Eagle3Heads, EagleHeads, eagle3_layers, unroll
from models.layers import apply_rope, rope_angles
from models.layout import Layout
from tests.noise import noisy

CAP = 0.5  # so low that every score bends
CONFIG = TransformerConfig(
    vocab_size=19,
    width=8,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=12,
    rope_theta=50.0,
    attention_softcap=CAP,
)
KINDS = {
    "eagle": EagleHeads(),
    "eagle without bias": EagleHeads(bias=False),
    "eagle3": Eagle3Heads(0, 2, 3),
    "eagle3 of few tokens": Eagle3Heads(1, 2, 3, vocab_size=7),
}
EPSILON = CONFIG.norm_eps

pytestmark = pytest.mark.usefixtures("x64")
each_kind = pytest.mark.parametrize("heads", KINDS.values(), ids=KINDS)


@pytest.fixture
def target() -> dict:
    return noisy(transformer.init(CONFIG, jax.random.key(0), jnp.float64), 0.3)


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON) * scale


def rotated(x_TND: np.ndarray, positions: np.ndarray) -> np.ndarray:
    angles = rope_angles(CONFIG, jnp.asarray(positions)[None])
    return np.asarray(apply_rope(jnp.asarray(x_TND)[None], angles)[0])


def layer(params: dict, x: np.ndarray, residual: np.ndarray, positions: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """One draft layer on rows `x`, whoever sees whom as a dense mask."""
    p = jax.tree.map(np.asarray, params)
    q, k, v = ((x @ p["attention"][n]["kernel"]).reshape(len(x), -1, CONFIG.head_dim) for n in ("q", "k", "v"))
    q, k = rotated(q, positions), rotated(k, positions)
    k, v = (np.repeat(y, 2, axis=1) for y in (k, v))
    scores = CAP * np.tanh(np.einsum("tnd,snd->nts", q, k) / np.sqrt(CONFIG.head_dim) / CAP)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    y = residual + np.einsum("nts,snd->tnd", weights, v).reshape(len(x), -1) @ p["attention"]["o"]["kernel"]
    z = rms(y, p["mlp_norm"]["scale"])
    gate = z @ p["mlp"]["gate"]["kernel"]
    return y + (gate / (1 + np.exp(-gate)) * (z @ p["mlp"]["up"]["kernel"])) @ p["mlp"]["down"]["kernel"]


def inputs_of(heads, params: dict, feature: np.ndarray, embedding: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What attention reads, and the residual stream that it adds to."""
    p = jax.tree.map(np.asarray, params)
    if isinstance(heads, EagleHeads):
        y = np.concatenate([embedding, feature], axis=-1) @ p["fc"]["kernel"] + (p["fc"]["bias"] if heads.bias else 0)
        return y, y
    normed = [rms(embedding, p["input_norm"]["scale"]), rms(feature, p["hidden_norm"]["scale"])]
    return np.concatenate(normed, axis=-1), feature


def text_and_features(heads, target: dict, params: dict, batch: int = 2, rows: int = 9):
    tokens = jax.random.randint(jax.random.key(3), (batch, rows), 0, CONFIG.vocab_size)
    layout = Layout.causal(batch, rows)
    out = transformer.forward(CONFIG, target, tokens, layout, taps=heads.taps)
    return tokens, layout, heads.fuse(params, out.taps), out


@each_kind
def test_run_and_logits_match_numpy(heads, target: dict) -> None:
    params = noisy(heads.init(CONFIG, target, jax.random.key(1)), 0.3)
    tokens, layout, feature, _ = text_and_features(heads, target, params)
    embedding = transformer.lookup(target, jnp.roll(tokens, -1, axis=1))
    found, rows = heads.run(CONFIG, params, feature, embedding, layout)
    assert rows["k"].shape == (2, 2, 4, 9) and rows["v"].shape == (2, 2, 9, 4)
    logits = heads.logits(CONFIG, params, target, found)
    for b in range(2):
        x, residual = inputs_of(heads, params, np.asarray(feature[b]), np.asarray(embedding[b]))
        expected = layer(params["layer"], x, residual, np.arange(9), np.tril(np.ones((9, 9), bool)))
        np.testing.assert_allclose(found[b], expected, atol=1e-10)
        if isinstance(heads, EagleHeads):
            scores = expected @ np.asarray(target["head"]["kernel"])
        else:
            scores = rms(expected, np.asarray(params["norm"]["scale"])) @ np.asarray(params["vocab"]["kernel"])
        np.testing.assert_allclose(logits[b], scores, atol=1e-10)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_zero_centred_norms_are_norms_of_one_more(kind: str, target: dict) -> None:
    """As Gemma's are: the network of such a target is that of another whose scales are larger by one."""
    heads, zero = KINDS[kind], dataclasses.replace(CONFIG, zero_centred_norm=True)
    fresh = heads.init(zero, transformer.init(zero, jax.random.key(0), jnp.float64), jax.random.key(1))
    assert not any(leaf.any() for path, leaf in jax.tree.leaves_with_path(fresh) if path[-1].key == "scale")
    params = noisy(fresh, 0.3)
    centred = jax.tree.map_with_path(lambda path, leaf: leaf + (path[-1].key == "scale"), params)
    _, layout, feature, _ = text_and_features(heads, target, params)
    embedding = feature[:, ::-1]
    found, expected = (
        heads.logits(config, p, target, heads.run(config, p, feature, embedding, layout)[0])
        for config, p in ((zero, params), (CONFIG, centred))
    )
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_eagle3_fuses_what_enters_three_layers(target: dict) -> None:
    heads = KINDS["eagle3"]
    params = noisy(heads.init(CONFIG, target, jax.random.key(1)), 0.3)
    tokens, layout, feature, _ = text_and_features(heads, target, params)
    entering = [transformer.embed(CONFIG, target, tokens)]
    for k in range(3):
        entering.append(transformer.forward(CONFIG, target, entering[k], layout, layers=(k, k + 1), taps=("pre_norm",)))
        entering[-1] = entering[-1].taps["pre_norm"]
    joined = np.concatenate([entering[0], entering[2], entering[3]], axis=-1)
    np.testing.assert_allclose(feature, joined @ np.asarray(params["fc"]["kernel"]), atol=1e-10)


@pytest.mark.parametrize("tied", [False, True])
def test_eagle3_starts_with_rows_of_the_targets_head(tied: bool) -> None:
    config = dataclasses.replace(CONFIG, tied_embeddings=tied)
    target = noisy(transformer.init(config, jax.random.key(0), jnp.float64), 0.3)
    vocabulary = jnp.array([2, 3, 5, 7, 11, 13, 17], jnp.int32)
    heads = KINDS["eagle3 of few tokens"]
    params = heads.init(config, target, jax.random.key(1), vocabulary)
    hidden = jax.random.normal(jax.random.key(2), (5, 8), jnp.float64)
    expected = transformer.head(config, target, transformer.final_norm(config, target, hidden))[:, vocabulary]
    np.testing.assert_allclose(heads.logits(config, params, target, hidden), expected, atol=1e-12)
    assert heads.vocabulary(params).tolist() == vocabulary.tolist()
    kernel = target["embed"]["embedding"].T if tied else target["head"]["kernel"]
    assert np.array_equal(params["vocab"]["kernel"], kernel[:, vocabulary])
    assert heads.vocabulary(KINDS["eagle3"].init(config, target, jax.random.key(1))) is None


@each_kind
@pytest.mark.parametrize("packed", [False, True])
def test_unrolled_equals_a_dense_mask_over_all_steps(heads, packed: bool, target: dict) -> None:
    steps, rows = 4, 9
    params = noisy(heads.init(CONFIG, target, jax.random.key(1)), 0.3)
    segments = jnp.array([[1] * 4 + [2] * 5] * 2) if packed else None
    layout = Layout.causal(2, rows, segments)
    tokens, _, feature, _ = text_and_features(heads, target, params)
    embeddings = [transformer.lookup(target, jnp.roll(tokens, -1 - k, axis=1)) for k in range(steps)]
    found = unroll(heads, CONFIG, params, feature, embeddings, layout)

    index = np.arange(rows)
    same = np.ones((rows, rows), bool) if segments is None else np.equal.outer(segments[0], segments[0])
    first, own = (index[:, None] >= index) & same, index[:, None] == index
    seen = np.zeros((steps * rows, steps * rows), bool)
    for k in range(steps):
        block = [first, *[own] * k]
        seen[k * rows : (k + 1) * rows, : (k + 1) * rows] = np.concatenate(block, axis=1)
    for b in range(2):
        place = np.asarray(layout.positions[b])
        positions = np.concatenate([place + k for k in range(steps)])
        x = residual = np.zeros((0, 0))
        f = np.asarray(feature[b])
        for k in range(steps):
            more = inputs_of(heads, params, f, np.asarray(embeddings[k][b]))
            x, residual = more if k == 0 else map(np.concatenate, zip((x, residual), more, strict=True))
            size = (k + 1) * rows
            f = layer(params["layer"], x, residual, positions[:size], seen[:size, :size])[-rows:]
            np.testing.assert_allclose(found[k][b], f, atol=1e-9)


@each_kind
def test_unrolled_equals_drafting_step_by_step_with_a_cache(heads, target: dict) -> None:
    """From every position, with true tokens, one pair at a time; true pairs in the prefix, drafted ones in scratch."""
    steps, rows = 3, 7
    params = noisy(heads.init(CONFIG, target, jax.random.key(1)), 0.3)
    tokens, layout, feature, _ = text_and_features(heads, target, params, rows=rows)
    embedding = transformer.lookup(target, jnp.pad(tokens, ((0, 0), (0, steps))))
    unrolled = unroll(heads, CONFIG, params, feature, [embedding[:, 1 + k :][:, :rows] for k in range(steps)], layout)
    true = heads.run(CONFIG, params, feature, embedding[:, 1:][:, :rows], layout)[1]
    for p in range(rows):
        f = feature[:, p : p + 1]
        scratch = {"k": jnp.zeros((2, 2, 4, steps)), "v": jnp.zeros((2, 2, steps, 4))}
        for k in range(steps):
            place = Layout(
                jnp.full((2, 1), p + k),
                jnp.full((2, 1), p),
                scratch_seen=jnp.broadcast_to(jnp.arange(steps) < k, (2, 1, steps)),
                scratch_positions=jnp.zeros((2, steps), jnp.int32),
            )
            f, fresh = heads.run(CONFIG, params, f, embedding[:, p + 1 + k][:, None], place, Sources(true, scratch))
            np.testing.assert_allclose(f[:, 0], unrolled[k][:, p], atol=1e-10)
            scratch = {
                "k": scratch["k"].at[:, :, :, k].set(fresh["k"][:, :, :, 0]),
                "v": scratch["v"].at[:, :, k].set(fresh["v"][:, :, 0]),
            }


def test_no_step_makes_a_mask_over_all_steps(target: dict) -> None:
    heads, rows, steps = KINDS["eagle3"], 33, 4
    params = heads.init(CONFIG, target, jax.random.key(1))

    def run(feature, embedding):
        return unroll(heads, CONFIG, params, feature, [embedding] * steps, Layout.causal(1, rows))

    x = jnp.zeros((1, rows, 8))
    shapes = [v.aval.shape for e in jax.make_jaxpr(run)(x, x).jaxpr.eqns for v in e.outvars]
    assert any(shape.count(rows) == 2 for shape in shapes)
    assert not [shape for shape in shapes if any(k * rows in shape for k in range(3, steps + 1))]  # 2 is heads per key


@pytest.mark.parametrize(("layers", "expected"), [(32, (2, 16, 29)), (7, (2, 3, 4)), (5, (1, 2, 4)), (1, (0, 0, 0))])
def test_layers_that_eagle3_reads_exist(layers: int, expected: tuple[int, int, int]) -> None:
    assert eagle3_layers(layers) == expected
    for n in range(1, 40):
        assert set(eagle3_layers(n)) <= set(range(n))
        assert list(eagle3_layers(n)) == sorted(eagle3_layers(n))
        Eagle3Heads(*eagle3_layers(n)).check(dataclasses.replace(CONFIG, num_layers=n))


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (Eagle3Heads(0, 2, 4), r"EAGLE-3 reads what enters layer 4 \(high\), but the target has layers 0 to 3"),
        (Eagle3Heads(-1, 2, 3), r"layer -1 \(low\)"),
        (Eagle3Heads(0, 2, 3, 20), r"must have 0 \(all\) to 19 tokens, as many as the target's, got 20"),
    ],
)
def test_a_network_for_another_target_is_refused(heads: Eagle3Heads, words: str) -> None:
    with pytest.raises(UserError, match=words):
        heads.check(CONFIG)
