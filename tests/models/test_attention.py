"""Attention with a library kernel for the prefix equals the dense reference, whatever the lengths and the tree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.generate import generate
from models.attention import Sources, attend
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.target import Target
from models.layout import Layout, Tree
from models.transformer import init
from tests.decoding.drafter_cases import BUSHY, CASES

B, K, N, D, S = 3, 2, 6, 8, 40
LENGTHS = jnp.array([0, 17, S])


def rows(key: int, slots: int) -> dict[str, jax.Array]:
    k, v = jax.random.split(jax.random.key(key))
    return {"k": jax.random.normal(k, (B, K, D, slots)), "v": jax.random.normal(v, (B, K, slots, D))}


@pytest.mark.parametrize("scratch_slots", [0, 5])
def test_split_attention_is_dense_attention(scratch_slots: int) -> None:
    nodes = BUSHY.size
    scratch, extra = None, {}
    if scratch_slots:
        scratch = rows(2, scratch_slots)
        seen = jax.random.bernoulli(jax.random.key(3), 0.5, (B, nodes, scratch_slots))
        extra = dict(scratch_seen=seen, scratch_positions=jnp.zeros((B, scratch_slots), jnp.int32))
    positions = LENGTHS[:, None] + jnp.asarray(BUSHY.depth)
    dense = Layout(positions, LENGTHS[:, None], Tree(jnp.asarray(BUSHY.ancestors)[None]), **extra)
    split = dataclasses.replace(dense, attention="split")
    q = 3 * jax.random.normal(jax.random.key(4), (B, nodes, N, D))
    out = [attend(q, rows(0, nodes), Sources(rows(1, S), scratch), layout, scale=0.4) for layout in (dense, split)]
    np.testing.assert_allclose(out[0], out[1], atol=2e-6)
    shorter = dataclasses.replace(split, horizon=(LENGTHS - jnp.array([0, 1, 1]))[:, None])
    changed = attend(q, rows(0, nodes), Sources(rows(1, S), scratch), shorter, scale=0.4)
    assert np.abs(changed - out[0])[1:].max() > 1e-3, "the length is what masks"


CONFIG = TransformerConfig(vocab_size=40, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)


def test_split_decoding_writes_the_same_text() -> None:
    params = init(CONFIG, jax.random.key(0))
    target = Target(CONFIG, jax.tree.map(lambda x: x * (6 if x.ndim > 1 else 1), params))
    prompts = [[1, 2, 3], [4] * 20]
    drafter, drafter_params = CASES["hydra++"](target, jax.random.key(1))
    for more in ({}, dict(drafter=drafter, drafter_params=drafter_params)):
        dense, split = (
            generate(target, prompts, max_new_tokens=40, stop=[], attention=kind, **more) for kind in ("dense", "split")
        )
        assert split.tokens == dense.tokens and len(set(dense.tokens[0])) > 5


def test_what_split_attention_cannot_do_is_refused() -> None:
    params = init(CONFIG, jax.random.key(0))
    for change in (dict(windows=(4, None)), dict(attention_softcap=30.0)):
        target = Target(dataclasses.replace(CONFIG, **change), params)
        with pytest.raises(UserError, match="'split' cannot serve a target with sliding windows or an attention soft"):
            generate(target, [[1]], max_new_tokens=2, attention="split")
    with pytest.raises(UserError, match="attention must be 'dense' or 'split', got 'flash'"):
        generate(Target(CONFIG, params), [[1]], max_new_tokens=2, attention="flash")
