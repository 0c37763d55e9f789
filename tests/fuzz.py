"""What fuzz tests share: how many examples, files with damage, and JSON that is nearly right.

A fuzz test runs a few hundred fixed examples by default and thousands under `-m slow`:

    @pytest.mark.parametrize("examples", FEW_OR_MANY)
    def test_reader(examples):
        fuzz(examples, damaged(GOOD), lambda content: accepts_or_refuses(read, content))
"""

import datetime
from collections.abc import Callable
from typing import Any

import pytest

from models.errors import UserError

pytest.importorskip("hypothesis", reason="fuzz tests need hypothesis (requirements-dev.txt)")
import hypothesis
from hypothesis import strategies as st

FEW_OR_MANY = [1, pytest.param(30, marks=pytest.mark.slow)]


def fuzz(examples: int, strategy: st.SearchStrategy, check: Callable[[Any], None]) -> None:
    """Runs `check` on so many draws, the same ones every time; one that takes a minute hangs."""
    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=datetime.timedelta(minutes=1),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.given(strategy)(check))()


def accepts_or_refuses(read: Callable[[], Any]) -> bool:
    """Whether `read` returns; what it may raise is one sentence for a person."""
    try:
        read()
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error).strip()
        return False
    return True


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with up to three wounds: cut short, bytes replaced, left out, repeated or put in."""
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(st.integers(0, len(content))), draw(st.integers(1, 8))
        kind = draw(st.sampled_from(["cut", "replace", "drop", "repeat", "insert"]))
        new = draw(st.binary(min_size=size, max_size=size)) if kind in ("replace", "insert") else b""
        stop = {"cut": len(content), "replace": at + size, "drop": at + size}.get(kind, at)
        content = content[:at] + (content[at : at + size] * 3 if kind == "repeat" else new) + content[stop:]
    return content


def json_values(keys: list[str], texts: list[str]) -> st.SearchStrategy:
    """JSON whose objects have some of `keys` and whose texts are often some of `texts`."""
    text = st.one_of(st.sampled_from(texts), st.text(max_size=8))
    plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text)
    key = st.one_of(st.sampled_from(keys), st.text(max_size=4))
    return st.recursive(
        plain,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(key, inner, max_size=5)),
        max_leaves=12,
    )
