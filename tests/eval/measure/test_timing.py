"""The stopwatch times the work that it is given: nothing is moved out of the timed loop, nothing is dropped."""

import dataclasses
import os
import re
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.hydra import Hydra
from decoding.drafters.medusa import Medusa
from eval.measure import timing as timing_module
from eval.measure.parts import STEPS_PER_SAMPLE, Scene, Step, network_ms, rows_forward, step_parts
from eval.measure.timing import MOST_TIMES, SAMPLE_SECONDS, Part, Timing, measure, prepare_together, summary
from eval.speed import SHAPES
from models import transformer
from models.heads.hydra import HydraHeads
from models.heads.medusa import MedusaHeads
from tests.eval.tiny import TREE
from tests.noise import drawn

CONFIG = dataclasses.replace(SHAPES["tiny"], num_layers=1)
PRODUCT = re.compile(r" dot\(| custom-call\(")


def products(text: str) -> tuple[int, int]:
    """Matrix products outside the loop, and all of them, in a compiled program."""
    computations = re.split(r"\n\n", text)
    entry = next(part for part in computations if part.startswith("ENTRY"))
    called = re.findall(r"calls=(%[\w.-]+)", entry)
    outside = [entry, *(part for part in computations if any(part.startswith(name + " ") for name in called))]
    return sum(len(PRODUCT.findall(part)) for part in outside), len(PRODUCT.findall(text))


def test_invariant_work_stays_in_the_loop() -> None:
    def product(matrix, vector):
        return matrix @ vector

    part = Part.of(product, jnp.ones((64, 64)), jnp.ones(64))
    assert products(part.text())[0] == 0 < products(part.text())[1]

    @jax.jit
    def naive(matrix, vector, times):
        return jax.lax.fori_loop(0, times, lambda _, carry: matrix @ vector, vector)

    text = naive.lower(jnp.ones((64, 64)), jnp.ones(64), 3).compile().as_text()
    assert products(text)[0] > 0, "the compiler no longer moves such work: the test of Part shows nothing"


@pytest.mark.parametrize(
    "drafter",
    [
        pytest.param(Medusa(MedusaHeads(3), TREE), id="medusa", marks=pytest.mark.slow),
        pytest.param(Hydra(HydraHeads(3, 2, prefix=True), TREE), id="hydra++"),
    ],
)
def test_parts_of_a_step_stay_in_the_loop(drafter) -> None:
    params = drawn(transformer.param_shapes(CONFIG), 0.1)
    scene = Scene.with_room(CONFIG, params, 20, drafter.max_depth)
    heads = jax.jit(drafter.heads.init, static_argnums=0)(CONFIG, params, jax.random.key(1))
    parts = step_parts(scene, drafter, heads)
    assert set(parts) == {"draft", "choice", "forward", "verdict", "commit", "update", "step"}
    for name in ("draft", "forward"):
        outside, total = products(parts[name].text())
        assert outside == 0 < total, name
    for name, part in parts.items():
        assert name == "forward" or part.sample() > 0


def test_rows_and_step_run_again_and_again() -> None:
    params = drawn(transformer.param_shapes(CONFIG), 0.1)
    scene = Scene.with_room(CONFIG, params, 20, 3)
    drafter = Medusa(MedusaHeads(3), TREE)
    heads = jax.jit(drafter.heads.init, static_argnums=0)(CONFIG, params, jax.random.key(1))
    step = Step(scene, drafter, heads)
    for _ in range(3):
        assert step.sample() > 0
    # Every sample makes all its steps: neither the limit nor the cache ends it early.
    assert int(step._state.counters.steps[0]) == 3 * STEPS_PER_SAMPLE
    assert not bool(step._state.text.done[0])
    assert rows_forward(scene, 5).sample() > 0


def test_a_part_that_works_on_its_result_does_so_every_time() -> None:
    part = Part(lambda fixed, varying, carry: carry + fixed, jnp.int32(2), (), jnp.int32(0))
    part.sample()
    runs = 1 + 1 + part._times
    assert int(part._state[-1]) == 2 * runs
    assert 1 <= part._times <= MOST_TIMES


def test_what_varies_does_not_change() -> None:
    vector = np.arange(4.0, dtype=np.float32)
    part = Part.of(lambda fixed, varying: varying * 2, (), vector)
    part.sample()
    assert np.array_equal(part._state[0], vector) and np.array_equal(part._state[1], 2 * vector)


class Clock:
    """A clock by hand: every reading of it is one of `ticks` later."""

    def __init__(self, *ticks: float):
        self._now, self._ticks = 0.0, list(ticks)

    def perf_counter(self) -> float:
        self._now += self._ticks.pop(0)
        return self._now


def test_a_sample_is_the_time_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first run that does not count, one that says how often to repeat, and then the sample."""
    part = Part.of(lambda fixed, varying: varying + fixed, jnp.float32(1), jnp.zeros(2))
    monkeypatch.setattr(timing_module, "time", Clock(0, 50.0, 0, SAMPLE_SECONDS / 4, 0, 6.0))
    assert part.sample() == pytest.approx(6.0 / 4)
    monkeypatch.setattr(timing_module, "time", Clock(0, 8.0))
    assert part.sample() == pytest.approx(8.0 / 4), "as often as at first"


def test_parts_take_turns_and_their_first_samples_do_not_count() -> None:
    asked: list[str] = []

    def part(name: str, *seconds: float):
        left = list(seconds)
        return types.SimpleNamespace(sample=lambda: (asked.append(name), left.pop(0))[1])

    timings = measure({"a": part("a", 9, 9, 0.001, 0.010, 0.003), "b": part("b", 9, 9, 1, 2, 2)}, rounds=3)
    assert asked == ["a", "b"] * 5, "one to compile, and one as the device is, alone"
    assert timings["a"].median == pytest.approx(3) and timings["a"].minimum == pytest.approx(1)
    assert timings["b"].median == pytest.approx(2000)


def test_networks_are_what_drafting_takes_beside_the_choice() -> None:
    ms = {"draft": Timing(5.0, 1.0), "choice": Timing(2.0, 2.0)}
    assert network_ms(ms) == 3.0
    assert network_ms({"draft": Timing(1.0, 1.0), "choice": Timing(2.0, 2.0)}) == 0.0
    assert network_ms({"draft": Timing(5.0, 1.0), "network": Timing(4.0, 1.0)}) == 4.0
    assert network_ms({"draft": Timing(5.0, 1.0)}) == 0.0, "a drafter without networks"


def test_summary() -> None:
    timing = summary([0.003, 0.001, 0.002, 0.010])
    assert timing.median == pytest.approx(2.5) and timing.minimum == pytest.approx(1.0)


def test_parts_compile_side_by_side_and_a_fault_in_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    inside = threading.Barrier(3, timeout=60)

    class Waiting:
        def prepare(self) -> None:
            inside.wait()

    prepare_together([Waiting() for _ in range(3)])
    part = Part.of(lambda fixed, varying: varying + fixed, jnp.ones(3), jnp.zeros(3))
    prepare_together([part])
    assert part._loop._cache_size() == 1 and part._times is None, "nothing was timed"

    class Broken:
        def prepare(self) -> None:
            raise ValueError("does not fit")

    with pytest.raises(ValueError, match="does not fit"):
        prepare_together([part, Broken()])
