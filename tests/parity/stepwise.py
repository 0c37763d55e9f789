"""Our logits for a text fed as decoding feeds it: a prefill, then one token at a time against the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from decoding.cache import commit, init_cache
from models.attention import Sources
from models.config import TransformerConfig
from models.layout import Layout
from models.transformer import Params, forward


def stepwise_logits(config: TransformerConfig, params: Params, tokens: np.ndarray, prefill: int) -> np.ndarray:
    """Logits `[B, T, V]` of `tokens` `[B, T]`, the first `prefill` in one forward and each other in one of its own."""
    batch, total = tokens.shape
    cache = init_cache(config, batch, total, params["embed"]["embedding"].dtype)
    length = jnp.zeros(batch, jnp.int32)
    logits = []
    for start, stop in [(0, prefill), *((t, t + 1) for t in range(prefill, total))]:
        new = jnp.asarray(tokens[:, start:stop], jnp.int32)
        fresh, cache = _step(config, params, new, length, cache)
        length += stop - start
        logits.append(fresh)
    return np.concatenate(logits, axis=1)


@functools.partial(jax.jit, static_argnames="config")
def _step(config, params, tokens_BT, length, cache):
    output = forward(config, params, tokens_BT, Layout.extend(length, tokens_BT.shape[1]), Sources(cache))
    return output.logits, commit(cache, output.rows, None, length)
