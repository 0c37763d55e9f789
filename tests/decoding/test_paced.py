"""The loop in segments of different widths: the text is plain decoding's, and a drafter is up to date after idling."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import costs, loop, paced, sizing
from decoding.costs import Costs
from decoding.drafter import Drafter
from decoding.drafters.oracle import Oracle
from decoding.generate import Generation, generate
from decoding.sampling import Sampling
from decoding.sizing import Pace, Width
from decoding.stats import Stats
from models.formats.target import Target
from tests.decoding.drafter_cases import CASES, random_target

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [0, 3, 3, 7, 1]]
LIMITS = [70, 45, 60, 9]
SAMPLINGS = [Sampling(), Sampling(temperature=0.7), Sampling(temperature=0.8, top_p=0.9), Sampling()]
LARGE, SMALL = 5, 2

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def target() -> Target:
    with jax.enable_x64(True):
        return random_target(vocab_size=12)


class Script(Pace):
    """A pace that does as it is told: (candidates, steps) again and again; 0 candidates are none."""

    def __init__(self, drafter: Drafter, turns: list[tuple[int, int]]):
        sizes = {size for size, _ in turns if size}
        fitted = {size: drafter.with_budget(size) for size in sorted(sizes, reverse=True)}
        self._of = {size: Width(one, 2.0, 1.0) for size, one in fitted.items() if one is not None}
        self.widths, self._turns, self.counted = tuple(self._of.values()), turns, dict[int, int]()

    @property
    def widest(self) -> Width:
        return self.widths[0]

    def next(self) -> tuple[Width | None, int]:
        (size, steps), self._turns = self._turns[0], [*self._turns[1:], self._turns[0]]
        return self._of.get(size), steps

    def count(self, width: Width | None, texts: list[Stats], seconds: float) -> None:
        assert seconds > 0
        size = width.drafter.max_nodes - 1 if width else 0
        self.counted[size] = self.counted.get(size, 0) + sum(text.steps for text in texts)


@pytest.fixture
def told(target: Target, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Generation, Script]]:
    """Decodes with a case's drafter, its sizes as a script says."""

    def decode(name: str, turns: list[tuple[int, int]], prompts=PROMPTS, **settings: Any) -> tuple[Generation, Script]:
        drafter, params = CASES[name](target, jax.random.key(3))
        script = Script(drafter, turns)
        monkeypatch.setattr(sizing, "pace", lambda *_: script)
        free = drafter.opened(((LARGE, 2.0),))
        made = generate(target, prompts, drafter=free, drafter_params=params, **({"capacity": 112} | settings))
        return made, script

    return decode


# A batch of one writes its caches in another way; one drafter with a cache shows it.
QUICK = [("hydra++", 4), ("token_recycling", 4)]
SLOW = [
    ("hydra++", 1),
    ("eagle3", 4),
    ("eagle3", 1),
    ("token_recycling", 1),
    ("p_eagle", 4),
    ("dflash", 4),
    ("dspark", 4),
    ("falcon", 4),
]


@functools.cache
def _plain(batch: int) -> Generation:
    with jax.enable_x64(True):
        return generate(random_target(vocab_size=12), PROMPTS[:batch], capacity=112, **_settings(batch))


def _programs() -> np.ndarray:
    return np.array([loop.run._cache_size(), paced._catch_up._cache_size()])


def _settings(batch: int) -> dict:
    return dict(max_new_tokens=LIMITS[:batch], sampling=SAMPLINGS[:batch], seeds=[3, 1, 4, 1][:batch])


@pytest.mark.parametrize(("name", "batch"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_text_is_plain_decodings_through_every_switch(told, name: str, batch: int) -> None:
    turns = [(LARGE, 3), (0, 7), (SMALL, 2), (LARGE, 2), (0, 2), (SMALL, 5)]
    plain, before = _plain(batch), _programs()
    made, script = told(name, turns, PROMPTS[:batch], **_settings(batch))
    assert made.tokens == plain.tokens
    # One a width and one to idle; the other is the one with which the drafter catches up.
    assert np.all(_programs() - before <= [3, 1])
    assert min(script.counted[size] for size in (0, SMALL, LARGE)) > 0
    whole = sum(made.stats[1:], made.stats[0])
    assert dict(whole.sizes) == script.counted and whole.steps == sum(script.counted.values())
    assert whole.committed == sum(len(tokens) - 1 for tokens in made.tokens) > whole.steps
    for writers, stats in zip(made.writers, made.stats, strict=True):
        assert stats.steps == sum(writer == 0 for writer in writers[1:]) + (writers[-1] > 0)


@pytest.mark.parametrize("name", [pytest.param("hydra++", marks=pytest.mark.slow), "eagle3"])
def test_after_idling_drafts_are_those_of_a_fresh_prompt(target: Target, told, name: str) -> None:
    idle = 7
    made, _ = told(name, [(0, idle), *[(LARGE, 40)] * 9], **_settings(4))
    before = [[*prompt, *tokens[:idle]] for prompt, tokens in zip(PROMPTS, made.tokens, strict=True)]
    drafter, params = CASES[name](target, jax.random.key(3))
    settings = _settings(4) | {"max_new_tokens": [limit - idle for limit in LIMITS]}
    fitted = drafter.with_budget(LARGE)
    fresh = generate(target, before, drafter=fitted, drafter_params=params, capacity=112, **settings)
    assert fresh.tokens == [tokens[idle:] for tokens in made.tokens]
    assert fresh.writers == [writers[idle:] for writers in made.writers] and any(map(any, fresh.writers))


def test_without_room_to_catch_up_the_rest_is_plain(told) -> None:
    settings = dict(max_new_tokens=100, sampling=SAMPLINGS[1], seeds=[9])
    made, script = told("hydra++", [(LARGE, 1), (0, 2)], PROMPTS[:1], **settings)
    ends = [place for place, writer in enumerate(made.writers[0]) if writer]
    assert 60 < max(ends) <= 112 - sizing.SEGMENT + LARGE and script.counted[0] > script.counted[LARGE]
    # Where there is none to begin with, drafts are made until the first pause.
    crowded = PROMPTS[1] * 12
    made, script = told("hydra++", [(LARGE, 4), (0, 1)], [crowded], max_new_tokens=20, sampling=SAMPLINGS[1])
    assert script.counted[LARGE] == 4 and script.counted[0] == made.stats[0].steps - 4 > 0


def test_a_short_request_has_room_to_catch_up(target: Target, told) -> None:
    prompt = [1 + i % 3 for i in range(30)]
    made, _ = told("hydra++", [(0, 8), (LARGE, 8)], [prompt], max_new_tokens=20, capacity=None, stop=[])
    assert made.stats[0].sizes[LARGE] == 8, "behind the eight steps without a draft"


def test_costs_and_acceptance_choose_the_width_in_mid_text(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dict(max_new_tokens=320, capacity=384, stop=[])
    plain = generate(target, [PROMPTS[0]], **settings).tokens[0]
    text = np.array([*PROMPTS[0], *plain], np.int32)
    measured = Costs(((1, 1.0), (4, 1.2), (8, 1.3), (16, 1.6)))
    monkeypatch.setattr(costs, "measured", lambda *_: measured)
    # As if steps really took so long.
    monkeypatch.setattr(sizing.Clock, "ratio", lambda clock, width: width.ratio)
    monkeypatch.setattr(sizing.Clock, "steps", lambda clock, width: sizing.LOOK)
    free = Oracle(depth=8, known=len(text)).opened(((2, 1.7), (8, 2.1)))

    def decode(told: np.ndarray, rate: float) -> list[int]:
        """Where drafts were accepted, with the text that the oracle is told."""
        monkeypatch.setattr(sizing, "_paces", {})
        params = {"text": jnp.asarray(told), "rate": jnp.float32(rate)}
        made = generate(target, [PROMPTS[0]], drafter=free, drafter_params=params, **settings)
        assert made.tokens == [plain]
        sizes.clear()
        sizes.update(made.stats[0].sizes)
        return [place for place, writer in enumerate(made.writers[0]) if writer]

    sizes: dict[int, int] = {}
    decode(text, 0.0)
    assert sizes[0] > 0.9 * 320
    decode(text, 1.0)
    assert sizes == {8: pytest.approx(320 / 9, abs=1)}
    turned = text.copy()
    turned[160:] = (turned[160:] + 1) % 12
    late = text.copy()
    late[:40] = (late[:40] + 1) % 12
    drafted = decode(turned, 1.0)
    assert len([place for place in drafted if place < 150]) > 125 and not any(place > 160 for place in drafted)
    drafted = decode(late, 1.0)
    assert not any(place < 36 for place in drafted) and len([place for place in drafted if place > 260]) > 45
