"""The decoding loop: one `lax.while_loop`, everything on the device.

A step drafts a token tree, runs the target on all of its nodes at once, verifies, commits the accepted rows to the
cache and tells the drafter what became text. One compilation serves a *bucket*, (batch, capacity, tree width, static
sampling mode); lengths, limits, stop sequences, sampling settings and the number of steps are traced.

Invariant between steps: the cache holds `tokens[:, :length]`, and `tokens[:, length]` is the root, chosen but not yet
read by the target.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Int16, Int32

from decoding.cache import commit, init_cache
from decoding.drafter import Drafter, Riders, TargetView, TrueRows
from decoding.sampling import SamplingParameters, draft_keys, draw
from decoding.stats import Counters
from decoding.trees import TokenTree
from decoding.verify import Typical, verify, verify_typical
from models.config import TransformerConfig
from models.layout import Layout
from models.sharding import keep_rows, place_rows
from models.transformer import Cache, Params, forward, head


@struct.dataclass
class Request:
    """What was asked, per batch row; read only.

    Attributes:
      prompt_length: tokens of the prompt.
      limit: most tokens in the end, prompt included.
      stops: K token sequences that end a text, right-aligned in L places, padded on the left with -1.
      keys: typed PRNG keys.
      sampling: sampling settings.
      attention: how the target attends to its cache (`models.layout.Layout.attention`).
    """

    prompt_length: Int[Array, "B"]
    limit: Int[Array, "B"]
    stops: Int[Array, "B K L"]
    keys: Array
    sampling: SamplingParameters
    attention: str = struct.field(pytree_node=False, default="dense")


@struct.dataclass
class DecodeState:
    """The carry of the loop.

    Attributes:
      tokens: the text so far, root included, in the first `length + 1` places.
      writers: who wrote each token: 0 the target, d the accepted draft of depth d.
      length: committed tokens.
      done: finished rows; they stay frozen.
      cache: the target's keys and values.
      drafter: the drafter's own state.
      counters: what the statistics are made of.
    """

    tokens: Int32[Array, "B C"]
    writers: Int16[Array, "B C"]
    length: Int32[Array, "B"]
    done: Bool[Array, "B"]
    cache: Cache
    drafter: object
    counters: Counters


def init_state(config, drafter: Drafter, batch: int, capacity: int, dtype, prompts=None, mesh=None) -> DecodeState:
    """An empty state of `capacity` tokens; `prompts` `[B, <= capacity]` pre-fills the text buffer.

    On a mesh every row's part of it lies on the row's devices.
    """
    tokens = jnp.zeros((batch, capacity), jnp.int32)
    if prompts is not None:
        tokens = tokens.at[:, : prompts.shape[1]].set(prompts)
    state = DecodeState(
        tokens=tokens,
        writers=jnp.zeros((batch, capacity), jnp.int16),
        length=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        cache=init_cache(config, batch, capacity, dtype, mesh=mesh),
        drafter=drafter.init(config, batch, capacity, dtype, mesh),
        counters=Counters.zeros(batch, drafter.max_depth, drafter.max_nodes),
    )
    return state if mesh is None else place_rows(mesh, state)


@functools.partial(jax.jit, static_argnames=("config", "drafter"), donate_argnames=("state", "hidden"))
def prefill_chunk(
    config: TransformerConfig,
    drafter: Drafter,
    params: Params,
    drafter_params,
    state: DecodeState,
    hidden: Float[Array, "B H"],
    request: Request,
    tokens: Int[Array, "B T"],
) -> tuple[DecodeState, Float[Array, "B H"]]:
    """Reads the next T prompt tokens of every row that still has any.

    Returns:
      The state, and per row the post-norm feature of its last prompt token read so far.
    """
    rows = tokens.shape[1]
    count = jnp.clip(request.prompt_length - state.length, 0, rows)
    layout = Layout.extend(state.length, rows, request.attention)
    out = forward(config, params, tokens, layout, state.cache, taps=drafter.taps)
    cache = commit(state.cache, out.rows, None, state.length)
    length = state.length + count
    view = TargetView(config, params, cache, length, state.tokens, request.sampling)
    drafter_state = drafter.ingest(drafter_params, view, state.drafter, TrueRows(tokens, state.length, count, out.taps))
    last = jnp.maximum(count - 1, 0)[:, None, None]
    read = jnp.take_along_axis(out.hidden, last, axis=1)[:, 0]
    hidden = jnp.where((count > 0)[:, None], read, hidden)
    return keep_rows((dataclasses.replace(state, cache=cache, length=length, drafter=drafter_state), hidden))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def choose_first(
    config: TransformerConfig, params: Params, state: DecodeState, hidden: Float[Array, "B H"], request: Request
) -> DecodeState:
    """Chooses the first root from the prompt's last feature."""
    root = draw(head(config, params, hidden), request.sampling, request.keys, state.length)
    zero = jnp.zeros_like(state.length)
    # The root goes to `tokens[length]`, one place before where a step's tokens go.
    before = dataclasses.replace(state, length=state.length - 1)
    state, _ = emit(before, request, root[:, None], zero)
    return keep_rows(state)


@functools.partial(jax.jit, static_argnames=("drafter",))
def prepare(drafter: Drafter, drafter_params):
    """The drafter's parameters as its `draft` reads them; what stays as it is is not copied."""
    return drafter.prepare(drafter_params)


@functools.partial(jax.jit, static_argnames=("config", "drafter", "typical"), donate_argnames=("state",))
def run(
    config: TransformerConfig,
    drafter: Drafter,
    params: Params,
    drafter_params,
    state: DecodeState,
    request: Request,
    steps: Int[Array, ""],
    typical: Typical | None = None,
) -> DecodeState:
    """At most `steps` steps, fewer when every row is done; `drafter_params` are prepared."""

    def going(carry):
        step, state = carry
        return (step < steps) & ~jnp.all(state.done)

    def body(carry):
        step, state = carry
        return step + 1, decode_step(config, drafter, params, drafter_params, state, request, typical)

    return jax.lax.while_loop(going, body, (jnp.int32(0), state))[1]


def decode_step(config, drafter, params, drafter_params, state, request, typical=None) -> DecodeState:
    """One draft, one target forward, one verdict; `drafter_params` are prepared."""
    view = TargetView(config, params, state.cache, state.length, state.tokens, request.sampling)
    root = jnp.take_along_axis(state.tokens, state.length[:, None], axis=1)[:, 0]
    with jax.named_scope("draft"):
        keys = draft_keys(request.keys, state.length)
        tree, drafted = drafter.draft(drafter_params, view, state.drafter, root, keys)
        riders = drafter.riders(drafter_params, view, state.drafter, tree)
    with jax.named_scope("target"):
        tokens, layout = verify_rows(tree, riders, state.length)
        layout = dataclasses.replace(layout, attention=request.attention)
        out = forward(config, params, tokens, layout, state.cache, taps=drafter.taps)
    with jax.named_scope("verify"):
        arguments = (request.sampling, request.keys, state.length, drafter.max_depth)
        if typical is None:
            verdict = verify(tree, out.logits, *arguments)
        else:
            verdict = verify_typical(tree, out.logits, typical, *arguments)
    with jax.named_scope("commit"):
        after, emitted = emit(state, request, verdict.tokens, verdict.drafts)
        path = verdict.path if drafter.max_depth else None
        # XLA updates the cache in place only if it can tell that every layer has read it before. Plain decoding writes
        # the same row whatever the verdict, so the place is made to depend on it: tokens are never negative.
        start = state.length + jnp.minimum(verdict.tokens[:, 0], 0)
        after = dataclasses.replace(
            after,
            cache=commit(state.cache, out.rows, path, start),
            counters=state.counters.record(
                verdict.path, emitted, jnp.minimum(verdict.drafts, emitted), (~state.done).astype(jnp.int32)
            ),
        )
    with jax.named_scope("ingest"):
        taps = {name: jnp.take_along_axis(tap, verdict.path[:, :, None], axis=1) for name, tap in out.taps.items()}
        read = jnp.take_along_axis(tree.tokens, verdict.path, axis=1)
        rows = TrueRows(read, state.length, emitted, taps, verdict.path, drafted)
        view = TargetView(config, params, after.cache, after.length, after.tokens, request.sampling)
        drafter_state = drafter.ingest(drafter_params, view, state.drafter, rows)
        drafter_state = drafter.observe(drafter_params, view, drafter_state, tree, out, verdict, ~state.done)
    return keep_rows(dataclasses.replace(after, drafter=drafter_state))


def verify_rows(tree: TokenTree, riders: Riders | None, length: Int[Array, "B"]) -> tuple[Int[Array, "B _"], Layout]:
    """The rows of the verify forward: tokens and layout of the tree's N nodes, then of the riders."""
    layout = Layout(length[:, None] + tree.depth, length, tree.ancestors)
    if riders is None:
        return tree.tokens, layout
    batch, nodes = tree.tokens.shape
    among = jnp.broadcast_to(tree.ancestors, (batch, nodes, nodes))
    by_riders = jnp.concatenate([riders.sees_tree, riders.sees_riders], axis=2)
    by_riders = jnp.broadcast_to(by_riders, (batch, *by_riders.shape[1:]))
    seen = jnp.concatenate([jnp.pad(among, ((0, 0), (0, 0), (0, riders.tokens.shape[1]))), by_riders], axis=1)
    positions = jnp.concatenate([layout.positions, riders.positions], axis=1)
    return jnp.concatenate([tree.tokens, riders.tokens], axis=1), Layout(positions, length, seen)


def emit(
    state: DecodeState, request: Request, tokens: Int[Array, "B R"], drafts: Int[Array, "B"]
) -> tuple[DecodeState, Int[Array, "B"]]:
    """Appends `drafts + 1` tokens to each live row, cut at its limit and after its first stop sequence.

    Returns:
      The state and how many tokens each row really got.
    """
    R = tokens.shape[1]
    place_R = jnp.arange(R, dtype=jnp.int32)
    count = jnp.minimum(drafts + 1, request.limit - state.length - 1)
    stopped_BR = _ends_stop(state, request, tokens) & (place_R < count[:, None])
    first = jnp.min(jnp.where(stopped_BR, place_R, R), axis=1)
    count = jnp.where(state.done, 0, jnp.minimum(count, first + 1))
    writers_BR = jnp.where(place_R < drafts[:, None], place_R + 1, 0).astype(jnp.int16)
    length = state.length + count
    done = state.done | (first < R) | (length + 1 >= request.limit)
    state = dataclasses.replace(
        state,
        tokens=_write_text(state.tokens, tokens, state.length + 1),
        writers=_write_text(state.writers, writers_BR, state.length + 1),
        length=length,
        done=done,
    )
    return state, count


def _write_text(buffer: Int[Array, "B C"], values: Int[Array, "B R"], start: Int[Array, "B"]) -> Int[Array, "B C"]:
    return jax.vmap(lambda b, v, s: jax.lax.dynamic_update_slice(b, v.astype(b.dtype), (s,)))(buffer, values, start)


def _ends_stop(state: DecodeState, request: Request, tokens: Int[Array, "B R"]) -> Bool[Array, "B R"]:
    """`[b, r]`: generated text up to and including `tokens[b, r]` ends with one of the row's stop sequences."""
    R, L = tokens.shape[1], request.stops.shape[2]
    before_BL = state.length[:, None] + 1 + jnp.arange(-(L - 1), 0, dtype=jnp.int32)
    tail = jnp.take_along_axis(state.tokens, jnp.maximum(before_BL, 0), axis=1)
    # A stop sequence must lie in generated text: prompt tokens match nothing.
    tail = jnp.where(before_BL >= request.prompt_length[:, None], tail, -2)
    text = jnp.concatenate([tail, tokens], axis=1)
    window_BRL = jnp.stack([text[:, i : i + R] for i in range(L)], axis=2)
    stops_BKL = request.stops
    same = (stops_BKL[:, None] == window_BRL[:, :, None]) | (stops_BKL[:, None] == -1)
    return jnp.any(jnp.all(same, axis=3) & (stops_BKL[:, None, :, -1] >= 0), axis=2)
