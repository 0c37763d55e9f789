"""Which tests go to one worker together, and which groups start first.

`scripts/test.sh` runs with `--dist loadgroup`: a worker takes a whole group, and the next one when it is nearly done. A
file is a group, because its tests share what they compile; where they share little, a file names one of its parameters,
`GROUP_BY = "name"`, and each value of that is a group. Groups known to be long come first, so that no worker is left
alone with one at the end. Without workers, too, the tests of a group come together: what they keep may go after them.
"""

import pathlib

import pytest
from _pytest.nodeid import NodeId

TESTS = pathlib.Path(__file__).resolve().parent

# Longest first, as the table that a run prints last told it; all others are shorter.
LONG = (
    "decoding/test_battery.py",
    "train/test_trainer.py",
    "decoding/test_losslessness.py",
    "decoding/test_mesh.py",
    "parity/test_transformers.py",
    "decoding/test_rows.py",
    "decoding/policies/test_policies.py",
    "train/test_vqvae.py",
    "decoding/images/test_generate.py",
    "eval/images/test_speed.py",
    "train/test_var_objective.py",
    "decoding/test_sampled_rules.py",
    "decoding/test_encoder_decoder.py",
    "train/test_two_processes.py",
    "eval/test_speed.py",
    "train/test_coprocessor.py",
)


def group_of(item: pytest.Function) -> tuple[str, str]:
    """The file of a test, below tests/, and its part of that: "" unless the file is divided and the test takes part."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    part = parameters.get(getattr(item.module, "GROUP_BY", None), "")
    return item.path.relative_to(TESTS).as_posix(), str(part)


@pytest.hookimpl(tryfirst=True)  # xdist looks for groups in this hook too.
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Puts every test that a worker has collected in its group, and long groups first."""
    if not hasattr(config, "workerinput"):
        first: dict[tuple[str, ...], int] = {}
        for item in items:
            file, part = group_of(item)
            first.setdefault((file,), len(first))
            first.setdefault((file, part), len(first))
        items.sort(key=lambda item: (first[group_of(item)[:1]], first[group_of(item)]))
        return
    for item in items:
        # xdist takes what comes after the last @ and the last bracket of an id. Its own marker does not get it there:
        # xdist 3.8 writes the id where pytest 9.2 does not read it.
        name = ":".join(filter(None, group_of(item))).replace("@", "_").replace("]", "_")
        item._id = NodeId.parse(f"{item.nodeid}@{name}")
    items.sort(key=lambda item: LONG.index(file) if (file := group_of(item)[0]) in LONG else len(LONG))
