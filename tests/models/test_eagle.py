"""EAGLE's networks against their definition in numpy, and the unrolled forward against drafting step by step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention, transformer
from models.attention import Sources
from models.config import TransformerConfig
from models.errors import UserError
from models.heads.eagle import Eagle3Heads, EagleHeads, eagle3_layers, unroll
from models.layers import apply_rope, rope_angles
from models.layout import Layout
from tests.noise import drawn, noisy

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
    "eagle3.1": Eagle3Heads(0, 2, 3, fc_norm=True, norm_before_residual=True, norm_output=True),
}
SWITCHES = {
    "norm_before_residual": Eagle3Heads(0, 2, 3, norm_before_residual=True),
    "norm_output": Eagle3Heads(0, 2, 3, norm_output=True),
    "no head_norm": Eagle3Heads(0, 2, 3, head_norm=False),
}
EPSILON = CONFIG.norm_eps

pytestmark = pytest.mark.usefixtures("x64")
# A bias and a vocabulary are not what steps differ in.
each_kind = pytest.mark.parametrize(
    "heads",
    [
        pytest.param(heads, id=name, marks=[pytest.mark.slow] if name.endswith(("bias", "tokens")) else [])
        for name, heads in KINDS.items()
    ],
)


ROWS = 9

forward = jax.jit(transformer.forward, static_argnames=("config", "layers", "taps"))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(heads, config, params, *inputs):
    return heads.run(config, params, *inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def scores(heads, config, params, target, hidden):
    return heads.logits(config, params, target, hidden)


@pytest.fixture
def target() -> dict:
    return drawn(transformer.param_shapes(CONFIG, jnp.float64), 0.3)


def network(heads, target: dict) -> dict:
    """Parameters of `heads`, every one drawn."""
    params = drawn(jax.eval_shape(lambda t: heads.init(CONFIG, t, jax.random.key(0)), target), 0.3, seed=1)
    return params | ({"draft_vocab": jnp.arange(heads.vocab_size)} if "draft_vocab" in params else {})


def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON) * scale


@functools.cache
def turns() -> np.ndarray:
    """What RoPE makes of every basis vector at positions 0 to 31, [32, D, D]."""
    x = jnp.broadcast_to(jnp.eye(CONFIG.head_dim), (1, 32, CONFIG.head_dim, CONFIG.head_dim))
    return np.asarray(jax.jit(lambda x: apply_rope(x, rope_angles(CONFIG, jnp.arange(32)[None])))(x)[0])


def rotated(x_TND: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.einsum("tnd,tde->tne", x_TND, turns()[positions])


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
    return np.concatenate(normed, axis=-1), normed[1] if heads.norm_before_residual else feature


def output_of(heads, params: dict, g: np.ndarray) -> np.ndarray:
    """What stands in for the next feature."""
    normed = isinstance(heads, Eagle3Heads) and heads.norm_output
    return rms(g, np.asarray(params["norm"]["scale"])) if normed else g


def text_and_features(heads, target: dict, params: dict):
    """Two texts, their layout, features of theirs, and `ahead(k)`, the embeddings of the tokens k places further on."""
    tokens = np.random.default_rng(3).integers(CONFIG.vocab_size, size=(2, ROWS))
    layout = Layout.causal(2, ROWS)
    taps = forward(CONFIG, target, tokens, layout, taps=heads.taps).taps
    table = np.asarray(target["embed"]["embedding"])
    return tokens, layout, heads.fuse(CONFIG, params, taps), lambda k: jnp.asarray(table[np.roll(tokens, -k, axis=1)])


@pytest.mark.parametrize("heads", [*KINDS.values(), *SWITCHES.values()], ids=[*KINDS, *SWITCHES])
def test_run_and_logits_match_numpy(heads, target: dict) -> None:
    params = network(heads, target)
    _, layout, feature, ahead = text_and_features(heads, target, params)
    embedding = ahead(1)
    found, rows = run(heads, CONFIG, params, feature, embedding, layout)
    assert rows["k"].shape == (2, 2, 4, ROWS) and rows["v"].shape == (2, 2, ROWS, 4)
    logits = scores(heads, CONFIG, params, target, found)
    for b in range(2):
        x, residual = inputs_of(heads, params, np.asarray(feature[b]), np.asarray(embedding[b]))
        expected = layer(params["layer"], x, residual, np.arange(ROWS), np.tril(np.ones((ROWS, ROWS), bool)))
        np.testing.assert_allclose(found[b], output_of(heads, params, expected), atol=1e-10)
        if isinstance(heads, EagleHeads):
            by_hand = expected @ np.asarray(target["head"]["kernel"])
        else:
            read = rms(expected, np.asarray(params["norm"]["scale"])) if heads.head_norm else expected
            by_hand = read @ np.asarray(params["vocab"]["kernel"])
        np.testing.assert_allclose(logits[b], by_hand, atol=1e-10)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_zero_centred_norms_are_norms_of_one_more(kind: str, target: dict) -> None:
    """As Gemma's are: the network of such a target is that of another whose scales are larger by one."""
    heads, zero = KINDS[kind], dataclasses.replace(CONFIG, zero_centred_norm=True)
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), transformer.param_shapes(zero))
    fresh = jax.jit(lambda target, key: heads.init(zero, target, key))(start, jax.random.key(1))
    assert not any(leaf.any() for path, leaf in jax.tree.leaves_with_path(fresh) if path[-1].key == "scale")
    params = noisy(fresh, 0.3)
    centred = jax.tree.map_with_path(lambda path, leaf: leaf + (path[-1].key == "scale"), params)
    _, layout, feature, ahead = text_and_features(heads, target, params)
    found, expected = (
        scores(heads, config, p, target, run(heads, config, p, feature, ahead(1), layout)[0])
        for config, p in ((zero, params), (CONFIG, centred))
    )
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("norm", [None, "fc_norm", "norm_before_fc"])
def test_eagle3_fuses_what_enters_three_layers(norm: str | None, target: dict) -> None:
    heads = Eagle3Heads(0, 2, 3, **({norm: True} if norm else {}))
    params = network(heads, target)
    tokens, layout, feature, _ = text_and_features(heads, target, params)
    entering = [transformer.embed(CONFIG, target, jnp.asarray(tokens))]
    for k in range(3):
        entering.append(forward(CONFIG, target, entering[k], layout, layers=(k, k + 1), taps=("pre_norm",)))
        entering[-1] = entering[-1].taps["pre_norm"]
    low_middle_high = [np.asarray(entering[k]) for k in (0, 2, 3)]
    if norm == "fc_norm":
        scales = [np.asarray(each["scale"]) for each in params["fc_norm"]]
        low_middle_high = [rms(x, scale) for x, scale in zip(low_middle_high, scales, strict=True)]
    joined = np.concatenate(low_middle_high, axis=-1)
    if norm == "norm_before_fc":
        joined = rms(joined, np.asarray(params["fc_norm"]["scale"]))
    np.testing.assert_allclose(feature, joined @ np.asarray(params["fc"]["kernel"]), atol=1e-10)


@pytest.mark.parametrize("tied", [False, True])
def test_eagle3_starts_with_rows_of_the_targets_head(tied: bool) -> None:
    config = dataclasses.replace(CONFIG, tied_embeddings=tied)
    target = drawn(transformer.param_shapes(config, jnp.float64), 0.3)
    heads = KINDS["eagle3 of few tokens"]
    vocabulary = np.arange(heads.vocab_size)
    params = jax.jit(lambda target: heads.init(config, target, jax.random.key(1)))(target)
    hidden = jax.random.normal(jax.random.key(2), (5, 8), jnp.float64)
    expected = transformer.head(config, target, transformer.final_norm(config, target, hidden))[:, vocabulary]
    np.testing.assert_allclose(heads.logits(config, params, target, hidden), expected, atol=1e-12)
    assert heads.vocabulary(params).tolist() == vocabulary.tolist()
    kernel = target["embed"]["embedding"].T if tied else target["head"]["kernel"]
    assert np.array_equal(params["vocab"]["kernel"], kernel[:, vocabulary])
    assert heads.vocabulary(network(KINDS["eagle3"], target)) is None


unrolled = jax.jit(unroll, static_argnums=(0, 1))


@each_kind
@pytest.mark.parametrize("packed", [False, True])
def test_unrolled_equals_a_dense_mask_over_all_steps(heads, packed: bool, target: dict) -> None:
    steps, rows = 4, ROWS
    params = network(heads, target)
    segments = np.array([[1] * 4 + [2] * 5] * 2) if packed else None
    layout = jax.jit(lambda s: Layout.causal(2, rows, s))(segments)
    _, _, feature, ahead = text_and_features(heads, target, params)
    embeddings = [ahead(1 + k) for k in range(steps)]
    found = unrolled(heads, CONFIG, params, feature, embeddings, layout)

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
            g = layer(params["layer"], x, residual, positions[:size], seen[:size, :size])[-rows:]
            f = output_of(heads, params, g)
            np.testing.assert_allclose(found[k][b], f, atol=1e-9)


@each_kind
def test_unrolled_equals_drafting_step_by_step_with_a_cache(heads, target: dict) -> None:
    """From every position, with true tokens, one pair at a time; true pairs in the prefix, drafted ones in scratch."""
    steps, rows = 4, ROWS
    params = network(heads, target)
    _, layout, feature, ahead = text_and_features(heads, target, params)
    embeddings = [ahead(1 + k) for k in range(steps)]
    expected = unrolled(heads, CONFIG, params, feature, embeddings, layout)
    true = run(heads, CONFIG, params, feature, embeddings[0], layout)[1]
    for p in range(rows):
        f = feature[:, p : p + 1]
        scratch = {"k": np.zeros((2, 2, 4, steps)), "v": np.zeros((2, 2, steps, 4))}
        for k in range(steps):
            place = Layout(
                jnp.full((2, 1), p + k),
                jnp.full((2, 1), p),
                scratch_seen=jnp.asarray(np.broadcast_to(np.arange(steps) < k, (2, 1, steps))),
                scratch_positions=jnp.zeros((2, steps), jnp.int32),
            )
            sources = Sources(true, jax.tree.map(jnp.asarray, scratch))
            f, fresh = run(heads, CONFIG, params, f, embeddings[k][:, p : p + 1], place, sources)
            np.testing.assert_allclose(f[:, 0], expected[k][:, p], atol=1e-10)
            scratch["k"][:, :, :, k], scratch["v"][:, :, k] = fresh["k"][:, :, :, 0], fresh["v"][:, :, 0]


def test_unrolled_in_blocks_it_has_the_values_and_slopes_of_one_block(target: dict, monkeypatch) -> None:
    heads = KINDS["eagle3"]
    params = network(heads, target)
    _, layout, feature, ahead = text_and_features(heads, target, params)
    embeddings = [ahead(1 + k) for k in range(3)]

    def total(params, feature):
        outputs = unroll(heads, CONFIG, params, feature, embeddings, layout)
        return sum(jnp.sum(jnp.sin(out)) for out in outputs), outputs

    def slopes(block):
        monkeypatch.setattr(attention, "BLOCK", block)
        return jax.value_and_grad(total, (0, 1), has_aux=True)(params, feature)

    whole, cut = jax.jit(lambda: (slopes(2**27), slopes(2 * 4 * ROWS * 3)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), cut, whole)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (cut, whole)), strict=True)), "nothing was cut"


def test_no_step_makes_a_mask_over_all_steps(target: dict) -> None:
    heads, rows, steps = KINDS["eagle3"], 33, 4
    params = network(heads, target)

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


def test_norms_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="fc_norm and norm_before_fc exclude each other"):
        Eagle3Heads(0, 1, 2, fc_norm=True, norm_before_fc=True)
    with pytest.raises(UserError, match="norm_output without head_norm is no network"):
        Eagle3Heads(0, 1, 2, norm_output=True, head_norm=False)


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
