"""Files as they are not meant to be: bytes changed, cut and put in anywhere, and JSON of any shape.

A fuzz test runs a few seconds by default and, under `-m slow`, minutes; both try the same inputs whenever they run.
"""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import UserError

_CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` with a few changes: single bytes, cuts at either end, pieces left out, doubled or put in."""
    place = st.integers(0, len(content))

    def apply(edits: list[tuple[str, int, int, bytes]]) -> bytes:
        made = bytearray(content)
        for kind, a, b, put in edits:
            a, b = (min(x, len(made)) for x in sorted((a, b)))
            if kind == "set":
                made[a : a + len(put)] = put
            elif kind == "cut":
                del made[b:]
            elif kind == "drop":
                del made[a : min(b, a + 64)]
            else:
                made[a:a] = put if kind == "put" else made[a : min(b, a + 64)]
        return bytes(made)

    # Headers decide most and are small beside the values.
    head = st.integers(0, min(256, len(content)))
    edit = st.tuples(
        st.sampled_from(["set", "cut", "drop", "put", "double"]), head | place, place, st.binary(min_size=1, max_size=8)
    )
    return st.lists(edit, min_size=1, max_size=4).map(apply)


def fuzzed(**inputs: st.SearchStrategy) -> Callable:
    """Two tests of one function: some examples, and under the mark `slow` many."""

    def decorate(function: Callable) -> Callable:
        shared = dict(deadline=10_000, derandomize=True, database=None, suppress_health_check=_CHECKS)
        few = settings(max_examples=60, **shared)(given(**inputs)(function))
        many = settings(max_examples=2000, **shared)(given(**inputs)(function))
        return pytest.mark.parametrize("_run", [few, pytest.param(many, marks=pytest.mark.slow)], ids=["few", "many"])(
            _runs(function.__doc__)
        )

    return decorate


def _runs(doc: str | None) -> Callable:
    def run(_run: Callable, tmp_path) -> None:
        _run(tmp_path=tmp_path)

    run.__doc__ = doc
    return run


def is_refused(read: Callable[[], object]) -> bool:
    """Whether `read` ends in one sentence; anything else that it raises is a defect."""
    try:
        read()
    except UserError as error:
        assert str(error) and "\n" not in str(error), repr(str(error))
        return True
    return False
