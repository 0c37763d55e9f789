"""How many candidates an open drafter has: the choice from costs, what ends it, and where costs are kept."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import sizing
from decoding.drafters.plain import Plain
from decoding.drafters.registry import DRAFTERS, load_drafter, trained_drafters
from decoding.drafters.token_recycling import TokenRecycling
from decoding.sizing import Costs, Gain, Watch, best_size, chosen
from decoding.stats import Counters
from models.formats.target import Target
from models.formats.text_files import read_json
from tests.decoding.drafter_cases import random_target

SIZES = ((2, 1.3), (4, 1.5), (8, 1.7), (16, 1.8))
FLAT = Costs(((1, 1.0), (16, 1.01)), 0.0)
STEEP = Costs(((1, 1.0), (4, 2.5), (16, 8.0)), 0.0)


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target(vocab_size=12, dtype=np.float32)


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("_costs", "_seen"):
        monkeypatch.setattr(sizing, name, {})


def test_the_size_with_the_most_tokens_per_second_is_taken() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = [0, *np.cumsum(rng.integers(1, 9, 4)).tolist()]
        lengths = dict(zip(sizes, [1.0, *(1 + np.sort(rng.random(4))).tolist()], strict=True))
        seconds = dict(zip(sizes, np.cumsum(rng.random(5) + 0.1).tolist(), strict=True))
        best = best_size({size: lengths[size] for size in sizes[1:]}, seconds)
        rates = {size: lengths[size] / seconds[size] for size in sizes}
        assert rates[best] == max(rates.values())
        # What becomes dearer is not taken for it.
        dearer = {**seconds, **{size: 2 * seconds[size] for size in sizes if size != best}}
        assert best_size(lengths, dearer) == best
    assert best_size({4: 1.5, 8: 2.0}, {0: 1.0, 4: 1.5, 8: 2.0}) == 0, "what only breaks even is left"


def test_costs_between_and_beyond_what_was_measured() -> None:
    assert [STEEP.step(rows) for rows in (1, 2, 4, 10, 16, 28)] == pytest.approx([1, 1.5, 2.5, 5.25, 8, 13.5])
    network = dataclasses.replace(FLAT, extra=0.5)
    assert network.step(1) == 1.0 and network.step(16) == pytest.approx(1.51)
    assert Costs(((1, 1.0),), 0.0).step(9) == 1.0
    assert Costs(((1, 1.0), (4, 0.9)), 0.0).step(10) == 0.9, "noise makes no rows cheaper than free"


def test_cheap_rows_buy_large_trees_and_dear_ones_none() -> None:
    free = TokenRecycling().opened(SIZES)
    fitted, length = chosen(free, FLAT)
    assert (fitted.max_nodes, length) == (17, 1.8) and not fitted.open_sizes
    assert chosen(free, STEEP) == (Plain(), 1.0)
    middle, _ = chosen(free, Costs(((1, 1.0), (4, 1.05), (16, 1.5)), 0.0))
    assert middle.max_depth and middle.max_nodes < 17


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


def _counters(steps: int, committed: int) -> Counters:
    zeros = Counters.zeros(2, 1, 2)
    return dataclasses.replace(zeros, steps=jnp.array([steps, 0]), committed=jnp.array([committed, 0]))


def test_a_tree_goes_on_while_it_pays() -> None:
    good, bad = Watch(Gain(), 1.5, 1.2), Watch(Gain(), 1.5, 1.2)
    for looks in range(1, 12):
        assert good.pays(_counters(8 * looks, 12 * looks))
    seen = next(looks for looks in range(1, 12) if not bad.pays(_counters(8 * looks, 8 * looks)))
    assert seen == 2, "sixteen steps without an accepted token are enough"
    assert not Watch(bad.gain, 1.5, 1.2).pays(_counters(1, 1)), "and are remembered"
    assert good.steps == sizing.LAST_LOOK and Watch(Gain(), 2.0, 1.2).steps == sizing.FIRST_LOOK


def test_what_was_seen_counts_in_the_next_request_and_fades(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "measured", lambda *_: Costs(((1, 1.0), (16, 1.2)), 0.0))
    free = TokenRecycling().opened(SIZES)

    def request() -> sizing.Sized:
        return sizing.sized(target, free, None, 1, True)

    first = request()
    assert first.watch is not None and not all(first.watch.pays(_counters(n, n)) for n in range(1, 99))
    first.finish()
    assert request().drafter == Plain() and sizing.sized(target, free, None, 1, False).watch is not None
    tries = 0
    while request().watch is None:
        request().finish()
        tries += 1
    assert 3 < tries < 60


def test_costs_are_measured_once_and_kept(target: Target, tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.setattr(sizing, "UNSTEADY", 1e9)
    free = TokenRecycling().opened(((2, 1.5),))
    costs = sizing.measured(target, free, None, 1)
    assert [rows for rows, _ in costs.forward] == [1, 5] and costs.extra >= 0
    assert min(seconds for _, seconds in costs.forward) > 0
    (path,) = (tmp_path / "tandem" / "costs").iterdir()

    monkeypatch.setattr(sizing, "_measure", lambda *_: FLAT)
    assert sizing.measured(target, free, None, 1) == costs
    sizing._costs.clear()
    assert sizing.measured(target, free, None, 1) == costs, "from the file"
    assert sizing.measured(target, free, None, 2) == FLAT, "another batch"
    other = dataclasses.replace(target, params=jax.tree.map(lambda x: x + 1, target.params))
    assert sizing.measured(other, free, None, 1) == FLAT, "other weights"
    sizing._costs.clear()
    path.write_text("{")
    monkeypatch.setattr(sizing, "_measure", lambda *_: dataclasses.replace(FLAT, steady=False))
    assert not sizing.measured(target, free, None, 1).steady, "a damaged file"
    assert path.read_text() == "{", "what was measured beside other work is not kept"
