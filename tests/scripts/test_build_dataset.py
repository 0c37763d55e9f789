"""From files to data sets: every kind of source, what is held out, and what happens when something is wrong."""

import gzip
import json
import os
import sysconfig

import pytest

from models.formats.tokenizer import Tokenizer
from scripts import build_dataset
from train.data.text_building import build
from train.data.text_sources import RawDocument
from train.data.texts import open_split

CHATML = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["once upon a time there was text\n"], 270).with_chat_template(CHATML)


@pytest.fixture
def tokenizer_dir(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def texts(directory, split="train") -> dict[str, str]:
    tokenizer = Tokenizer.load(directory / "tokenizer")
    documents = open_split(directory, split, tokenizer_fingerprint=tokenizer.fingerprint)
    return {documents[i]["name"]: tokenizer.decode(documents[i]["tokens"]) for i in range(len(documents))}


def run(*arguments) -> None:
    build_dataset.main([str(argument) for argument in arguments])


def fails(capsys, *arguments) -> str:
    """Runs a command that must fail, and returns its one line on stderr."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_jsonl(tokenizer_dir, tmp_path, capsys):
    source = tmp_path / "a.jsonl.gz"
    rows = [{"q": "once?", "a": "Ünce <eos>"}, {"q": " ", "a": ""}, {"q": "time?", "a": "was\n"}]
    with gzip.open(source, "wt", encoding="utf-8") as file:
        file.write("\n\n".join(json.dumps(row) for row in rows))
    run("--kind", "jsonl", "--src", source, "--field", "q,a", "--tokenizer", tokenizer_dir, "--out", tmp_path / "out")
    assert texts(tmp_path / "out") == {"a.jsonl.gz:1": "once?\nÜnce <eos>", "a.jsonl.gz:5": "time?\nwas\n"}
    assert "out: train" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    documents = open_split(tmp_path / "out", "train")
    assert manifest["splits"]["train"] == {
        "documents": 2,
        "tokens": int(documents.lengths.sum()),
        "labels": int(documents.lengths.sum()),
        "bytes": sum(len(text.encode()) for text in texts(tmp_path / "out").values()),
        "left_out": {"documents without text": 1},
    }
    assert manifest["source"] == {"src": str(source), "field": "q,a"} and manifest["chat_template"] is None


def test_text_and_its_separators(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("one\ntwo\n<|endoftext|>\nthree\n\n  \nfour\n<|endoftext|>\n", encoding="utf-8")
    for separator, expected in [
        (build_dataset.END_OF_TEXT, ["one\ntwo", "three\n\n  \nfour"]),
        (build_dataset.BLANK_LINE, ["one\ntwo\n<|endoftext|>\nthree", "four\n<|endoftext|>"]),
        ("e\n", ["on", "two\n<|endoftext|>\nthre", "\n  \nfour\n<|endoftext|>"]),
    ]:
        out = tmp_path / str(len(separator))
        run("--kind", "text", "--src", source, "--separator", separator, "--train_tokenizer", 260, "--out", out)
        assert list(texts(out).values()) == [piece.strip("\n") for piece in expected]


def test_source_folder(tokenizer_dir, tmp_path):
    files = {"b.py": "b = 1", "a/c.py": "c = 2", "a/test/d.py": "d", "copy.py": "c = 2", "x.txt": "x", "a/e.py": ""}
    for name, content in files.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "src" / "latin.py").write_bytes("é".encode("latin-1"))
    common = ["--kind", "source", "--src", tmp_path / "src", "--tokenizer", tokenizer_dir]
    run(*common, "--glob", "**/*.py", "--exclude", "te?t,b*", "--out", tmp_path / "few")
    assert texts(tmp_path / "few") == {"a/c.py": "c = 2"}
    run(*common, "--glob", "**/*.py", "--exclude", "a/*/d.py", "--out", tmp_path / "more")
    assert texts(tmp_path / "more") == {"a/c.py": "c = 2", "b.py": "b = 1"}
    run(*common, "--max_documents", 1, "--out", tmp_path / "one")
    assert list(texts(tmp_path / "one")) == ["a/c.py"]


def test_chat_forms_give_the_same_tokens_and_masks(tokenizer_dir, tokenizer, tmp_path):
    messages = [{"role": "user", "content": "once?"}, {"role": "assistant", "content": "a time"}]
    conversations = [{"from": "human", "value": "once?"}, {"from": "gpt", "value": "a time"}]
    source = tmp_path / "chat.jsonl"
    source.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"conversations": conversations}))
    run("--kind", "chat", "--src", source, "--tokenizer", tokenizer_dir, "--out", tmp_path / "out")
    documents = open_split(tmp_path / "out", "train")
    assert documents[0]["tokens"].tolist() == documents[1]["tokens"].tolist() == tokenizer.encode_chat(messages, False)
    assert tokenizer.decode(documents[0]["tokens"][documents[0]["mask"] == 1], skip_specials=False) == "a time<eos>"
    assert documents.manifest["chat_template"] == CHATML
    assert documents.manifest["splits"]["train"]["labels"] == 2 * int(documents[0]["mask"].sum())


BAD_ROWS = [
    ({"messages": [{"role": "assistant", "content": "a"}]}, ""),
    ({"messages": [{"role": "narrator", "content": "a"}]}, "line 2: turn 1 has the role 'narrator'"),
    ({"conversations": []}, "line 3: expected a list of turns"),
    ({"messages": [{"role": "assistant", "content": "b", "reasoning_content": "c"}]}, "line 4: the chat template does"),
    ({"messages": [{"role": "assistant", "content": "a", "name": "x"}], "id": 3}, ""),
]


def test_conversations_that_cannot_be_used_are_counted(tokenizer_dir, tmp_path, capsys):
    source = tmp_path / "chat.jsonl"
    source.write_text("\n".join(json.dumps(row) for row, _ in BAD_ROWS) + "\n{not json")
    command = ["--kind", "chat", "--src", source, "--tokenizer", tokenizer_dir, "--out", tmp_path / "out"]
    run(*command)
    told = capsys.readouterr().err
    assert list(texts(tmp_path / "out")) == ["chat.jsonl:1", "chat.jsonl:5"]
    assert "left out: conversations that are refused (4)" in told
    for _, message in BAD_ROWS[1:4]:
        assert f"refused {source}, {message}" in told
    assert f"refused {source}, line 6 is not valid JSON" in told
    assert "fields that go nowhere, and in how many rows: id (1), name of turns (1)" in told
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["splits"]["train"]["left_out"] == {"conversations that are refused": 4}
    assert BAD_ROWS[1][1] in fails(capsys, *command, "--overwrite", "--strict")
    message = fails(capsys, *command, "--overwrite", "--max_refused", 2)
    assert message.startswith(f"error: 3 conversations are refused, the first: {source}, line 2")
    for row, message in BAD_ROWS[1:4]:
        source.write_text("\n" * int(message[5]) + json.dumps(row))
        assert message.split(": ")[1] in fails(capsys, *command, "--overwrite")
    assert len(texts(tmp_path / "out")) == 2


def test_a_list_of_rows_is_read_like_lines(tokenizer_dir, tmp_path):
    row = {"conversations": [{"from": "human", "value": "once?"}, {"from": "gpt", "value": "a time"}]}
    (tmp_path / "chats.json").write_text(json.dumps([row, row], indent=1))
    (tmp_path / "texts.json").write_text("\ufeff" + json.dumps([{"text": "once"}, {"text": "time"}]), encoding="utf-8")
    for kind, names in (("chat", ["chats.json:1", "chats.json:2"]), ("jsonl", ["texts.json:1", "texts.json:2"])):
        source = tmp_path / names[0][:-2]
        run("--kind", kind, "--src", source, "--tokenizer", tokenizer_dir, "--out", tmp_path / kind)
        assert list(texts(tmp_path / kind)) == names


def test_what_a_folder_holds_besides_is_counted(tokenizer_dir, tmp_path, capsys):
    source, linked = tmp_path / "src", tmp_path / "elsewhere"
    for path in (source / ".git", linked):
        path.mkdir(parents=True)
    (source / "lib").symlink_to(linked)
    (linked / "b.py").write_text("b = 1")
    (linked / "loop").symlink_to(source)
    (source / os.fsdecode(b"caf\xe9.py")).write_text("\ufeffcafe = 1", encoding="utf-8")
    (source / ".git" / "config").write_text("hidden")
    (source / "copy.py").write_text("b = 1")
    (source / "latin.py").write_bytes(b"\xe9")
    (source / "weights.py").write_text("version https://git-lfs.github.com/spec/v1\n")
    (source / "empty.py").write_text(" ")
    common = ["--kind", "source", "--src", source, "--tokenizer", tokenizer_dir, "--exclude", "copy*"]
    run(*common, "--out", tmp_path / "out")
    assert texts(tmp_path / "out") == {"caf\\xe9.py": "cafe = 1", "lib/b.py": "b = 1"}
    told = capsys.readouterr().err
    for reason in ("excluded files", "hidden files", "files that are not UTF-8 text", "documents without text"):
        assert f"{reason} (1)" in told
    assert "links to folders that are read already (1)" in told and "Git LFS pointers" in told
    run(*common, "--glob", ".git/*", "--out", tmp_path / "hidden")
    assert texts(tmp_path / "hidden") == {".git/config": "hidden"}


def test_chat_template_file_goes_with_the_data(tmp_path):
    source, template = tmp_path / "chat.jsonl", tmp_path / "template.jinja"
    source.write_text(json.dumps({"messages": [{"role": "assistant", "content": "a time"}]}))
    template.write_text("{% for m in messages %}{% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}")
    command = ["--kind", "chat", "--src", source, "--train_tokenizer", 260, "--chat_template", template]
    run(*command, "--out", tmp_path / "out")
    assert list(texts(tmp_path / "out").values()) == ["a time!"]
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").apply_chat([{"role": "user", "content": "x"}]) == "x!"


def test_the_standard_library_becomes_a_data_set(tmp_path):
    """A package of it: beside the whole all that is installed may lie."""
    library = os.path.join(sysconfig.get_paths()["stdlib"], "email")
    common = ["--kind", "source", "--src", library, "--glob", "*.py", "--valid_fraction", 0.2]
    run(*common, "--train_tokenizer", 300, "--out", tmp_path / "out")
    held_out, trained_on = texts(tmp_path / "out", "valid"), texts(tmp_path / "out")
    assert held_out and not held_out.keys() & trained_on.keys()
    for name, text in held_out.items():
        with open(os.path.join(library, name), encoding="utf-8", newline="") as file:
            assert text == file.read()


def test_what_is_there_is_not_lost(tokenizer, tokenizer_dir, tmp_path, capsys):
    out = tmp_path / "out"
    build({"train": [RawDocument("old", "old")]}, tokenizer, out)
    (tmp_path / "new.txt").write_text("new")
    command = ["--kind", "text", "--src", tmp_path / "new.txt", "--tokenizer", tokenizer_dir, "--out"]
    assert "already holds a data set" in fails(capsys, *command, out)
    assert "is no data set" in fails(capsys, *command, tokenizer_dir)
    (tmp_path / "empty.txt").write_text(" \n")
    assert "'train' is empty" in fails(capsys, *command, out, "--overwrite", "--src", tmp_path / "empty.txt")
    assert texts(out) == {"old": "old"}
    run(*command, out, "--overwrite")
    assert texts(out) == {"new.txt:1": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "new.txt", "out", "tokenizer"]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("jsonl", None, "no file"),
        ("jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not valid JSON"),
        ("jsonl", b'{"text": "a"}\n\n{"body": "b"}', "line 3: expected a string field 'text'; the line holds body"),
        ("jsonl", b'{"text": 3}', "line 1: expected a string field 'text'"),
        ("jsonl", b"[1]", "item 1 (line 1): expected a JSON object, got int"),
        ("jsonl", b'{"text": "\\ud800"}', "source, line 1: field 'text': character 0 is half a surrogate pair"),
        ("jsonl", b"", "'train' is empty"),
        ("jsonl", b"[" * 100_000, "line 1: nested too deeply"),
        ("jsonl", b'{"text": "a", "b": ' + b"[" * 100_000, "line 1 is nested too deeply"),
        ("jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "line 2 has the byte 0xe9"),
        ("jsonl", b'[{"text": "a"},\n{"text": null}]', "item 2 (line 2): expected a string field 'text'"),
        ("jsonl", gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9], "is damaged or cut short"),
        ("text", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("text", b"\xff\xfe", "is not UTF-8 text"),
        ("chat", b'{"text": "a"}', "line 1: expected a list of turns"),
        (
            "chat",
            b'{"messages": [{"role": "user"}]}',
            "line 1: expected every turn to hold a text in 'content' or 'value', turn 1 holds nothing",
        ),
        (
            "chat",
            b'{"messages": [{"role": "user", "content": "a"}]}',
            "source, line 1: the conversation has no assistant turn",
        ),
        ("source", b"", "no folder"),
    ],
)
def test_bad_sources(tokenizer_dir, tmp_path, capsys, kind, content, message):
    source = tmp_path / "source"
    if content is not None:
        source.write_bytes(content)
    line = fails(capsys, "--kind", kind, "--src", source, "--tokenizer", tokenizer_dir, "--out", tmp_path / "out")
    assert message in line and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --tokenizer DIR or --train_tokenizer"),
        (["--train_tokenizer", 300, "--tokenizer", "x"], "give either --tokenizer DIR or --train_tokenizer"),
        (["--tokenizer", "nowhere"], "no tokenizer in nowhere"),
        (["--train_tokenizer", 10], "at least 258"),
        (["--train_tokenizer", 10**15], "at most 10,000,000"),
        (["--train_tokenizer", 300, "--separator", ""], "the separator of documents must not be empty"),
        (["--train_tokenizer", 300, "--max_refused", -1], "--max_refused must be at least 0"),
        (["--train_tokenizer", 300, "--size", 3], "--kind text has no use for --size"),
        (["--train_tokenizer", 300, "--field", "x"], "--kind text has no use for --field"),
        (["--train_tokenizer", 300, "--max_documents", 0], "max_documents must be at least 1"),
        (["--train_tokenizer", 300, "--chat_template", "nowhere"], "no file nowhere: expected a Jinja"),
        (["--train_tokenizer", 300, "--valid_src", "x", "--valid_documents", 1], "--valid_src gives the valid split"),
        (["--train_tokenizer", 300, "--valid_src", "nowhere"], "no file nowhere"),
    ],
)
def test_bad_options(tmp_path, capsys, arguments, message):
    (tmp_path / "a.txt").write_text("text")
    line = fails(capsys, "--kind", "text", "--src", tmp_path / "a.txt", "--out", tmp_path / "out", *arguments)
    assert message in line and not (tmp_path / "out").exists()


def test_a_place_that_no_library_can_write_to(tokenizer_dir, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    common = ["--kind", "text", "--src", tmp_path / "a.txt", "--tokenizer", tokenizer_dir]
    assert "is no name that is UTF-8" in fails(capsys, *common, "--out", os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))


@pytest.mark.parametrize("glob", ["", "/**/*.py", "../*"])
def test_globs_that_lead_out(tmp_path, capsys, glob):
    command = ["--kind", "source", "--src", tmp_path, "--train_tokenizer", 300, "--out", tmp_path / "out"]
    assert "must be relative to their folder" in fails(capsys, *command, "--glob", glob)
