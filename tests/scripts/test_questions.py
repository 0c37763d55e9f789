"""Questions of several files in one: how many, which, in which order; what is refused."""

import json

import pytest

from eval.text.prompts import read_questions
from scripts import questions


@pytest.fixture
def sources(tmp_path) -> list[str]:
    rows = {"a": [{"turns": [f"a{i}", "more"]} for i in range(8)], "b": [{"question": f"b{i}"} for i in range(5)]}
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [f"{name}={tmp_path}/{name}.jsonl" for name in rows]


def test_as_many_of_each_at_even_distances(sources, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "questions.jsonl"
    questions.main(["--src", *sources, "--each", "3", "--out", str(out)])
    found = [(question.category, *question.turns) for question in read_questions(out)]
    assert found == [("a", "a0"), ("a", "a2"), ("b", "b0"), ("b", "b1"), ("a", "a5"), ("b", "b3")]
    assert "wrote 6 questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--each", "6"], "has 5 questions, fewer than the 6"),
        (["--each", "3", "--src", "a.jsonl"], "must be NAME=FILE"),
    ],
)
def test_refusals(options, complaint, sources, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        questions.main(["--src", *sources, *options, "--out", str(tmp_path / "questions.jsonl")])
    assert complaint in capsys.readouterr().err
