"""What the compiled loop does not do: talk to the host, or copy the cache. Read off its optimised HLO."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import loop
from decoding.cache import SLOTS
from decoding.generate import _pack_stops
from decoding.sampling import Sampling, batch_sampling
from tests.decoding.drafter_cases import CASES, each_drafter, random_target

CAPACITY, HEAD_DIM, KV_HEADS = 112, 22, 2
HOST = re.compile(r"(?<![\w-])(infeed|outfeed|send|recv|send-done|recv-done)\(|callback")
# Handing a buffer on, or writing some rows into it, is not copying it.
IN_PLACE = {"parameter", "get-tuple-element", "tuple", "while", "call", "conditional", "bitcast"}
IN_PLACE |= {"dynamic-update-slice", "scatter"}
LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")


def compiled_text(name: str, batch: int, vocab_size: int = 12) -> str:
    """Optimised HLO of the loop with this drafter, in float32, its state donated."""
    target = random_target(vocab_size=vocab_size, head_dim=HEAD_DIM, num_kv_heads=KV_HEADS, dtype=jnp.float32)
    drafter, params = CASES[name](target, jax.random.key(0))
    state = loop.init_state(target.config, drafter, batch, CAPACITY, jnp.float32)
    request = loop.Request(
        prompt_length=jnp.ones(batch, jnp.int32),
        limit=jnp.full(batch, 50, jnp.int32),
        stops=_pack_stops([[3]], batch),
        keys=jax.vmap(jax.random.key)(jnp.arange(batch)),
        sampling=batch_sampling([Sampling(temperature=1.0, top_p=0.9)] * batch),
    )
    carried, of_state = jax.tree.flatten(state)
    given, of_rest = jax.tree.flatten((target.params, params, request))

    # A function made here, which jit cannot know from before a test changed the loop. It takes bare leaves because
    # lowering puts descriptions in the place of arrays, which checked annotations refuse.
    def run(carried, given):
        target_params, params, request = jax.tree.unflatten(of_rest, given)
        state = jax.tree.unflatten(of_state, carried)
        prepared = drafter.prepare(params)
        return loop.run.__wrapped__(target.config, drafter, target_params, prepared, state, request, jnp.int32(8))

    return jax.jit(run, donate_argnums=0).lower(carried, given).compile().as_text()


def computations(text: str) -> dict[str, list[str]]:
    """Name -> lines of every computation of an HLO module."""
    found: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if opened := re.match(r"^(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            name = opened[1]
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found


def inside_loops(text: str) -> dict[str, list[str]]:
    """The computations that a while loop runs, directly or through others; the insides of fusions left out."""
    everything = computations(text)
    waiting = re.findall(r"body=%?([\w.-]+)", text)
    reached: dict[str, list[str]] = {}
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached[name] = everything[name]
        for line in everything[name]:
            if " fusion(" not in line:
                waiting += re.findall(r"(?:to_apply|body|calls|true_computation|false_computation)=%?([\w.-]+)", line)
                for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
                    waiting += re.findall(r"[\w.-]+", group.replace("%", " "))
    return reached


def whole_cache_copies(text: str, batch: int) -> list[str]:
    """Lines inside loops that make a new buffer as large as one layer's keys or values."""
    return whole_copies(text, "f32", batch * KV_HEADS * CAPACITY * HEAD_DIM)


def whole_copies(text: str, dtype: str, size: int) -> list[str]:
    """Lines inside loops that make a new buffer of `size` elements."""
    everything = computations(text)

    def large(shape: str) -> bool:
        return size in [
            np.prod([int(d) for d in dims.split(",") if d]) for dims in re.findall(rf"{dtype}\[([\d,]*)\]", shape)
        ]

    def results(fusion: str) -> list[str]:
        """Kinds of the large operations that a fusion writes out: its root, or what its root gathers in a tuple."""
        lines = {match[1]: match for line in everything[fusion] if (match := LINE.match(line))}
        root = LINE.match(next(line for line in everything[fusion] if "ROOT" in line))
        written = re.findall(r"%([\w.-]+)", root[4]) if root[3] == "tuple" else [root[1]]
        return [lines[name][3] for name in written if name in lines and large(lines[name][2])]

    made = []
    for lines in inside_loops(text).values():
        for match in filter(None, map(LINE.match, lines)):
            _, shape, kind, rest = match.groups()
            kinds = results(re.search(r"calls=%?([\w.-]+)", rest)[1]) if kind == "fusion" else [kind]
            if large(shape) and not set(kinds) <= IN_PLACE:
                made.append(match[0].strip())
    return made


@each_drafter
@pytest.mark.parametrize("batch", [1, 3])
def test_loop_stays_on_the_device_and_copies_no_cache(name: str, batch: int) -> None:
    text = compiled_text(name, batch)
    assert text.count("while(") >= 1 and inside_loops(text)
    assert f"f32[{batch},{KV_HEADS},{CAPACITY},{HEAD_DIM}]" in text
    assert not HOST.findall(text)
    assert whole_cache_copies(text, batch) == []


@pytest.mark.parametrize(("name", "entry"), [("token_recycling", 2), ("lookahead", 2 * 3)])
@pytest.mark.parametrize("batch", [1, 3])
def test_tables_over_the_vocabulary_are_not_copied(name: str, entry: int, batch: int) -> None:
    text = compiled_text(name, batch, vocab_size=997)
    assert re.search(rf"s32\[{batch},997,", text)
    assert whole_copies(text, "s32", batch * 997 * entry) == []


def test_a_commit_that_gathers_the_cache_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = loop.commit

    def gathers(cache, rows, path, length):
        slots = jnp.arange(CAPACITY)[None, None, :, None]
        order = jnp.where(slots < length[:, None, None, None], slots, slots[:, :, ::-1])
        written = commit(cache, rows, path, length)
        return [layer | {"v": jnp.take_along_axis(layer["v"], order, axis=SLOTS["v"])} for layer in written]

    monkeypatch.setattr(loop, "commit", gathers)
    text = compiled_text("hydra", 3)
    assert whole_cache_copies(text, 3)


def test_a_callback_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.decode_step

    def talks(*arguments):
        state = step(*arguments)
        jax.debug.callback(lambda length: None, state.length)
        return state

    monkeypatch.setattr(loop, "decode_step", talks)
    text = compiled_text("none", 1)
    assert HOST.findall(text)
