"""`generate`: prompts in, texts out, through the jitted loop, whole or as a stream.

This is the host side: it checks the request, chooses the bucket and the size of an open drafter, feeds the prompt in
chunks, and runs the loop to its end or m steps at a time.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decoding import loop, sizing
from decoding.arguments import (
    at_least_one,
    behind_encoder,
    check_kinds,
    checked_prompts,
    checked_sampling,
    checked_stops,
    drafter_and_params,
    seed_per_row,
    whole_per_row,
)
from decoding.augment import NEVER, Augment, Schedule, step_runs
from decoding.drafter import Drafter
from decoding.drafters.plain import Plain
from decoding.paced import Paced
from decoding.request import Request
from decoding.sampling import Sampling, batch_sampling
from decoding.stats import Stats
from decoding.verify import Typical
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.continuation import Continuation, split_stops, text_behind
from models.formats.target import Target
from models.sharding import check_placed, mesh_of, on_mesh, place_rows

PREFILL_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Generation:
    """Finished texts, one per prompt.

    Attributes:
      tokens: new tokens, a stop token included.
      writers: beside each, who wrote it: 0 the target, d the accepted draft of depth d.
      texts: what the new tokens say behind their prompt, up to and with a stop text that ended them; empty where the
        target has no tokenizer.
      stats: one per prompt.
      prefill_seconds: reading the prompts and choosing the first tokens.
      decode_seconds: the loop.
      memory: what the drafter keeps for the next request; None for most drafters, and for open ones.
      augmentations: per prompt, how often a coprocessor answered.
      augment_seconds: what that took, the target's reading of the latents included; a part of the other two.
    """

    tokens: list[list[int]]
    writers: list[list[int]]
    stats: list[Stats]
    prefill_seconds: float
    decode_seconds: float
    memory: Any = None
    texts: list[str] = dataclasses.field(default_factory=list)
    augmentations: list[int] = dataclasses.field(default_factory=list)
    augment_seconds: float = 0.0


def bucket(size: int, smallest: int = 64) -> int:
    """Rounds a size up so that few shapes are compiled: four steps per power of two, at most a quarter wasted."""
    if size <= smallest:
        return smallest
    step = max(smallest // 4, 1 << ((size - 1).bit_length() - 3))
    return -(-size // step) * step


def cache_sizes(needed: Sequence[int]) -> list[int]:
    """Slots of each of several requests' caches, so that few programs are compiled: the largest of all, unless that is
    more than twice what a request needs, or than what others do that need no more than half of it."""
    sizes: list[int] = []
    for size in sorted(map(bucket, needed), reverse=True):
        if not sizes or 2 * size < sizes[-1]:
            sizes.append(size)
    return [min(size for size in sizes if size >= bucket(one)) for one in needed]


def slots_needed(
    prompt_length: int, max_new_tokens: int, max_depth: int, augment: Augment | None = None, batch: int = 1
) -> int:
    """Cache slots that a request takes: its text and latents with the rows of one last draft, or its padded prompt if
    longer; where so many are read at once."""
    # The last step starts one token before the limit and writes a full path.
    latents = augment.slots(max_new_tokens) if augment else 0
    return max(prompt_length + max_new_tokens + latents + max_depth + 1, sum(chunk_sizes(prompt_length, batch)))


def catching_up(drafter: Drafter) -> int:
    """Slots beside those that a request takes with which an open drafter goes on where nothing was drafted for a while:
    it then reads all of that at once. Without them it drafts no more at the end of a text."""
    return sizing.SEGMENT if drafter.open_sizes and drafter.ingests else 0


def check_context(
    config: TransformerConfig, prompts: Sequence[Sequence[int]], limits: Sequence[int], augment: Augment | None
) -> None:
    """Raises UserError for the first prompt that with its new tokens and their latents exceeds the target's context,
    where no token is asked for, or where every text ends before latents come."""
    if min(limits) < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {min(limits)}")
    if augment is not None:
        augment.refuse_unreached(max(limits))
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        latents = augment.positions(limit) if augment else 0
        if len(prompt) + limit + latents > config.max_position:
            beside = f" beside {latents} latents" if latents else ""
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens and {limit} new ones were asked for{beside}, more than the "
                f"target's context of {config.max_position}"
            )


def generate(
    target: Target,
    prompts: Any,
    *,
    drafter: Any = None,
    drafter_params: Any = None,
    max_new_tokens: Any = 128,
    sampling: Any = Sampling(),
    seeds: Any = 0,
    stop: Any = None,
    stop_texts: Any = (),
    typical: Any = None,
    capacity: Any = None,
    stream_every: Any = 8,
    on_tokens: Any = None,
    mesh=None,
    memory=None,
    attention: str = "dense",
    augment: Any = None,
) -> Generation:
    """Decodes a batch of prompts; ragged lengths are fine. Arguments may be anything and are checked (`arguments.py`).

    Args:
      target: the model whose text it is.
      prompts: token ids, int lists or arrays, at least one id per prompt. An encoder, if there is one, reads them.
      drafter: the `Drafter` that proposes candidates, or the pair that `load_drafter` returns; None is plain decoding.
        An open one (`Drafter.opened`) has the number of candidates that pays here, perhaps none (`decoding/sizing.py`);
        on a mesh, and with `memory`, the published one.
      drafter_params: its parameters, where they are not in the pair.
      max_new_tokens: int per prompt, or one for all.
      sampling: `Sampling` per prompt, or one for all; the default is greedy.
      seeds: int per prompt, or a first one from which they count up. A row's text depends on its own prompt, seed and
        settings alone; its distribution, where a rule that draws has trees sized by the clock or the batch.
      stop: token sequences that end a text; None means the target's end tokens. They are part of the output.
      stop_texts: texts that end a text beside `stop`, looked for in what the new tokens say; `texts` ends with the one
        that was met, `tokens` with the token that completes it. The host looks every `stream_every` steps, so counts
        of single nodes and `memory` may include up to that many steps more. Special tokens may be among them.
      typical: lossy typical acceptance instead of lossless verification.
      capacity: cache slots per row; by default the smallest bucket that fits.
      stream_every: steps between calls of `on_tokens` and between looks for `stop_texts`.
      on_tokens: called with (row, new tokens, their writers) as text is committed.
      mesh: devices that share the work, batch on `data`, heads and vocabulary on `tensor`. None is the target's own.
      attention: how the target reads its cache: `dense`, or `split`, with the library's attention for the prefix (no
        sliding windows, no soft caps). Measure before choosing.
      memory: `Generation.memory` of an earlier request of the same batch size, for drafters that learn as they go.
      augment: a coprocessor whose latents go into the cache beside the text, which becomes the augmented target's.

    Raises:
      UserError: an argument of another kind, an empty prompt, a token outside the vocabulary, a request that fits no
        context or cache, parameters of another drafter or off the mesh; or scores of the target that are not finite.
    """
    check_kinds(target, mesh, typical, on_tokens, augment, memory)
    config, mesh = target.config, mesh_of(target.params) if mesh is None else mesh
    drafter, drafter_params = drafter_and_params(drafter, drafter_params, target, mesh)
    read, prompts = behind_encoder(target, checked_prompts(prompts, target))
    batch, limits = len(prompts), _limits(config, prompts, max_new_tokens, augment)
    stop, stop_texts = _stops(target, stop, stop_texts)
    _check_mesh(mesh, target, drafter_params, batch, augment)
    request = _make_request(config, prompts, limits, seeds, sampling, stop, attention, typical, mesh)
    reader = _Reader(target, prompts, stop_texts, on_tokens, stream_every)
    drafter.rule(request.sampling.greedy)  # Refuses what cannot be verified, before anything is computed,
    _capacity(capacity, prompts, limits, 0, Plain(), config.max_position, augment)  # and a cache of no use.
    more, pace = catching_up(drafter), None
    if opened := bool(drafter.open_sizes) and mesh is None and memory is None and read is None:
        pace = _pace(target, drafter, drafter_params, checked_sampling(sampling, batch), augment)
        drafter, drafter_params = (pace.widest.drafter, drafter_params) if pace else (Plain(), None)
    capacity, padded = _capacity(capacity, prompts, limits, more, drafter, config.max_position, augment)
    started = time.perf_counter()
    models = loop.Models(config, drafter, target.params, drafter.for_decoding(drafter_params, mesh))
    with on_mesh(mesh):
        request = _encoded(models, request, read, mesh)
        schedule = Schedule(models, request, augment, stop, mesh)
        state = _prefill(models, request, _padded(prompts, padded), capacity, mesh, memory, schedule)
        if paced := Paced(models, request, pace) if pace else None:
            state = paced.compiled(state)
        prefilled = time.perf_counter()
        state = _run(paced.segment if paced else _steps(models), state, reader, mesh, schedule)
    seconds = prefilled - started, time.perf_counter() - prefilled
    memory = None if opened else drafter.memory(state.drafter)  # An open one's fits one of its sizes only.
    return _finished(target, prompts, state, paced, memory, seconds, reader.ended, stop_texts, schedule)


def _limits(config: TransformerConfig, prompts, asked: Any, augment: Augment | None) -> list[int]:
    """New tokens of each text at most, for which the context has room."""
    limits = whole_per_row(asked, len(prompts), "max_new_tokens")
    check_context(config, prompts, limits, augment)
    return limits


def _pace(target, drafter: Drafter, params, settings: list[Sampling], augment: Augment | None) -> sizing.Pace | None:
    """Of whose sizes the widest has the state that serves all; None where none pays."""
    greedy = all(one.temperature == 0 for one in settings)
    return sizing.pace(target, drafter, params, len(settings), greedy, augment and augment.kind)


def _padded(prompts: list[list[int]], length: int) -> np.ndarray:
    text = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = prompt
    return text


def _steps(models: loop.Models) -> Callable[..., loop.DecodeState]:
    return lambda state, steps, request: loop.run(models, state, request, np.int32(steps))


def _run(step: Callable[..., loop.DecodeState], state, reader: "_Reader", mesh, schedule: Schedule):
    """The loop to its end, without a stop where nobody reads what it writes or asks what the next steps shall be."""
    while True:
        if reader.watches:
            state = reader.look(state, mesh)
        if not np.all(np.asarray(state.text.done)):
            state = step(state, reader.every, schedule.request)
        elif (due := schedule.due(state, reader.ended)).any():
            state = schedule.resume(state, due)
        else:
            return jax.block_until_ready(state)


def _finished(
    target, prompts, state, paced: Paced | None, memory, seconds, ended: dict[int, int], stop_texts, schedule: Schedule
) -> Generation:
    tokens, writers, lengths = (np.asarray(x) for x in (state.text.tokens, state.text.writers, state.text.length))
    span = [slice(len(prompt), ended.get(row, int(lengths[row]) + 1)) for row, prompt in enumerate(prompts)]
    made = [tokens[row, s].tolist() for row, s in enumerate(span)]
    by = [writers[row, s].tolist() for row, s in enumerate(span)]
    for row, new in enumerate(made):
        _refuse_broken(new, target.config.vocab_size, row, len(prompts[row]))
    stats = paced.stats if paced else [Stats.of(state.counters, row) for row in range(len(prompts))]
    texts = []
    if target.tokenizer is not None:
        pairs = zip(prompts, made, strict=True)
        texts = [text_behind(target.tokenizer, prompt, new, stop_texts) for prompt, new in pairs]
    return Generation(
        tokens=made,
        writers=by,
        stats=[one.cut(step_runs(schedule.augment, by[row])) if row in ended else one for row, one in enumerate(stats)],
        prefill_seconds=seconds[0],
        decode_seconds=seconds[1],
        memory=memory,
        texts=texts,
        augmentations=schedule.calls.tolist(),
        augment_seconds=schedule.seconds,
    )


def _stops(target: Target, stop, stop_texts) -> tuple[list[list[int]], list[str]]:
    """Token sequences and texts that end a text."""
    stops = [[eos] for eos in target.config.eos_ids] if stop is None else checked_stops(stop)
    # What the loop draws where the target has no token to offer.
    stops.append([target.config.vocab_size])
    stop_texts = stop_texts.tolist() if isinstance(stop_texts, np.ndarray) else stop_texts
    if not stop_texts:
        return stops, []
    if target.tokenizer is None:
        raise UserError("stop_texts need a tokenizer, which this target lacks: give token sequences as stop")
    specials, texts = split_stops(target.tokenizer, stop_texts)
    return stops + specials, texts


def _encoded(models: loop.Models, request: Request, prompts: list[list[int]] | None, mesh) -> Request:
    """The request with its prompts read by the target's encoder, where it has one."""
    if prompts is None:
        return request
    lengths = [len(prompt) for prompt in prompts]
    read = jnp.asarray(_padded(prompts, bucket(max(lengths), smallest=16))), jnp.asarray(np.array(lengths, np.int32))
    read = read if mesh is None else place_rows(mesh, read)
    return dataclasses.replace(request, memory=loop.encode_prompt(models.config, models.params, *read))


def _prefill(models: loop.Models, request, text, capacity, mesh, memory, schedule: Schedule) -> loop.DecodeState:
    """The state in which the prompts are read and the first tokens chosen."""
    config, drafter, batch = models.config, models.drafter, len(text)
    dtype = models.params["embed"]["embedding"].dtype
    state = schedule.room(loop.init_state(config, drafter, batch, capacity, dtype, mesh=mesh))
    if memory is not None:
        # Copied, and through the host: the loop donates its state, the caller may want to begin from this memory again,
        # and it may come from another mesh.
        copied = jax.device_put(jax.tree.map(np.array, memory))
        recalled = drafter.recall(state.drafter, copied)
        state = dataclasses.replace(state, drafter=recalled if mesh is None else place_rows(mesh, recalled))
    hidden, chunks = jax.device_put(np.zeros((batch, config.width), dtype)), _chunks(text)
    if mesh is not None:
        hidden, chunks = place_rows(mesh, (hidden, chunks))
    for chunk in chunks:
        state, hidden = loop.read_prompt(models, state, hidden, request, jax.device_put(chunk))
    return jax.block_until_ready(schedule.begin(state, hidden))


def _check_mesh(mesh, target, drafter_params, batch, augment) -> None:
    if augment is not None:
        augment.check(target.config, mesh)
    if mesh is None:
        return
    check_placed(mesh, target.params, "the target's parameters")
    check_placed(mesh, drafter_params, "the drafter's parameters")
    sizes = {"data": (batch, "prompts"), "tensor": (target.config.num_kv_heads, "key-value heads of the target")}
    for axis, (size, what) in sizes.items():
        if size % mesh.shape[axis]:
            where = f"{axis}={mesh.shape[axis]}"
            warnings.warn(f"{size} {what} do not divide over {where}: each device there works on all", stacklevel=3)


def _make_request(config, prompts, limits, seeds, sampling, stop, attention, typical, mesh) -> Request:
    batch, lengths = len(prompts), np.array([len(prompt) for prompt in prompts], np.int32)
    if attention not in ("dense", "split"):
        raise UserError(f"attention must be 'dense' or 'split', got {attention!r}")
    if attention == "split" and (any(config.windows) or config.attention_softcap is not None):
        raise UserError("attention 'split' cannot serve a target with sliding windows or an attention soft cap")
    if typical is not None:
        typical = Typical(*(jnp.full(batch, bound, jnp.float32) for bound in (typical.epsilon, typical.delta)))
    request = Request(
        prompt_length=jax.device_put(lengths),
        limit=jax.device_put(lengths + np.array(limits, np.int32)),
        stops=_pack_stops(stop, batch),
        keys=jax.vmap(jax.random.key)(jax.device_put(np.array(seed_per_row(seeds, batch), np.uint32))),
        sampling=batch_sampling(checked_sampling(sampling, batch)),
        attention=attention,
        typical=typical,
    )
    return request if mesh is None else place_rows(mesh, request)


def _capacity(
    asked: Any, prompts, limits, more: int, drafter: Drafter, context: int, augment: Augment | None
) -> tuple[int, int]:
    """Cache slots, as asked or else as many as a bucket has; and those of the prompts in padded chunks."""
    padded = sum(chunk_sizes(max(map(len, prompts)), len(prompts)))
    sizes = {(len(prompt), limit) for prompt, limit in zip(prompts, limits, strict=True)}
    needed = max(slots_needed(*size, drafter.max_depth, augment, len(prompts)) for size in sizes)
    if asked is None:
        return bucket(max(needed + more, padded)), padded
    asked = at_least_one(asked, "capacity")
    if asked < max(needed, padded):
        of = f"longest prompt, new tokens and {drafter.max_depth + 1} rows of draft"
        of = of if needed > padded else "longest prompt, in whole chunks"
        raise UserError(f"a cache of {asked} slots is too small: the request needs {max(needed, padded)} ({of})")
    # A text as long as the context has more latents than this request, which may be the first few tokens of another.
    latents = augment.slots(context) if augment else 0
    most = max(bucket(max(needed, padded)), 2 * bucket(slots_needed(context, 0, drafter.max_depth) + latents))
    if asked > most:
        taken = "text, its latents and its draft" if augment else "text and its draft"
        raise UserError(
            f"a cache of {asked} slots is too large: with a context of {context} no {taken} take over {most}"
        )
    return asked, padded


def chunk_sizes(length: int, batch: int = 1) -> list[int]:
    """Rows of the chunks in which prompts of up to that length are read; each size is a program.

    On an accelerator a few hundred rows take about as long as one, so that nothing is gained by many sizes.
    """
    if length == 1:
        return [1]  # All that a decoder behind an encoder is given.
    whole, rest = divmod(length, PREFILL_CHUNK)
    smallest = 16 if jax.default_backend() == "cpu" else max(16, PREFILL_CHUNK // batch)
    return [PREFILL_CHUNK] * whole + ([bucket(rest, smallest)] if rest else [])


def _chunks(text: np.ndarray) -> list[np.ndarray]:
    sizes = [PREFILL_CHUNK] * (text.shape[1] // PREFILL_CHUNK)
    sizes += [text.shape[1] % PREFILL_CHUNK] if text.shape[1] % PREFILL_CHUNK else []
    return np.split(text, np.cumsum(sizes)[:-1], axis=1)


def _pack_stops(stops: Sequence[Sequence[int]], batch: int) -> Int[Array, "B K L"]:
    """`[B, K, L]`, right-aligned, padded with -1; K and L are rounded up to multiples of 4 and 8.

    So requests that stop at different things share a compilation: an all-padding row stops nothing.
    """
    longest = 8 * -(-max(map(len, stops), default=1) // 8)
    packed = np.full((4 * -(-max(len(stops), 1) // 4), longest), -1, np.int32)
    for row, sequence in enumerate(stops):
        packed[row, longest - len(sequence) :] = sequence
    return jax.device_put(np.tile(packed, (batch, 1, 1)))


class _Reader:
    """Reads a text while it grows: hands new tokens on, and ends rows where a stop text is complete.

    Attributes:
      every: steps from one look to the next.
      ended: places behind the stop texts that rows have met.
    """

    def __init__(self, target: Target, prompts: list[list[int]], stop_texts: Sequence[str], on_tokens, every: Any):
        steps = at_least_one(every, "stream_every", " step")
        self._vocab_size, self._on_tokens = target.config.vocab_size, on_tokens
        self._texts = None
        if stop_texts and target.tokenizer is not None:
            self._texts = [Continuation(target.tokenizer, prompt, stop_texts) for prompt in prompts]
        self._read = [len(prompt) for prompt in prompts]
        self.ended: dict[int, int] = {}
        self.every = steps if self.watches else NEVER

    @property
    def watches(self) -> bool:
        """Whether there is anything to read before the end."""
        return self._on_tokens is not None or self._texts is not None

    def look(self, state: loop.DecodeState, mesh) -> loop.DecodeState:
        """The state without the rows that have met a stop text since the last look."""
        tokens, writers, lengths = (np.asarray(x) for x in (state.text.tokens, state.text.writers, state.text.length))
        ended = len(self.ended)
        for row, start in enumerate(self._read):
            if row in self.ended:
                continue
            end = self._end(row, tokens[row, start : lengths[row] + 1].tolist())
            if self._on_tokens is not None and end > start:
                self._on_tokens(row, tokens[row, start:end].tolist(), writers[row, start:end].tolist())
            self._read[row] = end
        if len(self.ended) == ended:
            return state
        host = np.array(state.text.done)
        host[list(self.ended)] = True
        done = jnp.asarray(host)
        done = done if mesh is None else place_rows(mesh, done)
        return dataclasses.replace(state, text=dataclasses.replace(state.text, done=done))

    def _end(self, row: int, new: list[int]) -> int:
        start = self._read[row]
        _refuse_broken(new, self._vocab_size, row, start)
        if self._texts is not None:
            for place, token in enumerate(new, start):
                self._texts[row].feed(token)
                if self._texts[row].ended:
                    self.ended[row] = place + 1
                    return place + 1
        return start + len(new)


def _refuse_broken(tokens: list[int], vocab_size: int, row: int, start: int) -> None:
    """Raises UserError where the target had no next token to offer (`decoding.sampling.unless_broken`)."""
    if tokens and tokens[-1] >= vocab_size:
        raise UserError(
            f"the target's scores are not finite (NaN or infinity) for the token {start + len(tokens) - 1} of prompt "
            f"{row}'s text: its weights are damaged, or too large for their dtype"
        )
