"""Draft heads: what they start as, what they read, and that the decoding layout computes the training forward."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import TransformerConfig
from models.heads.hydra import HydraHeads
from models.heads.medusa import MedusaHeads, vocab_kernel
from models.layout import Layout
from tests.noise import drawn, noisy

CONFIG = TransformerConfig(
    vocab_size=19, width=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=12, tied_embeddings=True
)
KINDS = {
    "medusa": MedusaHeads(3, 2),
    "hydra": HydraHeads(3, 1),
    "hydra++": HydraHeads(3, 2, prefix=True, dropout=0.5),
}

pytestmark = pytest.mark.usefixtures("x64")
each_kind = pytest.mark.parametrize("heads", KINDS.values(), ids=KINDS)


init = jax.jit(lambda heads, target: heads.init(CONFIG, target, jax.random.key(1)), static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 2))
def hidden_of(heads, params, i, feature, path, key=None):
    return heads.hidden(params, i, feature, path, key)


@functools.partial(jax.jit, static_argnums=(0, 2))
def vocab_of(heads, params, i, hidden):
    return heads.vocab(params, i, hidden)


@pytest.fixture
def target() -> dict:
    return drawn(transformer.param_shapes(CONFIG, jnp.float64), 0.3)


def test_medusa_starts_as_the_targets_head(target: dict) -> None:
    heads = KINDS["medusa"]
    params = init(heads, target)
    feature = np.random.default_rng(2).normal(size=(5, 8))
    for i in range(3):
        logits = vocab_of(heads, params, i, hidden_of(heads, params, i, feature, jnp.zeros((5, 0, 8))))
        np.testing.assert_allclose(logits, transformer.head(CONFIG, target, jnp.asarray(feature)), atol=1e-12)


def test_hydra_starts_without_gates(target: dict) -> None:
    heads = KINDS["hydra"]
    params = init(heads, target)
    feature, path = np.ones((5, 8)), np.random.default_rng(2).normal(size=(5, 2, 8))
    first = params["heads"][1]["blocks"][0]
    assert not np.any(first["linear"]["kernel"])
    z = np.concatenate([feature, path[:, 0], path[:, 1]], axis=-1)
    expected = z @ np.asarray(first["residual"]["kernel"]) + np.asarray(first["residual"]["bias"])
    np.testing.assert_allclose(hidden_of(heads, params, 1, feature, path), expected, atol=1e-12)
    bound = 1 / np.sqrt(3 * 8)
    kernel = np.abs(first["residual"]["kernel"])
    assert 0.9 * bound < kernel.max() <= bound


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@each_kind
def test_hidden_matches_numpy(heads, target: dict) -> None:
    params = noisy(init(heads, target), 0.3)
    rng = np.random.default_rng(0)
    for i in range(3):
        feature, path = rng.normal(size=(4, 8)), rng.normal(size=(4, i + 1, 8))
        reads_path = isinstance(heads, HydraHeads)
        x = np.concatenate([feature[:, None], path], axis=1).reshape(4, -1) if reads_path else feature
        for block in jax.tree.map(np.asarray, params["heads"][i]["blocks"]):
            gate = silu(x @ block["linear"]["kernel"] + block["linear"]["bias"])
            skip = x @ block["residual"]["kernel"] + block["residual"]["bias"] if "residual" in block else x
            x = skip + gate
        np.testing.assert_allclose(hidden_of(heads, params, i, feature, path), x, atol=1e-10)
        vocab = jax.tree.map(np.asarray, params["heads"][i]["vocab"])
        expected = x @ vocab["kernel"] + vocab.get("bias", 0.0)
        np.testing.assert_allclose(vocab_of(heads, params, i, x), expected, atol=1e-10)


def test_joined_inputs_compute_the_same_hidden(target: dict) -> None:
    heads = KINDS["hydra++"]
    params = noisy(init(heads, target), 0.3)
    joined = jax.tree.map(np.asarray, jax.jit(heads.join_inputs)(params))
    rng = np.random.default_rng(0)
    for i in range(3):
        feature, path = rng.normal(size=(4, 8)), rng.normal(size=(4, i + 1, 8))
        summed = joined["bias"][i]
        for source, x in enumerate([feature, *path.swapaxes(0, 1)]):
            # A source lists the heads that read it: all of them, or those from source - 1 up.
            summed = summed + x @ joined["sources"][source][:, i - max(source - 1, 0)]
        found = jax.jit(heads.hidden_joined, static_argnums=1)(params, i, summed)
        np.testing.assert_allclose(found, hidden_of(heads, params, i, feature, path), atol=1e-10)


@each_kind
def test_blocks_are_not_tied(heads, target: dict) -> None:
    params = init(heads, target)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params["heads"])]
    assert len(set(pointers)) == len(pointers)
    assert len(params["heads"]) == 3 and all(len(head["blocks"]) == heads.num_layers for head in params["heads"])


@each_kind
def test_dtype_is_the_targets(heads) -> None:
    def run(target, feature, path):
        params = heads.init(CONFIG, target, jax.random.key(1))
        hidden = heads.hidden(params, 0, feature, path)
        return params, hidden, heads.vocab(params, 0, hidden)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 8), (2, 1, 8))]
    params, hidden, scores = jax.eval_shape(run, transformer.param_shapes(CONFIG, jnp.bfloat16), *shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert hidden.dtype == jnp.bfloat16 and scores.dtype == jnp.float32


def test_untied_targets_lend_their_head() -> None:
    target = drawn(transformer.param_shapes(dataclasses.replace(CONFIG, tied_embeddings=False)), 0.3)
    assert vocab_kernel(target) is target["head"]["kernel"]


def test_prefix_block_is_causal_over_features_and_cached(target: dict) -> None:
    heads = KINDS["hydra++"]
    params = noisy(init(heads, target), 0.3)
    features = np.random.default_rng(3).normal(size=(2, 6, 8))
    run = jax.jit(lambda features: heads.features(CONFIG, params, features, Layout.causal(2, 6)))
    whole, changed = run(features), run(features + (np.arange(6) == 4)[:, None])
    assert np.array_equal(whole[:, :4], changed[:, :4]) and np.abs(whole - changed)[:, 5].max() > 1e-6
    assert np.array_equal(KINDS["hydra"].features(CONFIG, params, jnp.asarray(features), Layout.causal(2, 6)), features)


def test_dropout_is_for_training(target: dict) -> None:
    heads = KINDS["hydra++"]
    params = noisy(init(heads, target), 0.3)
    feature, path = jnp.ones((64, 8)), jnp.ones((64, 1, 8))
    once, again, other = (hidden_of(heads, params, 0, feature, path, jax.random.key(k)) for k in (0, 0, 1))
    assert np.array_equal(once, again) and not np.array_equal(once, other)
    assert 0.35 < np.mean(np.asarray(once) == 0) < 0.65, "half of the last activations are dropped"
    assert np.ptp(hidden_of(heads, params, 0, feature, path), axis=0).max() < 1e-12
