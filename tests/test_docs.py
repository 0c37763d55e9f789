"""The code on the documentation's pages runs as it stands there."""

import re
from pathlib import Path

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
