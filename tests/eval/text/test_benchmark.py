"""The benchmark counts what the loop emitted, compares with plain decoding, and averages as its docstring says."""

import dataclasses
import json
import math
import pathlib
import types

import numpy as np
import pytest

from configs.eval import decode
from decoding.drafters.registry import load_drafter
from decoding.generate import Generation
from decoding.sampling import Sampling
from decoding.stats import Stats
from decoding.verify import Typical
from eval.main import DecodeConfig, run
from eval.measure.timing import Timing
from eval.report.text import write_report
from eval.text import benchmark as module
from eval.text.benchmark import Contender, Measured, benchmark
from eval.text.prompts import Prompt
from models.errors import UserError
from models.formats.target import Target

NEW_TOKENS = 12


def contender(target: Target, directory: pathlib.Path, **options) -> Contender:
    return Contender(*load_drafter(directory, target), str(directory), **options)


@pytest.fixture(scope="module")
def prompts(target: Target) -> list[Prompt]:
    texts = [("1", "qa", "def f(x):"), ("1", "qa", "def f(x):\n return"), ("2", "math", "once upon")]
    return [Prompt(tuple(target.tokenizer.encode(text)), name, category, text) for name, category, text in texts]


@pytest.fixture(scope="module")
def runs(target: Target, drafter_directories, prompts) -> list[dict]:
    field = [contender(target, path) for path in drafter_directories.values()]
    return benchmark(target, field, prompts, max_new_tokens=NEW_TOKENS, repeats=2)


def test_baseline_comes_first_by_itself(runs) -> None:
    assert [entry["drafter"] for entry in runs] == ["none", "medusa", "hydra"]
    baseline = runs[0]
    assert baseline["speedup"] == 1 and baseline["acceptance_length"] == 1
    assert baseline["identical_to_baseline"] and baseline["path"] is None


def test_greedy_output_is_identical_and_counted(runs) -> None:
    for entry in runs:
        assert entry["identical_to_baseline"] is True and entry["first_difference"] is None
        assert entry["new_tokens"] == runs[0]["new_tokens"] > 0
        # The first token of each text is prefill's; the steps committed the rest.
        assert entry["acceptance_length"] == pytest.approx((entry["new_tokens"] - 3) / entry["steps"])
        assert sum(entry["accepted_histogram"]) == entry["steps"]
        assert len(entry["tokens_per_second_repeats"]) == 2
        assert entry["speedup"] > 0
        assert entry["lossy"] is False
        low, high = entry["acceptance_length_interval"]
        assert low <= entry["acceptance_length"] <= high


def test_drafters_have_tree_parts_and_categories(runs, drafter_directories) -> None:
    for entry, directory in zip(runs[1:], drafter_directories.values(), strict=True):
        recorded = json.loads((directory / "drafter.json").read_text())
        assert entry["settings"].items() <= recorded.items()
        assert [list(path) for path in entry["tree"]["paths"]] == [[0], [1], [2], [0, 0], [0, 1], [0, 0, 0]]
        depth_one = sum(entry["tree"]["accepted"][:3])
        assert depth_one == entry["accepted_by_depth"][0]
        assert entry["tree"]["visits"][:3] == [entry["steps"]] * 3
        assert entry["tree"]["visits"][3] == entry["tree"]["accepted"][0]
        assert set(entry["categories"]) == {"qa", "math"}
        assert min(entry["parts"].values()) >= 0 and entry["loop_efficiency"] > 0 and entry["draft_share"] > 0


def test_report_and_json_take_the_runs(runs, tmp_path: pathlib.Path) -> None:
    json.dumps(runs, allow_nan=False)
    write_report({"runs": runs}, tmp_path / "report.html")
    assert "medusa" in (tmp_path / "report.html").read_text()


def test_sampling_is_compared_too_and_typical_is_lossy(target: Target, drafter_directories, prompts) -> None:
    field = [
        contender(target, drafter_directories["medusa"]),
        contender(target, drafter_directories["medusa"], typical=Typical(epsilon=1e-9, delta=1e-9)),
    ]
    options = {"sampling": Sampling(temperature=1.0), "max_new_tokens": 8, "repeats": 1, "parts": False}
    exact, typical = benchmark(target, field, prompts[:1], **options)[1:]
    assert exact["identical_to_baseline"] and "draft_share" not in exact
    assert typical["lossy"] and not typical["identical_to_baseline"]
    # A threshold of nothing accepts every candidate to full depth.
    assert typical["acceptance_length"] > exact["acceptance_length"]
    assert typical["first_difference"]["question"] == "1" and "top_2_margin" not in typical["first_difference"]


def generation(tokens: list[int], steps: int, committed: int) -> Generation:
    stats = Stats(steps, committed, np.zeros(0, np.int64), np.zeros(1, np.int64))
    return Generation([tokens], [[0] * len(tokens)], [stats], 0.0, 0.0)


def test_accelerators_compile_contenders_side_by_side(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain decoding first, because the others share its programs, and open drafters last, because they measure."""
    monkeypatch.setattr(module.jax, "default_backend", lambda: "gpu")
    field = [Contender(*load_drafter(name, target), name) for name in ("none", "token_recycling", "prompt_lookup:3")]
    assert field[1].drafter.open_sizes
    said: list[str] = []
    decoded = []
    module._compile(target, field, [0, 2], lambda who, number: decoded.append((who.path, number)), said.append)
    assert [decoded[:2], sorted(decoded[2:4]), decoded[4:]] == [
        [(name, number) for number in (0, 2)] for name in ("none", "prompt_lookup:3", "token_recycling")
    ]
    assert said[0] == "compiling 2 sizes of caches and prompts for each of 3"


def test_every_field_can_be_given_on_the_command_line() -> None:
    """`--config.NAME` is refused where the file does not have the name."""
    assert set(decode.get_config()) == {field.name for field in dataclasses.fields(DecodeConfig)}


def test_rates_are_means_over_questions() -> None:
    prompts = [Prompt((1,), "a"), Prompt((1,), "a"), Prompt((1,), "b"), Prompt((1,), "c")]
    made = [generation([5] * n, n - 1, n - 1) for n in (11, 31, 11, 1)]
    one = Measured(Contender(None), made, [[1.0, 3.0, 5.0, 0.5], [2.0, 2.0, 1.0, 0.5]], [])
    # Question a: 40 tokens in 4 s, both turns together; b: 10 tokens; c ended with its first token and has no rate.
    assert module._question_rates(one, prompts) == [[10.0, 2.0], [10.0, 10.0]]
    assert module._headline(module._question_rates(one, prompts)) == pytest.approx((6.0 + 10.0) / 2)


def measured(name: str, steps: int, seconds, prefill, parts: dict[str, float]) -> Measured:
    """Two texts of eleven tokens each, decoded three times."""
    drafter = types.SimpleNamespace(name=name, num_heads=0, max_depth=0, to_record=dict)
    made = [generation(list(range(11)), steps, 10)] * 2
    timings = {part: Timing(ms, ms / 2) for part, ms in parts.items()}
    return Measured(Contender(drafter), made, seconds, prefill, timings)


@pytest.fixture
def entry() -> dict:
    """What the benchmark says of decodes with numbers chosen by hand: every wrong average is another number."""
    prompts = [Prompt((1,), "a", "qa"), Prompt((2,), "b", "math")]
    baseline = measured("none", 10, [[1.0, 2.0], [1.0, 2.0], [10.0, 20.0]], [[0.1, 0.1]] * 3, {"forward": 1.5})
    seconds, prefill = [[0.5, 0.5], [0.25, 0.5], [5.0, 5.0]], [[0.1, 0.2], [0.3, 0.4], [0.1, 0.1]]
    parts = {"draft": 6.0, "choice": 2.0, "forward": 2.0}
    return module._run(None, measured("drafter", 5, seconds, prefill, parts), baseline, prompts, greedy=True)


def test_speed_is_the_median_over_repeats_of_means_over_questions(entry) -> None:
    assert entry["tokens_per_second_repeats"] == [20.0, 30.0, 2.0]
    assert entry["tokens_per_second"] == 20.0
    # The baseline's repeats: (10 + 5) / 2 twice, and 0.75.
    assert entry["speedup"] == pytest.approx(20 / 7.5)
    assert entry["decode_seconds"] == 1.0 and entry["prefill_seconds"] == pytest.approx(0.3)


def test_interval_of_the_speedup_lies_between_the_questions(entry) -> None:
    # In the median over repeats question a is twice as fast as its baseline (20 over 10), b four times (20 over 5).
    assert entry["speedup_interval"] == pytest.approx([2.0, 4.0])
    assert entry["acceptance_length_interval"] == [2.0, 2.0]


def test_interval_is_of_the_headline_itself() -> None:
    """Of questions that take turns in being slow, every median over repeats is high and the headline is not."""
    rates, base = [[9.0, 9.0, 0.0], [9.0, 0.0, 9.0], [0.0, 9.0, 9.0]], [[3.0] * 3] * 3
    assert module._headline(rates) / module._headline(base) == 2
    low, high = module._speedup_interval(rates, base)
    # Thrice the same question is as fast as its median; two of three and one beside them give 2, at least.
    assert 1 < low <= 2 <= high == 3


def test_lengths_of_steps_are_told_by_category_and_per_turn() -> None:
    prompts = [Prompt((1,), "a", "qa"), Prompt((2,), "a", "qa"), Prompt((3,), "b", "math"), Prompt((4,), "c", "math")]
    # Steps of three, one and one tokens; one step of three; two steps of two; a text that its first token ends.
    accepted = [(3, 5, [1, 1]), (1, 3, [1, 1]), (2, 4, [2, 0]), (0, 0, [0, 0])]
    made = [
        Generation(
            [[7] * (committed + 1)], [[]], [Stats(steps, committed, np.array(depth), np.zeros(3, int))], 0.0, 0.0
        )
        for steps, committed, depth in accepted
    ]
    drafter = types.SimpleNamespace(name="drafter", num_heads=0, max_depth=2, max_nodes=3, to_record=dict)
    one = Measured(Contender(drafter), made, [[1.0] * 4], [[1.0] * 4])
    entry = module._run(None, one, one, prompts, greedy=True)
    assert entry["acceptance_length"] == 2 and entry["acceptance_length_per_turn"] == pytest.approx((5 / 3 + 3 + 2) / 3)
    qa, math = entry["categories"]["qa"], entry["categories"]["math"]
    assert qa["acceptance_length"] == 2 and qa["acceptance_length_per_turn"] == pytest.approx((5 / 3 + 3) / 2)
    assert (qa["turns"], qa["steps"], qa["accepted_by_depth"], qa["accepted_histogram"]) == (2, 4, [2, 2], [2, 0, 2])
    assert math["acceptance_length_per_turn"] == 2 and math["accepted_histogram"] == [0, 2, 0]


def test_category_is_compared_with_its_own_baseline(entry) -> None:
    wanted = {"qa": 2.0, "math": 4.0}
    assert {name: cell["speedup"] for name, cell in entry["categories"].items()} == wanted
    assert {cell["tokens_per_second"] for cell in entry["categories"].values()} == {20.0}
    assert {cell["acceptance_length"] for cell in entry["categories"].values()} == {2.0}


def test_efficiency_is_of_steps_and_medians(entry) -> None:
    # A repeat lasts 1 s in the median, of ten steps that commit two tokens each.
    assert entry["parts"] == {"draft_ms": 6, "choice_ms": 2, "forward_ms": 2, "network_ms": 4, "step_ms": 100}
    assert entry["draft_share"] == pytest.approx(0.06)
    # Ideal: two tokens in 2 + 4 ms where plain decoding takes 1.5 ms a token, half its speed.
    assert entry["loop_efficiency"] == pytest.approx(20 / 7.5 / 0.5)


def test_first_difference_tells_place_and_margin(target: Target, prompts) -> None:
    base = [3, 4, 5]
    baseline = Measured(Contender(None), [generation(base, 2, 2)], [[1.0]], [[1.0]])
    other = Measured(Contender(None), [generation([3, 9, 5], 2, 2)], [[1.0]], [[1.0]])
    found = module._first_difference(target, other, baseline, prompts[:1], greedy=True)
    logits = np.sort(np.asarray(target.apply([[*prompts[0].tokens, 3]]).logits[0, -1]))
    assert found == {
        "question": "1",
        "new_token": 1,
        "token": 9,
        "baseline_token": 4,
        "top_2_margin": pytest.approx(logits[-1] - logits[-2]),
    }
    shorter = Measured(Contender(None), [generation(base[:2], 1, 1)], [[1.0]], [[1.0]])
    assert module._first_difference(target, shorter, baseline, prompts[:1], greedy=True)["token"] is None


def test_bad_requests(target: Target) -> None:
    with pytest.raises(UserError, match="no prompt"):
        benchmark(target, [], [])
    with pytest.raises(UserError, match="repeats"):
        benchmark(target, [], [Prompt((1,), "a")], repeats=0)
    with pytest.raises(UserError, match="context"):
        benchmark(target, [], [Prompt((1,) * 600, "a")], max_new_tokens=4)


def test_command_writes_results_and_report(target_directory, drafter_directories, tmp_path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("def f(x):\nonce upon\n")
    (tmp_path / "text.txt").write_text("once upon a time there was a small house\n" * 5)
    config = DecodeConfig(
        target=str(target_directory),
        drafters=f"none,{drafter_directories['medusa']}",
        prompts=str(tmp_path / "prompts.txt"),
        out=str(tmp_path / "out"),
        max_new_tokens=8,
        repeats=1,
        samples=1,
        text=str(tmp_path / "text.txt"),
        length=32,
    )
    run(config)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"environment", "target", "runs", "samples", "config", "command"} <= set(results)
    wanted = {"drafter", "tokens_per_second", "speedup", "acceptance_length", "identical_to_baseline", "new_tokens"}
    assert all(wanted <= set(entry) for entry in results["runs"])
    assert math.isfinite(results["target"]["perplexity"])
    assert len(results["runs"][1]["head_accuracy"]) == 3 and results["runs"][0]["head_accuracy"] is None
    assert [sample["drafter"] for sample in results["samples"]] == ["none", "medusa"]
    assert len(results["samples"][0]["pieces"]) == 8
    assert (tmp_path / "out" / "report.html").exists()
    assert "medusa" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"results\.json already exists: give .*, or --config\.overwrite to replace it"):
        run(dataclasses.replace(config, target="nowhere"))  # Said before anything is loaded.
    with pytest.raises(UserError, match="nowhere"):
        run(dataclasses.replace(config, target="nowhere", overwrite=True))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"target": None}, "which target"),
        ({"drafters": " , "}, "at least one"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"repeats": 0}, "repeats"),
        ({"length": 1}, "length"),
    ],
)
def test_config_rules(changes, complaint) -> None:
    with pytest.raises(UserError, match=complaint):
        DecodeConfig(**{"target": "x", **changes})
