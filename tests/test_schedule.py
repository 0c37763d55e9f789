"""Workers get whole files or the parts that a file names, and long ones first."""

from types import SimpleNamespace

import pytest

from tests import schedule


def item(file: str, by: str | None = None, **params) -> SimpleNamespace:
    """What the schedule reads of a collected test."""
    module = SimpleNamespace(GROUP_BY=by) if by else SimpleNamespace()
    callspec = SimpleNamespace(params=params)
    return SimpleNamespace(path=schedule.TESTS / file, module=module, callspec=callspec, nodeid=f"{file}::test[a@b]")


def scope_of(nodeid: str) -> str:
    """What xdist takes a test for a part of."""
    loadgroup = pytest.importorskip("xdist.scheduler.loadgroup")
    return loadgroup.LoadGroupScheduling._split_scope(None, nodeid)


def test_groups_are_files_or_named_parts_and_long_ones_come_first() -> None:
    short, long = "decoding/test_trees.py", schedule.LONG[1]
    items = [item(short, name="a"), item(long, by="name", name="eagle@2[x]"), item(long, by="name"), item(short)]
    items += [item(schedule.LONG[0], by="name", name="b", depth=3)]
    schedule.pytest_collection_modifyitems(SimpleNamespace(workerinput={}), items)
    scopes = [scope_of(str(one._id)) for one in items]
    assert scopes == [
        f"{schedule.LONG[0]}:b",
        f"{long}:eagle_2[x_",
        long,
        short,
        short,
    ]


def test_a_worker_tells_the_group_of_a_test(request: pytest.FixtureRequest) -> None:
    one = pytest.Function.from_parent(request.node.parent, name="test_other", callobj=scope_of)
    schedule.pytest_collection_modifyitems(SimpleNamespace(workerinput={}), [one])
    assert one.nodeid.endswith("::test_other@test_schedule.py") and scope_of(one.nodeid) == "test_schedule.py"
    if request.config.getoption("loadgroup", False):
        assert scope_of(request.node.nodeid) == "test_schedule.py"


def test_without_workers_the_order_is_that_of_the_files() -> None:
    long = schedule.LONG[0]
    items = [item("decoding/test_trees.py"), *(item(long, by="name", name=name) for name in "abab"), item(long)]
    schedule.pytest_collection_modifyitems(SimpleNamespace(), items)
    assert [schedule.group_of(one) for one in items] == [
        ("decoding/test_trees.py", ""),
        *((long, part) for part in ("a", "a", "b", "b", "")),
    ]


def test_long_files_exist() -> None:
    assert [file for file in schedule.LONG if not (schedule.TESTS / file).is_file()] == []
