"""Comparing answers: the score of words, and a decoder and an encoder-decoder side by side."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import answers
from models import transformer
from models.config import TransformerConfig
from models.formats.hf import save_target
from models.formats.tokenizer import Tokenizer
from models.layout import Layout
from scripts import build_dataset, openings
from tests.noise import drawn
from train.data.pairs import PairRows
from train.data.texts import open_split

STORIES = [
    f'{who} went to the {where}. It was {what} there. "So {what}," {who} said.\n'
    for who in ("Tim", "Lily", "Ben")
    for where in ("sea", "hill")
    for what in ("cold", "nice")
]
SHAPE = dict(width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16, tied_embeddings=True)


@functools.partial(jax.jit, static_argnames="config")
def alone(config, params, tokens):
    return transformer.forward(config, params, tokens, Layout.causal(*tokens.shape)).logits


@pytest.mark.parametrize(
    ("ours", "theirs", "score"),
    [("a b c", "a b c", 1.0), ("A x c", "a b c", 2 / 3), ("c a", "a c", 0.5), ("", "a", 0.0), ("b", "a", 0.0)],
)
def test_words_in_common_are_counted_in_their_order(ours: str, theirs: str, score: float) -> None:
    assert answers.words_in_common(ours, theirs) == pytest.approx(score)


def test_a_story_is_parted_behind_its_first_sentence() -> None:
    assert openings.opening('"Hi!" said Tim. He ran.') == ("said Tim. He ran.", '"Hi!"')
    assert openings.opening("Tim ran.\nHe fell.") == ("He fell.", "Tim ran.")
    assert openings.opening("Only one.") is None


@pytest.mark.slow
def test_targets_of_both_kinds_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stories.txt").write_text("<|endoftext|>\n".join(STORIES))
    openings.main(["--src", str(tmp_path / "stories.txt"), "--out", str(tmp_path / "chats.jsonl")])
    arguments = ["--kind", "chat", "--src", str(tmp_path / "chats.jsonl"), "--train_tokenizer", "300"]
    arguments += ["--chat_template", str(tmp_path / "chats.jinja"), "--valid_documents", "3"]
    build_dataset.main([*arguments, "--out", str(tmp_path / "data")])
    tokenizer = Tokenizer.load(tmp_path / "data" / "tokenizer")
    facts = dict(vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids)
    kinds = {"decoder": {}, "both": {"family": "mu", "encoder_layers": 1, "gated_mlp": False}}
    made = {}
    for name, more in kinds.items():
        config = TransformerConfig(**facts, **SHAPE, **more)
        made[name] = config, drawn(transformer.param_shapes(config), 0.3)
        save_target(tmp_path / name, *made[name], tokenizer)
    targets = [f"{name}={tmp_path / name}" for name in kinds]
    arguments = ["--data", str(tmp_path / "data"), "--targets", *targets, "--prompts", "1", "--repeats", "1"]
    answers.main([*arguments, "--source_length", "64", "--new_tokens", "31", "--out", str(tmp_path / "results")])
    printed = capsys.readouterr().out
    runs = json.loads((tmp_path / "results" / "results.json").read_text())["runs"]
    assert [run["label"] for run in runs] == list(kinds) and all(name in printed for name in kinds)
    assert all(run["first_token_ms"] > 0 and run["tokens_per_second"] > 0 for run in runs)
    # A decoder's score of the answers is that of each text alone.
    rows = PairRows(open_split(tmp_path / "data", "valid"), 64, 32)
    config, params = made["decoder"]
    total = count = 0.0
    for row in (rows[index] for index in range(len(rows))):
        prompt = row["source"][: row["source_length"]]
        text = np.concatenate([prompt, row["tokens"][row["mask"] > 0]])
        padded = jnp.asarray(np.pad(text, (0, 96 - len(text)))[None])
        scores = np.asarray(alone(config, params, padded), np.float64)[0]
        scores = scores - np.log(np.sum(np.exp(scores), axis=-1, keepdims=True))
        places = np.arange(len(prompt) - 1, len(text) - 1)
        total, count = total - scores[places, text[places + 1]].sum(), count + len(places)
    assert runs[0]["loss"] == pytest.approx(total / count, rel=1e-4)
