"""Tokenizers: exact round trips, directories, chat templates and their masks, streaming, parity with transformers."""

import json
import random

import pytest
import tokenizers

from models.errors import UserError
from models.formats.tokenizer import StreamDecoder, Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n" * 3,
    "def f(x):\n    return x + 1\n" * 5,
    "naïve café ☕ 日本語",
]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello ☕"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "the end"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320)


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """A tokenizer of Llama's kind: words with `▁` for the space before them, and `<0xNN>` for everything else."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    vocabulary = {name: index for index, name in enumerate(names)}
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True)
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    core.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(core, {"bos_token": "<s>", "eos_token": "</s>"})


def random_text(generator: random.Random, length: int) -> str:
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    pieces = ["<bos>", "<eos>", "\n\n\n", "    ", "\r\n", "\ufffd", "e\u0301"]
    return "".join(
        generator.choice(pieces) if generator.random() < 0.2 else chr(generator.randint(*generator.choice(ranges)))
        for _ in range(length)
    )


def test_any_text_survives(tokenizer):
    generator = random.Random(0)
    for length in [0, 1, 2, 5, 50, 500] * 5:
        text = random_text(generator, length)
        assert tokenizer.decode(tokenizer.encode(text, specials=False)) == text
        assert tokenizer.decode(tokenizer.encode_documents([text])[0]) == text
        plain = text.replace("<", "")
        assert tokenizer.decode(tokenizer.encode(plain)) == plain


def test_training_gives_the_size_asked_for_and_is_deterministic(tokenizer):
    assert tokenizer.vocab_size == 320
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (1,))
    assert Tokenizer.train(iter(TEXTS), 320).fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(TEXTS[:1], 320).fingerprint != tokenizer.fingerprint
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    lines = []
    Tokenizer.train(TEXTS, 258, lines.append)
    assert len(lines) == 1 and "3 texts" in lines[0]
    with pytest.raises(UserError, match="at least 258"):
        Tokenizer.train(TEXTS, 257)


def test_specials_in_text_are_tokens_only_when_wanted(tokenizer):
    assert tokenizer.encode("a<eos>", bos=False)[-1] == 1
    assert 1 not in tokenizer.encode("a<eos>", bos=False, specials=False)
    document = tokenizer.encode_documents(["a<eos>b"])[0]
    assert document[0] == 0 and document[-1] == 1 and document.count(1) == 1
    assert tokenizer.decode([0, 1]) == "" and tokenizer.decode([0, 1], skip_specials=False) == "<bos><eos>"


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"character 1 .* surrogate"):
        tokenizer.encode("a\ud800")


def test_bos_is_added_only_where_the_tokenizer_uses_one(tokenizer):
    core = tokenizers.Tokenizer.from_str(tokenizer.core.to_str())
    assert tokenizer.encode("a", bos=True) == [0, *tokenizer.encode("a", bos=False)]
    assert Tokenizer(core, {}).encode("a") == tokenizer.encode("a", bos=False)
    assert Tokenizer(core, {"bos_token": "<bos>", "add_bos_token": False}).encode("a")[0] != 0
    core.post_processor = tokenizers.processors.ByteLevel()  # As GPT-2's: it names a begin token and never uses it.
    assert Tokenizer(core, {"bos_token": "<bos>"}).encode("a")[0] != 0
    assert Tokenizer(core, {"bos_token": "<bos>", "add_bos_token": True}).encode("a")[0] == 0


def test_directory_round_trip_keeps_every_byte(tokenizer, tmp_path):
    tokenizer.with_chat_template(CHATML).save(tmp_path / "a")
    path = tmp_path / "a" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=None))  # Another writer's layout.
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == path.read_bytes()
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert loaded.fingerprint == tokenizer.fingerprint and len(loaded.fingerprint) == 16
    assert loaded.chat_template == CHATML and loaded.eos_ids == (1,)


def test_fingerprint_is_of_the_tokens_not_of_the_file(tokenizer, tmp_path):
    content = json.loads(tokenizer.core.to_str())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(reversed(content.items())), indent=3))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.decode(loaded.encode(TEXTS[0])) == TEXTS[0]  # Nothing is truncated.
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).fingerprint != tokenizer.fingerprint


def test_config_forms(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<eos>", "lstrip": False}}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_ids) == (None, (1,))
    config.write_text(
        json.dumps({"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]})
    )
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_ids == () and loaded.apply_chat(CHAT) == "y"
    (tmp_path / "chat_template.jinja").write_text("z")
    config.unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<bos>"}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.bos_id == 0 and loaded.apply_chat(CHAT) == "z"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer in .*expected the file tokenizer.json"),
        ("tokenizer.json", "{}", "is not a tokenizer definition"),
        ("tokenizer.json", b"\xff{}", "tokenizer.json is not UTF-8 text"),
        ("tokenizer_config.json", b"\xff{}", "tokenizer_config.json is not UTF-8 text"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8 text"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object, got list"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "names '<end>' as eos_token"),
    ],
)
def test_broken_directories(tokenizer, tmp_path, name, content, message):
    tokenizer.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_chat_rendering(tokenizer):
    chat = tokenizer.with_chat_template(CHATML)
    text = chat.apply_chat(CHAT[:1])
    assert text == "<bos><|user|>\nhi<eos>\n<|assistant|>\n"
    assert chat.apply_chat(CHAT[:1], add_generation_prompt=False) == "<bos><|user|>\nhi<eos>\n"
    ids = chat.encode_chat(CHAT[:1])
    assert ids.count(0) == 1 and ids[0] == 0 and chat.decode(ids, skip_specials=False) == text
    tags = tokenizer.with_chat_template("{{ messages | tojson }}{{ strftime_now('%Y') | length }}")
    assert tags.apply_chat([{"role": "user", "content": "<é>"}]) == '[{"role": "user", "content": "<é>"}]4'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[9].content.strip() }}", "no element 9"),
    ],
)
def test_failing_templates_are_one_sentence(tokenizer, template, message):
    with pytest.raises(UserError, match=message):
        tokenizer.with_chat_template(template).apply_chat(CHAT)


def test_no_template(tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.apply_chat(CHAT)


GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:\n"
    "{% generation %}{{ m.content }}<eos>{% endgeneration %}{{ '\n' }}"
    "{% else %}U: {{ m.content }}\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_mask_is_the_assistants_words_and_closing_token(tokenizer, template):
    chat = tokenizer.with_chat_template(template)
    ids, mask = chat.encode_chat_with_mask(CHAT)
    assert ids == chat.encode_chat(CHAT, add_generation_prompt=False) and len(mask) == len(ids)
    learnt = chat.decode([token for token, bit in zip(ids, mask, strict=True) if bit], skip_specials=False)
    assert learnt == "hello ☕<eos>the end<eos>"


def test_generation_tag_leaves_no_marks(tokenizer):
    text = tokenizer.with_chat_template(GENERATION).apply_chat(CHAT[:2])
    assert text == "U: hi\nA:\nhello ☕<eos>\n"


def test_mask_refuses_what_it_cannot_tell_apart(tokenizer):
    twice = "{% for m in messages %}{{ loop.length }}{{ m.content }}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="writes assistant turn 2 so that its tokens cannot be told apart"):
        tokenizer.with_chat_template(twice).encode_chat_with_mask(CHAT)
    with pytest.raises(UserError, match="no assistant turn"):
        tokenizer.with_chat_template(CHATML).encode_chat_with_mask(CHAT[:1])


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_streamed_text_is_the_whole_text(kind, tokenizer, byte_fallback):
    subject = {"byte-level": tokenizer, "byte-fallback": byte_fallback}[kind]
    generator = random.Random(1)
    for _ in range(200):
        ids = [generator.randrange(subject.vocab_size + 3) for _ in range(generator.randrange(1, 30))]
        if generator.random() < 0.5:
            ids = subject.encode("a b ☕a " + random_text(generator, 4)) + ids
        decoder = StreamDecoder(subject)
        pieces = []
        rest = list(ids)
        while rest:
            count = generator.randrange(1, 5)
            pieces.append(decoder.feed(rest[:count]))
            rest = rest[count:]
        assert "".join(pieces) + decoder.flush() == subject.decode(ids)


def test_streaming_holds_back_only_what_is_incomplete(tokenizer):
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("fox 𐍈", bos=False)
    assert tokenizer.decode(ids[-4:]) == "𐍈"  # Four bytes, four tokens.
    assert decoder.feed(ids[:-4]) == "fox "
    assert [decoder.feed([token]) for token in ids[-4:]] == ["", "", "", "𐍈"]
    assert decoder.feed(ids[-4:-1]) == "" and decoder.flush() == "\ufffd"


@pytest.mark.parity
def test_transformers_reads_our_directory(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = tokenizer.with_chat_template(CHATML)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    generator = random.Random(2)
    for text in [*TEXTS, *(random_text(generator, 40) for _ in range(20))]:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))
    for prompt in (False, True):
        assert theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt) == ours.apply_chat(
            CHAT, prompt
        )
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, ours.vocab_size)
    tagged = transformers.AutoTokenizer.from_pretrained(tmp_path, chat_template=GENERATION)
    output = tagged.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = ours.with_chat_template(GENERATION).encode_chat_with_mask(CHAT)
    assert (output["input_ids"], output["assistant_masks"]) == (ids, mask)
