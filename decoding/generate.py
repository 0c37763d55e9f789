"""`generate`: prompts in, texts out, through the jitted loop, whole or as a stream.

This is the host side: it checks the request, chooses the bucket, feeds the prompt in chunks, and runs the loop to its
end or m steps at a time.
"""

import dataclasses
import numbers
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decoding import loop
from decoding.drafter import Drafter
from decoding.drafters.plain import Plain
from decoding.request import Request
from decoding.sampling import Sampling, batch_sampling
from decoding.stats import Stats
from decoding.verify import Typical
from models.errors import UserError
from models.formats.target import Target
from models.sharding import check_placed, mesh_of, on_mesh, place_rows

PREFILL_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Generation:
    """Finished texts, one per prompt.

    Attributes:
      tokens: new tokens, a stop token included.
      writers: beside each, who wrote it: 0 the target, d the accepted draft of depth d.
      stats: one per prompt.
      prefill_seconds: reading the prompts and choosing the first tokens.
      decode_seconds: the loop.
      memory: what the drafter keeps for the next request; None for most drafters.
    """

    tokens: list[list[int]]
    writers: list[list[int]]
    stats: list[Stats]
    prefill_seconds: float
    decode_seconds: float
    memory: Any = None


def bucket(size: int, smallest: int = 64) -> int:
    """Rounds a size up so that few shapes are compiled: four steps per power of two, at most a quarter wasted."""
    if size <= smallest:
        return smallest
    step = max(smallest // 4, 1 << ((size - 1).bit_length() - 3))
    return -(-size // step) * step


def slots_needed(prompt_length: int, max_new_tokens: int, max_depth: int) -> int:
    """Cache slots that a request takes: its text with the rows of one last draft, or its padded prompt if longer."""
    # The last step starts one token before the limit and writes a full path.
    return max(prompt_length + max_new_tokens + max_depth + 1, sum(_chunk_sizes(prompt_length)))


def generate(
    target: Target,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    drafter: Drafter | None = None,
    drafter_params=None,
    max_new_tokens: int | Sequence[int] | np.ndarray = 128,
    sampling: Sampling | Sequence[Sampling] = Sampling(),
    seeds: int | np.integer | Sequence[int] | np.ndarray = 0,
    stop: Sequence[Sequence[int]] | None = None,
    typical: Typical | None = None,
    capacity: int | None = None,
    stream_every: int = 8,
    on_tokens: Callable[[int, list[int], list[int]], None] | None = None,
    mesh=None,
    memory=None,
    attention: str = "dense",
) -> Generation:
    """Decodes a batch of prompts; ragged lengths are fine.

    Args:
      target: the model whose text it is.
      prompts: token ids, at least one per prompt.
      drafter: what proposes candidates; None is plain decoding.
      drafter_params: its parameters.
      max_new_tokens: per prompt, or one for all.
      sampling: settings per prompt, or one for all; the default is greedy.
      seeds: one per prompt, or a first one from which they count up. A row's text depends on its own prompt, seed and
        settings alone.
      stop: token sequences that end a text; None means the target's end tokens. They are part of the output.
      typical: lossy typical acceptance instead of lossless verification.
      capacity: cache slots per row; by default the smallest bucket that fits.
      stream_every: steps between calls of `on_tokens`.
      on_tokens: called with (row, new tokens, their writers) as text is committed.
      mesh: devices that share the work: the batch is split over `data`, heads and vocabulary over `tensor`. None is the
        mesh that the target was loaded on, or one device.
      attention: how the target reads its cache: `dense`, or `split`, with the library's attention for the prefix
        (`models/attention.py`; neither sliding windows nor soft caps). Measure before choosing.
      memory: `Generation.memory` of an earlier request of the same batch size, for drafters that learn as they go.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, a request that does not fit the context or cache, or
        parameters that do not lie on the mesh.
    """
    config, params = target.config, target.params
    drafter = drafter or Plain()
    drafter.check(config)
    batch = len(prompts)
    limits = _per_row(max_new_tokens, batch, "max_new_tokens")
    if stream_every < 1:
        raise UserError(f"stream_every must be at least 1 step, got {stream_every}")
    needed, padded = _check_request(config, prompts, limits, drafter)
    capacity = _capacity(capacity, max(needed, padded), drafter)
    if drafter_params is None and jax.tree.leaves(_param_shapes(drafter, target)):
        raise UserError(f"the drafter {drafter.name} has parameters: give them as drafter_params")
    mesh = mesh_of(params) if mesh is None else mesh
    if mesh is not None:
        _check_mesh(mesh, target, drafter_params, batch)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    request = _make_request(config, lengths, limits, seeds, sampling, stop, attention, typical)
    drafter.rule(request.sampling.greedy)  # Refuses what cannot be verified, before anything is computed.
    text = np.zeros((batch, padded), np.int32)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = prompt

    started = time.perf_counter()
    models = loop.Models(config, drafter, params, drafter.for_decoding(drafter_params, mesh))
    with on_mesh(mesh):
        state, request = _prefill(models, request, text, capacity, mesh, memory)
        prefilled = time.perf_counter()
        every = 2**31 - 1 if on_tokens is None else stream_every
        sent = lengths.copy()
        while True:
            if on_tokens is not None:
                sent = _stream(state, sent, on_tokens)
            if bool(jnp.all(state.text.done)):
                break
            state = loop.run(models, state, request, np.int32(every))
        jax.block_until_ready(state)
    return _finished(state, lengths, drafter, prefilled - started, time.perf_counter() - prefilled)


def _finished(state, lengths, drafter, prefill_seconds, decode_seconds) -> Generation:
    tokens, writers, ends = (np.asarray(x) for x in (state.text.tokens, state.text.writers, state.text.length + 1))
    span = [slice(int(start), int(end)) for start, end in zip(lengths, ends, strict=True)]
    return Generation(
        tokens=[tokens[row, s].tolist() for row, s in enumerate(span)],
        writers=[writers[row, s].tolist() for row, s in enumerate(span)],
        stats=[Stats.of(state.counters, row) for row in range(len(span))],
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        memory=drafter.memory(state.drafter),
    )


def _prefill(models: loop.Models, request, text, capacity, mesh, memory):
    """The state in which the prompts are read and the first tokens chosen, and the request beside it."""
    config, drafter, batch = models.config, models.drafter, len(text)
    dtype = models.params["embed"]["embedding"].dtype
    state = loop.init_state(config, drafter, batch, capacity, dtype, text, mesh=mesh)
    if memory is not None:
        # Copied, and through the host: the loop donates its state, the caller may want to begin from this memory again,
        # and it may come from another mesh.
        copied = jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), memory)
        recalled = drafter.recall(state.drafter, copied)
        state = dataclasses.replace(state, drafter=recalled if mesh is None else place_rows(mesh, recalled))
    hidden, chunks = jnp.zeros((batch, config.width), dtype), _chunks(text)
    if mesh is not None:
        hidden, chunks, request = place_rows(mesh, (hidden, chunks, request))
    for chunk in chunks:
        state, hidden = loop.read_prompt(models, state, hidden, request, jnp.asarray(chunk))
    return jax.block_until_ready(loop.begin(models, state, hidden, request)), request


def _param_shapes(drafter: Drafter, target: Target):
    return jax.eval_shape(lambda key: drafter.init_params(target.config, target.params, key), jax.random.key(0))


def _check_mesh(mesh, target, drafter_params, batch) -> None:
    check_placed(mesh, target.params, "the target's parameters")
    check_placed(mesh, drafter_params, "the drafter's parameters")
    sizes = {"data": (batch, "prompts"), "tensor": (target.config.num_kv_heads, "key-value heads of the target")}
    for axis, (size, what) in sizes.items():
        if size % mesh.shape[axis]:
            where = f"{axis}={mesh.shape[axis]}"
            warnings.warn(f"{size} {what} do not divide over {where}: each device there works on all", stacklevel=3)


def _make_request(config, lengths, limits, seeds, sampling, stop, attention, typical) -> Request:
    batch = len(lengths)
    if attention not in ("dense", "split"):
        raise UserError(f"attention must be 'dense' or 'split', got {attention!r}")
    if attention == "split" and (any(config.windows) or config.attention_softcap is not None):
        raise UserError("attention 'split' cannot serve a target with sliding windows or an attention soft cap")
    seeds = _per_row(
        [seeds + row for row in range(batch)] if isinstance(seeds, numbers.Integral) else seeds, batch, "seeds"
    )
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise UserError(f"seeds must be in [0, 2^32), got {min(seeds) if min(seeds) < 0 else max(seeds)}")
    return Request(
        prompt_length=jnp.asarray(lengths),
        limit=jnp.asarray(lengths + np.array(limits, np.int32)),
        stops=_pack_stops(stop if stop is not None else [[eos] for eos in config.eos_ids], batch),
        keys=jax.vmap(jax.random.key)(jnp.array(seeds, jnp.uint32)),
        sampling=batch_sampling(_per_row(sampling, batch, "sampling")),
        attention=attention,
        typical=typical,
    )


def _per_row(value, batch: int, name: str) -> list:
    value = value.tolist() if isinstance(value, np.ndarray) else value
    rows = list(value) if isinstance(value, Sequence) else [value] * batch
    if len(rows) != batch:
        raise UserError(f"{name} has {len(rows)} entries for {batch} prompts")
    return rows


def _check_request(config, prompts, limits, drafter) -> tuple[int, int]:
    """Cache slots that decoding needs, and those that the padded prompt chunks need."""
    if min(limits, default=1) < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {min(limits)}")
    if len(prompts) == 0:
        raise UserError("there is no prompt to decode")
    needed = 0
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if len(prompt) == 0:
            raise UserError(f"prompt {row} is empty: a text needs at least one token to begin with")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            bad = min(prompt) if min(prompt) < 0 else max(prompt)
            raise UserError(f"prompt {row} has token {bad}, outside the target's vocabulary of {config.vocab_size}")
        if len(prompt) + limit > config.max_position:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens and {limit} new ones were asked for, more than the target's "
                f"context of {config.max_position}"
            )
        needed = max(needed, slots_needed(len(prompt), limit, drafter.max_depth))
    return needed, sum(_chunk_sizes(max(map(len, prompts))))


def _capacity(asked: int | None, needed: int, drafter: Drafter) -> int:
    if asked is None:
        return bucket(needed)
    if asked < needed:
        raise UserError(
            f"a cache of {asked} slots is too small: the request needs {needed} (longest prompt, new tokens and "
            f"{drafter.max_depth + 1} rows of draft)"
        )
    return asked


def _chunk_sizes(length: int) -> list[int]:
    whole, rest = divmod(length, PREFILL_CHUNK)
    return [PREFILL_CHUNK] * whole + ([bucket(rest, smallest=16)] if rest else [])


def _chunks(text: np.ndarray) -> list[np.ndarray]:
    sizes = [PREFILL_CHUNK] * (text.shape[1] // PREFILL_CHUNK)
    sizes += [text.shape[1] % PREFILL_CHUNK] if text.shape[1] % PREFILL_CHUNK else []
    return np.split(text, np.cumsum(sizes)[:-1], axis=1)


def _pack_stops(stops: Sequence[Sequence[int]], batch: int) -> Int[Array, "B K L"]:
    """`[B, K, L]`, right-aligned, padded with -1; K and L are rounded up to multiples of 4 and 8.

    So requests that stop at different things share a compilation: an all-padding row stops nothing.
    """
    if any(not sequence for sequence in stops):
        raise UserError("a stop sequence is empty")
    if any(min(sequence) < 0 for sequence in stops):
        raise UserError(f"a stop sequence holds the token {min(map(min, stops))}: token ids begin at 0")
    longest = 8 * -(-max(map(len, stops), default=1) // 8)
    packed = np.full((4 * -(-max(len(stops), 1) // 4), longest), -1, np.int32)
    for row, sequence in enumerate(stops):
        packed[row, longest - len(sequence) :] = sequence
    return jnp.broadcast_to(packed, (batch, *packed.shape))


def _stream(state, sent, on_tokens):
    tokens, writers, ends = (np.asarray(x) for x in (state.text.tokens, state.text.writers, state.text.length + 1))
    for row in range(len(sent)):
        if ends[row] > sent[row]:
            span = slice(int(sent[row]), int(ends[row]))
            on_tokens(row, tokens[row, span].tolist(), writers[row, span].tolist())
    return ends
