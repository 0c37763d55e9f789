"""Files of a released drafter: found, read whatever their format, and used up to the last tensor.

A release is a directory or one file, in safetensors or torch's own formats (read by `models.formats.torch_files`), in
one piece or in shards with an index. `take` hands out a tensor once, after its shape and kind were checked; `finish`
complains about any that nobody took. So a converter cannot miss a tensor that changes what a drafter computes.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.errors import UserError
from models.formats.storage import refuse_non_finite
from models.formats.text_files import read_json
from models.formats.weights import Stored, find_weights, open_weights

# Entries of `config.json` that shape a layer, and those that say how far back it looks.
LAYER_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)
WINDOW_KEYS = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")
# Entries that change what is computed, and the values with which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1),
    "output_multiplier": (None, 1),
    "input_embedding_scale": (None, 1),
    "conv_kernel_size": (None, 2),
    "conv_group_size": (None, 16),
}
_TELLING = ("rope", "window", "attention_scal", "logit_scal", "softcap")  # In names of entries that nobody may skip.


class Release:
    """The tensors of a released drafter, each to be taken once.

    Attributes:
      source: the file or directory it came from, for messages.
      config: its `config.json`; empty if there is none.
      digests: file name -> SHA-256 of every file that was read.
    """

    def __init__(self, source: Path, tensors: Mapping[str, Stored], config: dict, digests: dict[str, str]):
        self.source, self.config, self.digests = source, config, digests
        self._tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        """Names of the tensors not taken yet, sorted."""
        return sorted(self._tensors)

    def take(self, name: str, shape: Sequence[int], because: str) -> np.ndarray:
        """A floating-point tensor in torch's own layout, and no longer among `names`.

        Raises:
          UserError: it is missing, not floating point, not finite, or of another shape; `because` tells what implies
            the right one.
        """
        array = self.take_any(name)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{self.source}: tensor {name} holds {array.dtype.name} values, expected floating point")
        if array.shape != tuple(shape):
            raise UserError(
                f"{self.source}: tensor {name} has shape {list(array.shape)}, {because} implies {list(shape)}"
            )
        refuse_non_finite(array, name, self.source)
        return array

    def take_any(self, name: str) -> np.ndarray:
        """A tensor of any kind and shape, and no longer among `names`."""
        if name not in self._tensors:
            raise UserError(f"{self.source}: tensor {name} is missing")
        return self._tensors.pop(name).read()

    def numbers(self, before: str, after: str) -> list[int]:
        """The numbers n, sorted, for which the name of a tensor not taken yet begins with `before` + n + `after`."""
        pattern = re.compile(f"{re.escape(before)}([0-9]{{1,3}}){re.escape(after)}")
        return sorted({int(match[1]) for name in self._tensors if (match := pattern.match(name))})

    def finish(self, ignored: str, what: str) -> None:
        """Checks that every tensor was taken or matches `ignored`.

        Raises:
          UserError: one is left; the message names it and `what` it does not belong to.
        """
        if left := [name for name in self.names if not re.fullmatch(ignored, name)]:
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise UserError(f"{self.source}: tensor {left[0]} is unknown to {what}{more}")


def read_release(source: str | Path, names: Sequence[str] = ()) -> Release:
    """Opens a release.

    Args:
      source: a file, or a directory that holds one of `names`, or `model.safetensors`, `pytorch_model.bin` or the
        index of their shards.
      names: the files that this kind of drafter is usually released in, first choice first.

    Raises:
      UserError: there is none, or one is damaged, or an index does not fit its shards.
    """
    source = Path(source)
    if not source.is_dir() and not source.is_file():
        raise UserError(f"there is no released file {source}")
    main = find_weights(source, names) if source.is_dir() else source
    # What reads a tensor holds its file, which is closed with the release.
    tensors, shards = open_weights(main, contextlib.ExitStack())
    beside = main.with_name("config.json")
    config = read_json(beside) if beside.is_file() else {}
    read = dict.fromkeys([main, *shards, *([beside] if beside.is_file() else [])])
    return Release(source, tensors, config, {path.name: digest(path) for path in read})


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_settings(said: Mapping[str, Any], where: str) -> None:
    """Checks that a part of a `config.json` has no entry which a drafter's network would compute differently.

    Raises:
      UserError: it has one; `where` is the part's name, to which the entry's is added.
    """
    for key, value in said.items():
        skipped = key not in (*LAYER_KEYS, *WINDOW_KEYS) and any(word in key for word in _TELLING)
        if value not in _NEUTRAL.get(key, (value,)) or (skipped and value is not None):
            raise UserError(f"{where}{key} = {json.dumps(value)} is not supported")
