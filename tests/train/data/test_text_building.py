"""Data sets of texts: what is held out, the same bytes again, and nothing lost or left behind when something fails."""

import errno
import os

import pytest

from models.errors import UserError
from models.formats.tokenizer import Tokenizer
from train.data.text_building import build
from train.data.text_sources import RawDocument, hold_out
from train.data.texts import open_split


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["once upon a time there was text\n"], 270).with_chat_template("{{ messages }}")


def names(directory) -> list[str]:
    """Of the documents of a data set."""
    documents = open_split(directory, "train")
    return [documents[i]["name"] for i in range(len(documents))]


def test_held_out_documents_are_fixed_by_their_names():
    documents = [RawDocument(f"file {index}", "text") for index in range(400)]
    splits = {name: [document.name for document in part] for name, part in hold_out(documents, fraction=0.1).items()}
    assert 20 < len(splits["valid"]) < 60
    assert sorted(splits["train"] + splits["valid"]) == sorted(document.name for document in documents)
    fewer = {document.name for document in hold_out(documents[::2], fraction=0.1)["valid"]}
    assert fewer == set(splits["valid"]) & {document.name for document in documents[::2]}
    counted = hold_out((document for document in documents), count=7)
    assert [len(list(counted[name])) for name in ("valid", "valid", "train")] == [7, 7, 393]
    assert list(hold_out(documents)) == ["train"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.1, "count": 1}, "not both"),
        ({"fraction": 1.0}, "got 1.0"),
        ({"count": -1}, "got -1"),
        ({"count": 2}, "cannot hold out 2 documents of 2"),
    ],
)
def test_hold_outs_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        hold_out([RawDocument("a", "x"), RawDocument("b", "x"), RawDocument("c", " ")], **arguments)


def test_the_same_documents_give_the_same_bytes(tokenizer, tmp_path):
    documents = [RawDocument(f"file {index}", f"text {index}") for index in range(100)]
    for name in ("first", "second"):
        build(hold_out(documents, fraction=0.1), tokenizer, tmp_path / name)
    first, second = (
        sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("first", "second")
    )
    assert [path.name for path in first] == [path.name for path in second]
    for one, other in zip(first, second, strict=True):
        if not one.name.endswith(".json") or one.name in ("manifest.json", "tokenizer.json"):
            assert one.read_bytes() == other.read_bytes(), one.name


def test_failure_leaves_nothing_behind(tokenizer, tmp_path):
    def documents():
        yield from (RawDocument(f"{index}", "text") for index in range(100))
        raise UserError("the source broke")

    for splits, message in [
        ({"train": documents()}, "^the source broke$"),
        ({"train": [RawDocument("a", "a")], "valid": []}, "'valid' is empty"),
        ({"train": [RawDocument("a", messages=({"role": "user", "content": "x"},))]}, "^a: .* no assistant turn"),
    ]:
        with pytest.raises(UserError, match=message):
            build(splits, tokenizer, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_the_old_data_set_returns_when_the_new_one_cannot_take_its_place(tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    build({"train": [RawDocument("old", "old")]}, tokenizer, out)
    replace = os.replace

    def fails_for_the_new(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_for_the_new)
    with pytest.raises(OSError, match="Input/output"):
        build({"train": [RawDocument("new", "new")]}, tokenizer, out, overwrite=True)
    assert names(out) == ["old"] and [path.name for path in tmp_path.iterdir()] == ["out"]
