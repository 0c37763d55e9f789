"""The decoding loop: one `lax.while_loop`, everything on the device, and the programs that read a prompt before it.

A step is five functions, which the loop, the benchmarks and the tests all call:

    draft    the drafter's token tree                                   (`decoding/drafters`, `decoding/policies`)
    read     the target's forward on all of its nodes, and on riders    (`models/transformer.py`)
    judge    which candidates become text, and the next root            (`decoding/verify.py`)
    commit   accepted rows into the cache; text, counters, stops        (`decoding/cache.py`, `decoding/text.py`)
    learn    what the drafter makes of it                               (`decoding/drafter.py`)

One compilation of the loop serves a *bucket*, (batch, capacity, tree width, static sampling mode); lengths, limits,
stop sequences, sampling parameters and the number of steps are traced. Prompts are read by a program of the target's
own, which all drafters share; what a drafter makes of a prompt is a small program beside it.

Invariant between steps: the cache holds the rows of `tokens[:, :length]`, and `tokens[:, length]` is the root, chosen
but not yet read by the target.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Int32

from decoding import verify
from decoding.cache import commit as commit_rows
from decoding.cache import init_cache
from decoding.drafter import Drafter, Riders, TargetView, TrueRows
from decoding.place import Place
from decoding.request import Request
from decoding.sampling import draft_keys, draw
from decoding.stats import Counters
from decoding.text import Text, emit
from decoding.trees import TokenTree
from decoding.verify import Verdict
from models.config import TransformerConfig
from models.encoder_decoder import Memory, beside, encode
from models.layout import Layout, Tree
from models.sharding import keep_rows, place_rows
from models.transformer import Cache, Output, Params, forward, head


@struct.dataclass
class DecodeState:
    """The carry of the loop.

    Attributes:
      text: tokens, who wrote them, lengths, finished rows; those stay frozen.
      slots: cache slots in use.
      cache: the target's keys and values.
      drafter: the drafter's own state.
      counters: what the statistics are made of.
      held: slots without a position of their own (`decoding.place.Place`); None where no latents hold theirs.
    """

    text: Text
    slots: Int32[Array, "B"]
    cache: Cache
    drafter: Any
    counters: Counters
    held: Int32[Array, "B"] | None = None

    @property
    def place(self) -> Place:
        """Where each row stands."""
        return Place(self.text.length, self.slots, self.held)


@struct.dataclass
class Models:
    """Who works together: a target, a drafter, and their parameters as `for_decoding` made them."""

    config: TransformerConfig = struct.field(pytree_node=False)
    drafter: Drafter = struct.field(pytree_node=False)
    params: Params
    drafter_params: Any

    def view(self, state: DecodeState, request: Request) -> TargetView:
        """The target as the drafter may see it."""
        text, memory = state.text, request.memory
        of_target = (self.config, self.params, state.cache, state.place)
        return TargetView(*of_target, text.tokens, request.sampling, memory, text.done)


def init_state(config, drafter: Drafter, batch: int, capacity: int, dtype, prompts=None, mesh=None) -> DecodeState:
    """An empty state of `capacity` tokens; on a mesh every row's part of it lies on the row's devices.

    `read_prompt` writes the text that it reads; `prompts` `[B, <= capacity]` stand in the buffer from the beginning.
    What is small comes from the host: a `jnp.zeros` is a program for each shape, and `jnp.asarray` another.
    """
    tokens = np.zeros((batch, capacity), np.int32)
    if prompts is not None:
        tokens[:, : prompts.shape[1]] = prompts
    state = DecodeState(
        text=Text(
            tokens=jax.device_put(tokens),
            writers=jax.device_put(np.zeros((batch, capacity), np.int16)),
            length=jax.device_put(np.zeros(batch, np.int32)),
            done=jax.device_put(np.zeros(batch, bool)),
        ),
        slots=jax.device_put(np.zeros(batch, np.int32)),
        cache=init_cache(config, batch, capacity, dtype, mesh=mesh),
        drafter=drafter.init(config, batch, capacity, dtype, mesh),
        counters=Counters.zeros(batch, drafter.max_depth, drafter.max_nodes),
    )
    return state if mesh is None else place_rows(mesh, state)


def read_prompt(
    models: Models,
    state: DecodeState,
    hidden: Float[Array, "B H"],
    request: Request,
    tokens: Int[Array, "B T"],
    source: Literal["prompt", "target"] = "prompt",
) -> tuple[DecodeState, Float[Array, "B H"]]:
    """Reads the next T prompt tokens of every row that still has any, and lets the drafter ingest them.

    With the source `target` it is a text that has been decoded so far, and is read on as if it were a prompt.

    Returns:
      The state, and per row the post-norm feature of its last prompt token read so far.
    """
    config, drafter = models.config, models.drafter
    start = state.place
    cache, written, count, taps, hidden = _read_chunk(
        config,
        drafter.taps,
        request.attention,
        models.params,
        state.cache,
        state.text.tokens,
        start,
        hidden,
        request.prompt_length,
        tokens,
        request.memory,
    )
    after = start.after(count)
    text = dataclasses.replace(state.text, tokens=written, length=after.length)
    state = dataclasses.replace(state, text=text, slots=after.slots, cache=cache)
    if drafter.ingests:
        rows = TrueRows(tokens, start, count, taps, source)
        view = models.view(state, dataclasses.replace(request, sampling=request.sampling.of_any_mode))
        made = _ingest(drafter, models.drafter_params, view, state.drafter, rows)
        state = dataclasses.replace(state, drafter=made)
    return state, hidden


def choose_root(models: Models, state: DecodeState, hidden: Float[Array, "B H"], request: Request) -> DecodeState:
    """Chooses the first root from the prompt's last feature, and tells the drafter that the prompt is complete."""
    any_mode = request.sampling.of_any_mode
    asked = dataclasses.replace(request, sampling=any_mode, attention="dense", typical=None, memory=None)
    state = dataclasses.replace(state, text=_choose_first(models.config, models.params, state.text, hidden, asked))
    return begin_drafter(models, state, request)


def begin_drafter(models: Models, state: DecodeState, request: Request) -> DecodeState:
    """Tells the drafter that the prompt is complete, and its root chosen."""
    if models.drafter.begins:
        view = models.view(state, dataclasses.replace(request, sampling=request.sampling.of_any_mode))
        made = _begin(models.drafter, models.drafter_params, view, state.drafter)
        state = dataclasses.replace(state, drafter=made)
    return state


@functools.partial(jax.jit, static_argnames=("config",))
def encode_prompt(config, params: Params, tokens: Int[Array, "B M"], lengths: Int[Array, "B"]) -> Memory:
    """The prompts of an encoder-decoder, read once."""
    return keep_rows(encode(config, params, tokens, lengths))


@functools.partial(jax.jit, static_argnames=("config", "taps", "attention"), donate_argnames=("cache", "hidden"))
def _read_chunk(config, taps, attention, params, cache, text, start: Place, hidden, prompt_length, tokens, memory):
    """The target on one chunk of prompts: cache, text, how much was text, taps, and the newest last feature."""
    rows = tokens.shape[1]
    count = jnp.clip(prompt_length - start.length, 0, rows)
    layout = Layout.extend(start.slots, rows, start.position, attention)
    out = forward(config, params, tokens, *beside(memory, layout, cache), taps=taps)
    cache = commit_rows(cache, out.rows, None, start.slots, after=out.hidden[:, 0])
    place = jnp.arange(text.shape[1], dtype=jnp.int32) - start.length[:, None]
    fresh = jnp.take_along_axis(tokens, jnp.clip(place, 0, rows - 1), axis=1)
    text = jnp.where((place >= 0) & (place < count[:, None]), fresh, text)
    last = jnp.maximum(count - 1, 0)[:, None, None]
    read = jnp.take_along_axis(out.hidden, last, axis=1)[:, 0]
    return keep_rows((cache, text, count, out.taps, jnp.where((count > 0)[:, None], read, hidden)))


@functools.partial(jax.jit, static_argnames=("drafter",), donate_argnames=("state",))
def _ingest(drafter: Drafter, params, view: TargetView, state, rows: TrueRows):
    return keep_rows(drafter.ingest(params, view, state, rows))


@functools.partial(jax.jit, static_argnames=("drafter",), donate_argnames=("state",))
def _begin(drafter: Drafter, params, view: TargetView, state):
    return keep_rows(drafter.begin(params, view, state))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("text",))
def _choose_first(config, params: Params, text: Text, hidden: Float[Array, "B H"], request: Request) -> Text:
    root = draw(head(config, params, hidden), request.sampling, request.keys, text.length)
    # The root goes to `tokens[length]`, one place before where a step's tokens go.
    before = dataclasses.replace(text, length=text.length - 1)
    return keep_rows(emit(before, request, root[:, None], jnp.zeros_like(text.length))[0])


@functools.partial(jax.jit, donate_argnames=("state",))
def run(models: Models, state: DecodeState, request: Request, steps: Int[Array, ""]) -> DecodeState:
    """At most `steps` steps, fewer when every row is done."""

    def going(carry):
        step, state = carry
        return (step < steps) & ~jnp.all(state.text.done)

    def body(carry):
        step, state = carry
        return step + 1, decode_step(models, state, request)

    return jax.lax.while_loop(going, body, (jnp.int32(0), state))[1]


def decode_step(models: Models, state: DecodeState, request: Request) -> DecodeState:
    """One draft, one target forward, one verdict."""
    tree, kept = draft(models, state, request)
    out = read(models, state, request, tree)
    verdict = judge(models, state, request, tree, out.logits)
    after, emitted = commit(models, state, request, out.rows, verdict)
    return keep_rows(learn(models, state, after, request, Step(tree, kept, out, verdict, emitted)))


@struct.dataclass
class Step:
    """What happened in a step, for `learn`.

    Attributes:
      tree: what was drafted.
      kept: what `draft` returned beside it.
      out: the target's output on its nodes, then on the riders.
      verdict: what became text.
      emitted: how many tokens each row got.
    """

    tree: TokenTree
    kept: Any
    out: Output
    verdict: Verdict
    emitted: Int[Array, "B"]


@jax.named_scope("draft")
def draft(models: Models, state: DecodeState, request: Request) -> tuple[TokenTree, Any]:
    """The drafter's candidates behind the root, and what it keeps beside them for `learn`."""
    root = jnp.take_along_axis(state.text.tokens, state.text.length[:, None], axis=1)[:, 0]
    keys = draft_keys(request.keys, state.text.length)
    return models.drafter.draft(models.drafter_params, models.view(state, request), state.drafter, root, keys)


@jax.named_scope("read")
def read(models: Models, state: DecodeState, request: Request, tree: TokenTree) -> Output:
    """The target's forward on the tree's N nodes, then on the drafter's riders, with the features that it taps."""
    view = models.view(state, request)
    riders = models.drafter.riders(models.drafter_params, view, state.drafter, tree)
    tokens, layout = verify_rows(tree, riders, state.place)
    layout = dataclasses.replace(layout, attention=request.attention)
    seen = beside(request.memory, layout, state.cache)
    return forward(models.config, models.params, tokens, *seen, taps=models.drafter.taps)


@jax.named_scope("judge")
def judge(
    models: Models, state: DecodeState, request: Request, tree: TokenTree, logits: Float[Array, "B _ V"]
) -> Verdict:
    """Which candidates become text and what the next root is, by the tree's acceptance rule."""
    arguments = (request.sampling, request.keys, state.text.length, models.drafter.max_depth)
    if request.typical is not None:
        return verify.verify_typical(tree, logits, request.typical, *arguments)
    return verify.verify(tree, logits, *arguments, live=~state.text.done)


@jax.named_scope("commit")
def commit(
    models: Models, state: DecodeState, request: Request, rows: Any, verdict: Verdict
) -> tuple[DecodeState, Int[Array, "B"]]:
    """Accepted ones of the fresh rows into the cache, tokens into the text; and how many tokens each row got."""
    text, emitted = emit(state.text, request, verdict.tokens, verdict.drafts)
    path = verdict.path if models.drafter.max_depth else None
    live = (~state.text.done).astype(jnp.int32)
    after = dataclasses.replace(
        state,
        text=text,
        slots=state.place.after(emitted).slots,
        # Plain decoding writes the same row whatever the verdict, so XLA is told that it comes after.
        cache=commit_rows(state.cache, rows, path, state.slots, after=verdict.tokens[:, :1]),
        counters=state.counters.record(verdict.path, emitted, jnp.minimum(verdict.drafts, emitted), live),
    )
    return after, emitted


@jax.named_scope("learn")
def learn(models: Models, state: DecodeState, after: DecodeState, request: Request, step: Step) -> DecodeState:
    """The drafter's state after it ingested the rows that became text and observed everything else.

    Args:
      models: target and drafter.
      state: before the step.
      after: as `commit` left it.
      request: what was asked.
      step: what happened.
    """
    tree, verdict = step.tree, step.verdict
    taps = {name: jnp.take_along_axis(tap, verdict.path[:, :, None], axis=1) for name, tap in step.out.taps.items()}
    tokens = jnp.take_along_axis(tree.tokens, verdict.path, axis=1)
    rows = TrueRows(tokens, state.place, step.emitted, taps, "own", verdict.path, step.kept)
    view, params = models.view(after, request), models.drafter_params
    made = models.drafter.ingest(params, view, state.drafter, rows)
    made = models.drafter.observe(params, view, made, tree, step.out, verdict, ~state.text.done)
    return dataclasses.replace(after, drafter=made)


def verify_rows(tree: TokenTree, riders: Riders | None, place: Place) -> tuple[Int[Array, "B _"], Layout]:
    """The rows of the verify forward: tokens and layout of the tree's N nodes, then of the riders."""
    positions, horizon = place.positions(tree.depth), place.slots[:, None]
    if riders is None:
        return tree.tokens, Layout(positions, horizon, Tree(tree.ancestors))
    batch, nodes = tree.tokens.shape
    among = jnp.broadcast_to(tree.ancestors, (batch, nodes, nodes))
    by_riders = jnp.concatenate([riders.sees_tree, riders.sees_riders], axis=2)
    by_riders = jnp.broadcast_to(by_riders, (batch, *by_riders.shape[1:]))
    seen = jnp.concatenate([jnp.pad(among, ((0, 0), (0, 0), (0, riders.tokens.shape[1]))), by_riders], axis=1)
    positions = jnp.concatenate([positions, riders.positions], axis=1)
    return jnp.concatenate([tree.tokens, riders.tokens], axis=1), Layout(positions, horizon, Tree(seen))
