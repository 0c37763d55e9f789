"""In which order examples become batches, texts and images alike: shuffled to train on, as they lie to evaluate.

With several processes each takes every so-many-th example: a step holds the same ones, however many there are.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from models.errors import UserError

if TYPE_CHECKING:  # Training steps are timed where it is not installed.
    import grain


class Examples(Protocol):
    """Random access to examples, dicts of arrays of equal shapes."""

    @property
    def padding(self) -> Mapping[str, np.ndarray]:
        """What fills up a last batch: an example that counts nowhere."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Any:
        """One of them."""


def shuffled(
    examples: Examples,
    batch_size: int,
    seed: int,
    *,
    epochs: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    ahead: int = 16,
) -> "grain.DatasetIterator":
    """Shuffled batches to train on, each epoch in another order, read ahead by threads.

    Step `s` holds the same examples whatever the number of processes. `get_state()` is a small JSON-able dict that is
    the same on every process; after `set_state` with it an iterator made with the same arguments continues exactly.

    Args:
      examples: what the batches are made of.
      batch_size: examples over all processes.
      seed: of the shuffles.
      epochs: passes over the examples; None for no end. A last batch that is not full is dropped.
      process_index: which of `process_count` processes this one is; it gets every `process_count`-th example.
      ahead: batches that are read ahead, and lie in memory.

    Returns:
      An iterator of dicts of arrays `[batch_size / process_count, ...]`.

    Raises:
      UserError: `batch_size` is not a multiple of `process_count`, or larger than all the epochs together.
    """
    local_size = _local_batch_size(batch_size, process_count)
    if epochs is not None and epochs * len(examples) < batch_size:
        raise UserError(
            f"{epochs} epochs of {len(examples)} examples do not fill one batch of {batch_size}: take more data or a "
            "smaller batch"
        )
    import grain

    data = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(epochs)
    data = data[process_index::process_count].batch(local_size, drop_remainder=True)
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=ahead)))


def in_order(
    examples: Examples,
    batch_size: int,
    *,
    max_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order, to evaluate on; the last batch is filled up with `padding`.

    Arguments, errors and sharding are those of `shuffled`; `max_batches` ends the pass early. Every process gets the
    same number of batches.
    """
    local_size = _local_batch_size(batch_size, process_count)
    total = -(-len(examples) // batch_size)
    for step in range(total if max_batches is None else min(total, max_batches)):
        first = step * batch_size + process_index
        indices = range(first, first + local_size * process_count, process_count)
        picked = [examples[index] if index < len(examples) else examples.padding for index in indices]
        yield {key: np.stack([example[key] for example in picked]) for key in examples.padding}


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"the batch size must be a positive multiple of {process_count} (processes), got {batch_size}")
    return batch_size // process_count
