"""The code on the documentation's pages runs as it stands there."""

import re
from pathlib import Path

import models
from decoding import drafters
from decoding.drafters.registry import trained_drafters
from models.formats.target import load_target
from tests.eval.tiny import write_target

DOCS = Path(__file__).parent.parent / "docs"


def test_the_example_of_adding_a_drafter_runs(capsys):
    page = (DOCS / "adding_a_drafter.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    namespace: dict = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "docs/adding_a_drafter.md", "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5
    assert all("23 tokens in" in line for line in printed[:2])
    assert printed[2].startswith("setting") and all(" match " in line for line in printed[3:])


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """As it stands there, but for the model, which has to be fetched, and the drafter that was trained for it."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    write_target(tmp_path / "target")
    asked = []

    def load_tiny(directory):
        asked.append(directory)
        return load_target(tmp_path / "target")

    def load_none(name, target):
        asked.append(name)
        return load_drafter("none", target)

    load_drafter = drafters.load_drafter
    monkeypatch.setattr(models, "load_target", load_tiny, raising=False)
    monkeypatch.setattr(drafters, "load_drafter", load_none, raising=False)
    exec(compile(code, "README.md", "exec"), {"__name__": "page"})
    assert asked == ["runs/smollm2", "smollm2"] and asked[1] in trained_drafters()
    printed = capsys.readouterr().out
    assert printed.startswith("Once upon") and re.search(r"\d+ tokens in \d+ target forwards", printed)
