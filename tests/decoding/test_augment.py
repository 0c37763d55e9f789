"""Decoding with an augmented cache is what the target says of one long sequence, text and latents in their order.

That drafters are lossless on top of it is the battery's to show (test_battery.py).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generate as module
from decoding.augment import Augment
from decoding.cache import SLOTS
from decoding.coprocessors import Coprocessor
from decoding.generate import Generation, generate
from models import coprocessor, transformer
from models.coprocessor import CoprocessorConfig, Points
from models.formats.target import Target
from models.layout import Layout
from tests.decoding.drafter_cases import random_target
from tests.noise import noisy

pytestmark = pytest.mark.usefixtures("x64")

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
NEW = [22, 17, 30]
SIZE = 64  # Rows of the long sequence, and slots of the cache.


@functools.cache
def target() -> Target:
    with jax.enable_x64(True):
        return random_target(vocab_size=12)


@functools.cache
def augment(every: int | None = None, lag: int = 0, **flags: Any) -> Augment:
    """A coprocessor that is no copy of the target, whose latents matter."""
    config = CoprocessorConfig(**{"kind": "lora", "rank": 2, "num_latents": 3, **flags})
    with jax.enable_x64(True):
        init = jax.jit(coprocessor.init_params, static_argnums=(0, 1))
        params = noisy(init(config, target().config, target().params, jax.random.key(5)), 0.5)
        return Augment(Coprocessor(config, coprocessor.for_decoding(config, params)), every, lag)


@jax.jit
def whole(params, inputs, positions):
    layout = Layout(positions, jnp.zeros((1, 1), jnp.int32))
    return transformer.forward(target().config, params, inputs, layout)


@functools.partial(jax.jit, static_argnums=0)
def answer(config, params, target_params, rows, points, seen):
    return coprocessor.latents(config, params, target().config, target_params, rows, points, prefix_seen=seen)


def dense(prompt: list[int], new: list[int], with_latents: Augment):
    """Logits before every new token, and all keys and values, of the sequence in one causal forward.

    Each point's latents are made from the rows of such a forward over what comes before.
    """
    (config, own), params, text = with_latents.coprocessor, target().params, [*prompt, *new]
    inputs = np.zeros((1, SIZE, target().config.width))
    positions, is_text, before = np.zeros((1, SIZE), np.int32), np.zeros((1, SIZE), bool), []
    size, position = 0, -1
    points = {len(prompt) + with_latents.lag + i * (with_latents.every or 0) for i in range(len(new))}
    points = points if with_latents.every else {len(prompt) + with_latents.lag}

    def forward():
        return whole(params, jnp.asarray(inputs), jnp.asarray(positions))

    for index, token in enumerate(text):
        if index in points:
            read = size - with_latents.lag
            where = Points(*(jnp.full((1, 1), at, jnp.int32) for at in (position - with_latents.lag, read)))
            z = answer(config, own, params, forward().rows, where, jnp.asarray(is_text))
            at = slice(size, size + config.num_latents)
            inputs[:, at], positions[:, at] = z[:, 0], config.latent_positions(where.positions + with_latents.lag)[:, 0]
            size, position = at.stop, position + config.shift
        before.append(size - 1)
        inputs[:, size] = params["embed"]["embedding"][token]
        size, position = size + 1, position + 1
        positions[:, size - 1], is_text[:, size - 1] = position, True
    out = forward()
    return np.asarray(out.logits[0])[before[len(prompt) :]], out.rows, size


def augmented(with_latents: Augment, monkeypatch: pytest.MonkeyPatch, **settings) -> tuple[Generation, Any]:
    """What `generate` makes, and the state that it ended in."""
    kept, finished = [], module._finished
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finished", lambda *args: kept.append(args[2]) or finished(*args))
        made = generate(target(), PROMPTS, augment=with_latents, capacity=SIZE, **{"max_new_tokens": NEW, **settings})
    return made, kept[0]


@pytest.mark.parametrize(
    ("every", "lag", "flags"),
    [(None, 0, {}), (5, 0, {}), (6, 2, {"positions": "hold"}), (None, 3, {"kind": "pause", "positions": "hold"})],
)
def test_engine_is_one_long_forward(every, lag, flags, monkeypatch) -> None:
    made, state = augmented(augment(every, lag, **flags), monkeypatch)
    changed = 0
    for row, (prompt, new) in enumerate(zip(PROMPTS, made.tokens, strict=True)):
        assert len(new) == NEW[row]
        logits, rows, size = dense(prompt, new, augment(every, lag, **flags))
        assert np.argmax(logits, axis=-1).tolist() == new
        assert int(state.slots[row]) == size - 1, "the last token is never read"
        for layer, expected in zip(state.cache, rows, strict=True):
            for kind, axis in SLOTS.items():
                ours, theirs = (
                    np.asarray(x[kind])[i].take(range(size - 1), axis - 1) for x, i in ((layer, row), (expected, 0))
                )
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
        changed += new != generate(target(), [prompt], max_new_tokens=NEW[row], capacity=SIZE).tokens[0]
    assert changed, "latents that change nothing prove nothing"
