"""Workers get whole files or the parts that a file names, and long ones first."""

import copy
from types import SimpleNamespace

import pytest

from tests import schedule


class Item(SimpleNamespace):
    """What the schedule reads of a collected test."""

    nodeid = "test"

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.group = mark.args[0]


def item(file: str, by: str | None = None, **params) -> Item:
    module = SimpleNamespace(GROUP_BY=by) if by else SimpleNamespace()
    return Item(path=schedule.TESTS / file, module=module, callspec=SimpleNamespace(params=params))


def test_groups_are_files_or_named_parts_and_long_ones_come_first() -> None:
    short, long = "decoding/test_trees.py", schedule.LONG[1]
    items = [item(short, name="a"), item(long, by="name", name="eagle@2[x]"), item(long, by="name"), item(short)]
    items += [item(schedule.LONG[0], by="name", name="b", depth=3)]
    schedule.pytest_collection_modifyitems(SimpleNamespace(workerinput={}), items)
    assert [one.group for one in items] == [f"{schedule.LONG[0]}:b", f"{long}:eagle_2[x_", long, short, short]


def test_the_group_is_where_the_scheduler_looks(request: pytest.FixtureRequest) -> None:
    scheduler = pytest.importorskip("xdist.scheduler").LoadGroupScheduling
    one = copy.copy(request.node)
    one.own_markers = []
    schedule.pytest_collection_modifyitems(SimpleNamespace(workerinput={}), [one])
    scope = scheduler._split_scope(None, one.nodeid)
    assert scope == "test_schedule.py" and [mark.args for mark in one.own_markers] == [(scope,)]


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
