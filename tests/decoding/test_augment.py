"""Decoding with an augmented cache is what the target says of one long sequence, text and latents in their order.

That drafters are lossless on top of it is the battery's to show (test_battery.py), and here where latents hold
positions, which the battery's target, with windows, cannot have.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import generate as module
from decoding import sizing
from decoding.augment import Augment, step_runs
from decoding.cache import SLOTS, commit, init_cache
from decoding.coprocessors import Coprocessor
from decoding.drafters.early_exit import EarlyExit
from decoding.drafters.lookahead import Lookahead
from decoding.drafters.plain import Plain
from decoding.drafters.prompt_lookup import PromptLookup
from decoding.generate import Generation, generate
from decoding.policies import Static
from decoding.sampling import Sampling, batch_sampling, draw
from decoding.trees import chain
from models import coprocessor, transformer
from models.coprocessor import CoprocessorConfig, Points
from models.errors import UserError
from models.formats.target import Target
from models.layout import Layout, Tree
from scripts.generate import stream
from tests.decoding.drafter_cases import random_target
from tests.noise import noisy

pytestmark = pytest.mark.usefixtures("x64")

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
NEW = [22, 17, 30]
SEEDS = [3, 1, 4]
SIZE = 64  # Rows of the long sequence, and slots of the cache.
FLAGS = {
    "suffix_attn": "bidirectional",
    "z_scale": "match_rms",
    "z_tap": "pre_norm",
    "z_base": "last_token",
}


@functools.cache
def target() -> Target:
    with jax.enable_x64(True):
        return random_target(vocab_size=12)


@functools.cache
def augment(every: int | None = None, lag: int = 0, **flags: Any) -> Augment:
    """A coprocessor that is no copy of the target, whose latents matter."""
    sizes = {} if "kind" in flags else {"kind": "lora", "rank": 2}
    config = CoprocessorConfig(**{"num_latents": 3, **sizes, **flags})
    with jax.enable_x64(True):
        init = jax.jit(coprocessor.init_params, static_argnums=(0, 1))
        params = noisy(init(config, target().config, target().params, jax.random.key(5)), 0.5)
        return Augment(Coprocessor(config, coprocessor.for_decoding(config, params)), every, lag)


@jax.jit
def whole(params, inputs, positions, seen):
    layout = Layout(positions, jnp.zeros((1, 1), jnp.int32), Tree(seen))
    return transformer.forward(target().config, params, inputs, layout)


@functools.partial(jax.jit, static_argnums=0)
def answer(config, params, target_params, read, points, last, seen):
    model, rows = target().config, read.rows
    if config.reads == "last_layer":  # Of the text alone, which no latents stand in yet.
        layout = Layout.causal(1, SIZE)
        rows = coprocessor.read_features(config, params, model, target_params, read.hidden, layout)
    return coprocessor.latents(config, params, model, target_params, rows, points, last, prefix_seen=seen)


def dense(prompt: list[int], new: list[int], with_latents: Augment):
    """Logits before every new token, and all keys and values, of the sequence in one forward.

    It is causal, but for latents that see each other. Each point's latents are made from the rows of such a forward
    over what comes before.
    """
    (config, own), params, text = with_latents.coprocessor, target().params, [*prompt, *new]
    inputs = np.zeros((1, SIZE, target().config.width))
    positions, is_text, before = np.zeros((1, SIZE), np.int32), np.zeros((1, SIZE), bool), []
    size, position, seen = 0, -1, np.tril(np.ones((1, SIZE, SIZE), bool))
    points = {len(prompt) + with_latents.lag + i * (with_latents.every or 0) for i in range(len(new))}
    points = points if with_latents.every else {len(prompt) + with_latents.lag}

    def forward():
        return whole(params, jnp.asarray(inputs), jnp.asarray(positions), jnp.asarray(seen))

    for index, token in enumerate(text):
        if index in points:
            read = size - with_latents.lag
            where = Points(*(jnp.full((1, 1), at, jnp.int32) for at in (position - with_latents.lag, read)))
            last = jnp.full((1, 1), text[index - 1], jnp.int32)
            z = answer(config, own, params, forward(), where, last, jnp.asarray(is_text))
            at = slice(size, size + config.num_latents)
            inputs[:, at], positions[:, at] = z[:, 0], config.latent_positions(where.positions + with_latents.lag)[:, 0]
            seen[:, at, at] |= config.suffix_attn == "bidirectional"
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
    [
        (None, 0, {}),
        (5, 0, FLAGS),
        (6, 2, {"positions": "hold", "latent_attn": "bidirectional", "temperature": 3.0}),
        (None, 2, {"reads": "last_layer"}),
        (None, 3, {"kind": "pause", "positions": "hold", "z_base": "last_token"}),
    ],
)
def test_engine_is_one_long_forward(every, lag, flags, monkeypatch) -> None:
    """Greedily, or with draws that are keyed by the text alone, latents or none."""
    warm = Sampling(temperature=flags.get("temperature", 0.0))
    flags = {name: value for name, value in flags.items() if name != "temperature"}
    made, state = augmented(augment(every, lag, **flags), monkeypatch, sampling=warm, seeds=SEEDS)
    changed = 0
    for row, (prompt, new) in enumerate(zip(PROMPTS, made.tokens, strict=True)):
        assert len(new) == NEW[row]
        logits, rows, size = dense(prompt, new, augment(every, lag, **flags))
        places = np.arange(len(prompt), len(prompt) + len(new), dtype=np.int32)
        keys = jax.vmap(jax.random.key)(jnp.full(len(new), SEEDS[row], jnp.uint32))
        drawn = draw(jnp.asarray(logits), batch_sampling([warm] * len(new)), keys, jnp.asarray(places))
        assert drawn.tolist() == new
        assert (np.argmax(logits, axis=-1).tolist() == new) == (warm.temperature == 0)
        assert int(state.slots[row]) == size - 1, "the last token is never read"
        for layer, expected in zip(state.cache, rows, strict=True):
            for kind, axis in SLOTS.items():
                ours, theirs = (
                    np.asarray(x[kind])[i].take(range(size - 1), axis - 1) for x, i in ((layer, row), (expected, 0))
                )
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
        alone = dict(max_new_tokens=NEW[row], capacity=SIZE, sampling=warm, seeds=[SEEDS[row]])
        changed += new != generate(target(), [prompt], **alone).tokens[0]
    assert changed, "latents that change nothing prove nothing"


def test_a_text_that_ends_before_its_latents_is_plain_decoding_s() -> None:
    """Beside others that have them, at positions of their own or not."""
    plain = generate(target(), PROMPTS, max_new_tokens=NEW, capacity=SIZE)
    for flags in ({"reads": "last_layer"}, {"kind": "pause", "positions": "hold", "z_base": "last_token"}):
        made = generate(
            target(), PROMPTS, max_new_tokens=[2, *NEW[1:]], capacity=SIZE, augment=augment(None, 2, **flags)
        )
        assert made.augmentations == [0, 1, 1]
        assert made.tokens[0] == plain.tokens[0][:2] and made.tokens[1:] != plain.tokens[1:]


def test_streams_and_stops_are_those_of_the_text() -> None:
    """Of a text whose second run of tokens is cut by a stop, and a third by the limit; rows end at different points."""
    arguments = dict(augment=augment(5, 0, **FLAGS), capacity=SIZE)
    alone = generate(target(), PROMPTS, max_new_tokens=NEW, capacity=SIZE)
    whole = generate(target(), PROMPTS, max_new_tokens=NEW, **arguments)
    again = generate(target(), PROMPTS, max_new_tokens=NEW, capacity=SIZE)
    assert again.tokens == alone.tokens != whole.tokens, "without latents the target is what it was"
    assert whole.augmentations == [-(-new // 5) for new in NEW]
    calls: list[tuple[int, list[int]]] = []
    told = lambda row, tokens, writers: calls.append((row, tokens))  # noqa: E731
    stop = whole.tokens[0][5:8]
    made = generate(target(), PROMPTS, max_new_tokens=NEW, stop=[stop], stream_every=2, on_tokens=told, **arguments)
    for row, (new, plain) in enumerate(zip(made.tokens, whole.tokens, strict=True)):
        ends = (end for end in range(3, len(plain) + 1) if plain[end - 3 : end] == stop)
        assert new == plain[: next(ends, len(plain))]
        assert [token for at, tokens in calls for token in tokens if at == row] == new
    assert len(made.tokens[0]) <= 8 < NEW[0]
    # A point lies behind the last token of a run: what ends there is over, not continued from latents.
    at_point = generate(target(), PROMPTS, max_new_tokens=NEW, stop=[whole.tokens[2][2:5]], **arguments)
    assert len(at_point.tokens[2]) <= 5


def test_a_text_is_counted_in_runs_between_points() -> None:
    for every, lag, expected in (
        (None, 0, [[1, 2, 3, 4, 5, 6, 7]]),
        (None, 2, [[1], [3, 4, 5, 6, 7]]),
        (3, 0, [[1, 2], [4, 5], [7]]),
        (3, 2, [[1], [3, 4], [6, 7]]),
    ):
        assert step_runs(augment(every, lag), [*range(8)]) == expected
        assert augment(every, lag).calls(8) == len(expected) - bool(lag)
    assert step_runs(None, [*range(3)]) == [[1, 2]]


def test_what_does_not_fit_is_one_sentence() -> None:
    plain = augment()
    for arguments, message in (
        (dict(every=0), "augment needs every of at least 1, and less than 2.31, got 0"),
        (dict(every=2**40), "augment needs every of at least 1, and less than 2.31, got 1099511627776"),
        (dict(lag=-1), "augment needs lag of at least 0, and less than 2.31, got -1"),
        (dict(every=3, lag=3), "lag below the 3 tokens between two points"),
    ):
        with pytest.raises(UserError, match=message):
            Augment(plain.coprocessor, **arguments)
    with pytest.raises(UserError, match=r"needs a coprocessor .* got a str: Augment.load\(DIR, target\) reads one"):
        Augment("runs/coprocessor")
    last_layer = Coprocessor(CoprocessorConfig(reads="last_layer"), {})
    with pytest.raises(UserError, match="answers once, at the end of the prompt"):
        Augment(last_layer, every=4)
    windowed = dataclasses.replace(target(), config=dataclasses.replace(target().config, windows=(4, None)))
    encoding = dataclasses.replace(target().config, family="mu", encoder_layers=1, bos_id=0)
    hold = augment(6, 2, positions="hold")
    wide = Augment(Coprocessor(plain.coprocessor.config, {"soft": {"embedding": jnp.zeros((3, 8))}}))
    for model, latents, more, message in (
        (target(), {}, {}, "augment must be an? Augment or None"),
        (windowed, hold, {}, "need a target without sliding windows"),
        (dataclasses.replace(target(), config=encoding), hold, {}, "and the target is an encoder-decoder"),
        (target(), wide, {}, r"soft tokens are \[3, 8\], this target needs \[3, 32\]"),
        (
            target(),
            augment(5),
            dict(max_new_tokens=2000),
            "asked for beside 1200 latents, more than",
        ),
        (target(), plain, dict(capacity=24), "a cache of 24 slots is too small: the request needs 25"),
    ):
        with pytest.raises(UserError, match=message):
            generate(model, [[1] * 7], augment=latents, **{"max_new_tokens": 14, **more})


@pytest.mark.parametrize(
    "drafter",
    [EarlyExit(1, Static(chain(3), "top")), Lookahead(window=3, ngram=4, guesses=2), PromptLookup()],
    ids=repr,
)
def test_latents_that_hold_positions_leave_drafts_lossless(drafter) -> None:
    """A drafter in the target's own place, one with riders, and one of the text alone."""
    settings = dict(augment=augment(5, 1, positions="hold", z_base="last_token"), max_new_tokens=NEW, capacity=SIZE)
    plain = generate(target(), PROMPTS, **settings)
    drafted = generate(target(), PROMPTS, drafter=drafter, **settings)
    assert drafted.tokens == plain.tokens and any(stats.accepted_by_depth.any() for stats in drafted.stats)


def test_a_plain_decode_after_an_augmented_one_is_the_one_before_to_the_bit(monkeypatch) -> None:
    kept = []
    for with_latents in (None, augment(5, 0, **FLAGS), None):
        made, state = augmented(with_latents, monkeypatch)
        kept.append((made.tokens, [leaf.tobytes() for leaf in map(np.asarray, jax.tree.leaves(state.cache))]))
    before, between, after = kept
    assert before == after and before[1] != between[1]


def test_served_latents_are_those_that_are_trained() -> None:
    """Layers stacked and nothing joined, over the rows of a forward; a list of joined ones, over a cache."""
    model, served, text = target().config, target().params, jnp.asarray([PROMPTS[1]])
    config = CoprocessorConfig("lora", num_latents=3, rank=2, **FLAGS)
    stacked, found = jax.jit(coprocessor._stacked, static_argnums=0)(model, served), []
    init = jax.jit(coprocessor.init_params, static_argnums=(0, 1))
    params = noisy(init(config, model, served, jax.random.key(5)), 0.5)
    points = Points(jnp.asarray([[2, 6]]), jnp.asarray([[3, 7]]))
    for own, frozen in ((params, stacked), (coprocessor.for_decoding(config, params), served)):

        @jax.jit
        def answered(own, frozen):
            rows = transformer.forward(model, frozen, text, Layout.causal(*text.shape)).rows
            if isinstance(frozen["layers"], list):
                zero = jnp.zeros(1, jnp.int32)
                rows = commit(init_cache(model, 1, 16, jnp.float64), rows, None, zero)
            return coprocessor.latents(config, own, model, frozen, rows, points, text[:, [2, 6]])

        found.append(answered(own, frozen))
    np.testing.assert_allclose(*found, rtol=0, atol=1e-12)
    attention = coprocessor.for_decoding(config, params)["network"]["adapters"][0]["attention"]
    assert "q_k_v" in attention and "q_k_v" in served["layers"][0]["attention"], "what is compared is joined"


def test_a_cache_as_large_as_a_whole_text_s_serves_its_first_tokens() -> None:
    """As in a warm-up; latents that hold a position take slots beyond those of the context."""
    every = Augment(Coprocessor(CoprocessorConfig(num_latents=16, positions="hold"), {}), every=4)
    config = dataclasses.replace(target().config, max_position=512)
    needed = module.slots_needed(7, 500, 0, every)
    with pytest.raises(UserError, match="no text and its draft take over 1280"):
        module._capacity(needed, [[1] * 7], [57], 0, Plain(), 512, None)
    assert module._capacity(needed, [[1] * 7], [2], 0, Plain(), 512, every)[0] == needed
    with pytest.raises(UserError, match="no text, its latents and its draft take over"):
        module._capacity(8 * needed, [[1] * 7], [2], 0, Plain(), 512, every)
    for with_latents, new, message in (
        (every, 5000, "5000 new ones were asked for, more than the target's context of 512"),
        (augment(4), 500, "500 new ones were asked for beside 375 latents, more than"),
        (augment(lag=9), 9, "needs a lag below the 9 new tokens, got 9: latents would never come"),
    ):
        settings: dict[str, Any] = dict(drafter=(Plain(), None), sampling=Sampling(), seed=0, stop=(), typical=False)
        with pytest.raises(UserError, match=message):
            model = dataclasses.replace(target(), config=config)
            stream(model, [1] * 7, print, max_new_tokens=new, augment=with_latents, **settings)


def test_what_is_counted_beside_latents_is_kept_apart(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(sizing, "pace", lambda *arguments: made.append(arguments[5]))
    for with_latents in (None, augment(), augment(5)):
        module._pace(target(), Plain(), None, [Sampling()], with_latents)
    config = augment().coprocessor.config
    assert made == [None, (config, None, 0), (config, 5, 0)]
