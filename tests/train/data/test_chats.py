"""Rows of chats: every form that people have becomes one, and what a text model cannot learn is refused by its turn."""

import json

import pytest

from models.errors import UserError
from train.data.chats import check_characters, conversation, may_hold_halves, other_fields
from train.data.text_sources import read_prompts

ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def share(*turns: tuple[str, str]) -> list[dict]:
    return [{"from": role, "value": text} for role, text in turns]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"conversations": ASKED},
        {"conversations": share(("human", "q"), ("gpt", "a"))},
        {"messages": None, "conversations": share(("Human", "q"), (" chatgpt", "a"))},
        {"messages": ASKED, "conversations": share(("user", "q"), ("bing", "a")), "tools": None, "system": ""},
        {"messages": [{**turn, "tool_calls": None, "from": None} for turn in ASKED]},
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in ASKED]},
        {"messages": [ASKED[0], {"role": "assistant", "content": ["", "a"], "weight": 1}]},
    ],
)
def test_forms_of_one_conversation(row):
    assert conversation(row) == (tuple(ASKED), ())


def test_roles_of_calls_and_their_results():
    call = json.dumps({"name": "clock", "arguments": {}})
    row = {"conversations": share(("human", "time?"), ("function_call", call), ("observation", "12"), ("bard", "noon"))}
    _, calling, result, answer = conversation(row)[0]
    assert calling["tool_calls"][0]["function"]["name"] == "clock" and calling["content"] == ""
    assert (calling["role"], result["role"], answer["role"]) == ("assistant", "tool", "assistant")
    turns, _ = conversation({"conversations": share(("function_call", "clock()"), ("function", "12"))})
    assert turns[0] == {"role": "assistant", "content": "clock()"} and turns[1]["role"] == "tool"
    called = [{"role": "assistant", "content": None, "tool_calls": [{}], "reasoning_content": "hm"}]
    assert conversation({"messages": called})[0][0] == {**called[0], "content": ""}


def test_system_and_tools_of_a_row():
    system = {"role": "system", "content": "brief"}
    for row in ({"system": "brief", "messages": ASKED}, {"system_prompt": "brief", "messages": [system, *ASKED]}):
        assert conversation(row)[0] == (system, *ASKED)
    for tools in ([{"name": "x"}], '[{"name": "x"}]'):
        assert conversation({"messages": ASKED, "tools": tools})[1] == ({"name": "x"},)
    assert other_fields({"messages": ASKED, "tools": [], "id": 3, "source": "", "score": 0.0}) == ["id", "score"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "the row holds nothing"),
        ({"text": "a"}, "expected a list of turns in 'messages' or 'conversations'; the row holds text"),
        ({"messages": []}, "expected a list of turns in 'messages', which is an empty list"),
        ({"messages": "hi"}, "expected a list of turns in 'messages', which is str"),
        ({"messages": ["hi"]}, "turn 1 is str"),
        ({"messages": ASKED, "conversations": ASKED[:1]}, "'messages' and 'conversations' differ"),
        ({"messages": [{"content": "a"}]}, "turn 1 has no role"),
        ({"messages": [*ASKED, {"role": "narrator", "content": "a"}]}, "turn 3 has the role 'narrator'"),
        ({"messages": [{"role": 3, "content": "a"}]}, "turn 1 has no role"),
        ({"messages": [{"role": "user", "from": "gpt", "content": "a"}]}, "a 'role' and another 'from'"),
        ({"messages": [{"role": "user", "content": "a", "value": "b"}]}, "a 'content' and another 'value'"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1 holds nothing"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "turn 1 holds dict"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of the type 'image_url'"),
        ({"messages": [{"role": "user", "content": [3]}]}, "expected texts alone"),
        ({"messages": [{**ASKED[1], "weight": 0}]}, "turn 1 has weight 0"),
        ({"messages": [{**ASKED[1], "train": False}]}, "turn 1 has train False"),
        ({"messages": ASKED, "images": ["a.png"]}, "the row holds 'images'"),
        ({"messages": [{**ASKED[0], "audio": "a.wav"}]}, "turn 1 holds 'audio'"),
        ({"messages": ASKED, "system": ["a"]}, "expected a text in 'system', got list"),
        ({"messages": [{"role": "system", "content": "b"}], "system": "a"}, "'system' differs from the system turn"),
        ({"messages": ASKED, "tools": "nonsense"}, "'tools' is not valid JSON"),
        ({"messages": ASKED, "tools": {"a": 1}}, "expected one list of tools"),
        ({"messages": ASKED, "tools": [{}], "functions": [{}]}, "expected one list of tools"),
    ],
)
def test_rows_that_are_refused(row, message):
    with pytest.raises(UserError, match=message):
        conversation(row)


def test_halves_of_characters_are_found_with_their_field():
    assert may_hold_halves(r'"\ud83d"') and not may_hold_halves(r'"\u00e9 \\d83d"')
    check_characters(json.loads(r'{"a": "\ud83d\ude00"}'))
    with pytest.raises(UserError, match="field 'messages': character 1 is half"):
        check_characters({"id": "x", "messages": [{"content": "a\ud83d"}]})
    with pytest.raises(UserError, match="character 0 is half"):
        check_characters({"\ud83d": 1})


def prompts_in(tmp_path, row) -> list:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row))
    return [document.messages for document in read_prompts(path)]


def test_prompts_are_rows_of_chats_too(tmp_path):
    system = {"role": "system", "content": "brief"}
    for row in ({"prompt": "q"}, {"conversations": share(("human", "q"))}, {"messages": ASKED[:1], "prompt": None}):
        assert prompts_in(tmp_path, row) == [(ASKED[0],)]
        assert prompts_in(tmp_path, {**row, "system": "brief"}) == [(system, ASKED[0])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "messages": ASKED[:1]}, "expected a string 'prompt', or"),
        ({"prompt": 3}, "expected a string 'prompt', or"),
        ({"prompt": "q", "tools": [{"name": "x"}]}, "the row offers tools"),
        ({"prompt": "q", "images": ["a.png"]}, "the row holds 'images'"),
        ({"messages": [{"role": "narrator", "content": "a"}, *ASKED[:1]]}, "turn 1 has the role 'narrator'"),
        ({"messages": ASKED}, "the last turn must be a user's"),
        ({"prompt": " "}, "the last turn must be a user's, and say something"),
    ],
)
def test_prompts_that_are_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=rf"prompts\.jsonl, line 1: {message}"):
        prompts_in(tmp_path, row)
