"""Every form of prompts file is read, in its order and whole; what is none of them is refused by line."""

import gzip
import json
import pathlib

import pytest

from eval.text.prompts import Question, Room, encode_questions, read_questions, spread
from models.errors import UserError
from models.formats.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)


def write(path: pathlib.Path, *records: object) -> pathlib.Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_spec_bench(tmp_path: pathlib.Path) -> None:
    path = write(
        tmp_path / "question.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["Compose.", "Rewrite."]},
        {"question_id": 161, "category": "qa", "turns": ["Who?"], "reference": ["x"]},
    )
    assert read_questions(path) == [
        Question("81", ("Compose.", "Rewrite."), "writing"),
        Question("161", ("Who?",), "qa"),
    ]


def test_speed_bench(tmp_path: pathlib.Path) -> None:
    more = {"sub_category": "essay", "source": "x", "src_id": "4", "difficulty": None, "multiturn": True}
    messages = [{"role": "user", "content": "Compose."}, {"role": "user", "content": "Rewrite."}]
    path = write(
        tmp_path / "qualitative.jsonl",
        {"question_id": "a1", "category": "writing", "turns": ["Compose.", "Rewrite."], **more},
        {"question_id": "b2", "category": "stem", "turns": None, "messages": messages, **more},
    )
    turns = ("Compose.", "Rewrite.")
    assert read_questions(path) == [Question("a1", turns, "writing"), Question("b2", turns, "stem")]


def test_human_eval_packed(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"task_id": "HumanEval/0", "prompt": "def f():\n"}).encode()))
    assert read_questions(path) == [Question("HumanEval/0", ("def f():\n",))]


def test_json_arrays(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text('\ufeff[{"prompt": "one", "turns": null},\n {"question": "two", "answer": "x"}]')
    assert [q.turns for q in read_questions(path)] == [("one",), ("two",)]


def test_text_by_line_and_by_separator(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\n")
    assert [q.turns[0] for q in read_questions(path)] == ["one", "two"]
    path.write_text("one\n  more\n---\n\n---\ntwo\n")
    assert [q.turns[0] for q in read_questions(path)] == ["one\n  more", "two"]


def test_real_files(shared_data: pathlib.Path) -> None:
    questions = read_questions(shared_data / "spec_bench" / "question.jsonl")
    assert len(questions) == 480
    assert sum(len(question.turns) for question in questions) == 560
    assert len({question.category for question in questions}) == 13
    assert len({q.category for q in read_questions(shared_data / "spec_bench" / "question.jsonl", 48)}) > 6
    assert len(read_questions(shared_data / "humaneval" / "HumanEval.jsonl.gz")) == 164


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"turns": []}', "line 1 must be an object"),
        ('{"prompt": "x"}\n{"text": "y"}', "line 2 must be an object"),
        ('{"prompt": "x"}\nnot json', "line 2 is not valid JSON"),
        ('{"prompt": " "}', "line 1 must be"),
        ("3", "line 1: expected a JSON object, got int"),
        ('{"prompt": "x", "question": "y"}', "line 1 must be an object with one of"),
        ('{"turns": ["x"], "system": "be brief"}', "line 1 holds 'system'"),
        ('{"question": "x", "image": "x.png"}', "line 1 holds 'image'"),
        ('[{"prompt": "x"},\n {"prompt": 4}]', r"item 2 \(line 2\) must be"),
        (
            '{"turns": ["x", "FULL BENCHMARK DATA SHOULD BE FETCHED FROM X"]}',
            "line 1 holds no question but a placeholder",
        ),
        (
            '{"messages": [{"role": "user", "content": "FULL BENCHMARK DATA SHOULD BE FETCHED"}]}',
            "the benchmark's own s",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x"}]}',
            "line 1: turn 1 has the role 'assistant', expected us",
        ),
        ('{"messages": [{"role": "user", "content": "x"}], "turns": ["x"]}', "line 1 must be an object with one of"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 1: expected every turn to hold a text"),
        ("\n\n", "holds no prompts"),
    ],
)
def test_bad_files(tmp_path: pathlib.Path, content: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        read_questions(path)


def test_missing_file_and_damaged_archive(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"no file .*nowhere\.jsonl: expected"):
        read_questions(tmp_path / "nowhere.jsonl")
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="is not a gzip file"):
        read_questions(tmp_path / "x.jsonl.gz")


def test_spread_covers_the_whole_list() -> None:
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread(range(3), 10) == [0, 1, 2]
    with pytest.raises(UserError, match="at least 1"):
        spread(range(3), 0)


def test_later_turns_hold_the_answers() -> None:
    tokenizer = Tokenizer.train(["first second answer"] * 9, 280).with_chat_template(TEMPLATE)
    asked = []

    def answer(tokens: list[int]) -> list[int]:
        asked.append(tokenizer.decode(tokens))
        return tokenizer.encode("answer", bos=False)

    question = Question("7", ("first", "second"), "qa")
    chat = encode_questions([question], tokenizer, answer, chat=True)
    read = [tokenizer.decode(prompt.tokens) for prompt in chat]
    assert read == ["[user]first[bot]", "[user]first[assistant]answer[user]second[bot]"]
    assert chat[1].text == "user: first\nassistant: answer\nuser: second\nassistant: "
    assert {(prompt.question, prompt.category) for prompt in chat} == {("7", "qa")}
    plain = encode_questions([question], tokenizer, answer)
    assert plain[1].text == "first\nanswer\nsecond"
    assert tokenizer.decode(plain[1].tokens) == plain[1].text
    assert plain[0].tokens[0] == tokenizer.bos_id
    assert asked == ["[user]first[bot]", "first"], "only turns that are followed by another are answered"
    with pytest.raises(UserError, match="no chat template"):
        encode_questions([question], Tokenizer.train(["x"], 280), answer, chat=True)


def counted(length: int) -> str:
    return " ".join("first" for _ in range(length))


@pytest.mark.parametrize("too_long", ["error", "skip", "truncate"])
def test_questions_that_are_too_long(too_long: str) -> None:
    tokenizer = Tokenizer.train(["first second answer"] * 9, 280)
    asked, told = [], []

    def answer(tokens: list[int]) -> list[int]:
        asked.append(len(tokens))
        return tokenizer.encode(counted(10), bos=False)

    size = len(tokenizer.encode(counted(12)))
    questions = [Question("81", ("first",)), Question("99", (counted(13),)), Question("7", (counted(5), "second"))]
    room = Room(4, size + 7, too_long, told.append, ": do otherwise", latents=3)
    assert room.tokens == size
    if too_long == "error":
        with pytest.raises(UserError, match=rf"^question 99 has \d+ .* 4 new ones and 3 latents .* of {size + 7}: do"):
            encode_questions(questions, tokenizer, answer, room=room)
        assert asked == [], "nothing is decoded before all are known to fit"
        with pytest.raises(UserError, match="question 7, turn 2, has"):
            encode_questions(questions[2:], tokenizer, answer, room=room)
        assert len(asked) == 1
    elif too_long == "skip":
        made = encode_questions(questions, tokenizer, answer, room=room)
        assert [prompt.question for prompt in made] == ["81"]
        assert "left out 1 of 3 questions: question 99 has" in told[0] and "left out 1 more questions" in told[1]
        with pytest.raises(UserError, match=r"question 99 .*: no question is left"):
            encode_questions(questions[1:2], tokenizer, answer, room=room)
    else:
        made = encode_questions(questions, tokenizer, answer, room=room)
        assert [prompt.question for prompt in made] == ["81", "99", "7", "7"]
        cut = made[1].tokens
        assert len(cut) == size and cut[0] == tokenizer.bos_id
        assert cut[1:] == tuple(tokenizer.encode(counted(13))[-size + 1 :])
        assert max(len(prompt.tokens) for prompt in made) <= size and "cut 1 of 3 questions" in told[0]


def test_new_tokens_that_leave_no_room() -> None:
    with pytest.raises(UserError, match="600 new tokens leave no room for a prompt in the target's context of 512"):
        encode_questions([Question("1", ("x",))], Tokenizer.train(["x"], 280), lambda tokens: [], room=Room(600, 512))
    with pytest.raises(UserError, match="500 new tokens and 12 latents leave no room for a prompt in the target"):
        _ = Room(500, 512, latents=12).tokens
