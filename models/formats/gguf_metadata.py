"""Typed access to the metadata of a GGUF file; every complaint names the key and the file."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Keys and values of a GGUF file. All methods raise UserError for a value of another type, or none.

    Attributes:
      path: the file.
      metadata: its keys and values.
    """

    path: Path
    metadata: Mapping[str, Any]

    def text(self, key: str, default: str | None = None) -> str:
        return self._typed(key, str, "a string", default)

    def flag(self, key: str, default: bool) -> bool:
        return self._typed(key, bool, "true or false", default)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 0."""
        value = self._typed(key, int, "a whole number", default)
        if value < 0:
            self.refuse(f"{key} must be a whole number of at least 0, got {value}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._typed(key, float, "a number", default)
        # Stored in float32; the decimal that was meant is the shortest that rounds to it.
        shortest = float(str(np.float32(value)))
        if not (math.isfinite(shortest) and shortest > 0):
            self.refuse(f"{key} must be a finite number above 0, got {value}")
        return shortest

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """The id of a special token; None where the file has none."""
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.metadata:
            return None
        index = self._typed(key, int, "a token id", None)
        if not 0 <= index < vocab_size:
            self.refuse(f"{key} is {index}, but there are {vocab_size} tokens")
        return index

    def list_of(self, kind: type, key: str, default: list | None = None) -> list:
        """A list of values of one type."""
        values = self._typed(key, list, "a list", default)
        wrong = next((i for i, value in enumerate(values) if type(value) is not kind), None)
        if wrong is not None:
            self.refuse(f"{key} must be a list of {kind.__name__}, got {str(values[wrong])[:60]!r} at {wrong}")
        return values

    def refuse(self, complaint: str) -> NoReturn:
        raise UserError(f"{self.path}: {complaint}")

    def _typed(self, key: str, kind: type, noun: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            self.refuse(f"the key {key} is missing")
        if type(value) is not kind and (kind, type(value)) != (float, int):
            self.refuse(f"{key} must be {noun}, got {str(value)[:60]}")
        return value
