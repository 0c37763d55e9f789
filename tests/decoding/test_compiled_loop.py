"""What the compiled loop does not do: talk to the host, or copy the cache. Read off its optimised HLO.

The battery reads the program that it decodes with, of four rows in float64; here are others, and mistakes that it sees.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from decoding import loop
from decoding.cache import SLOTS
from decoding.generate import _pack_stops
from decoding.request import Request
from decoding.sampling import Sampling, batch_sampling
from tests.decoding.compiled_text import HOST, inside_loops, whole_copies
from tests.decoding.drafter_cases import CASES, random_target

CAPACITY, HEAD_DIM, KV_HEADS = 112, 22, 2


def compiled_text(name: str, batch: int, vocab_size: int = 12) -> str:
    """Optimised HLO of the loop with this drafter, in float32, its state donated."""
    target = random_target(vocab_size=vocab_size, head_dim=HEAD_DIM, num_kv_heads=KV_HEADS, dtype=jnp.float32)
    drafter, params = CASES[name](target, jax.random.key(0))
    state = loop.init_state(target.config, drafter, batch, CAPACITY, jnp.float32)
    request = Request(
        prompt_length=jnp.ones(batch, jnp.int32),
        limit=jnp.full(batch, 50, jnp.int32),
        stops=_pack_stops([[3]], batch),
        keys=jax.vmap(jax.random.key)(jnp.arange(batch)),
        sampling=batch_sampling([Sampling(temperature=1.0, top_p=0.9)] * batch),
    )
    carried, of_state = jax.tree.flatten(state)
    models = loop.Models(target.config, drafter, target.params, drafter.for_decoding(params))
    given, of_rest = jax.tree.flatten((models, request))

    # A function made here, which jit cannot know from before a test changed the loop. It takes bare leaves because
    # lowering puts descriptions in the place of arrays, which checked annotations refuse.
    def run(carried, given):
        models, request = jax.tree.unflatten(of_rest, given)
        return loop.run.__wrapped__(models, jax.tree.unflatten(of_state, carried), request, jnp.int32(8))

    return jax.jit(run, donate_argnums=0).lower(carried, given).compile().as_text()


def whole_cache_copies(text: str, batch: int) -> list[str]:
    """Lines inside loops that make a new buffer as large as one layer's keys or values."""
    return whole_copies(text, "f32", batch * KV_HEADS * CAPACITY * HEAD_DIM)


def slow_but_for(name: str, batch: int) -> list:
    """One row is written in another way than several; two drafters show it, one of which asks another conditionally."""
    return [] if batch == 1 and name in ("prompt_lookup+hydra++", "draft chain") else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "batch"),
    [pytest.param(name, batch, marks=slow_but_for(name, batch)) for name in CASES for batch in (1, 3)],
)
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
    commit = loop.commit_rows

    def gathers(cache, rows, path, length, after):
        slots = jnp.arange(CAPACITY)[None, None, :, None]
        order = jnp.where(slots < length[:, None, None, None], slots, slots[:, :, ::-1])
        written = commit(cache, rows, path, length, after)
        return [layer | {"v": jnp.take_along_axis(layer["v"], order, axis=SLOTS["v"])} for layer in written]

    monkeypatch.setattr(loop, "commit_rows", gathers)
    text = compiled_text("hydra", 3)
    assert whole_cache_copies(text, 3)


def test_a_callback_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.decode_step

    def talks(*arguments):
        state = step(*arguments)
        jax.debug.callback(lambda length: None, state.text.length)
        return state

    monkeypatch.setattr(loop, "decode_step", talks)
    text = compiled_text("none", 1)
    assert HOST.findall(text)
