"""The forward: layouts of parameters, slices, taps, packing, caches, windows, RoPE, dtypes, and what XLA drops."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.cache import commit, init_cache
from models import linear, pages, transformer
from models.attention import Sources, softcap
from models.config import RopeScaling, TransformerConfig
from models.heads.medusa import vocab_kernel
from models.layers import apply_rope, rope_frequencies
from models.layout import Blocks, Layout, Tree
from tests.noise import drawn

LLAMA = TransformerConfig(
    vocab_size=23, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, mlp_width=20, norm_eps=1e-6
)
FAMILIES = {
    "llama": LLAMA,
    "qwen": dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True, tied_embeddings=True),
    "gemma": dataclasses.replace(
        LLAMA,
        windows=(3, None, 3),
        embed_scale=True,
        attention_softcap=5.0,
        logit_softcap=3.0,
        post_norms=True,
        zero_centred_norm=True,
        activation="gelu_tanh",
        tied_embeddings=True,
        query_scale=0.3,
    ),
}
TOKENS = jnp.array(np.random.default_rng(0).integers(23, size=(2, 9)))

TAPS = ("layer:0", "layer:1", "layer:2", "pre_norm", "post_norm")

forward = jax.jit(transformer.forward, static_argnames=("config", "layers", "taps"))

pytestmark = pytest.mark.usefixtures("x64")
each_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
# What Qwen adds lies before attention; with the other two, whatever asks where rows stand and what they see is asked.
each_attention = pytest.mark.parametrize(
    "config", [pytest.param(c, marks=[pytest.mark.slow] if n == "qwen" else [], id=n) for n, c in FAMILIES.items()]
)


def lively(config: TransformerConfig, dtype=jnp.float64, seed: int = 0) -> dict:
    """Parameters with noise on every one, biases and norms too, large enough to matter."""
    return drawn(transformer.param_shapes(config, dtype), 0.3, seed)


def read(config: TransformerConfig, params: dict) -> transformer.Output:
    """The whole text at once with all that can be tapped, one program for all who compare with it."""
    return forward(config, params, TOKENS, Layout.causal(2, 9), taps=TAPS)


def close(a, b, atol: float = 1e-10) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


@each_family
def test_stacked_is_the_list(config: TransformerConfig) -> None:
    params = lively(config)
    whole, stacked = (read(config, p) for p in (params, transformer.stack_layers(params)))
    close(stacked.logits, whole.logits)
    close(stacked.taps, whole.taps)
    close(transformer.unstack_layers(transformer.stack_layers(params)), params, atol=0)


def test_a_turn_of_the_loop_may_run_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = transformer.stack_layers(lively(LLAMA))

    def slope(of_layers: int):
        monkeypatch.setattr(transformer, "_at_a_turn", lambda layers: of_layers)
        run = functools.partial(transformer.forward, LLAMA, inputs=TOKENS, layout=Layout.causal(2, 9))
        total = jax.jit(jax.value_and_grad(lambda params: jnp.sum(run(params).logits ** 2)))
        assert ("while" in total.lower(stacked).as_text()) == (of_layers == 1)
        return total(stacked)

    close(slope(1), slope(LLAMA.num_layers))
    again = functools.partial(transformer.forward, LLAMA, inputs=TOKENS, layout=Layout.causal(2, 9), remat="layers")
    lowered = jax.jit(jax.grad(lambda params: jnp.sum(again(params).logits ** 2))).lower(stacked)
    assert "while" in lowered.as_text(), "in one turn nothing would be computed again"
    monkeypatch.undo()
    assert transformer._at_a_turn(2) == 1, "a processor gains nothing"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [transformer._at_a_turn(layers) for layers in (2, 80)] == [2, 1]


@each_family
def test_joined_projections_are_the_separate_ones(config: TransformerConfig) -> None:
    params = lively(config)
    joined = transformer.join_projections(params)
    assert "q_k_v" in joined["layers"][0]["attention"] and "q" not in joined["layers"][0]["attention"]
    whole, ours = (read(config, p) for p in (params, joined))
    close(ours.logits, whole.logits)
    close(ours.rows, whole.rows)
    back = transformer.split_projections(config, joined)
    close(back, params, atol=0)
    close(transformer.split_projections(config, params), params, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_in_blocks_are_those_as_they_were(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LEAST_BYTES", 1024)
    monkeypatch.setattr(pages, "are_huge", lambda: True)
    config = dataclasses.replace(
        LLAMA, vocab_size=128, width=32, mlp_width=64, num_layers=1, windows=(), tied_embeddings=tied
    )
    params = lively(config)
    ours = transformer.for_decoding(params)
    assert ours["layers"][0]["mlp"]["gate_up"]["kernel"].shape == (2, 32, 64)
    assert (ours["embed"]["embedding"] if tied else ours["head"]["kernel"]).shape == (2, 32, 64)
    whole, blocks = (forward(config, p, TOKENS, Layout.causal(2, 9)) for p in (params, ours))
    close(blocks.logits, whole.logits)
    close(transformer.split_projections(config, ours), params, atol=0)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, transformer.for_decoding(ours), ours))
    np.testing.assert_array_equal(vocab_kernel(ours), vocab_kernel(params))


@each_attention
def test_slices_of_the_stack_compose(config: TransformerConfig) -> None:
    params, layout = lively(config), Layout.causal(2, 9)
    whole = read(config, params)
    for cut in (1, 2):
        lower = forward(config, params, TOKENS, layout, layers=(0, cut), taps=("pre_norm",))
        upper = forward(config, params, lower.taps["pre_norm"], layout, layers=(cut, 3))
        close(upper.logits, whole.logits)
        close(lower.rows + upper.rows, whole.rows)
    first = forward(config, params, TOKENS, layout, layers=(0, 1), taps=("pre_norm",))
    close(first.taps["pre_norm"], whole.taps["layer:1"])


def test_taps_name_what_they_are() -> None:
    params, layout = lively(LLAMA), Layout.causal(2, 9)
    taken = read(LLAMA, params)
    close(taken.taps["layer:0"], transformer.embed(LLAMA, params, TOKENS))
    close(taken.taps["post_norm"], taken.hidden)
    close(transformer.final_norm(LLAMA, params, taken.taps["pre_norm"]), taken.hidden)
    close(transformer.head(LLAMA, params, taken.hidden), taken.logits)
    close(forward(LLAMA, params, taken.taps["layer:0"], layout).logits, taken.logits)
    for tap in ("layer:3", "logits"):
        with pytest.raises(ValueError, match=f"no tap '{tap}': have pre_norm, post_norm and layer:0 to layer:2"):
            forward(LLAMA, params, TOKENS, layout, taps=(tap,))
    with pytest.raises(ValueError, match="unstack_layers"):
        forward(LLAMA, transformer.stack_layers(params), TOKENS, layout, layers=(0, 1))


@each_family
def test_lookup_is_the_table_as_it_stands(config: TransformerConfig) -> None:
    params = lively(config)
    rows = np.asarray(params["embed"]["embedding"])[np.asarray(TOKENS)]
    assert np.array_equal(transformer.lookup(params, TOKENS), rows)
    close(transformer.embed(config, params, TOKENS), rows * (config.width**0.5 if config.embed_scale else 1.0))


@each_attention
def test_packed_documents_are_separate_ones(config: TransformerConfig) -> None:
    params = lively(config)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 2, 2, 2, 3, 0, 0, 0]])
    for layers in (params, transformer.stack_layers(params)):
        packed = forward(config, layers, TOKENS, Layout.causal(2, 9, segments)).logits
        for row, start, end in ((0, 0, 4), (0, 4, 9), (1, 0, 2), (1, 2, 5), (1, 5, 6)):
            # All in one shape, that of the longest.
            padded = jnp.zeros((1, 5), jnp.int32).at[0, : end - start].set(TOKENS[row, start:end])
            alone = forward(config, params, padded, Layout.causal(1, 5)).logits
            close(packed[row, start:end], alone[0, : end - start])


@each_attention
def test_cached_rows_are_whole_rows(config: TransformerConfig) -> None:
    """A prefix of ragged length, then a chain of rows, then a tree with two branches."""
    params = lively(config)
    whole = read(config, params)
    length = jnp.array([4, 6])
    cache = commit(init_cache(config, 2, 12, jnp.float64), whole.rows, None, jnp.zeros(2, jnp.int32))
    following = jnp.take_along_axis(TOKENS, length[:, None] + jnp.arange(3), axis=1)
    rest = forward(config, params, following, Layout.extend(length, 3), Sources(cache)).logits
    close(rest, jnp.stack([whole.logits[row, n : n + 3] for row, n in enumerate(length)]))

    ancestors = jnp.array([[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]], bool)
    nodes = jnp.concatenate([following[:, :1], (following[:, 1:2] + 1) % 23, following[:, 1:]], axis=1)
    layout = Layout(length[:, None] + jnp.array([0, 1, 1, 2]), length[:, None], Tree(ancestors))
    branched = forward(config, params, nodes, layout, Sources(cache)).logits
    close(branched[:, [0, 2, 3]], rest)
    assert np.abs(branched[:, 1] - rest[:, 1]).max() > 1e-3


@each_attention
def test_stacked_layers_attend_to_a_stacked_cache(config: TransformerConfig) -> None:
    """As a list of layers does to a list, at a horizon per row too; and their rows come back stacked."""
    params = lively(config)
    stacked = transformer.stack_layers(params)
    whole, together = (read(config, p) for p in (params, stacked))
    cache = jax.tree.map(lambda *layers: jnp.stack(layers), *whole.rows)
    close(together.rows, cache)
    for horizon in (jnp.array([[4], [6]]), jnp.array([[4, 2, 0], [6, 6, 1]])):
        positions = jnp.broadcast_to(horizon, (2, 3)) + jnp.arange(3)
        following = Layout(positions, horizon, Blocks(2))
        apart = forward(config, params, TOKENS[:, :3], following, Sources(whole.rows))
        scanned = forward(config, stacked, TOKENS[:, :3], following, Sources(cache))
        close(scanned.logits, apart.logits)
        assert np.abs(scanned.logits - forward(config, stacked, TOKENS[:, :3], following).logits).max() > 1e-3


def test_window_limits_what_is_seen() -> None:
    config = dataclasses.replace(LLAMA, num_layers=1, windows=(3,))
    params = lively(config)
    logits = forward(config, params, TOKENS, Layout.causal(2, 9)).logits
    changed = forward(config, params, TOKENS.at[:, 2].set((TOKENS[:, 2] + 1) % 23), Layout.causal(2, 9)).logits
    differs = np.abs(logits - changed).max(axis=(0, 2)) > 1e-9
    assert differs.tolist() == [False, False, True, True, True, False, False, False, False]


def test_rotation_depends_on_distance_alone() -> None:
    params = lively(LLAMA)
    layout = Layout.causal(2, 9)
    shifted = layout.replace(positions=layout.positions + 1000)
    close(forward(LLAMA, params, TOKENS, shifted).logits, forward(LLAMA, params, TOKENS, layout).logits, atol=1e-3)
    stretched = layout.replace(positions=layout.positions * 2)
    assert (
        np.abs(forward(LLAMA, params, TOKENS, stretched).logits - forward(LLAMA, params, TOKENS, layout).logits).max()
        > 0.01
    )


def test_rope_turns_pairs_half_a_head_apart() -> None:
    x = np.random.default_rng(0).normal(size=(1, 2, 1, 4))
    angles = np.array([[0.3, 1.1], [0.6, 2.2]]).reshape(1, 2, 1, 2)
    pairs = x[..., :2] + 1j * x[..., 2:]
    turned = pairs * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(apply_rope(jnp.array(x), jnp.array(angles)), expected, atol=1e-12)


def llama3_by_cases(frequency: float, scaling: RopeScaling) -> float:
    wavelength = 2 * math.pi / frequency
    longest = scaling.original_max_position / scaling.low_freq_factor
    shortest = scaling.original_max_position / scaling.high_freq_factor
    if wavelength < shortest:
        return frequency
    if wavelength > longest:
        return frequency / scaling.factor
    smooth = scaling.original_max_position / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def test_rope_scaling() -> None:
    plain = [500_000.0 ** (-2 * i / 128) for i in range(64)]
    np.testing.assert_allclose(rope_frequencies(128, 500_000.0, None), plain, rtol=1e-5)
    linear = rope_frequencies(128, 500_000.0, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(linear, np.array(plain) / 4, rtol=1e-5)
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    scaled = np.asarray(rope_frequencies(128, 500_000.0, scaling))
    np.testing.assert_allclose(scaled, [llama3_by_cases(f, scaling) for f in plain], rtol=1e-4)
    # Of Llama 3.1's 64 frequencies 29 are kept, 29 divided by 8, and 6 lie between.
    ratio = np.array(plain) / scaled
    kept, divided = np.isclose(ratio, 1, rtol=1e-4), np.isclose(ratio, 8, rtol=1e-4)
    assert (kept.sum(), divided.sum()) == (29, 29) and kept[:29].all() and divided[35:].all()
    with pytest.raises(ValueError, match="the factor of rope scaling must be above 0, got 0"):
        RopeScaling("linear", 0.0)
    with pytest.raises(ValueError, match=r"needs 0 < low_freq_factor < high_freq_factor, got 4\.0 and 4\.0"):
        RopeScaling("llama3", 8.0, low_freq_factor=4.0)
    with pytest.raises(ValueError, match="rope scaling must be 'linear' or 'llama3', got 'yarn'"):
        RopeScaling("yarn", 2.0)


def test_softcap_bounds_scores() -> None:
    x = jnp.array([-1e6, -1.0, 0.0, 2.0, 1e6])
    np.testing.assert_allclose(softcap(x, 3.0), 3 * np.tanh(np.asarray(x) / 3))
    assert softcap(x, None) is x
    gemma = FAMILIES["gemma"]
    assert np.abs(read(gemma, lively(gemma)).logits).max() <= 3.0


@pytest.mark.parametrize(
    ("dtype", "expected"), [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32), (jnp.float64, jnp.float64)]
)
def test_dtypes(dtype, expected) -> None:
    params = lively(FAMILIES["gemma"], dtype)
    out = read(FAMILIES["gemma"], params)
    assert out.logits.dtype == expected and out.hidden.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(out.rows)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(transformer.param_shapes(LLAMA, dtype))} == {jnp.dtype(dtype)}
    exact = read(FAMILIES["gemma"], jax.device_put(jax.tree.map(lambda x: np.asarray(x, np.float64), params)))
    error = np.abs(np.asarray(out.logits, np.float64) - exact.logits).max()
    assert error < {jnp.bfloat16: 0.3, jnp.float32: 1e-4, jnp.float64: 1e-9}[dtype]


def test_param_shapes_are_those_of_init() -> None:
    for config in FAMILIES.values():
        shapes, params = (
            transformer.param_shapes(config, jnp.bfloat16),
            jax.eval_shape(lambda key, config=config: transformer.init(config, key, jnp.bfloat16), jax.random.key(0)),
        )
        assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_unused_logits_cost_nothing() -> None:
    config = dataclasses.replace(LLAMA, vocab_size=997)
    params = drawn(transformer.param_shapes(config), 0.1)

    def head_products(pick) -> int:
        compiled = (
            jax.jit(lambda p, t: pick(forward(config, p, t, Layout.causal(2, 9)))).lower(params, TOKENS).compile()
        )
        # Results as wide as the vocabulary: [2, 9, 997], flattened or not.
        return len(re.findall(r"= \(?f32\[(?:2,9|18),997\]", compiled.as_text()))

    assert head_products(lambda out: out.hidden) == 0 < head_products(lambda out: out.logits)
