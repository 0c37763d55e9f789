"""Weights in huge pages, which Linux makes of memory that already holds them, so that no environment variable need ask.

In pages of 4 KB kernels in blocks (`models/linear.py`) are read slower than kernels as they are; in pages of 2 MB they
are read at the speed of memory (docs/decisions.md, "Cache and layout"). Where such pages cannot be had everything here
does nothing, and says nothing: no result hangs on them.
"""

import ctypes
import functools
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import jax

LARGEST = 2**25  # A larger "huge page", as kernels with pages of 64 KB have, would be more empty than full.
_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1, which Python does not name.
_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
T = TypeVar("T")


@functools.cache
def page_size() -> int | None:
    """Bytes of a huge page; None where memory in use cannot be put into huge pages, which is tried once."""
    try:
        size = int(_SIZE.read_text(encoding="ascii"))
        if size > LARGEST:
            return None
        with mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            for start in range(0, 2 * size, mmap.PAGESIZE):
                memory[start] = 1
            memory.madvise(_COLLAPSE)
    except (OSError, ValueError):
        return None
    return size


def are_huge() -> bool:
    """Whether weights lie in huge pages once they went through `in_huge_pages`."""
    return jax.default_backend() == "cpu" and page_size() is not None


def in_huge_pages(tree: T) -> T:
    """The same arrays, those that are large and lie in this machine's own memory moved to huge pages by the kernel.

    Their addresses stay, so that nothing that holds them notices. Arrays split over several devices stay as they are.
    """
    size = page_size()
    if size is None:
        return tree
    large = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and leaf.nbytes >= size]
    own = [leaf for leaf in large if [device.platform for device in leaf.devices()] == ["cpu"]]
    jax.block_until_ready(own)
    libc = ctypes.CDLL(None)
    for start, end in spans(((leaf.unsafe_buffer_pointer(), leaf.nbytes) for leaf in own), size):
        # What is refused (a hole between two arrays, memory that is in too many pieces) stays in small pages.
        for advice in (mmap.MADV_HUGEPAGE, _COLLAPSE):
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
    return tree


def spans(buffers: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The whole huge pages that buffers touch, as ascending `(start, end)`, those that meet joined.

    Also pages that a buffer shares with a neighbour: what else is in them moves along unharmed, and only whole pages
    can be huge.

    Args:
      buffers: address and bytes of each.
      size: bytes of a huge page.
    """
    joined: list[tuple[int, int]] = []
    for address, length in sorted(buffers):
        start, end = address // size * size, -(-(address + length) // size) * size
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined
