"""Features of a job's frozen target on its training split, kept on disk (`data.features`): how large, whose, made how.

Evaluations run the target all the same: what they tell does not hang on what was kept.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from models.errors import UserError
from models.sharding import mesh_of, on_mesh
from train.config import TrainConfig
from train.data.corpus import Corpus, TextCorpus
from train.data.features import FeatureRows, Manifest, read_manifest, write_features
from train.data.order import in_order
from train.fingerprint import fingerprint
from train.objectives.objective import Batch, Objective, Params
from train.objectives.target_features import arrays_to_keep, rounded

if TYPE_CHECKING:  # Training steps are timed where TFDS is not installed.
    from train.data.texts import PackedRows

_SECONDS = 20  # Between lines of progress.


@dataclasses.dataclass(frozen=True)
class KeptFeatures:
    """What a job reads of its target from disk.

    Attributes:
      directory: where.
      manifest: what the job needs; a directory may hold more.
    """

    directory: Path
    manifest: Manifest

    @property
    def exists(self) -> bool:
        """Whether it is there already. Raises UserError where something else is, or features of something else."""
        if not self.directory.exists() or (self.directory.is_dir() and not any(self.directory.iterdir())):
            return False
        read_manifest(self.directory).check_holds(self.manifest, self.directory)
        return True

    def __str__(self) -> str:
        do = "read from" if self.exists else "to be written to"
        rows, size = self.manifest.rows, self.manifest.size / 1e9
        length = next(iter(self.manifest.arrays.values())).shape[0]
        return f"features of the target: {rows:,} rows of {length} tokens, {size:.3g} GB, {do} {self.directory}"


def kept_features(config: TrainConfig, objective: Objective, corpus: Corpus) -> KeptFeatures | None:
    """What a job asks to keep; None where it asks for nothing.

    Raises:
      UserError: the objective reads no frozen target, `features_top_k` is more than there are tokens or too few for a
        divergence, or `directory` holds something else.
    """
    if config.data.features is None:
        return None
    if not objective.target_taps or not isinstance(corpus, TextCorpus):
        raise UserError(f"data.features must be None: the objective {config.objective.name} reads no frozen target")
    if (top_k := config.data.features_top_k) > objective.model.vocab_size:
        raise UserError(f"data.features_top_k ({top_k}) exceeds the vocabulary ({objective.model.vocab_size})")
    if top_k and (names := sorted({one.name for one in objective.divergences if one.floored})):
        raise UserError(
            f"data.features_top_k must be 0 with {' and '.join(names)}: what the student gives to tokens that are not "
            f"kept would cost what the floor under their probability says, got {top_k}"
        )
    arrays = arrays_to_keep(objective.model, objective.target_taps, corpus.length, top_k)
    origin = {
        "target": fingerprint([Path(config.objective.base)]),
        "data set": fingerprint(corpus.train.files),
        "split": config.data.split,
        "choice of fields": config.data.fields,
        "tokenizer": corpus.facts.fingerprint,
        "length of rows": corpus.length,
    }
    kept = KeptFeatures(Path(config.data.features), Manifest(arrays, origin, len(corpus.rows)))
    if not kept.exists and jax.process_count() > 1:
        raise UserError(f"there are no features in {kept.directory} yet, and one process alone can write them")
    return kept


def with_features(
    config: TrainConfig,
    objective: Objective,
    corpus: Corpus,
    kept: KeptFeatures,
    frozen: Params,
    place: Callable[[Mapping[str, np.ndarray]], Batch],
    say: Callable[[str], None],
) -> Corpus:
    """The corpus whose training batches carry the target's features, which are written first where they are not there.

    Args:
      config: the job's.
      objective: its objective.
      corpus: its corpus.
      kept: what `kept_features` says of these.
      frozen: the job's frozen parameters.
      place: from a batch on the host to the global one.
      say: told how it goes on.
    """
    assert isinstance(corpus, TextCorpus)
    say(str(kept))
    rows, size, manifest = corpus.rows, config.batch_size, kept.manifest

    def make(first: int) -> Iterator[dict[str, np.ndarray]]:
        devices = objective.compute.devices
        run = jax.jit(lambda frozen, batch: rounded(objective.read_target(frozen, batch), manifest.arrays, devices))
        began = told = time.monotonic()
        for number, batch in enumerate(in_order(_RowsFrom(rows, first), size), start=1):
            with on_mesh(mesh_of(frozen)):
                found = run(frozen, place(batch))
            yield jax.device_get(found)
            if (now := time.monotonic()) - told > _SECONDS:
                rate, told = number * size * corpus.length / (now - began), now
                done = min(first + number * size, len(rows))
                say(f"features of {done:,} of {len(rows):,} rows, {rate:,.0f} tokens/s")

    if not kept.exists:
        write_features(kept.directory, manifest, size, make, say)
    return dataclasses.replace(corpus, features=FeatureRows(rows, kept.directory, tuple(manifest.arrays)))


@dataclasses.dataclass(frozen=True)
class _RowsFrom:
    """Packed rows from one on."""

    rows: "PackedRows"
    first: int

    @property
    def padding(self) -> dict[str, np.ndarray]:
        return self.rows.padding

    def __len__(self) -> int:
        return len(self.rows) - self.first

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.rows[self.first + index]
