"""The battery of an encoder-decoder, step by step: stops, scores, what a step leaves behind, and its one program."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import loop
from decoding.cache import SLOTS
from decoding.generate import generate
from decoding.request import Request
from decoding.sampling import Sampling, SamplingParameters
from decoding.stats import Counters
from decoding.text import Text
from models import transformer
from models.encoder_decoder import Memory, beside, encode
from models.layout import Layout
from tests.decoding.battery import Seen, Step, programs
from tests.decoding.compiled_text import HOST, inside_loops, shapes_for_arrays, whole_copies
from tests.decoding.drafter_cases import Recorder
from tests.decoding.test_encoder_decoder import CAPACITY, PROMPTS, SHAPE, case, decode, params, run, target

pytestmark = pytest.mark.usefixtures("x64")
RUN_LONG = True

each = pytest.mark.parametrize("name", ["draft model", pytest.param("prompt_lookup", marks=pytest.mark.slow)])
TEXTS, LENGTH = 64, 24  # Whole forwards come in pieces of this shape, for one program to serve all.


def first_place(text: list[int], stop: list[int]) -> int:
    """Where a text is cut after a stop, its whole length where it has none."""
    found = (end for end in range(len(stop), len(text) + 1) if text[end - len(stop) : end] == stop)
    return next(found, len(text))


@pytest.mark.parametrize("name", ["draft model", "prompt_lookup"])
def test_stops_at_every_tree_position(name: str) -> None:
    # Drafts that are copied from the text repeat three tokens that it had; with those before them they are new.
    plain, uncut, size, met = run("none").tokens, run(name), 6, set()
    depths = range(case(name)[0].max_depth + 1)
    for depth in depths:
        ends = [
            (row, end)
            for row, (text, writers) in enumerate(zip(plain, uncut.writers, strict=True))
            for end in range(size, len(text) + 1)
            if writers[end - 1] == depth and first_place(text, text[end - size : end]) == end
        ]
        if not ends:
            continue
        row, end = ends[0]
        stop = plain[row][end - size : end]
        cut = [text[: first_place(text, stop)] for text in plain]
        made = decode(name, stop=[stop])
        assert made.tokens == cut and len(cut[row]) == end and made.writers[row][-1] == depth
        assert made.writers == [writers[: len(text)] for writers, text in zip(uncut.writers, cut, strict=True)]
        met.add(depth)
    assert met >= {0, 1, 2}


@functools.lru_cache(maxsize=1)
def steps(name: str) -> tuple[list[Step], Request]:
    """Every step of a short greedy decode, with the tree and the target's scores at its nodes."""
    seen, requests, whole_loop = [], [], loop.run

    def watched(models, state, request, count):
        before = Seen.of(state)
        after = whole_loop(models, state, request, count)
        seen.append(Step(before, Seen.of(after)))
        requests.append(request)
        return after

    drafter, own = case(name)
    assert drafter is not None
    with jax.enable_x64(True), shapes_for_arrays(Memory), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run", watched)
        made = generate(
            target(),
            PROMPTS,
            drafter=Recorder(drafter),
            drafter_params=own,
            max_new_tokens=[16, 9, 13],
            capacity=CAPACITY,
            stream_every=1,
            on_tokens=lambda *_: None,
        )
    assert made.tokens[0] == run("none").tokens[0][:16]
    return seen, requests[0]


@functools.partial(jax.jit, static_argnames="config")
def forward(config, params, memory: Memory, text):
    out = transformer.forward(config, params, text, *beside(memory, Layout.causal(*text.shape)))
    return out.logits, out.rows


_encode = jax.jit(encode, static_argnames="config")


def whole(config, params, request: Request, paths: list[tuple[int, list[int]]]):
    """Logits and keys and values of whole texts, of (row whose prompt it is, text), as many as were asked for."""
    assert request.memory is not None
    memory = _encode(config, params, request.memory.tokens, request.memory.lengths)
    rows, text = np.zeros(TEXTS, np.int32), np.zeros((TEXTS, LENGTH), np.int32)
    for place, (row, path) in enumerate(paths):
        rows[place], text[place, : len(path)] = row, path
    batch = len(request.memory.lengths)
    chosen = jax.tree.map(
        lambda leaf: jax.device_put(np.asarray(leaf)[rows]) if leaf.shape[0] == batch else leaf, memory
    )
    return jax.tree.map(np.asarray, forward(config, params, chosen, jnp.asarray(text)))


@each
def test_every_node_scores_like_a_plain_forward_over_its_root_path(name: str) -> None:
    seen, request = steps(name)
    paths, scores = [], []
    for step in seen:
        made = step.after.drafter
        for row in np.flatnonzero(~step.before.done):
            text = step.before.tokens[row, : step.before.length[row]].tolist()
            for leaf in np.flatnonzero(made["ancestors"][row].sum(axis=0) == 1):
                nodes = np.flatnonzero(made["ancestors"][row, leaf])
                paths.append((int(row), text + made["tokens"][row, nodes].tolist()))
                scores.append(made["logits"][row, nodes])
    assert len(paths) > 2 * len(seen)
    for first in range(0, len(paths), TEXTS):
        part = paths[first : first + TEXTS]
        logits, _ = whole(SHAPE, params(), request, part)
        for (_, path), ours, theirs in zip(part, scores[first : first + TEXTS], logits, strict=False):
            np.testing.assert_allclose(ours, theirs[len(path) - len(ours) : len(path)], rtol=0, atol=1e-9)


@each
def test_what_a_step_leaves_behind_is_what_the_text_alone_makes(name: str) -> None:
    """The target's cache of all text, and a draft model's own, which is read up to its last token."""
    seen, request = steps(name)
    drafter, own = case(name)
    last = seen[-1].after
    texts = [(row, last.tokens[row, : last.length[row]].tolist()) for row in range(len(PROMPTS))]
    _, fresh = whole(SHAPE, params(), request, texts)
    beginnings = whole(drafter.model, own, request, texts)[1] if own else []
    for step in seen:
        after = step.after
        assert all(np.array_equal(after.tokens[row, :n], last.tokens[row, :n]) for row, n in enumerate(after.length))
        kept = after.drafter["inner"]
        same_rows(after.cache, fresh, after.length)
        same_rows(kept["cache"] if own else [], beginnings, after.length - 1)
    if own:
        memory = _encode(drafter.model, own, request.memory.tokens, request.memory.lengths)
        for ours, theirs in zip(*map(jax.tree.leaves, (kept["memory"], memory)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def same_rows(cache, fresh, lengths) -> None:
    for ours, theirs in zip(cache, fresh, strict=True):
        for kind, axis in SLOTS.items():
            for row, length in enumerate(lengths):
                text = [np.asarray(x[kind][row]).take(range(length), axis - 1) for x in (ours, theirs)]
                np.testing.assert_allclose(*text, rtol=0, atol=1e-9)


@each
def test_one_program_serves_other_prompts_limits_and_stops_and_stays_on_the_device(name: str) -> None:
    """Read off the program that decodes: lowered again it is the one that was compiled."""
    run(name)
    before, requests, whole_loop = programs(), [], loop.run

    def watched(models, state, request, count):
        if not requests:
            arguments = models, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state), request
            requests.append(arguments)
        return whole_loop(models, state, request, count)

    checked = loop.Models, loop.DecodeState, Text, Counters, Request, SamplingParameters, Memory
    with shapes_for_arrays(*checked), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run", watched)
        others = [Sampling(temperature=2.0, top_p=0.3), Sampling(), Sampling()]
        decode(name, [[5, 4], [6] * 10, [8]], max_new_tokens=[3, 20, 5], stop=[[1], [2, 3]], sampling=others)
        text = whole_loop.lower(*requests[0], np.int32(1)).compile().as_text()
    assert programs() == before
    assert text.count("while(") >= 1 and inside_loops(text) and not HOST.findall(text)
    cache = len(PROMPTS), SHAPE.num_kv_heads, CAPACITY, SHAPE.head_dim
    assert f"f64[{','.join(map(str, cache))}]" in text
    assert whole_copies(text, "f64", math.prod(cache)) == []
