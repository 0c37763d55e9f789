"""Continuations are the target's own greedy text, marked as such, from the splits they should come from."""

import json

import numpy as np
import pytest

from decoding.generate import generate
from models.formats.target import load_target
from scripts import continue_dataset
from tests.eval.tiny import write_target
from train.data import continuations
from train.data.text_building import build
from train.data.text_sources import RawDocument
from train.data.texts import open_split


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continue")
    target = load_target(write_target(folder / "target"))
    text = "def f(x):\n    return x + 1\nonce upon a time there was a small house by the sea\n"
    splits = {
        "train": [RawDocument(f"train{i}", text * (i + 1)) for i in range(3)],
        "valid": [RawDocument("held out", "the sea " + text)],
    }
    build(splits, target.tokenizer, folder / "data")
    return folder, target


def run(folder, out, *arguments):
    continue_dataset.main(
        ["--target", str(folder / "target"), "--data", str(folder / "data"), "--out", str(out), *arguments]
    )


def test_every_document_is_a_window_and_what_the_target_says_next(sources, tmp_path):
    folder, target = sources
    sizes = ["--documents", "5", "--valid_documents", "2", "--prompt_tokens", "8", "--new_tokens", "6", "--rows", "2"]
    run(folder, tmp_path / "out", *sizes)
    originals = {
        d["name"]: d["tokens"].tolist() for split in ("train", "valid") for d in open_split(folder / "data", split)
    }
    for split, count in (("train", 5), ("valid", 2)):
        documents = open_split(tmp_path / "out", split, tokenizer_fingerprint=target.tokenizer.fingerprint)
        assert len(documents) == count
        for document in (documents[i] for i in range(count)):
            name, _, start = document["name"].rpartition("@")
            assert name.startswith("train") == (split == "train")
            prompt = document["tokens"][:8].tolist()
            assert prompt == originals[name][int(start) : int(start) + 8]
            continuation = generate(target, [prompt], max_new_tokens=6).tokens[0]
            assert document["tokens"][8:].tolist() == continuation
            assert document["mask"].tolist() == [0] * 8 + [1] * len(continuation)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == "continuations" and manifest["splits"]["train"]["documents"] == 5


def test_windows_differ_and_are_the_same_again(sources, tmp_path):
    folder, _ = sources
    names = []
    for out, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(
            folder,
            tmp_path / out,
            "--documents",
            "4",
            "--valid_documents",
            "0",
            "--new_tokens",
            "2",
            "--prompt_tokens",
            "8",
            "--seed",
            seed,
        )
        names.append([open_split(tmp_path / out, "train")[i]["name"] for i in range(4)])
    assert names[0] == names[1] != names[2]
    assert len(set(names[0])) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt_tokens", "5000"], "no document has more than 5000 tokens"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--new_tokens", "1000"], "more than the target's context of 512"),
    ],
)
def test_bad_requests_are_one_sentence_and_leave_nothing(sources, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(sources[0], tmp_path / "out", *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_text_ends_where_the_target_ends_it(sources, tmp_path, monkeypatch):
    folder, target = sources
    decoded = continuations.generate

    def stops_early(*given, **options):
        return decoded(*given, **options, stop=[[token] for token in range(target.config.vocab_size)])

    monkeypatch.setattr(continuations, "generate", stops_early)
    run(
        folder,
        tmp_path / "out",
        "--documents",
        "2",
        "--valid_documents",
        "0",
        "--prompt_tokens",
        "8",
        "--new_tokens",
        "6",
    )
    document = open_split(tmp_path / "out", "train")[0]
    assert len(document["tokens"]) == 9 and np.sum(document["mask"]) == 1
