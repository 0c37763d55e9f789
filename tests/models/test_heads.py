"""Draft heads: what they start as, what they read, and that the decoding layout computes the training forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import TransformerConfig
from models.heads.hydra import HydraHeads
from models.heads.medusa import MedusaHeads, vocab_kernel
from models.layout import Layout
from tests.noise import noisy

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


@pytest.fixture
def target() -> dict:
    return transformer.init(CONFIG, jax.random.key(0), jnp.float64)


def test_medusa_starts_as_the_targets_head(target: dict) -> None:
    heads = KINDS["medusa"]
    params = heads.init(CONFIG, target, jax.random.key(1))
    feature = jax.random.normal(jax.random.key(2), (5, 8), jnp.float64)
    for i in range(3):
        logits = heads.vocab(params, i, heads.hidden(params, i, feature, jnp.zeros((5, 0, 8))))
        np.testing.assert_allclose(logits, transformer.head(CONFIG, target, feature), atol=1e-12)


def test_hydra_starts_without_gates(target: dict) -> None:
    heads = KINDS["hydra"]
    params = heads.init(CONFIG, target, jax.random.key(1))
    feature, path = jnp.ones((5, 8)), jax.random.normal(jax.random.key(2), (5, 2, 8), jnp.float64)
    first = params["heads"][1]["blocks"][0]
    assert not np.any(first["linear"]["kernel"])
    z = np.concatenate([feature, path[:, 0], path[:, 1]], axis=-1)
    expected = z @ np.asarray(first["residual"]["kernel"]) + np.asarray(first["residual"]["bias"])
    np.testing.assert_allclose(heads.hidden(params, 1, feature, path), expected, atol=1e-12)
    bound = 1 / np.sqrt(3 * 8)
    kernel = np.abs(first["residual"]["kernel"])
    assert 0.9 * bound < kernel.max() <= bound


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@each_kind
def test_hidden_matches_numpy(heads, target: dict) -> None:
    params = noisy(heads.init(CONFIG, target, jax.random.key(1)), 0.3)
    rng = np.random.default_rng(0)
    for i in range(3):
        feature, path = rng.normal(size=(4, 8)), rng.normal(size=(4, i + 1, 8))
        reads_path = isinstance(heads, HydraHeads)
        x = np.concatenate([feature[:, None], path], axis=1).reshape(4, -1) if reads_path else feature
        for block in jax.tree.map(np.asarray, params["heads"][i]["blocks"]):
            gate = silu(x @ block["linear"]["kernel"] + block["linear"]["bias"])
            skip = x @ block["residual"]["kernel"] + block["residual"]["bias"] if "residual" in block else x
            x = skip + gate
        np.testing.assert_allclose(heads.hidden(params, i, jnp.array(feature), jnp.array(path)), x, atol=1e-10)
        vocab = jax.tree.map(np.asarray, params["heads"][i]["vocab"])
        expected = x @ vocab["kernel"] + vocab.get("bias", 0.0)
        np.testing.assert_allclose(heads.vocab(params, i, jnp.array(x)), expected, atol=1e-10)


def test_joined_inputs_compute_the_same_hidden(target: dict) -> None:
    heads = KINDS["hydra++"]
    params = noisy(heads.init(CONFIG, target, jax.random.key(1)), 0.3)
    joined = heads.join_inputs(params, 3)
    rng = np.random.default_rng(0)
    for i in range(3):
        feature, path = jnp.array(rng.normal(size=(4, 8))), jnp.array(rng.normal(size=(4, i + 1, 8)))
        summed = joined["bias"][i]
        for source, x in enumerate([feature, *jnp.unstack(path, axis=1)]):
            # A source lists the heads that read it: all of them, or those from source - 1 up.
            summed = summed + x @ joined["sources"][source][:, i - max(source - 1, 0)]
        expected = heads.hidden(params, i, feature, path)
        np.testing.assert_allclose(heads.hidden_joined(params, i, summed), expected, atol=1e-10)


@each_kind
def test_blocks_are_not_tied(heads, target: dict) -> None:
    params = heads.init(CONFIG, target, jax.random.key(1))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params["heads"])]
    assert len(set(pointers)) == len(pointers)
    assert len(params["heads"]) == 3 and all(len(head["blocks"]) == heads.num_layers for head in params["heads"])


@each_kind
def test_dtype_is_the_targets(heads, target: dict) -> None:
    params = heads.init(CONFIG, jax.tree.map(lambda x: x.astype(jnp.bfloat16), target), jax.random.key(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    feature, path = jnp.ones((2, 8), jnp.bfloat16), jnp.ones((2, 1, 8), jnp.bfloat16)
    hidden = heads.hidden(params, 0, feature, path)
    assert hidden.dtype == jnp.bfloat16 and heads.vocab(params, 0, hidden).dtype == jnp.float32


def test_untied_targets_lend_their_head() -> None:
    target = transformer.init(TransformerConfig(**{**vars(CONFIG), "tied_embeddings": False}), jax.random.key(0))
    assert vocab_kernel(target) is target["head"]["kernel"]


def test_prefix_block_is_causal_over_features_and_cached(target: dict) -> None:
    heads = KINDS["hydra++"]
    params = noisy(heads.init(CONFIG, target, jax.random.key(1)), 0.3)
    features = jax.random.normal(jax.random.key(3), (2, 6, 8), jnp.float64)
    whole = heads.features(CONFIG, params, features, Layout.causal(2, 6))
    changed = heads.features(CONFIG, params, features.at[:, 4].add(1.0), Layout.causal(2, 6))
    assert np.array_equal(whole[:, :4], changed[:, :4]) and np.abs(whole - changed)[:, 5].max() > 1e-6
    assert np.array_equal(KINDS["hydra"].features(CONFIG, params, features, Layout.causal(2, 6)), features)


def test_dropout_is_for_training() -> None:
    heads = KINDS["hydra++"]
    target = transformer.init(CONFIG, jax.random.key(0), jnp.float64)
    params = noisy(heads.init(CONFIG, target, jax.random.key(1)), 0.3)
    feature, path = jnp.ones((64, 8)), jnp.ones((64, 1, 8))
    once, again, other = (heads.hidden(params, 0, feature, path, jax.random.key(k)) for k in (0, 0, 1))
    assert np.array_equal(once, again) and not np.array_equal(once, other)
    assert 0.35 < np.mean(np.asarray(once) == 0) < 0.65, "half of the last activations are dropped"
    assert np.ptp(heads.hidden(params, 0, feature, path), axis=0).max() < 1e-12
