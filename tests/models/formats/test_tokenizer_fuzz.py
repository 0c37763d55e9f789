"""Tokenizer directories with damage: they are read or refused in one sentence, and what is read can be used."""

import json
import shutil
from pathlib import Path

import pytest

from models.formats.tokenizer import Tokenizer
from tests.fuzz import FEW_OR_MANY, accepts_or_refuses, damaged, fuzz, json_values, st
from tests.models.formats.sentencepiece_models import model

TEXT = "once upon ☕ <eos> a\n time"
KEYS = [
    *("bos_token", "eos_token", "pad_token", "chat_template", "added_tokens_decoder", "additional_special_tokens"),
    *("extra_special_tokens", "add_bos_token", "add_prefix_space", "legacy", "content", "special", "lstrip"),
    *("name", "template", "0", "1", "270", "271"),
]
WORDS = ["<bos>", "<eos>", "<x>", "a", "default", "{{ messages }}", "{% for"]


@pytest.fixture(scope="module")
def good() -> Tokenizer:
    return Tokenizer.train(["once upon a time there was text\n"], 262).with_chat_template("{{ messages[0].content }}")


def use(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    tokenizer.decode(tokenizer.encode(TEXT))
    tokenizer.encode_documents([TEXT, ""])
    tokenizer.save(directory / "saved")
    assert Tokenizer.load(directory / "saved").fingerprint == tokenizer.fingerprint
    accepts_or_refuses(lambda: tokenizer.encode_chat([{"role": "user", "content": "hi"}]))


@pytest.mark.parametrize("examples", FEW_OR_MANY)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"])
def test_damaged_files(good, tmp_path, name, examples):
    good.save(tmp_path)
    if name == "tokenizer.model":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "tokenizer_config.json").unlink()
        (tmp_path / name).write_bytes(model())
    if name == "chat_template.jinja":
        (tmp_path / name).write_text(
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content | trim }}{% endif %}{% endfor %}"
        )

    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        accepts_or_refuses(lambda: use(tmp_path))

    fuzz(60 * examples, damaged((tmp_path / name).read_bytes()), check)


@pytest.mark.parametrize("examples", FEW_OR_MANY)
def test_files_that_say_odd_things(good, tmp_path, examples):
    values = json_values(KEYS, WORDS)
    files = st.fixed_dictionaries(
        {},
        optional={
            "tokenizer_config.json": st.dictionaries(st.sampled_from(KEYS), values, max_size=6),
            "special_tokens_map.json": st.dictionaries(st.sampled_from(KEYS), values, max_size=4),
            "added_tokens.json": st.dictionaries(st.sampled_from(WORDS), st.integers(-1, 264) | values, max_size=4),
        },
    )

    def check(files: dict) -> None:
        shutil.rmtree(tmp_path)
        good.save(tmp_path)
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content))
        accepts_or_refuses(lambda: use(tmp_path))

    fuzz(80 * examples, files, check)


@pytest.mark.parametrize("examples", FEW_OR_MANY)
def test_definitions_with_other_parts(good, tmp_path, examples):
    good.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    parts = [(key,) for key in content] + [("model", key) for key in content["model"]]
    parts += [("added_tokens", 0, key) for key in content["added_tokens"][0]]
    values = json_values([str(part[-1]) for part in parts], ["BPE", "a", "b", "ab", "Sequence", "<bos>"])

    def check(change: tuple) -> None:
        (*way, last), value = change
        changed = json.loads(json.dumps(content))
        place = changed
        for key in way:
            place = place[key]
        place[last] = value
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
        accepts_or_refuses(lambda: use(tmp_path))

    fuzz(80 * examples, st.tuples(st.sampled_from(parts), values), check)
