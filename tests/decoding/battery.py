"""What the battery (test_battery.py) decodes with: its target, cases and runs, and a loop looked at step by step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import loop
from decoding.augment import Augment
from decoding.coprocessors import Coprocessor
from decoding.drafter import Drafter
from decoding.generate import Generation, generate
from decoding.request import Request
from decoding.sampling import Sampling
from models import coprocessor
from models.coprocessor import CoprocessorConfig
from models.formats.target import Target
from tests.decoding.drafter_cases import WARM, Recorder, battery_case, battery_target
from tests.noise import noisy

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [0, 3, 3, 7, 1]]
CAPACITY = 520
SAMPLINGS = [
    Sampling(temperature=0.7),
    Sampling(temperature=0.8 * WARM, top_p=0.9),
    Sampling(temperature=1.5 * WARM, top_k=4, min_p=0.05),
    Sampling(temperature=1.0 * WARM, top_k=7, top_p=0.8),
]


@functools.cache
def target() -> Target:
    with jax.enable_x64(True):
        return battery_target()


@functools.cache
def case(name: str) -> tuple[Drafter, Any]:
    with jax.enable_x64(True):
        return battery_case(name, target())


def decode(name: str, prompts=PROMPTS, params: Any = None, **settings) -> Generation:
    """Decodes with the case's parameters, or with others."""
    drafter, own = case(name)
    params = own if params is None else params
    return generate(target(), prompts, drafter=Recorder(drafter), drafter_params=params, capacity=CAPACITY, **settings)


def room(drafter: Drafter, prompt: list[int]) -> int:
    """New tokens of a request that fills the cache to its last slot."""
    return CAPACITY - drafter.max_depth - 1 - len(prompt)


def full_limits(drafter: Drafter) -> list[int]:
    """Different limits for every row; the first row's request fills the cache to its last slot."""
    return [room(drafter, PROMPTS[0]), 420, 410, 460]


@functools.cache
def long_run(name: str) -> Generation:
    with jax.enable_x64(True):
        return decode(name, max_new_tokens=full_limits(case(name)[0]))


def cut_after(text: list[int], stop: list[int]) -> list[int]:
    """A text until it first shows `stop`, with that."""
    ends = (end for end in range(len(stop), len(text) + 1) if text[end - len(stop) : end] == stop)
    return text[: next(ends, len(text))]


def first_ends(text: list[int], size: int = 3) -> list[int]:
    """Places where a text first shows the `size` tokens that end there."""
    return [end for end in range(size, len(text) + 1) if len(cut_after(text, text[end - size : end])) == end]


SHORTER = [200, 150, 180, 130]


@functools.cache
def long_sampled_run(name: str) -> Generation:
    with jax.enable_x64(True):
        return decode(name, max_new_tokens=SHORTER, sampling=SAMPLINGS, seeds=[3, 1, 4, 1])


@dataclasses.dataclass(frozen=True)
class Seen:
    """A copy on the host of what the loop carries."""

    tokens: np.ndarray
    length: np.ndarray
    done: np.ndarray
    cache: Any
    drafter: Any

    @classmethod
    def of(cls, state: loop.DecodeState) -> "Seen":
        assert np.array_equal(state.slots, state.text.length), "plain text takes a slot per token"
        text = [np.array(x) for x in (state.text.tokens, state.text.length, state.text.done)]
        return cls(*text, *(jax.tree.map(np.array, part) for part in (state.cache, state.drafter)))


@dataclasses.dataclass(frozen=True)
class Step:
    """What was there before and after one step of the loop."""

    before: Seen
    after: Seen


@functools.lru_cache(maxsize=1)  # Hundreds of megabytes each.
def steps(name: str) -> tuple[list[Step], Request]:
    """Every step of a short decode, looked at by running the loop one step at a time."""
    seen, requests = [], []
    run = loop.run

    def watched(models, state, request, count):
        before = Seen.of(state)
        after = run(models, state, request, count)
        seen.append(Step(before, Seen.of(after)))
        requests.append(request)
        return after

    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run", watched)
        generation = decode(name, max_new_tokens=[30, 25, 33, 9], stream_every=1, on_tokens=lambda *_: None)
    assert generation.tokens[0] == long_run("none").tokens[0][:30]
    return seen, requests[0]


@functools.cache
def latents() -> Augment:
    """A coprocessor of three latents at every eleventh token, two tokens late."""
    config = CoprocessorConfig("lora", num_latents=3, rank=2, z_scale="match_rms", z_base="last_token")
    with jax.enable_x64(True):
        init = jax.jit(coprocessor.init_params, static_argnums=(0, 1))
        params = noisy(init(config, target().config, target().params, jax.random.key(5)), 0.5)
        return Augment(Coprocessor(config, coprocessor.for_decoding(config, params)), every=11, lag=2)


@functools.cache
def augmented_run(name: str, sampled: bool = False, backwards: bool = False) -> Generation:
    """On a cache with latents; `backwards` has the last prompt first."""
    way = -1 if backwards else 1
    settings = dict(sampling=SAMPLINGS[::way], seeds=[3, 1, 4, 1][::way]) if sampled else {}
    with jax.enable_x64(True):
        new_tokens = [60, 45, 64, 39][::way]
        return decode(name, PROMPTS[::way], max_new_tokens=new_tokens, augment=latents(), **settings)


@functools.cache
def models(name: str) -> loop.Models:
    """The target and the case's drafter, recorded."""
    drafter, params = case(name)
    return loop.Models(target().config, Recorder(drafter), target().params, drafter.for_decoding(params))


def blank(name: str, text: np.ndarray) -> loop.DecodeState:
    """A state before any text, but for what stands in the text's buffer."""
    return loop.init_state(target().config, Recorder(case(name)[0]), len(text), CAPACITY, jnp.float64, text)


def prefilled(
    name: str, text: np.ndarray, request: Request, chunks: list[tuple[int, np.ndarray]]
) -> tuple[loop.DecodeState, jax.Array]:
    """The state that has read the beginning of `text` in chunks of 16: (first place, where each row ends by then)."""
    state, hidden = blank(name, text), jnp.zeros((len(text), target().config.width))
    for first, ends in chunks:
        until = dataclasses.replace(request, prompt_length=jnp.array(ends))
        chunk = jnp.array(text[:, first : first + 16], jnp.int32)
        state, hidden = loop.read_prompt(models(name), state, hidden, until, chunk)
    return state, hidden


def programs() -> list[int]:
    """Programs of a decode that were compiled so far."""
    return [f._cache_size() for f in (loop.run, loop._read_chunk, loop._ingest, loop._begin, loop._choose_first)]
