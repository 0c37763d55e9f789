"""Attention equals sums over pairs written out, and with a library kernel for the prefix the dense computation."""

import dataclasses
import functools
import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models.attention
from decoding.generate import generate
from models.attention import Sources, attend
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.target import Target
from models.layout import BlockCausal, Blocks, Causal, Layout, Tree
from models.linear import wide_einsum
from models.transformer import param_shapes
from tests.decoding.drafter_cases import BUSHY, CASES
from tests.noise import drawn

B, K, N, D, S = 3, 2, 6, 8, 40
LENGTHS = jnp.array([0, 17, S])


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rows(seed: int, slots: int) -> dict[str, jax.Array]:
    return {"k": normal(seed, B, K, D, slots), "v": normal(seed + 100, B, K, slots, D)}


# Of one kind of key source: keys [K, D, S], values [K, S, D], whether the tree lets row t see s [T, S], positions [S].
Source = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def pair_by_pair(
    q_TND: np.ndarray, places: np.ndarray, sources: list[Source], scale: float, cap: float | None, window: int | None
) -> np.ndarray:
    """Attention of the new rows of one text, [T, N, D]."""
    out = np.zeros(q_TND.shape)
    for t, n in np.ndindex(q_TND.shape[:2]):
        scores, values = [], []
        for k_KDS, v_KSD, lets_TS, places_S in sources:
            head = n // (q_TND.shape[1] // len(k_KDS))
            for s, place in enumerate(places_S):
                if lets_TS[t, s] and (window is None or place > places[t] - window):
                    score = scale * (q_TND[t, n] @ k_KDS[head, :, s])
                    scores.append(score if cap is None else cap * np.tanh(score / cap))
                    values.append(v_KSD[head, s])
        weights = np.exp(np.array(scores) - max(scores))
        out[t, n] = weights @ np.array(values) / weights.sum()
    return out


# New rows of a draft tree, after scratch rows of its first levels, of which the last was never filled. No two sizes are
# the same, and with a window of 3 some pair of every kind stands where the window ends.
DEPTHS, SCRATCH_DEPTHS = np.array([2, 3, 3, 4, 5]), np.array([0, 1, 1, 0])
ANCESTORS = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]], bool)
SCRATCH_SEEN = np.array([[1, 1, 0, 0]] * 2 + [[1, 0, 1, 0]] * 3, bool)


@pytest.mark.parametrize(
    ("window", "cap", "traced"), [(None, 1.5, False), (3, None, False), (3, 1.5, False), (3, 1.5, True)]
)
def test_windows_caps_and_scratch_are_sums_over_pairs(window: int | None, cap: float | None, traced: bool) -> None:
    T, lengths = len(DEPTHS), np.array([1, 9, 11])
    places, scratch_places = (lengths[:, None] + depths for depths in (DEPTHS, SCRATCH_DEPTHS))
    q = 3 * normal(4, B, T, N, D)
    new, prefix, scratch = rows(0, T), rows(1, 11), rows(2, len(SCRATCH_DEPTHS))
    layout = Layout(
        jnp.asarray(places),
        jnp.asarray(lengths)[:, None],
        Tree(jnp.asarray(ANCESTORS)[None]),
        scratch_seen=jnp.broadcast_to(SCRATCH_SEEN, (B, *SCRATCH_SEEN.shape)),
        scratch_positions=jnp.asarray(scratch_places),
    )
    run = functools.partial(attend, q, new, Sources(prefix, scratch), layout, scale=0.4, cap=cap)
    found = jax.jit(lambda w: run(window=w))(window) if traced else jax.jit(lambda: run(window=window))()
    for b, length in enumerate(lengths):
        sources = []
        for source, lets, where in (
            (new, ANCESTORS, places[b]),
            (scratch, SCRATCH_SEEN, scratch_places[b]),
            (prefix, np.ones((T, length), bool), np.arange(length)),
        ):
            keys, values = np.asarray(source["k"])[b], np.asarray(source["v"])[b]
            sources.append((keys[..., : len(where)], values[:, : len(where)], lets, where))
            assert np.any(lets & (where == places[b][:, None] - 3))
        expected = pair_by_pair(np.asarray(q[b], np.float64), places[b], sources, 0.4, cap, window)
        np.testing.assert_allclose(found[b], expected.reshape(T, -1), atol=2e-6)


@pytest.mark.parametrize("scratch_slots", [0, 5])
def test_split_attention_is_dense_attention(scratch_slots: int) -> None:
    nodes = BUSHY.size
    scratch, extra = None, {}
    if scratch_slots:
        scratch = rows(2, scratch_slots)
        seen = normal(3, B, nodes, scratch_slots) > 0
        extra = dict(scratch_seen=seen, scratch_positions=jnp.zeros((B, scratch_slots), jnp.int32))
    positions = LENGTHS[:, None] + jnp.asarray(BUSHY.depth)
    dense = Layout(positions, LENGTHS[:, None], Tree(jnp.asarray(BUSHY.ancestors)[None]), **extra)
    split = dataclasses.replace(dense, attention="split")
    q = 3 * normal(4, B, nodes, N, D)
    shorter = dataclasses.replace(split, horizon=(LENGTHS - jnp.array([0, 1, 1]))[:, None])

    @jax.jit
    def mixed(q, new, prefix, scratch, layouts):
        return [attend(q, new, Sources(prefix, scratch), layout, scale=0.4) for layout in layouts]

    given = q, rows(0, nodes), rows(1, S), scratch, (dense, split, shorter)
    by_dense, by_split, changed = jax.device_get(mixed(*given))
    np.testing.assert_allclose(by_dense, by_split, atol=2e-6)
    assert np.abs(changed - by_dense)[1:].max() > 1e-3, "the length is what masks"


CONFIG = TransformerConfig(vocab_size=40, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)


def test_split_decoding_writes_the_same_text() -> None:
    config = dataclasses.replace(CONFIG, num_layers=1)
    target = Target(config, drawn(param_shapes(config), 0.3))
    prompts = [[1, 2, 3], [4] * 20]
    drafter, drafter_params = CASES["hydra++"](target, jax.random.key(1))
    for more in ({}, dict(drafter=drafter, drafter_params=drafter_params)):
        dense, split = (
            generate(target, prompts, max_new_tokens=40, stop=[], attention=kind, **more) for kind in ("dense", "split")
        )
        assert split.tokens == dense.tokens and len(set(dense.tokens[0])) > 5


@pytest.mark.parametrize(("rows", "head_dim", "masked"), [(9, 8, True), (8, 12, False), (8, 136, False), (9, 8, False)])
def test_what_the_library_s_kernel_does_not_take_is_done_in_blocks(
    monkeypatch: pytest.MonkeyPatch, rows: int, head_dim: int, masked: bool
) -> None:
    """On a GPU: odd rows with a mask, and heads that are no multiple of eight or too large."""
    gpu = SimpleNamespace(client=SimpleNamespace(platform_version="cuda 13"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    segments = jnp.ones((2, rows), jnp.int32) if masked else None
    layout = Layout.causal(2, rows, segments, "fused")
    q = jnp.ones((2, rows, 2, head_dim), jnp.bfloat16)
    kernel = functools.partial(models.attention.kernel_for, layout=layout, cap=None, window=None)
    assert kernel(q) == ("library" if (rows, head_dim, masked) == (9, 8, False) else "blocks")
    assert kernel(q.astype(jnp.float32)) == kernel(q, cap=5.0) == kernel(q, window=4) == "blocks"
    if kernel(q) == "library":
        gpu.client.platform_version = "rocm 7"
        assert kernel(q) == "blocks"
    else:
        kv = {"k": jnp.ones((2, 1, head_dim, rows), jnp.bfloat16), "v": jnp.ones((2, 1, rows, head_dim), jnp.bfloat16)}
        mixed = jax.eval_shape(lambda: attend(q, kv, Sources(), layout, scale=1.0))
        assert mixed.shape == (2, rows, 2 * head_dim)


def test_what_split_attention_cannot_do_is_refused() -> None:
    params = drawn(param_shapes(CONFIG), 0.3)
    for change in (dict(windows=(4, None)), dict(attention_softcap=30.0)):
        target = Target(dataclasses.replace(CONFIG, **change), params)
        with pytest.raises(UserError, match="'split' cannot serve a target with sliding windows or an attention soft"):
            generate(target, [[1]], max_new_tokens=2, attention="split")
    with pytest.raises(UserError, match="attention must be 'dense' or 'split', got 'flash'"):
        generate(Target(CONFIG, params), [[1]], max_new_tokens=2, attention="flash")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("window", "cap"), [(None, None), (4, 1.5)])
def test_attention_in_blocks_is_dense_attention(window: int | None, cap: float | None, monkeypatch) -> None:
    T = 11
    rng = np.random.default_rng(0)
    given = {"q": rng.normal(size=(B, T, N, D)), "k": rng.normal(size=(B, K, D, T)), "v": rng.normal(size=(B, K, T, D))}
    factors = rng.normal(size=(B, T, N * D))
    segments = jnp.asarray(np.sort(rng.integers(1, 3, (B, T)), axis=1), jnp.int32)

    def slopes(attention: str):
        layout = Layout.causal(B, T, segments, attention)

        def mixed(given):
            new = {"k": given["k"], "v": given["v"]}
            out = attend(given["q"], new, Sources(), layout, scale=0.7, cap=cap, window=window)
            return jnp.sum(factors * out), out

        return jax.value_and_grad(mixed, has_aux=True)(given)

    # Blocks of four rows, the last of them of three.
    monkeypatch.setattr(models.attention, "BLOCK", B * N * T * 4)
    ways = ["dense", "blocks", *(["fused"] if window is None else [])]
    dense, blocks, *fused = jax.jit(lambda: [slopes(way) for way in ways])()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), blocks, dense)
    for found in fused:  # The library's softmax is float32, whatever its inputs are.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, dense)


@pytest.mark.usefixtures("x64")
def test_whole_texts_are_read_alike_in_every_order(monkeypatch) -> None:
    """Of one document or several, each row in order or blocks of rows at once, whose first is cut differently in each
    text."""
    T, sources = 11, Sources()
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.normal(size=(B, T, N, D)))
    new = {"k": jnp.asarray(rng.normal(size=(B, K, D, T))), "v": jnp.asarray(rng.normal(size=(B, K, T, D)))}
    packed = jnp.asarray(np.sort(rng.integers(1, 4, (B, T)), axis=1), jnp.int32)
    orders = (Causal(), BlockCausal(3, jnp.array([0, 2, 1], jnp.int32)), BlockCausal(2))

    def read(order, segments, way):
        layout = dataclasses.replace(Layout.causal(B, T, segments, way), order=order)
        return attend(q, new, sources, layout, scale=0.7)

    monkeypatch.setattr(models.attention, "BLOCK", B * N * T * 4)
    ways = ("dense", "blocks", "fused")
    cases = [(order, segments) for order in orders for segments in (None, packed)]
    found = jax.jit(lambda: [[read(*case, way) for way in ways] for case in cases])()
    for dense, blocks, fused in found:
        np.testing.assert_allclose(blocks, dense, rtol=0, atol=1e-12)
        np.testing.assert_allclose(fused, dense, atol=1e-5)
    for (dense, *_), (other, *_) in itertools.combinations(found, 2):
        assert np.abs(dense - other).max() > 1e-3


@pytest.mark.parametrize("window, cap", [(None, None), (4, 2.0)])
def test_blocks_over_a_prefix_are_one_softmax(window: int | None, cap: float | None, x64, monkeypatch) -> None:
    """Merged by log-sum-exp, some blocks at a time; one sees nothing of the prefix."""
    blocks, size, slots = 5, 3, 11
    rng = np.random.default_rng(0)

    def some(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape))

    q_BTND, new, prefix = (
        some(2, blocks * size, 4, 6),
        *({"k": some(2, 2, 6, n), "v": some(2, 2, n, 6)} for n in (blocks * size, slots)),
    )
    horizon = jnp.repeat(jnp.array([[1, 4, 5, 0, 11], [2, 3, 7, 9, 10]]), size, axis=1)
    positions = horizon + jnp.tile(jnp.arange(size), blocks)
    layout = Layout(positions, horizon, Blocks(size, causal=True, together=2), since=horizon // 2)

    @jax.jit
    def both(q_BTND, new, prefix):
        def of(attention):
            named = dataclasses.replace(layout, attention=attention)
            return attend(q_BTND, new, Sources(prefix), named, scale=0.7, cap=cap, window=window)

        return of("dense"), of("blocks")

    monkeypatch.setattr(models.attention, "BLOCK", 2 * 4 * 2 * size * slots)
    dense, merged = both(q_BTND, new, prefix)
    np.testing.assert_allclose(merged, dense, rtol=0, atol=4e-15)


def test_products_of_narrow_factors_have_narrow_slopes() -> None:
    x, y = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((3, 4), (4, 5)))
    slope = jax.grad(lambda *a: jnp.sum(wide_einsum("AB,BC->AC", *a) ** 2), argnums=(0, 1))
    products = re.findall(r"stablehlo.dot_general.*: \((.*)\) -> (.*)", jax.jit(slope).lower(x, y).as_text())
    assert [out.split("x")[-1] for _, out in products] == ["f32>", "bf16>", "bf16>"]
    assert all("f32" not in factors for factors, _ in products)
