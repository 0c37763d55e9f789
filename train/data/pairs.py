"""Prompts and answers apart, as an encoder-decoder reads them: every run of labels in a document, and all before it.

A chat's pairs are its assistant's turns, each with what the chat says up to there, chat template included
(`train/data/text_building.py` marks them). A pair fills a row of its own, and one that does not fit is left out.
"""

import sys

import numpy as np

from models import processes
from models.errors import UserError
from train.data.texts import Documents


class PairRows:
    """Random access to the pairs of documents.

    Attributes:
      left_out: pairs that are longer than a row.
    """

    def __init__(self, documents: Documents, source_length: int, length: int):
        """Of prompts of at most `source_length` tokens and answers that fit rows of `length`, begin token included.

        Raises:
          UserError: no document has labels behind a prompt that fit.
        """
        self._documents, self._lengths = documents, (source_length, length)
        pairs = [
            (index, int(start), int(end))
            for index in range(len(documents))
            for start, end in zip(*_runs(documents[index]["mask"]), strict=True)
            if start
        ]
        self._pairs = [pair for pair in pairs if pair[1] <= source_length and pair[2] - pair[1] < length]
        self.left_out = len(pairs) - len(self._pairs)
        if not pairs:
            raise UserError(
                "no document has a prompt before its labels: expected a chat data set (scripts.build_dataset --kind "
                "chat), whose answers are labels"
            )
        if not self._pairs:
            raise UserError(
                f"none of {len(pairs)} answers fits: prompts have at most {source_length} tokens (source_length), "
                f"answers at most {length - 1}"
            )
        if self.left_out and processes.is_first():
            held = f"{self.left_out} of {len(pairs)} answers are left out"
            print(f"{held}: they, or their prompts, are longer than a row", file=sys.stderr, flush=True)

    @property
    def padding(self) -> dict[str, np.ndarray]:
        """A row without labels, which fills up a last batch."""
        source_length, length = self._lengths
        return {
            "tokens": np.zeros(length, np.int32),
            "segments": np.zeros(length, np.int32),
            "mask": np.zeros(length, np.uint8),
            "source": np.zeros(source_length, np.int32),
            "source_length": np.ones((), np.int32),
        }

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`.

        Returns:
          `source` int32 [S], the prompt, and `source_length` int32 [], its tokens; `tokens` int32 [T], the answer
          behind a place for what the model begins with; `segments` int32 [T], 1 where that is text; `mask` uint8 [T],
          1 where it is the answer.
        """
        number, start, end = self._pairs[index]
        row, document = self.padding, self._documents[number]
        size = end - start
        row["source"][:start] = document["tokens"][:start]
        row["source_length"][...] = start
        row["tokens"][1 : 1 + size] = document["tokens"][start:end]
        row["segments"][: 1 + size] = 1
        row["mask"][1 : 1 + size] = 1
        return row


def _runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of labels begin, and where they have ended."""
    edges = np.diff(mask.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
