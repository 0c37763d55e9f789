"""Stop texts are found in what the tokens say, wherever the borders of tokens lie, and end the text exactly there."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from decoding.drafters.registry import load_drafter
from decoding.generate import generate
from decoding.verify import Typical
from models.errors import UserError
from models.formats.continuation import Continuation, split_stops, text_behind
from models.formats.hf import save_target
from models.formats.target import Target, load_target
from models.formats.tokenizer import Tokenizer
from models.transformer import split_projections
from scripts import convert
from tests.eval import tiny

PROMPT = "def f(x):"


def spaced() -> Tokenizer:
    """Like SentencePiece: words carry the space before them, a text's first space is dropped, bytes for the rest."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁named", "▁L", "ily", ".", "▁the", "▁end", "▁", "▁Lily"]
    core = tokenizers.Tokenizer(tokenizers.models.Unigram([(w, -float(i)) for i, w in enumerate(words)], 0, True))
    core.add_special_tokens(["<s>", "</s>"])
    decoders = tokenizers.decoders
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(core, {"bos_token": "<s>", "eos_token": "</s>"})


def ids(tokenizer: Tokenizer, *words: str) -> list[int]:
    return [tokenizer.core.token_to_id(word) for word in words]


def test_new_tokens_keep_the_space_behind_the_prompt() -> None:
    tokenizer = spaced()
    prompt, new = ids(tokenizer, "<s>", "▁the", "▁end"), ids(tokenizer, "▁named", "▁L", "ily", ".")
    assert tokenizer.decode(new) == "named Lily."
    assert text_behind(tokenizer, prompt, new) == " named Lily."
    assert tokenizer.decode(prompt + new) == tokenizer.decode(prompt) + text_behind(tokenizer, prompt, new)
    assert text_behind(tokenizer, prompt[:1], new) == "named Lily."
    # A prompt that ends with a line, which is a byte here: the line end is not said again.
    line = ids(tokenizer, "<0x0A>")
    assert text_behind(tokenizer, prompt + line, new) == " named Lily."
    assert text_behind(tokenizer, prompt + line, line + new) == "\n named Lily."
    euro = ids(tokenizer, "<0xE2>", "<0x82>", "<0xAC>")
    assert text_behind(tokenizer, prompt + line, euro + new) == "€ named Lily."
    assert text_behind(tokenizer, prompt, euro[:2]) == "\ufffd\ufffd"


@pytest.mark.parametrize(
    ("stop", "said", "count"),
    [
        (".", " named Lily.", 4),
        ("ly.", " named Lily.", 4),
        ("d L", " named L", 2),
        ("Lil", " named Lil", 3),
        ("\n", " named Lily. the\n", 6),
        ("e\n", " named Lily. the\n", 6),
        ("€", " named Lily. the\n€", 9),
        (" the", " named Lily. the", 5),
    ],
)
def test_stops_lie_anywhere_among_tokens(stop: str, said: str, count: int) -> None:
    tokenizer = spaced()
    new = ids(tokenizer, "▁named", "▁L", "ily", ".", "▁the", "<0x0A>", "<0xE2>", "<0x82>", "<0xAC>", "▁end")
    made = Continuation(tokenizer, ids(tokenizer, "▁the"), [stop, "never"])
    fed = []
    for token in new:
        fed.append(made.feed(token))
        if made.ended:
            break
    assert len(fed) == count and "".join(fed) == made.text == said
    assert made.feed(new[0]) == made.flush() == ""
    assert text_behind(tokenizer, ids(tokenizer, "▁the"), new, [stop, "never"]) == said


def test_of_several_stops_the_first_in_the_text_counts() -> None:
    tokenizer = spaced()
    new = ids(tokenizer, "▁named", "▁Lily", ".", "▁end")
    for stops in (["ly", "il"], ["il", "ly"]):
        assert text_behind(tokenizer, ids(tokenizer, "▁the"), new, stops) == " named Lil"
    # The prompt is no part of what is searched.
    assert text_behind(tokenizer, ids(tokenizer, "▁the"), new, ["the named"]) == " named Lily. end"


def test_special_tokens_are_looked_for_as_tokens() -> None:
    tokenizer = spaced()
    assert split_stops(tokenizer, ["</s>", "a", "b c"]) == ([[2]], ["a", "b c"])
    for stops, complaint in (
        ("ab", "must be a list of texts, got the text 'ab'"),
        ([""], "must not be empty"),
        ([3], "must be a text, got 3"),
        (["x</s>"], "can never occur: a decoded text holds no special tokens such as </s>"),
    ):
        with pytest.raises(UserError, match=complaint):
            split_stops(tokenizer, stops)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(tiny.write_target(tmp_path_factory.mktemp("stops") / "target"))


def test_decoding_ends_at_the_text(target: Target) -> None:
    prompt = target.tokenizer.encode(PROMPT)
    free = generate(target, [prompt, prompt[:3]], max_new_tokens=40)
    assert [target.tokenizer.decode(p + t) for p, t in zip([prompt, prompt[:3]], free.tokens, strict=True)] == [
        target.tokenizer.decode(p) + text for p, text in zip([prompt, prompt[:3]], free.texts, strict=True)
    ]
    whole = free.texts[0]
    # From the middle of a token into another one.
    ends = [len(text_behind(target.tokenizer, prompt, free.tokens[0][:count])) for count in range(1, 40)]
    pairs = [whole[end - 1 : end + 1] for end in ends if whole[end - 1 : end + 1].isascii()]
    stop = next(pair for pair in pairs if len(pair) == 2 and whole.index(pair) > 3)
    said = whole[: whole.index(stop) + len(stop)]
    calls: list[tuple[int, list[int]]] = []
    settings = dict(max_new_tokens=40, stop_texts=[stop, "</never>"])
    made = generate(target, [prompt, prompt[:3]], on_tokens=lambda *call: calls.append(call), **settings)
    count = len(made.tokens[0])
    assert made.texts[0] == said and made.tokens[0] == free.tokens[0][:count]
    assert len(text_behind(target.tokenizer, prompt, made.tokens[0][:-1])) < len(said)
    assert [token for row, tokens, _ in calls if row == 0 for token in tokens] == made.tokens[0]
    assert made.stats[0].committed == made.stats[0].steps == count - 1
    for row in (0, 1):
        alone = generate(target, [[prompt, prompt[:3]][row]], stream_every=1, **settings)
        assert (alone.tokens[0], alone.texts[0]) == (made.tokens[row], made.texts[row])
        assert alone.stats[0].line() == made.stats[row].line()


def test_statistics_of_a_text_that_was_cut(target: Target, tmp_path: Path) -> None:
    """The counts of the steps that made what is left, whenever the host looked."""
    drafter = tiny.write_drafters(tmp_path, target.path)["medusa"]
    pair, prompt = load_drafter(drafter, target), target.tokenizer.encode(PROMPT)
    options = dict(drafter=pair, max_new_tokens=40, typical=Typical(0.0, 0.0))  # Everything is accepted.
    free = generate(target, [prompt], **options)
    assert max(free.writers[0]) == 3
    for end in (9, 10, 11, 12):
        text = text_behind(target.tokenizer, prompt, free.tokens[0][:end])
        if len(text) < 3 or text.find(text[-3:]) != len(text) - 3:
            continue
        often, seldom = (generate(target, [prompt], stop_texts=[text[-3:]], stream_every=n, **options) for n in (1, 7))
        assert often.tokens == seldom.tokens and often.texts == seldom.texts == [text]
        for one in (often, seldom):
            stats = one.stats[0]
            assert stats.committed == len(one.tokens[0]) - 1
            assert stats.accepted_by_depth.tolist() == [one.writers[0][1:].count(d) for d in (1, 2, 3)]
        assert often.stats[0].steps == seldom.stats[0].steps


def test_a_draft_model_with_a_shorter_vocabulary(target: Target, tmp_path: Path, capsys) -> None:
    """Models of one tokenizer are padded differently: drafts come from what both have, the text is the target's."""
    params = split_projections(target.config, target.params)
    table = np.asarray(params["embed"]["embedding"])
    large = dataclasses.replace(target.config, vocab_size=len(table) + 9)
    rows = np.random.default_rng(0).normal(0, table.std(), (9, table.shape[1])).astype(table.dtype)
    padded = {**params, "embed": {"embedding": jnp.asarray(np.concatenate([table, rows]))}}
    save_target(tmp_path / "padded", large, padded, target.tokenizer)
    prompt = target.tokenizer.encode(PROMPT)
    for number, (source, base) in enumerate([(target.path, tmp_path / "padded"), (tmp_path / "padded", target.path)]):
        out = tmp_path / f"drafter{number}"
        convert.main(["--from", "model", "--src", str(source), "--base", str(base), "--out", str(out)])
        assert f"vocabulary {len(table)} of" in capsys.readouterr().out
        loaded = load_target(base)
        made = generate(loaded, [prompt], drafter=load_drafter(out, loaded), max_new_tokens=40)
        assert made.tokens == generate(loaded, [prompt], max_new_tokens=40).tokens
        assert made.stats[0].acceptance_length > 1.3
    shutil.copytree(tmp_path / "padded", tmp_path / "other")
    content = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    swapped = [piece for piece, i in sorted(vocabulary.items(), key=lambda item: item[1]) if i in (20, 21)]
    vocabulary[swapped[0]], vocabulary[swapped[1]] = 21, 20
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "padded" / name, tmp_path / "bare")
    for source, complaint in (("other", "another tokenizer than"), ("bare", "has no tokenizer that could tell")):
        with pytest.raises(SystemExit):
            arguments = ["--from", "model", "--src", str(tmp_path / source), "--base", str(target.path)]
            convert.main([*arguments, "--out", str(tmp_path / "no")])
        assert complaint in capsys.readouterr().err and not (tmp_path / "no").exists()
