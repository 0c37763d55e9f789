"""`eval.quality`: what it reads, what it counts, and that all of it is about the same tokens."""

import json
import pathlib
import warnings
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.coprocessors import Coprocessor, save_coprocessor
from decoding.generate import Generation
from eval import quality
from eval.report import quality as report
from eval.report.quality import signed_ticks
from eval.text import behind, tasks
from models import coprocessor
from models.coprocessor import CoprocessorConfig
from models.errors import UserError
from models.formats.target import Target, load_target
from tests.eval.tiny import write_target
from tests.noise import noisy

ROWS, LENGTH, AHEAD = 4, 64, 8  # Of all that is scored here: one program for each contender.


def test_wilson_interval_is_that_of_the_tables() -> None:
    found = quality.wilson([True] * 8 + [False] * 2)
    assert found["correct"] == 8 and found["share"] == 0.8
    np.testing.assert_allclose(found["interval"], [0.4902, 0.9433], atol=1e-4)
    assert quality.wilson([False] * 3)["interval"][0] == 0.0


def test_gain_is_over_the_same_questions() -> None:
    found = quality.against([True, True, False], [False, True, False])
    assert found["gain"] == pytest.approx(1 / 3)
    low, high = found["gain_interval"]
    assert 0 <= low <= 1 / 3 <= high <= 1
    assert quality.against([True, False], [True, False])["gain_interval"] == [0, 0]
    # Of 27 ways to draw three questions one gives the first thrice, more than 2.5% and less than 5%; 8 leave it out.
    assert quality.against([True, False, True], [False, False, True])["gain_interval"] == [0, 1]


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("so 3 + 4 = 7\n#### 7", "7", "7"),
        ("#### $1,234.50 and 9", "1234.5", "1234.5"),
        ("it costs 12 dollars, or 1,000.", None, "1000"),
        ("#### none", None, None),
        ("#### -3.0", "-3", "-3"),
        ("nothing", None, None),
        ("5-7", None, "7"),
        ("10-3 is it", None, "3"),
        ("3,4", None, "4"),
        ("1,2345", None, "2345"),
        ("it is -3", None, "-3"),
        ("so...18", None, "18"),
        ("version 3.11.7", None, "3.11"),
        ("#### 1,234,567.", "1234567", "1234567"),
        ("#### 5-7", "5", "5"),
    ],
)
def test_numbers_of_answers(text: str, marked: str | None, last: str | None) -> None:
    assert tasks.number_in(text, marked=True) == marked
    assert tasks.number_in(text, marked=False) == last


def write(path: pathlib.Path, *rows: object) -> pathlib.Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_choices_come_in_several_shapes(tmp_path: pathlib.Path) -> None:
    arc = {"text": ["x", "y"], "label": ["1", "2"]}
    file = write(
        tmp_path / "c.jsonl",
        {"question": "a", "choices": ["x", "y", "z"], "answer": 2},
        {"question": "b", "choices": arc, "answerKey": "2"},
        {"question": "c", "choices": ["x", "y"], "answer": "B"},
        {"question": "d", "choices": ["x", "y"], "answer": "y"},
        {"question": "e", "choices": {"text": ["x", "y"], "label": [1, 2]}, "answerKey": 1},
        {"question": "f", "choices": arc, "answerKey": 1},
        {"question": "g", "choices": arc, "answer": None, "answerKey": "2"},
        {"ctx": "h", "ctx_a": "h", "endings": ["w", "x", "y", "z"], "label": "3"},
        {"ctx": "i", "endings": ["w", "x", "y", "z"], "label": 2},
        {"question": "of numbers", "choices": ["0", "4", "2", "1"], "answer": 1},
        {"question": "of numbers, as a text", "choices": ["0", "4", "2", "1"], "answer": "1"},
        {"ctx": "of numbers", "endings": ["3", "1", "0"], "label": "0"},
        {"goal": "j", "sol1": "x", "sol2": "y", "label": 1},
    )
    found = tasks.read_choices(file)
    assert [one.answer for one in found] == [2, 1, 1, 1, 0, 0, 1, 3, 2, 1, 3, 0, 1]
    assert found[-1] == tasks.Choice("j", ("x", "y"), 1) and found[7].question == "h"


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (
            tasks.read_choices,
            {"question": "a", "choices": ["x"], "answer": 0},
            "line 1 must have a text",
        ),
        (tasks.read_choices, {"question": "a", "choices": ["x", "y"], "answer": 2}, "from 0 to 1.* got 2"),
        (tasks.read_choices, {"question": "a", "choices": ["x", "y"]}, "got None"),
        (tasks.read_choices, {"ctx": "a", "endings": ["x", "y"], "label": ""}, "got ''"),
        (tasks.read_choices, {"ctx": "a", "endings": ["x", "y"], "label": "1" * 5000}, "must be a number from 0 to 1"),
        (tasks.read_choices, {"question": "a", "choices": ["1", "7"], "answer": 7}, "from 0 to 1.* got 7"),
        (tasks.read_choices, {"goal": "a", "sol1": "x", "label": 0}, "or goal, sol1 and sol2"),
        (tasks.read_problems, {"question": "a", "answer": "7"}, "ends with '#### N'"),
        (tasks.read_problems, {"question": "a"}, "line 1 must have"),
    ],
)
def test_other_records_are_one_sentence(read, row, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "x.jsonl", row))


def test_shots_are_not_asked() -> None:
    items = list(range(10))
    assert tasks.split_shots(items, None, 2, 4) == ([0, 1], [2, 4, 6, 8])
    assert tasks.split_shots(items, [7, 8], 1, None) == ([7], items)
    with pytest.raises(UserError, match="10 shots and a question to ask need more than the 10 records"):
        tasks.split_shots(items, None, 10, None)


def test_change_is_paired_by_token() -> None:
    rng = np.random.default_rng(0)
    count = np.full((6, 3), 5)
    count[:, 2] = 0
    base = behind.ByOffset(rng.uniform(5, 20, (6, 3)), count)
    better = behind.ByOffset(base.nll - 5 * np.log(2), count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        change, interval = better.change(base)
    np.testing.assert_allclose(change[:2], -0.5)
    np.testing.assert_allclose(interval[:2], -0.5)
    assert np.isnan(change[2]) and np.isnan(base.perplexity[2])


def test_interval_of_a_change_is_over_rows_with_their_own_tokens() -> None:
    """Of two rows one draw in four is the first alone, one the second; of three one in 27 is any of them alone."""
    count = np.array([[4], [1], [2]])
    base = behind.ByOffset(np.array([[9.0], [3.0], [5.0]]), count)
    other = behind.ByOffset(base.nll + count * np.log([[0.5], [2.0], [0.8]]), count)
    for rows in (2, 3):
        mine, theirs = (behind.ByOffset(one.nll[:rows], one.count[:rows]) for one in (other, base))
        change, interval = mine.change(theirs)
        whole = np.exp(np.sum(mine.nll - theirs.nll) / np.sum(mine.count)) - 1
        np.testing.assert_allclose([*change, *interval[0]], [whole, -0.5, 1.0])


def test_latents_are_held_against_each_other_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same tokens, so that a small gain that every row has is told from none."""
    count = np.full((5, 2), 3)
    base = np.linspace(3.0, 30.0, 10).reshape(5, 2)
    factors = {"target": 1.0, "soft 4": 0.9, "soft 8": 0.88}
    found = iter(behind.ByOffset(base + count * np.log(factor), count) for factor in factors.values())
    monkeypatch.setattr(quality, "by_offset", lambda *_: next(found))
    monkeypatch.setattr(quality, "rows_of_text", lambda *_: [])
    monkeypatch.setattr(quality, "_shift", lambda _: 0)
    field: Any = [quality.Contender(name, None if name == "target" else (None, None)) for name in factors]
    asked = "--target x --out x --text x --ahead 2"
    model: Any = SimpleNamespace(config=SimpleNamespace(max_position=512))
    made = quality.perplexity(quality._parser().parse_args(asked.split()), model, field, lambda _: None)()
    first, *runs = made["runs"]
    assert set(first) == {"label", "perplexity"} and made["tokens"] == [15, 15]
    np.testing.assert_allclose([run["change"] for run in runs], [[-0.1] * 2, [-0.12] * 2])
    assert runs[0]["over"] == [] and [than["label"] for than in runs[1]["over"]] == ["soft 4"]
    np.testing.assert_allclose(runs[1]["over"][0]["change_interval"], 0.88 / 0.9 - 1)
    titles = [table["title"] for table in report._tables({"perplexity": made})]
    assert titles == ["Perplexity behind latents", "Latents against each other"]
    assert report._tables({"perplexity": made})[1]["rows"] == [["soft 8", "soft 4", *["-2.2% (-2.2 to -2.2)"] * 2]]


def test_points_are_spread_from_the_first_token_to_the_last_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And sums are by row and offset, in the order of rows."""
    asked = []

    def scored(target, network, tokens, segments, at, ahead, labels, lag):
        asked.append((at.tolist(), None if labels is None else labels.tolist(), lag))
        place = at[:, :, None] + 1 + np.arange(ahead)
        return -np.where(place < 8, tokens[:, :1, None] + place / 100.0, 99.0), place < 8

    monkeypatch.setattr(behind, "scored", scored)
    batches = [
        {"tokens": np.full((2, 8), first) + np.arange(2)[:, None], "segments": np.ones((2, 8)), "mask": np.eye(2, 8)}
        for first in (1, 3)
    ]
    found = behind.by_offset(None, None, batches, 3, 2)
    points = [0, 3, 6]
    assert asked == [([points] * 2, None, 0)] * 2
    np.testing.assert_allclose(found.count, [[3, 2]] * 4)
    rows = np.array([[1.0], [2.0], [3.0], [4.0]])
    np.testing.assert_allclose(found.nll, np.hstack([3 * rows + 0.12, 2 * rows + 0.07]))
    behind.by_offset(None, None, batches[:1], 20, 2, "assistant", 5)
    assert asked[2:] == [([[*range(7)]] * 2, np.eye(2, 8).tolist(), 5)]


def test_ticks_lie_on_both_sides_of_zero() -> None:
    ticks = signed_ticks(-0.034, 0.012)
    assert ticks[0] <= -0.034 and ticks[-1] >= 0.012 and 0 in ticks and 3 <= len(ticks) <= 10


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(write_target(tmp_path_factory.mktemp("quality") / "target"))


@pytest.fixture(scope="module")
def network(target: Target) -> Coprocessor:
    config = CoprocessorConfig("lora", num_latents=2, rank=2)
    init = jax.jit(coprocessor.init_params, static_argnums=(0, 1))
    params = noisy(init(config, target.config, target.params, jax.random.key(1)), 0.1)
    save_coprocessor(target.path / "coprocessor", config, params, target.fingerprint())
    return Coprocessor(config, coprocessor.for_decoding(config, params))


def test_likelihoods_are_those_of_plain_forwards(target: Target) -> None:
    """Two documents in a row, padding behind them; one token does not count."""
    tokens = np.random.default_rng(0).integers(1, 250, (ROWS, LENGTH))
    segments = np.tile([1] * 30 + [2] * 24 + [0] * (LENGTH - 54), (ROWS, 1))
    at = np.array([[3], [27], [50], [60]])
    labels = (segments > 0) & (np.arange(LENGTH) != 29)
    found, there = behind.scored(target, None, tokens, segments, at, AHEAD, labels)
    logp = jax.nn.log_softmax(target.apply(tokens, jnp.asarray(segments, jnp.int32)).logits)
    for row, offset in np.ndindex(ROWS, AHEAD):
        place = int(at[row, 0]) + 1 + offset
        same = place < LENGTH and segments[row, place] == segments[row, at[row, 0]] and labels[row, place]
        assert there[row, 0, offset] == same
        if there[row, 0, offset]:
            np.testing.assert_allclose(found[row, 0, offset], logp[row, place - 1, tokens[row, place]], atol=1e-4)
    assert there.sum(axis=(1, 2)).tolist() == [8, 1, 3, 0]
    # A place counts if the token behind it does, as those that training draws.
    labels[:, 20] = False
    _, there = behind.scored(target, None, tokens, segments, np.array([[18], [19], [20], [21]]), AHEAD, labels)
    assert there.sum(axis=(1, 2)).tolist() == [7, 0, 8, 7]


def test_a_mesh_scores_the_same(target: Target, tmp_path: pathlib.Path, run_on_devices) -> None:
    tokens = np.random.default_rng(0).integers(1, 250, (ROWS, LENGTH))
    scored = behind.scored(target, None, tokens, np.ones_like(tokens), np.full((ROWS, 1), 20), AHEAD)[0]
    np.save(tmp_path / "scored.npy", scored)
    run_on_devices(
        f"""
import numpy as np
from eval.text import behind
from models.formats.target import load_target
from models.sharding import mesh_of, parse_mesh
target = load_target({str(target.path)!r}, mesh=parse_mesh("tensor=2"))
tokens = np.random.default_rng(0).integers(1, 250, {(ROWS, LENGTH)})
found, _ = behind.scored(target, None, tokens, np.ones_like(tokens), np.full(({ROWS}, 1), 20), {AHEAD})
assert mesh_of(target.params).size == 2
np.testing.assert_allclose(found, np.load({str(tmp_path / "scored.npy")!r}), atol=1e-4)
""",
        devices=2,
    )


def test_a_late_coprocessor_is_measured_late(target: Target, network: Coprocessor) -> None:
    tokens = np.random.default_rng(0).integers(1, 250, (ROWS, LENGTH))
    segments, at = np.ones_like(tokens), np.array([[0], [1], [20], [40]])
    now, late, all_but_one = (
        behind.scored(target, network, tokens, segments, at, AHEAD, lag=lag)[0] for lag in (0, 2, LENGTH)
    )
    assert np.array_equal(now[0], late[0]) and np.all(np.any(now[1:] != late[1:], axis=(1, 2)))
    assert np.array_equal(late[1], all_but_one[1]) and np.any(late[2] != all_but_one[2]), "one token is always read"


def test_choices_are_scored_by_their_own_tokens(target: Target) -> None:
    """Of questions of unequal lengths, in batches of which the last is smaller; by sums the shortest choice is the
    likeliest, by bytes a long one."""
    texts = ("x", "a small house by the sea", "def f(x)")
    questions = [
        tasks.Choice(question, texts, answer)
        for answer, question in enumerate(("once?", "once upon a time there was", "f(x) + 1?"))
    ]
    pairs = tasks.choice_pairs(target, questions, [])
    assert len({len(before) for before, _ in pairs}) == 3 and len({len(after) for _, after in pairs}) > 1
    segments, expected = np.ones((ROWS, LENGTH), np.int32), []
    for before, after in pairs:
        tokens = np.zeros((ROWS, LENGTH), np.int32)
        tokens[0, : len(before) + len(after)] = [*before, *after]
        logp = jax.nn.log_softmax(target.apply(tokens, jnp.asarray(segments)).logits[0])
        expected.append(sum(logp[len(before) - 1 + i, token] for i, token in enumerate(after)))
    found = tasks.choice_scores(target, pairs, None, batch=ROWS)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    sums = np.reshape(expected, (3, 3))
    plain, normalised = sums.argmax(axis=1), (sums / [len(text) for text in texts]).argmax(axis=1)
    assert np.all(plain != normalised)
    for answer in range(3):
        asked = [tasks.Choice(one.question, one.choices, answer) for one in questions]
        right = tasks.likeliest(asked, found)
        assert right == {"plain": (plain == answer).tolist(), "normalised": (normalised == answer).tolist()}


def test_answers_are_matched_with_their_own_problems(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five problems, two at a time, and what is written to each."""
    written = {
        "one": "so it is\n#### 1",
        "two": "3, or rather 2",
        "three": "#### 4, not 3" + tasks.NEXT,
        "four": "four",
        "five": "#### 5.0" + tasks.NEXT,
    }
    problems = [tasks.Problem(question, "", str(number)) for number, question in enumerate(written, 1)]
    assert target.tokenizer is not None
    prompts = tasks.problem_prompts(target.tokenizer, problems, [tasks.Problem("0?", "#### 0", "0")], chat=False)
    texts, sizes = dict(zip(map(tuple, prompts), written.values(), strict=True)), []

    def generate(_, some, **settings):
        assert settings["stop_texts"] == (tasks.NEXT,) and settings["augment"] is None
        sizes.append(len(some))
        return Generation([], [], [], 0.0, 0.0, texts=[texts[tuple(prompt)] for prompt in some])

    monkeypatch.setattr(tasks, "generate", generate)
    found = tasks.exact_match(target, problems, prompts, None, batch=2)
    assert found["marked"] == [True, False, False, False, True]
    assert found["last"] == [True, True, False, False, True]
    assert found["answers"][2] == "#### 4, not 3" and sizes == [2, 2, 2]


def test_what_does_not_fit_is_said_before_anything_is_measured(
    target: Target, network: Coprocessor, tmp_path: pathlib.Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments) -> str:
        with pytest.raises(SystemExit):
            quality.main(list(map(str, ["--target", target.path, "--out", tmp_path / "out", *arguments])))
        return capsys.readouterr().err

    monkeypatch.setattr(quality, "by_offset", lambda *_: pytest.fail("it is measured"))
    text = tmp_path / "t.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 40)
    solved = write(tmp_path / "p.jsonl", *({"question": "x?", "answer": "#### 1"} for _ in range(2)))
    asked = ["--text", text, "--rows", ROWS, "--length", LENGTH, "--problems", solved, "--shots", 1]
    assert "say when latents come, and there are none: give --coprocessors too" in refused(*asked, "--augment_lag", 1)
    assert "--data: not allowed with argument --text" in refused(*asked, "--data", tmp_path)
    assert f"--ahead must be less than --length, {LENGTH}, got {LENGTH}" in refused(*asked[:6], "--ahead", LENGTH)
    with_latents = [*asked, "--coprocessors", target.path / "coprocessor"]
    told = refused(*with_latents[:6], *with_latents[-2:], "--augment_every", 4)
    assert "latents come again in answers: give --problems too" in told
    told = refused(*with_latents, "--augment_lag", 8, "--max_new_tokens", 8)
    assert "a lag below the 8 new tokens, got 8: latents would never come" in told
    assert "lag below the 2 tokens" in refused(*with_latents, "--augment_every", 2, "--augment_lag", 2)
    told = refused(*with_latents, "--augment_every", 1, "--max_new_tokens", 256)
    assert "prompt 0 has" in told and "beside 512 latents, more than the target's context of 512" in told
    assert "mesh 'two' is not a list of sizes of data, fsdp, tensor" in refused(*asked, "--mesh", "two")


def test_the_command_measures_what_is_asked_for(
    target: Target, network: Coprocessor, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "t.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 40)
    solved = write(tmp_path / "p.jsonl", *({"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(4)))
    choices = write(
        tmp_path / "c.jsonl", *({"question": "x?", "choices": ["a b", "c"], "answer": i % 2} for i in range(3))
    )
    out = tmp_path / "out"
    arguments = [
        *("--target", target.path, "--coprocessors", target.path / "coprocessor", "--out", out),
        *("--text", text, "--rows", ROWS, "--length", LENGTH, "--points", 1, "--ahead", AHEAD),
        *("--problems", solved, "--shots", 1, "--max_new_tokens", 8, "--batch", ROWS, "--choices", choices),
    ]
    quality.main(list(map(str, arguments)))
    told = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [one["label"] for one in results["contenders"]] == ["target", "lora 2, rank=2"]
    base, changed = results["perplexity"]["runs"]
    assert len(base["perplexity"]) == len(changed["change"]) == AHEAD and "change" not in base
    ratio = np.array(changed["perplexity"]) / np.array(base["perplexity"]) - 1
    np.testing.assert_allclose(changed["change"], ratio, rtol=1e-6)
    assert results["problems"]["questions"] == 3 and results["problems"]["runs"][1]["augmentation_ms"] > 0
    (one,) = results["choices"]
    assert one["chance"] == 0.5 and {run["label"] for run in one["runs"]} == {"target", "lora 2, rank=2"}
    page = (out / "report.html").read_text()
    assert "lora 2, rank=2" in page and "<svg" in page and "lora 2, rank=2" in told
    with pytest.raises(SystemExit):
        quality.main(["--target", str(target.path), "--out", str(tmp_path / "no")])
    assert "what to measure? Give --data or --text, --problems, or --choices" in capsys.readouterr().err
