"""Tokenizer directories: tokens outside `tokenizer.json`, files that contradict each other, SentencePiece."""

import json

import pytest

from models.errors import UserError
from models.formats.tokenizer import Tokenizer
from models.formats.tokenizer_files import holds_tokenizer
from tests.models.formats.sentencepiece_models import PIECES, SPECIALS, WORDS, field, model


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return Tokenizer.train(["once upon a time <|a|>\n"], 270)


@pytest.fixture
def directory(plain, tmp_path):
    plain.save(tmp_path)
    return tmp_path


def add(directory, name: str, **entries) -> None:
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **entries}))


def token(text: str, **flags) -> dict:
    return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "special": True, **flags}


def test_tokens_outside_the_definition_are_tokens(plain, directory):
    size = plain.vocab_size
    decoder = {str(size + 1): token("<|b|>", lstrip=True), str(size): token("<|a|>", special=False)}
    add(directory, "tokenizer_config.json", added_tokens_decoder=decoder, eos_token="<|b|>")
    add(directory, "added_tokens.json", **{"<|a|>": size})
    loaded = Tokenizer.load(directory)
    assert loaded.encode("<|a|> <|b|>", bos=False) == [size, size + 1] and loaded.eos_ids == (size + 1,)
    assert loaded.vocab_size == size + 2 and loaded.fingerprint != plain.fingerprint
    loaded.save(directory / "saved")
    saved = Tokenizer.load(directory / "saved")
    assert saved.fingerprint == loaded.fingerprint and saved.encode("<|a|>") == loaded.encode("<|a|>")


def test_the_older_files_hold_where_the_newer_is_silent(plain, directory):
    size = plain.vocab_size
    add(directory, "added_tokens.json", **{"<|a|>": size})
    add(directory, "special_tokens_map.json", additional_special_tokens=["<|b|>"], eos_token="<bos>")
    loaded = Tokenizer.load(directory)
    assert loaded.encode("<|a|><|b|>", bos=False) == [size, size + 1] and loaded.eos_ids == (0,)
    assert "<|b|>" in loaded.specials and "<|a|>" not in loaded.specials
    add(directory, "tokenizer_config.json", added_tokens_decoder={"0": token("<bos>"), str(size): token("<|a|>")})
    loaded = Tokenizer.load(directory)
    assert loaded.vocab_size == size + 1 and loaded.eos_ids == (1,)


def test_what_says_nothing_new_changes_nothing(plain, directory):
    decoder = {"0": token("<bos>"), "1": token("<eos>")}
    add(directory, "tokenizer_config.json", added_tokens_decoder=decoder)
    add(directory, "added_tokens.json", **{"<bos>": 0})
    assert Tokenizer.load(directory).fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"300": token("<x>")}}},
            "id 300, but the next free id is 270",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"5": token("<x>")}}}, "under that id"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"9": token("<eos>")}}}, "tokenizer has the id 1"),
        ({"added_tokens.json": {"<eos>": 9}}, "added_tokens.json gives '<eos>' the id 9"),
        (
            {
                "tokenizer_config.json": {"added_tokens_decoder": {"270": token("<x>")}},
                "added_tokens.json": {"<x>": 271},
            },
            "gives '<x>' the id 271, which .* does not",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": []}}, "must be an object"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"a": "b"}}}, "maps ids to tokens"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"270": token("x", special=1)}}}, "true or false"),
        ({"added_tokens.json": {"x": "y"}}, "maps tokens to ids"),
        ({"tokenizer_config.json": {"pad_token": 3}}, "pad_token must be a text"),
        ({"tokenizer_config.json": {"chat_template": 3}}, "chat_template must be a text"),
        ({"tokenizer_config.json": {"chat_template": {}}}, "chat_template must be a text"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "x"}]}}, "chat_template must be a text"),
    ],
)
def test_contradictions_are_refused(directory, files, message):
    for name, content in files.items():
        add(directory, name, **content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(directory)


def test_ids_that_the_definition_itself_contradicts(plain, directory):
    content = json.loads((directory / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 400, "content": "<x>"})
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="gives the added token '<x>' the id 400"):
        Tokenizer.load(directory)


def test_pointers_and_other_formats_are_named(directory):
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    (directory / "tokenizer.json").write_bytes(pointer)
    with pytest.raises(UserError, match=r"tokenizer\.json is a Git LFS pointer"):
        Tokenizer.load(directory)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(pointer)
    with pytest.raises(UserError, match=r"tokenizer\.model is a Git LFS pointer"):
        Tokenizer.load(directory)
    (directory / "tokenizer.model").unlink()
    (directory / "vocab.json").write_text("{}")
    assert not holds_tokenizer(directory)
    with pytest.raises(UserError, match=r"no tokenizer in .*; vocab\.json is not read here"):
        Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["<s>", "▁the", "▁", "in", "<|u|>", "in"]),
        ({"add_bos_token": False, "add_prefix_space": False}, ["t", "he", "▁", "in", "<|u|>", "in"]),
        ({"legacy": True}, ["<s>", "▁the", "▁", "in", "<|u|>", "▁", "in"]),
    ],
)
def test_sentencepiece(tmp_path, config, words):
    (tmp_path / "tokenizer.model").write_bytes(model([*PIECES, ("<|u|>", 0.0, 4)]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    ids = loaded.encode("the in<|u|>in")
    assert [loaded.core.id_to_token(i) for i in ids] == words
    assert (loaded.bos_id, loaded.eos_ids) == (1, (2,)) and loaded.specials == {"<unk>", "<s>", "</s>"}
    text = "the ☕\t  world"
    assert loaded.decode(loaded.encode(text)) == text
    loaded.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode(text) == loaded.encode(text)


def test_sentencepiece_with_added_tokens(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": len(PIECES)}))
    assert Tokenizer.load(tmp_path).encode("<pad>", bos=False) == [len(PIECES)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or not a SentencePiece"),
        (b"IQ== 0\nIg== 1\n", "looks like a tiktoken vocabulary"),
        (model()[:-5], "damaged or not a SentencePiece"),
        (model()[:200], "damaged or not a SentencePiece"),
        (model(kind=1), "is a unigram model of SentencePiece; BPE is supported"),
        (model(charsmap=b"abc"), "normalises texts"),
        (model([*PIECES, PIECES[-1]]), "occur twice"),
        (model([*SPECIALS, ("\udc80".encode("utf-8", "surrogateescape").decode("latin-1"), 0.0, 1)], kind=3), "a word"),
        (field(1, field(2, 1.0)), "damaged or not a SentencePiece"),
    ],
)
def test_sentencepiece_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_a_text_that_a_vocabulary_lacks_pieces_for(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}))
    with pytest.raises(UserError, match="cannot encode a text"):
        Tokenizer.load(tmp_path).encode("b")


def test_the_best_scored_pair_is_merged_first(tmp_path):
    pieces = [*PIECES[: -len(dict(WORDS))], ("ab", -1.0, 1), ("bc", -0.5, 1), *((c, -9.0, 1) for c in "abc▁")]
    (tmp_path / "tokenizer.model").write_bytes(model(pieces, prefix=0))
    loaded = Tokenizer.load(tmp_path)
    assert [loaded.core.id_to_token(i) for i in loaded.encode("abc", bos=False)] == ["a", "bc"]
