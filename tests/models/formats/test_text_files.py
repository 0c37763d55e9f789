"""Text and JSON as people have them: byte order marks, gzip, pointers, damage, each refusal with its file and line."""

import gzip
import json

import pytest

from models.errors import UserError
from models.formats.text_files import half_character, json_items, parse_json, read_json, read_text, shown

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"


@pytest.mark.parametrize("compressed", [False, True])
def test_a_byte_order_mark_is_no_text(tmp_path, compressed):
    content = "\ufeffone\r\ntwo \ufeff three\n".encode()
    path = tmp_path / "a.txt"  # Compression is seen by the content: browsers unpack and rename at will.
    path.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
    assert read_text(path) == "one\ntwo \ufeff three\n"
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is a Git LFS pointer"),
        (b"one\ntwo\nthr\xe9e\n", "line 3 has the byte 0xe9 at character 3"),
        ("one".encode("utf-16"), "it is UTF-16"),
        ("one\ntwo".encode("utf-16-le"), "line 1 has the byte 0x00"),
        (b"BZh91AY", "is a bzip2 file"),
        (b"PK\x03\x04", "is a zip file"),
        (b"PAR1....", "is a Parquet file"),
        (gzip.compress(b"a" * 9999, mtime=0)[:-9], "is damaged or cut short"),
        (gzip.compress(b"a" * 9999, mtime=0)[:12], "is damaged or cut short"),
        (gzip.compress(b"a" * 9999, mtime=0)[:5], "is damaged or cut short"),
        (gzip.compress(b"a", mtime=0) + b"tail", "is damaged or cut short"),
        (gzip.compress(bytes(range(128)), mtime=0)[:20] + b"\xff" * 20, "is damaged or cut short"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.txt .*{message}"):
        read_text(path)


def test_paths_that_hold_no_file(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("gone")
    for path, message in [
        ("none", "there is no none in"),
        ("none/x", "there is no x in .*none, which does not exist"),
        ("link", "link is a link to gone, which is not there"),
        ("file/x", "is not a directory"),
        ("", "cannot read"),
    ]:
        with pytest.raises(UserError, match=message):
            read_text(tmp_path / path)


def test_json_that_cannot_be_read_is_one_sentence():
    for text, message in [
        ("[" * 100_000, "here is nested too deeply"),
        ("{", "here is not valid JSON"),
        ("", "not valid"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_json(text, "here")


def test_items_of_a_list_know_their_lines():
    values = [{"a": [1]}, 2, "x\ny"]
    for indent in (None, 2):
        assert [value for _, value in json_items(f"\n{json.dumps(values, indent=indent)}\n", "f")] == values
    assert list(json_items('[1,\n2,\n\n{"a":\n 3}\n]', "f")) == [(1, 1), (2, 2), (4, {"a": 3})]
    assert list(json_items(" [ ] ", "f")) == []


@pytest.mark.parametrize(
    ("text", "good", "message"),
    [
        ("[1, 2", 2, "line 1: expected a comma or the end"),
        ("[1,\n2,\n{", 2, "line 3: item 3 is not valid JSON"),
        ("[1, ]", 1, "item 2 is not valid"),
        ("[1] 2", 1, "expected a comma or the end"),
        ("[1] ]", 1, "expected a comma or the end"),
        ("[", 0, "item 1 is not valid"),
        ("[" + "[" * 100_000, 0, "line 1: nested too deeply"),
    ],
)
def test_lists_that_are_damaged(text, good, message):
    items = json_items(text, "f")
    for _ in range(good):
        next(items)
    with pytest.raises(UserError, match=message):
        next(items)


def test_half_characters_and_names_that_are_no_text():
    assert half_character("aé\U0001f600") is None and half_character("a\ud83d") == 1
    assert shown("caf\udce9.py") == "caf\\xe9.py" and shown("café") == "café"
