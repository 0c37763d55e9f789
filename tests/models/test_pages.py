"""Large arrays move to huge pages where the kernel can, and to no other address."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models import pages


def test_spans_are_the_whole_pages_that_buffers_touch() -> None:
    assert pages.spans([], 100) == []
    assert pages.spans([(110, 20)], 100) == [(100, 200)]
    assert pages.spans([(100, 100)], 100) == [(100, 200)]
    assert pages.spans([(510, 290), (110, 95), (199, 2), (250, 60)], 100) == [(100, 400), (500, 800)]


def test_large_arrays_lie_in_huge_pages() -> None:
    size = pages.page_size()
    if size is None:
        pytest.skip("this kernel moves no memory to huge pages")
    rows = np.arange(4 * size // 4, dtype=np.float32)
    array = jnp.array(rows)
    address = array.unsafe_buffer_pointer()
    assert pages.in_huge_pages({"kernel": array, "count": 3})["kernel"] is array
    assert array.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(array, rows)
    assert _huge_bytes(address, address + array.nbytes) >= 3 * size


def test_nothing_happens_where_pages_cannot_be_huge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pages, "_SIZE", tmp_path / "absent")
    pages.page_size.cache_clear()
    try:
        assert pages.page_size() is None and not pages.are_huge()
        tree = [jnp.zeros(4)]
        assert pages.in_huge_pages(tree) is tree
    finally:
        pages.page_size.cache_clear()


def _huge_bytes(start: int, end: int) -> int:
    """Bytes in huge pages of the mappings that hold addresses from `start` to `end`."""
    huge, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) < end and int(span[2], 16) > start
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1]) * 1024
    return huge
