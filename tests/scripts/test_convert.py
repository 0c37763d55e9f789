"""The convert command: a directory that loads, and one sentence for every mistake."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models import load_target
from models.llama2c import read_llama2c
from models.target import Target
from scripts.convert import main
from tests.models.test_llama2c import (
    CHARACTERS,
    TEXT,
    WORDS,
    pieces_of,
    random_weights,
    write_tokenizer,
    write_v0,
    write_v2,
)

WORDS_300 = [*WORDS, *CHARACTERS, *(f"w{i}" for i in range(300 - 259 - len(WORDS) - len(CHARACTERS)))]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_v0(tmp_path / "model.bin", random_weights(), tied=True)
    write_v2(tmp_path / "q8.bin", random_weights(), tied=True)
    write_tokenizer(tmp_path / "tok.bin", pieces_of(WORDS_300))
    return tmp_path


def convert(folder: Path, src: str = "model.bin", tokenizer: str | None = "tok.bin", *more: str) -> None:
    extra = ["--tokenizer", str(folder / tokenizer)] if tokenizer else []
    main(["--from", "llama2c", "--src", str(folder / src), "--out", str(folder / "out"), *extra, *more])


def test_converts(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(source)
    assert "2 layers, width 16, vocabulary 300, with tokenizer" in capsys.readouterr().out
    target = load_target(source / "out")
    direct = Target(*read_llama2c(source / "model.bin"))
    np.testing.assert_allclose(target.apply([TEXT]).logits, direct.apply([TEXT]).logits, atol=1e-5)
    assert target.tokenizer is not None and target.tokenizer.decode(target.tokenizer.encode("the aba")) == "the aba"
    convert(source, "q8.bin", None, "--overwrite")
    rounded = load_target(source / "out")
    assert rounded.tokenizer is None
    assert 0 < np.abs(rounded.apply([TEXT]).logits - direct.apply([TEXT]).logits).max() < 1


def test_mistakes_are_one_sentence(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*arguments: str | None) -> str:
        before = sorted(p.name for p in source.iterdir())
        with pytest.raises(SystemExit) as caught:
            convert(source, *arguments)
        assert caught.value.code == 2
        assert sorted(p.name for p in source.iterdir()) == before
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    assert "no checkpoint file" in complaint("nowhere.bin")
    assert "no tokenizer file" in complaint("model.bin", "nowhere.bin")
    assert "not a llama2.c checkpoint" in complaint("tok.bin")
    (source / "short.bin").write_bytes((source / "model.bin").read_bytes()[:-4])
    assert "truncated" in complaint("short.bin")
    convert(source)
    assert "--overwrite" in complaint()


def test_runs_as_a_command(source: Path) -> None:
    command = [sys.executable, "-m", "scripts.convert", "--from", "llama2c", "--src", str(source / "nowhere.bin")]
    done = subprocess.run([*command, "--out", str(source / "out")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_unknown_format_lists_the_known(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--from", "gguf", "--src", "x", "--out", "y"])
    assert "llama2c" in capsys.readouterr().err
