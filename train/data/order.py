"""In which order examples become batches, texts and images alike: shuffled to train on, as they lie to evaluate.

With several processes each takes every so-many-th example: a step holds the same ones, however many there are.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np

from models.errors import UserError


class Examples(Protocol):
    """Random access to examples, dicts of arrays of equal shapes."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Any:
        """One of them."""


def shuffled(
    examples: Examples, batch_size: int, seed: int, epochs: int | None, process_index: int, process_count: int
) -> grain.DatasetIterator:
    """This process's parts of shuffled batches, each epoch in another order, read ahead by threads.

    Raises:
      UserError: `batch_size` is not a multiple of `process_count`.
    """
    local_size = _local_batch_size(batch_size, process_count)
    data = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(epochs)
    data = data[process_index::process_count].batch(local_size, drop_remainder=True)
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=16)))


def in_order(
    examples: Examples,
    padding: Mapping[str, np.ndarray],
    batch_size: int,
    max_batches: int | None,
    process_index: int,
    process_count: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once; the last batch is filled up with `padding`.

    Raises:
      UserError: `batch_size` is not a multiple of `process_count`.
    """
    local_size = _local_batch_size(batch_size, process_count)
    total = -(-len(examples) // batch_size)
    for step in range(total if max_batches is None else min(total, max_batches)):
        first = step * batch_size + process_index
        indices = range(first, first + local_size * process_count, process_count)
        picked = [examples[index] if index < len(examples) else padding for index in indices]
        yield {key: np.stack([example[key] for example in picked]) for key in padding}


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"the batch size must be a positive multiple of {process_count} (processes), got {batch_size}")
    return batch_size // process_count
