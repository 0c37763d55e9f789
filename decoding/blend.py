"""Texts of two models that are mixed token by token: the next token is drawn from (1 - share) q + share p.

Both read all of the text, each with a cache of its own, one token a step; nothing is drafted. It is what a student
writes that its teacher keeps from going astray (MiniLLM, Gu et al. 2024).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from decoding.arguments import checked_prompts
from decoding.cache import commit, init_cache
from decoding.generate import bucket
from decoding.sampling import argmax, noise
from models.attention import Sources
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.target import Target
from models.layout import Layout
from models.sharding import mesh_of, on_mesh
from models.transformer import Cache, Params, forward, head


class _Read(NamedTuple):
    """What a model has of the text: its cache, and its post-norm feature of the last token."""

    cache: Cache
    hidden: Float[Array, "B H"]


def blend(
    first: Target,
    second: Target,
    share: float,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    seeds: Sequence[int],
    room: int,
) -> list[list[int]]:
    """Up to `new_tokens` behind every prompt, at temperature 1; an end token ends a text and is part of it.

    At a share of 0 or 1 the text is what `generate` draws from that model alone with the same seeds.

    Args:
      first: q.
      second: p, of the same tokenizer; the two are mixed over the tokens that both have.
      share: of p in the mixture.
      prompts: of at most `room` tokens.
      new_tokens: for every prompt.
      seeds: one per prompt.
      room: so that batches of other prompts run the same program.
    """
    prompts = checked_prompts(prompts, first)
    if not 0 <= share <= 1:
        raise UserError(f"the share of the second model must lie in 0..1, got {share}")
    rows = bucket(room, smallest=16)
    padded = np.zeros((len(prompts), rows), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    mesh = mesh_of(second.params)
    keys = jax.vmap(jax.random.key)(jnp.asarray(np.asarray(seeds, np.uint32)))
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    with on_mesh(mesh):
        tokens, count = _run(
            (first.config, second.config),
            (first.params, second.params),
            jnp.float32(share),
            jnp.asarray(padded),
            lengths,
            keys,
            new_tokens,
        )
    tokens, count = np.asarray(tokens), np.asarray(count)
    return [new[:number].tolist() for new, number in zip(tokens, count, strict=True)]


@functools.partial(jax.jit, static_argnames=("configs", "new_tokens"))
def _run(
    configs: tuple[TransformerConfig, TransformerConfig],
    params: tuple[Params, Params],
    share: Float[Array, ""],
    prompts: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    keys: Array,
    new_tokens: int,
) -> tuple[Int[Array, "B N"], Int[Array, "B"]]:
    """New tokens, and how many of them are text."""
    batch, capacity = prompts.shape[0], prompts.shape[1] + new_tokens
    ends = jnp.asarray([-1, *configs[0].eos_ids], jnp.int32)
    size = min(config.vocab_size for config in configs)

    def read(k, cache, tokens, slots, last, behind=True):
        layout = Layout.extend(slots, tokens.shape[1]) if behind else Layout.causal(*tokens.shape)
        out = forward(configs[k], params[k], tokens, layout, Sources(cache if behind else None))
        hidden = jnp.take_along_axis(out.hidden, last[:, None, None], axis=1)[:, 0]
        return _Read(commit(cache, out.rows, None, slots, after=out.hidden[:, 0]), hidden)

    def going(carry):
        n, _, count, _ = carry
        return (n < new_tokens) & jnp.any(count == n)

    def step(carry):
        n, tokens, count, states = carry
        log_q, log_p = (
            jax.nn.log_softmax(head(configs[k], params[k], state.hidden)[..., :size], axis=-1)
            for k, state in enumerate(states)
        )
        mixed = jnp.logaddexp(jnp.log1p(-share) + log_q, jnp.log(share) + log_p)
        drawn = argmax(mixed + noise(keys, lengths + n, mixed.shape[-1], mixed.dtype))
        live = count == n
        tokens = tokens.at[:, n].set(jnp.where(live, drawn, 0))
        ended = jnp.any(drawn[:, None] == ends, axis=-1)
        # A text that has ended keeps its count, which `n` leaves behind.
        count = jnp.where(live, n + 1, count)
        going_on = jnp.where(live & ended, -count, count)
        zero = jnp.zeros(batch, jnp.int32)
        states = tuple(read(k, state.cache, drawn[:, None], lengths + n, zero) for k, state in enumerate(states))
        return n + 1, tokens, going_on, states

    begun = []
    for k, config in enumerate(configs):
        cache = init_cache(config, batch, capacity, params[k]["embed"]["embedding"].dtype)
        begun.append(read(k, cache, prompts, jnp.zeros(batch, jnp.int32), lengths - 1, behind=False))
    empty = jnp.zeros((batch, new_tokens), jnp.int32)
    _, tokens, count, _ = jax.lax.while_loop(
        going, step, (jnp.int32(0), empty, jnp.zeros(batch, jnp.int32), tuple(begun))
    )
    return tokens, jnp.abs(count)
