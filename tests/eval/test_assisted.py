"""The race against assisted generation counts as it says, on a clock by hand; tests/parity runs it."""

import types

import pytest

from eval import assisted


def test_rates_are_medians_over_rounds_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of a way takes as long as its turn says; the first round warms up."""
    now = [0.0]
    monkeypatch.setattr(assisted, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    durations = {"plain": [50.0, 1.0, 2.0, 9.0], "draft_model": [70.0, 0.5, 4.0, 1.0]}
    calls: list[str] = []

    def way(name: str):
        def decode(text: list[int]):
            now[0] += durations[name][calls.count(name) // 2]
            calls.append(name)
            return [*text, 7, 7, 7], 2 if name == "draft_model" else 4

        return decode

    made, seconds = assisted._race({name: way(name) for name in durations}, [[1], [2]], 3, lambda line: None)
    assert seconds == {"plain": [2.0, 4.0, 18.0], "draft_model": [1.0, 8.0, 2.0]}, "two texts a round"
    assert calls[:4] == ["plain", "draft_model"] * 2, "ways take turns text by text"
    rates = assisted._rates(seconds, 2 * 6)
    assert rates == {"plain": 3.0, "draft_model": 6.0}
    # Of four tokens the first is prefill's: six in four steps.
    entry = assisted._way(made["draft_model"], made["plain"], rates["draft_model"])
    assert entry == {"tokens_per_s": 6.0, "acceptance_length": 1.5, "identical": 2}
