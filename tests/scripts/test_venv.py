"""The scripts' environment: made where nothing is, completed where something is, never emptied."""

import os
import pathlib
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parents[2]


def make_venv(folder: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What the scripts do before they install anything."""
    command = ["bash", "-c", f"source '{ROOT}/scripts/_venv.sh'; make_venv; echo ready"]
    variables = {**os.environ, "TANDEM_PYTHON": sys.executable, "TANDEM_VENV": str(folder), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_an_environment_without_pip_keeps_what_is_in_it(tmp_path: pathlib.Path) -> None:
    venv.create(tmp_path / "env", symlinks=True)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "mine.py").write_text("")
    done = make_venv(tmp_path / "env")
    assert (done.stdout, done.stderr) == ("ready\n", "")
    assert (packages / "mine.py").exists() and (packages / "pip").is_dir()


def test_what_cannot_be_used_is_one_sentence_and_stays(tmp_path: pathlib.Path) -> None:
    elsewhere = "move it away, or set TANDEM_VENV to another path\n"
    (tmp_path / "diary.txt").write_text("dear diary")
    done = make_venv(tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} exists and is no virtual environment: {elsewhere}"
    (tmp_path / "pyvenv.cfg").write_text("")
    done = make_venv(tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: the Python of {tmp_path} does not run or is not 3.11 to 3.14: {elsewhere}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diary.txt", "pyvenv.cfg"]
    done = make_venv(tmp_path / "new", TANDEM_PYTHON="no-such-python")
    assert done.returncode == 2 and not (tmp_path / "new").exists()
    assert done.stderr.startswith("error: Python 3.11 to 3.14 is needed, and none of these is one: no-such-python;")
