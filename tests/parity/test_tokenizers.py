"""The same ids as transformers: SentencePiece models, and tokens that stand outside `tokenizer.json`."""

import json
import random

import pytest

from models.formats.tokenizer import Tokenizer

pytestmark = pytest.mark.parity
PIECES = ("a", "b", " ", "  ", "\n", "é", "☕", "<s>", "</s>", "<|u|>", "▁", "the ", "THE", "\t", "x<", "<pad>")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choice(PIECES) for _ in range(generator.randrange(12))) for _ in range(200)]


@pytest.mark.parametrize("config", [{}, {"legacy": True}, {"add_prefix_space": False}, {"add_bos_token": False}])
def test_sentencepiece_as_transformers(config, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the theory of the weather in other northern worlds\n" * 30 + "abba x THE\n" * 30)
    library.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|u|>"],
        minloglevel=2,
    )
    named = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**named, "add_bos_token": True, **config}))
    theirs, ours = transformers.LlamaTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    ours.save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"] == saved(text)["input_ids"]
        assert ours.decode(ids, skip_specials=False) == theirs.decode(ids)


def _token(text: str, **flags) -> dict:
    return {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "special": True, **flags}


@pytest.mark.parametrize(
    ("config", "added", "special"),
    [
        ({"added_tokens_decoder": {"262": _token("<|u|>"), "263": _token("<pad>", lstrip=True)}}, None, None),
        ({"added_tokens_decoder": {"1": _token("<eos>", rstrip=True)}, "pad_token": "<pad>"}, {"<eos>": 1}, None),
        ({"extra_special_tokens": ["<|u|>"]}, {"<|u|>": 262, "<pad>": 263}, None),
        ({}, None, {"additional_special_tokens": ["<|u|>"], "pad_token": "<pad>", "eos_token": "<bos>"}),
    ],
)
def test_tokens_outside_the_definition_as_transformers(config, added, special, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    Tokenizer.train(["the theory <|u|> <pad>\n"], 262).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    for name, content in (("added_tokens.json", added), ("special_tokens_map.json", special)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert (ours.vocab_size, ours.eos_ids) == (len(theirs), (theirs.eos_token_id,))
    for text in [*texts, "<eos> a <bos> the"]:
        assert ours.encode(text) == theirs(text)["input_ids"]
