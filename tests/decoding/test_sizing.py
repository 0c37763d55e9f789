"""How many candidates an open drafter has: which sizes are kept in hand, and what a pace makes of costs and counts."""

import dataclasses
import gc
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import pytest

from decoding import costs, sizing
from decoding.costs import Costs
from decoding.drafter import Drafter
from decoding.drafters.draft_model import DraftModel
from decoding.drafters.eagle import Eagle
from decoding.drafters.first_of import FirstOf
from decoding.drafters.hydra import Hydra
from decoding.drafters.oracle import Oracle
from decoding.drafters.prompt_lookup import PromptLookup
from decoding.drafters.registry import DRAFTERS, load_drafter, trained_drafters
from decoding.drafters.token_recycling import TokenRecycling
from decoding.policies import Confidence, DySpec, Static
from decoding.sizing import Clock, Pace, Running, Width, pace, widths
from decoding.stats import Stats
from decoding.tree_search import best_part
from decoding.trees import Topology, chain
from models.errors import UserError
from models.formats.target import Target
from models.formats.text_files import read_json
from models.heads.eagle import EagleHeads
from models.heads.hydra import HydraHeads
from tests.decoding.drafter_cases import LOPSIDED, random_target

SIZES = ((1, 1.4), (2, 1.7), (4, 1.9), (8, 2.1))
FREE = Oracle(8).opened(SIZES)
CHEAP = Costs(((1, 1.0), (4, 1.2), (8, 1.3), (16, 1.6)))
STEEP = Costs(((1, 1.0), (4, 1.45), (8, 1.8), (16, 2.5)))
NOWHERE = np.zeros(1, int)
HOPELESS = Costs(((1, 1.0), (4, 4.0), (16, 16.0)))


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target(vocab_size=12, dtype=np.float32)


def candidates(found: Sequence[Width]) -> list[int]:
    return [width.drafter.max_nodes - 1 for width in found]


def test_cheap_rows_buy_large_trees_and_dear_ones_none() -> None:
    assert candidates(widths(FREE, CHEAP)) == [8, 2] and candidates(widths(FREE, STEEP)) == [2, 1]
    assert widths(FREE, HOPELESS) == ()
    # Four candidates lose as it is, and win if twice as many drafts are accepted.
    late = Costs(((1, 1.0), (2, 2.5), (5, 2.5), (9, 9.0)))
    assert candidates(widths(FREE, late)) == [4]
    assert widths(FREE, late, batch=4) == (), "that four texts accept twice as many is not to be hoped for"
    assert candidates(widths(FREE, dataclasses.replace(CHEAP, extra=((2, 1.0), (9, 1.0))))) == [8]


def test_conditional_acceptance_is_that_of_the_length() -> None:
    for depth, length in ((1, 1.4), (3, 1.9), (8, 2.1)):
        chance = Width(Oracle(depth), length, 1.0).conditional
        assert 1 + sum(chance**d for d in range(1, depth + 1)) == pytest.approx(length)


def test_counts_by_depth_say_how_long_steps_of_every_width_will_be() -> None:
    small, large = Width(Oracle(1), 1.5, 1.0), Width(Oracle(3), 1.9, 1.0)
    running = Running(3)
    assert [running.length(width) for width in (small, large)] == pytest.approx([1.5, 1.9])
    # The first depth twice as often as expected, none below it: seen with the large one, believed of both.
    running.add(large, np.array([1000, 0, 0]), 1000)
    assert running.length(small) == pytest.approx(1 + 0.5 / large.conditional, abs=0.02)
    assert 1.9 < running.length(large) < 2.05
    # Just as expected, each depth of those that reached it.
    usual = Running(3)
    usual.add(large, np.round(10**6 * large.conditional ** np.arange(1, 4)).astype(int), 10**6)
    assert [usual.length(width) for width in (small, large)] == pytest.approx([1.5, 1.9], abs=1e-4)
    shallow = Running(3)
    shallow.add(small, np.array([0]), 1000)
    assert shallow.length(large) < 1.01, "what is below a depth that is never reached is not expected either"
    shallow.fade(100 * sizing.MEMORY)
    assert shallow.length(large) == pytest.approx(1.9)


def played(
    pace: Pace, batch: int, rates: Sequence[float], tokens: int, dearer: float = 1.0, pauses: Mapping[int, float] = {}
) -> tuple[float, list[dict[int, int]]]:
    """Speed-up by the clock, and steps by candidates, of texts whose drafts are accepted at one rate after another.

    Steps with drafts take `dearer` times as long as was measured. `pauses` are what other work adds to a segment, by
    its number, which is nobody's fault and counts for nothing here.
    """
    rng = np.random.default_rng(0)
    number, seconds, made, sizes = 0, 0.0, 0.0, [dict[int, int]() for _ in rates]
    while made < tokens * len(rates):
        width, steps = pace.next()
        depth, part = (width.drafter.max_depth if width else 0), int(made // tokens)
        hit = np.cumprod(rng.random((steps, batch, depth)) < rates[part], axis=2)
        committed, by_depth = steps + hit.sum(axis=(0, 2)), hit.sum(axis=0)
        took = steps * (dearer * width.ratio if width else 1.0)
        texts = [Stats(steps, int(n), a, NOWHERE) for n, a in zip(committed, by_depth, strict=True)]
        pace.count(width, texts, took + pauses.get(number, 0.0))
        number += 1
        made += committed.mean()
        seconds += took
        sizes[part][depth] = sizes[part].get(depth, 0) + steps
    return made / seconds, sizes


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("measured", [CHEAP, STEEP], ids=["cheap", "steep"])
def test_it_never_loses_and_follows_what_is_accepted(measured: Costs, batch: int) -> None:
    large, _ = candidates(widths(FREE, measured))

    def fresh() -> Pace:
        return Pace(widths(FREE, measured), batch)

    lost, (sizes,) = played(fresh(), batch, [0.0], 800)
    assert 0.98 < lost < 1 and sizes[0] > 0.9 * 800
    won, (sizes,) = played(fresh(), batch, [0.9], 800)
    assert won > (4 if measured is CHEAP else 2) and sizes[large] >= sum(sizes.values()) - sizing.LOOK
    _, (bad, good) = played(fresh(), batch, [0.0, 0.9], 800)
    assert bad[0] > 0.9 * 800 and good[large] > 0.5 * sum(good.values())
    _, (good, bad) = played(fresh(), batch, [0.9, 0.0], 800)
    assert good[large] > 0.9 * sum(good.values()) and bad[0] > 0.8 * sum(bad.values())


def test_a_loss_is_bounded_whatever_is_expected() -> None:
    sure = Pace([Width(Oracle(8), 8.9, 2.5)], 1)
    rate, _ = played(sure, 1, [0.0], 400)
    assert rate > 1 - sizing.SHARE - (sizing.START + 1.5) / 400
    assert sure.account < sizing.TRIAL * 1.5, "it saves for the next trial"


def test_the_clock_corrects_costs_that_were_measured_wrong() -> None:
    """Of a tree that seems to pay and does not, and of one that seems not to and does."""
    rate = Width(Oracle(2), 1.8, 1.0).conditional
    for ratio, dearer, least in ((1.5, 1.5, 0.98), (1.4, 1.6, 0.98), (1.85, 0.6, 1.3)):
        speedup, _ = played(Pace([Width(Oracle(2), 1.8, ratio)], 1), 1, [rate], 2000, dearer)
        assert speedup > least, (ratio, dearer, speedup)


@pytest.mark.parametrize("batch", [1, 4])
def test_pauses_do_not_decide(batch: int) -> None:
    """Of the first plain steps, of the first drafts, and of later ones, where drafts pay and where they do not."""
    worth, worthless = Width(Oracle(2), 1.99, 1.27), Width(Oracle(2), 1.8, 1.5)
    for pauses in ({0: 4.0}, {0: 640.0}, {1: 16.0}, {1: 640.0}, {2: 16.0}, {5: 640.0}, {0: 8.0, 1: 8.0}):
        won, _ = played(Pace([worth], batch), batch, [worth.conditional], 6000, pauses=pauses)
        lost, _ = played(Pace([worthless], batch), batch, [0.3], 6000, pauses=pauses)
        assert won > 1.35 and lost > 0.98, (pauses, won, lost)


def test_the_clock_believes_what_it_has_seen_of_both_and_forgets() -> None:
    seen, width = Clock(), Width(Oracle(2), 1.8, 1.5)
    seen.add(width, 30.0, 10)
    assert seen.ratio(width) == 1.5, "nothing to compare with"
    seen.add(None, 4.0, 4)
    assert seen.ratio(width) == pytest.approx((1.5 + 3.0) / 2, abs=0.01)
    for _ in range(sizing.SEGMENTS):
        seen.add(width, 64.0, 32)
        seen.add(None, 32.0, 32)
    assert seen.ratio(width) == pytest.approx(2.0, abs=0.02), "old segments are gone"
    seen.add(None, 1e4, 10**4)
    assert seen.ratio(width) == pytest.approx(1.5, abs=0.01), "what was long ago is worth nothing"


def test_plain_steps_are_seen_first_where_little_is_promised() -> None:
    assert Pace([Width(Oracle(2), 1.8, 1.5)], 1).next() == (None, sizing.LOOK)
    assert Pace([Width(Oracle(2), 1.8, 1.1)], 1).next()[0] is not None


@pytest.mark.parametrize(("length", "stays"), [(1.53, True), (1.56, False)])
def test_another_tree_must_promise_clearly_more(length: float, stays: bool) -> None:
    """Than the present one, by 3%, where all is accepted as expected."""
    present, other = Width(Oracle(2), 1.5, 0.9), Width(Oracle(8), length, 0.9)
    pace, steps = Pace([present, other], 1), 10**6
    assert pace.next()[0] is other
    accepted = np.round(steps * present.conditional ** np.arange(1, 3)).astype(int)
    pace.count(present, [Stats(steps, steps + int(accepted.sum()), accepted, NOWHERE)], 1.0 * steps)
    assert pace.next() == (present if stays else other, sizing.SEGMENT)


def test_what_lost_is_not_tried_again_at_once() -> None:
    """Though the account could bear it: first comes plain decoding."""
    doubtful = Width(Oracle(8), 1.05, 1.1)
    pace = Pace([doubtful], 1)
    assert pace.next() == (doubtful, sizing.TRIAL)
    pace.count(doubtful, [Stats(sizing.TRIAL, sizing.TRIAL, np.zeros(8, int), NOWHERE)], 1.1 * sizing.TRIAL)
    assert pace.account > 2 * sizing.TRIAL * 0.1 and pace.next() == (None, sizing.SEGMENT)
    pace.count(None, [Stats(sizing.SEGMENT, sizing.SEGMENT, np.zeros(0, int), NOWHERE)], 1.0 * sizing.SEGMENT)
    assert pace.next() == (doubtful, sizing.TRIAL)


def test_a_pace_outlives_its_request(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_paces", {})
    monkeypatch.setattr(costs, "measured", lambda *_: CHEAP)
    first = pace(target, FREE, None, 1, True)
    assert first is pace(target, FREE, None, 1, True)
    assert first is not pace(target, FREE, None, 1, False) and first is not pace(target, FREE, None, 2, True)
    assert first is not pace(target, FREE, None, 1, True, "latents") is pace(target, FREE, None, 1, True, "latents")
    shared = jnp.arange(3)  # As draft vocabularies often are.
    one, other = ({"draft_vocab": shared, "w": jnp.ones(2), "x": jnp.ones(3)} for _ in range(2))
    learnt = pace(target, FREE, one, 1, True)
    assert learnt is pace(target, FREE, one, 1, True) and learnt is not pace(target, FREE, other, 1, True)
    before = len(sizing._paces)
    del one
    gc.collect()
    assert len(sizing._paces) == before - 1, "what counts of a drafter that is gone is kept for nobody"
    monkeypatch.setattr(costs, "measured", lambda *_: HOPELESS)
    assert pace(target, FREE, None, 3, True) is None


def test_open_drafters_equal_others_and_close_when_they_are_changed() -> None:
    closed, free = TokenRecycling(), TokenRecycling().opened(SIZES)
    assert free == closed and hash(free) == hash(closed) and not closed.open_sizes
    assert free.open_sizes == SIZES and not dataclasses.replace(free, warm_start=True).open_sizes


def test_names_without_a_number_are_open(target: Target) -> None:
    for name, drafter in DRAFTERS.items():
        if drafter.known_sizes:
            loaded, _ = load_drafter(name, target)
            assert loaded.open_sizes == drafter.known_sizes
            fitted = [loaded.with_budget(size) for size, _ in drafter.known_sizes]
            assert all(one is not None and one.max_depth <= loaded.max_depth for one in fitted)
            assert not load_drafter(f"{name}+{name}", target)[0].open_sizes
    for spec, nodes in (("token_recycling:5", 6), ("token_recycling:80", 81), ("prompt_lookup:1:4", 5)):
        fixed, _ = load_drafter(spec, target)
        assert fixed.max_nodes == nodes and not fixed.open_sizes
    for directory in trained_drafters().values():
        lengths = [length for _, length in read_json(directory / "drafter.json")["sizes"]]
        assert lengths == sorted(lengths) and lengths[0] > 1


def test_any_drafter_that_takes_a_budget_can_be_opened(target: Target) -> None:
    small = dataclasses.replace(target.config, num_layers=1, windows=(None,))
    cases: list[tuple[Drafter, list[int]]] = [
        (Hydra(HydraHeads(num_heads=3), LOPSIDED), [1, 3, 7]),
        (Eagle(EagleHeads(), Static(LOPSIDED, "top")), [1, 3, 7]),
        (Eagle(EagleHeads(), Confidence(top_k=3, depth=3, total=10)), [1, 3, 7]),
        (DraftModel(small, Static(chain(3))), [1, 3]),
        (DraftModel(small, DySpec(budget=8, depth=3, width=3, branch=4)), [1, 3, 7]),
    ]
    for drafter, expected in cases:
        assert [size for size, _ in drafter.opened().open_sizes] == expected
        parts = [drafter.with_budget(size) for size in expected]
        assert [part.max_nodes - 1 for part in parts if part is not None] == expected
    assert cases[0][0].with_budget(10) is None
    assert best_part(LOPSIDED, 4) == Topology(((0,), (1,), (0, 0), (1, 0)))
    with pytest.raises(UserError, match="first_of cannot be fitted"):
        FirstOf((PromptLookup(), TokenRecycling())).opened()
