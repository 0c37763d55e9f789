"""Files of texts and chats with damage: read or refused in one sentence, and data sets are whole or absent."""

import contextlib
import gzip
import json
import shutil

import pytest

from models.errors import UserError
from models.formats.tokenizer import Tokenizer
from tests.fuzz import FEW_OR_MANY, accepts_or_refuses, damaged, fuzz, json_values, st
from train.data import text_sources
from train.data.text_building import build
from train.data.texts import open_split

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
KEYS = [
    *("messages", "conversations", "role", "content", "from", "value", "system", "tools", "functions", "tool_calls"),
    *("reasoning_content", "function_call", "type", "text", "weight", "train", "name", "arguments", "images", "id"),
]
WORDS = [
    "user",
    "assistant",
    "human",
    "gpt",
    "system",
    "tool",
    "function_call",
    "text",
    '{"name": "x"}',
    "[]",
    "\ud83d",
]
TURN = {"role": "user", "content": "q"}
CHAT = {"messages": [TURN, {"role": "assistant", "content": "a é ☕"}], "system": "brief", "tools": [{"name": "x"}]}
ROWS = [CHAT, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": [{"text": "a"}]}]}] * 2
FILES = {
    "jsonl": "\n".join(
        json.dumps(row, ensure_ascii=False) for row in [{"text": "once"}, {"text": "☕ time"}] * 3
    ).encode(),
    "chat": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "array": json.dumps(ROWS, indent=1).encode(),
    "text": "one\n<|endoftext|>two é ☕\n\n\nthree".encode(),
}
READERS = {
    "jsonl": text_sources.read_jsonl,
    "chat": text_sources.read_chat,
    "array": text_sources.read_chat,
    "text": text_sources.read_text,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["once upon a time there was text\n"], 262).with_chat_template(TEMPLATE)


def read(kind: str, path, tokenizer: Tokenizer) -> None:
    """Reads a file and makes tokens of what it holds."""
    for document in READERS[kind](path):
        assert not (document.refused and (document.content or document.messages))
        if document.messages:
            accepts_or_refuses(lambda: tokenizer.encode_chat_with_mask(document.messages, document.tools))  # noqa: B023
        else:
            tokenizer.encode_documents([document.text])


@pytest.mark.parametrize("examples", FEW_OR_MANY)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(tokenizer, tmp_path, kind, compressed, examples):
    content = gzip.compress(FILES[kind], mtime=0) if compressed else FILES[kind]
    path = tmp_path / ("file.gz" if compressed else "file")

    def check(content: bytes) -> None:
        path.write_bytes(content)
        accepts_or_refuses(lambda: read(kind, path, tokenizer))

    fuzz(80 * examples, damaged(content), check)


@pytest.mark.parametrize("examples", FEW_OR_MANY)
def test_rows_that_say_odd_things(tokenizer, tmp_path, examples):
    turn = st.dictionaries(st.sampled_from(KEYS), json_values(KEYS, WORDS), max_size=5)
    nearly = st.fixed_dictionaries(
        {"role": st.sampled_from(WORDS), "content": json_values(KEYS, WORDS)},
        optional={key: json_values(KEYS, WORDS) for key in ("tool_calls", "weight", "value", "reasoning_content")},
    )
    row = st.fixed_dictionaries(
        {"messages": st.lists(nearly | turn, max_size=4)},
        optional={key: json_values(KEYS, WORDS) for key in KEYS if key != "messages"},
    )
    path = tmp_path / "rows.jsonl"

    def check(rows: list) -> None:
        path.write_text("\n".join(json.dumps(row) for row in rows))
        accepts_or_refuses(lambda: read("chat", path, tokenizer))

    fuzz(60 * examples, st.lists(row | json_values(KEYS, WORDS), max_size=3), check)


@pytest.mark.parametrize("examples", FEW_OR_MANY)
@pytest.mark.parametrize("kind", ["chat", "jsonl"])
def test_a_data_set_is_whole_or_absent(tokenizer, tmp_path, kind, examples):
    path, out = tmp_path / "file", tmp_path / "out"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        shutil.rmtree(out, ignore_errors=True)
        with contextlib.suppress(UserError):
            build({"train": READERS[kind](path)}, tokenizer, out, kind=kind, max_refused=2)
        assert {one.name for one in tmp_path.iterdir()} <= {"file", "out"}
        if out.exists():
            documents = open_split(out, "train")
            assert sum(len(documents[i]["tokens"]) for i in range(len(documents))) == documents.lengths.sum() > 0

    fuzz(8 * examples, damaged(FILES[kind]), check)
