"""The report shows what the results hold, escapes it, needs nothing from outside, and claims only what was measured."""

import html
import io
import pathlib
import re
from typing import Any

import pytest

from eval.measure.environment import describe_environment
from eval.report.text import print_categories, print_table, write_report
from models.errors import UserError
from tests.eval.report.page import Page


def run(drafter: str, speedup: float, **rest: Any) -> dict[str, Any]:
    return {
        "drafter": drafter,
        "tokens_per_second": 500 * speedup,
        "speedup": speedup,
        "acceptance_length": 1.0 if drafter == "none" else 2.5,
        "identical_to_baseline": True,
        **rest,
    }


def full_results() -> dict[str, Any]:
    hydra = run(
        "hydra",
        1.6,
        path="runs/hydra",
        tokens_per_second_repeats=[780.0, 800.0, 830.0],
        new_tokens=1000,
        steps=400,
        accepted_by_depth=[300, 200, 0, 0],
        accepted_histogram=[100, 100, 200],
        prefill_seconds=0.123,
        draft_share=0.125,
        loop_efficiency=0.93,
        head_accuracy=[[0.7, 0.8], [0.5, 0.6]],
        tree={"paths": [[0], [1], [0, 0]], "accepted": [280, 20, 200], "visits": [400, 400, 280]},
        categories={"qa": {"speedup": 1.5, "acceptance_length": 2.2, "tokens_per_second": 750.0}},
    )
    return {
        "environment": {"python": "3.11.9", "device": "cpu", "date": "2025-01-01T00:00:00+00:00"},
        "command": "python -m eval.main --config=configs/eval/decode.py",
        "config": {"max_new_tokens": 64},
        "target": {"path": "runs/target", "parameters": 9_437_184, "layers": 12, "perplexity": None},
        "runs": [run("none", 1.0), hydra],
        "samples": [{"prompt": "def f(", "drafter": "hydra", "pieces": [["x", 0], ["):\n", 1], ["    return", 2]]}],
    }


def write(results: dict[str, Any], tmp_path: pathlib.Path) -> str:
    write_report(results, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_full_report_is_well_formed_and_self_contained(tmp_path: pathlib.Path) -> None:
    source = write(full_results(), tmp_path)
    page = Page(source)
    assert page.tags.count("svg") == 6  # speed-up, acceptance length, two by depth, histogram, tree
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "href")]
    assert "url(" not in source and "@import" not in source and "nan" not in re.findall(r"[\w]+", source.lower())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_numbers_reach_the_page(tmp_path: pathlib.Path) -> None:
    source = write(full_results(), tmp_path)
    text = re.sub(r"\s+", " ", " ".join(Page(source).texts))
    for expected in ("hydra decodes 1.60x as fast as plain decoding, with identical output", "780–830", "9,437,184"):
        assert expected in text
    # Depth 1: 300 of 400 steps; depth 2 given depth 1: 200 of 300; depth 3 given depth 2: none; depth 4 had no chance.
    assert "hydra, depth 1: 75%" in text and "hydra, depth 2: 67%" in text and "hydra, depth 3: 0%" in text
    assert text.count("hydra, depth 4:") == 1
    assert "ranks 0 0: accepted in 50% of steps (200 of 400), 71% of those that accepted its parent" in text
    assert "2 of 3 tokens drafted (67%)" in text


def test_text_is_coloured_by_writer_and_kept_character_for_character(tmp_path: pathlib.Path) -> None:
    source = write(full_results(), tmp_path)
    text = re.search(r'<pre class="text">(.*?)</pre>', source, re.DOTALL)
    assert text is not None
    shown = html.unescape(re.sub(r"<i>.*?</i>|<[^>]*>", "", text.group(1)))
    assert shown == "def f(x):\n    return"
    writers = re.findall(r'class="(paid|drafted)"(?: style="--a:([\d.]+)")? title="([^"]*)"', text.group(1))
    assert [(kind, hover) for kind, _, hover in writers] == [
        ("paid", "target"),
        ("drafted", "draft of depth 1"),
        ("drafted", "draft of depth 2"),
    ]
    assert float(writers[1][1]) < float(writers[2][1])


def test_a_prompt_is_shown_once_above_its_texts(tmp_path: pathlib.Path) -> None:
    results = full_results()
    results["samples"] += [{"prompt": "def f(", "drafter": "none", "pieces": [["y", 0]]}]
    results["samples"] += [{"prompt": "def g(", "drafter": "none", "pieces": [["z", 0]]}]
    page = Page(write(results, tmp_path))
    shown = [text for text in page.texts if text in ("def f(", "def g(", "x", "y", "z")]
    assert shown == ["def f(", "x", "y", "def g(", "z"]


def test_step_lengths_by_category(tmp_path: pathlib.Path) -> None:
    results = full_results()
    cell = results["runs"][1]["categories"]["qa"]
    out = io.StringIO()
    print_categories({"runs": [run("none", 1.0)]}, file=out)
    assert not out.getvalue()
    cell |= {"acceptance_length_per_turn": 2.4, "steps": 8, "accepted_by_depth": [4, 1, 0, 0]}
    cell |= {"accepted_histogram": [4, 3, 1, 0, 0]}
    print_categories(results, file=out)
    assert [line.split("  ")[-1].strip() for line in out.getvalue().splitlines()[3:]] == ["1.50x 2.20, 2.40 per turn"]
    page = Page(write(results, tmp_path))
    text = " ".join(page.texts)
    assert page.tags.count("svg") == 7 and "2.20, 2.40 per turn" in text
    # Lengths of 2 of all steps; 3 of these; 4 of these; nothing was left that could reach 5.
    heading = page.texts.index("Step lengths by category")
    assert [x for x in page.texts[heading:] if x.endswith("%")][:3] == ["50%", "25%", "0%"]


def test_every_text_is_escaped(tmp_path: pathlib.Path) -> None:
    evil = "<script>alert('&\"')</script>"
    results = full_results()
    results["runs"][1] |= {"drafter": evil, "categories": {evil: {"speedup": 1.0, "acceptance_length": 1.0}}}
    results["runs"][1] |= {"identical_to_baseline": False, "first_difference": {evil: evil}}
    results["samples"] = [{"prompt": evil, "drafter": evil, "pieces": [[evil, 0], [evil, 1]]}]
    results |= {"command": evil, "config": {evil: evil}, "target": {evil: evil}, "environment": {"device": evil}}
    page = Page(write(results, tmp_path))
    assert "script" not in page.tags
    assert "".join(page.texts).count(evil) >= 10


@pytest.mark.parametrize("key", ["environment", "command", "config", "target", "samples"])
def test_top_level_keys_are_optional(key: str, tmp_path: pathlib.Path) -> None:
    results = full_results()
    del results[key]
    Page(write(results, tmp_path))


def test_run_with_only_what_is_required(tmp_path: pathlib.Path) -> None:
    required = ("drafter", "tokens_per_second", "speedup", "acceptance_length")
    results = {"runs": [{key: run[key] for key in required} for run in full_results()["runs"]]}
    page = Page(write(results, tmp_path))
    assert page.tags.count("svg") == 2
    assert "output not compared" in "".join(page.texts)


def test_headline_claims_no_more_than_was_measured(tmp_path: pathlib.Path) -> None:
    def headline(*runs: dict[str, Any]) -> str:
        found = re.search(r"<h1>(.*?)</h1>", write({"runs": list(runs)}, tmp_path))
        assert found is not None
        return found.group(1)

    plain = run("none", 1.0)
    assert "hydra decodes 1.20x" in headline(plain, run("hydra", 1.2), run("typical", 1.9, lossy=True))
    assert headline(plain, run("typical", 1.9, lossy=True)).endswith("with lossy acceptance")
    assert headline(plain, run("hydra", 1.2, identical_to_baseline=False)).endswith("but its output differs")
    assert headline(plain) == "Plain decoding makes 500 tokens per second"


def test_bad_results_are_one_sentence_and_leave_no_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="at least one run"):
        write_report({"runs": []}, tmp_path / "report.html")
    results = full_results()
    results["runs"][1]["tree"] = {"paths": [[0], [1, 0]], "accepted": [1, 1]}
    with pytest.raises(UserError, match=r"\[1, 0\].*parent \[1\]"):
        write_report(results, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_table_is_aligned_and_tells_twins_apart() -> None:
    results = full_results()
    results["runs"] += [run("hydra", 1.3, path="runs/other", lossy=True), run("hydra", 1.3, path="runs/other")]
    out = io.StringIO()
    print_table(results, file=out)
    lines = out.getvalue().splitlines()
    names = [re.split(r"\s{2,}", line)[0] for line in lines]
    assert names[2:] == ["none", "hydra (hydra)", "hydra (other) (lossy)", "hydra (other) 2"]
    assert len({len(line) for line in lines[1:3]}) <= 2 and lines[0].rstrip().endswith("new tokens")
    end = lines[0].index("speed-up") + len("speed-up")
    assert [line[end - 5 : end] for line in lines[2:]] == ["1.00x", "1.60x", "1.30x", "1.30x"]


def test_rows_are_named_by_run_directories() -> None:
    paths = [
        ("none", None, "none"),
        ("medusa", "runs/medusa/drafter", "medusa"),
        ("hydra", "runs/one/drafter", "hydra (one)"),
        ("hydra", "/data/runs/two/drafter", "hydra (two)"),
        ("first_of", "prompt_lookup+runs/one/drafter", "prompt_lookup+one"),
        ("first_of", "prompt_lookup+lookahead", "prompt_lookup+lookahead"),
        ("lookahead", "lookahead", "lookahead"),
    ]
    results = full_results()
    results["runs"] = [run(name, 1.0, path=path) for name, path, _ in paths]
    out = io.StringIO()
    print_table(results, file=out)
    assert [re.split(r"\s{2,}", line)[0] for line in out.getvalue().splitlines()[2:]] == [label for *_, label in paths]
    # As much of the paths as tells them apart.
    results["runs"] = [run("none", 1.0), *(run("hydra", 1.0, path=f"{day}/run/drafter") for day in ("mon", "tue"))]
    out = io.StringIO()
    print_table(results, file=out)
    assert "hydra (mon/run)" in out.getvalue() and "hydra (tue/run)" in out.getvalue()


def test_environment_names_versions_device_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.orig_argv", ["/somewhere/bin/python3", "-m", "eval.main", "--prompt=a b"])
    facts = describe_environment()
    assert facts["command"] == "python -m eval.main '--prompt=a b'"
    assert {"python", "jax", "jaxlib", "flax", "numpy", "device", "device_count", "cpu", "cores"} <= facts.keys()
    assert isinstance(facts["cores"], int) and facts["cores"] >= 1 and facts["cpu"]
