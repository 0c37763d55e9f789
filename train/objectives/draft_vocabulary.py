"""The draft vocabulary of objectives whose drafters have one (`models/heads/vocabulary.py`): the most frequent labels.

It is data, not a parameter: it travels with the frozen target and is saved with the drafter. The head over it begins as
the target's and is trained. A drafter is compared with its teacher on this vocabulary, renormalised, and learns only
where it holds what is asked: the target's first choice (EAGLE-3), and where labels are learnt these.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Int32, Int64

from models.heads.medusa import vocab_kernel
from train.objectives.drafting import OnFrozenTarget
from train.objectives.objective import Params

if TYPE_CHECKING:  # Training steps are timed where TFDS is not installed.
    from train.data.texts import Documents


class WithDraftVocabulary(OnFrozenTarget):
    """Base of objectives whose drafter's `heads` have a `vocab_size`, 0 for all tokens; the frozen target then holds
    `draft_vocab`, int32 [W], unless that is 0."""

    _vocabulary: np.ndarray | None = None

    def prepare(self, compute):
        """With the draft vocabulary."""
        super().prepare(compute)
        if size := self.drafter.heads.vocab_size:
            self.base = {**self.base, "draft_vocab": jax.ShapeDtypeStruct((size,), jnp.int32)}

    def scan_data(self, documents: "Documents") -> None:
        """Also chooses the draft vocabulary."""
        super().scan_data(documents)
        if size := self.drafter.heads.vocab_size:
            counts = count_labels(documents, self.model.vocab_size, self._config.labels)
            self._vocabulary = most_frequent(counts, size)

    def beside_target(self, mesh):
        """The draft vocabulary."""
        if not self.drafter.heads.vocab_size:
            return {}
        if self._vocabulary is None:
            raise ValueError("the draft vocabulary is not known before `scan_data` has seen the training split")
        return {"draft_vocab": jax.device_put(self._vocabulary, NamedSharding(mesh, PartitionSpec()))}

    def init(self, key, base):
        """As for any drafter, but the head begins as the target's on the draft vocabulary, which is not trained."""
        params, known_W = super().init(key, base), self.known(base)
        if known_W is None:
            return params
        trained = {name: leaf for name, leaf in params.items() if name != "draft_vocab"}
        return {**trained, "vocab": {"kernel": vocab_kernel(base)[:, known_W].astype(jnp.float32)}}

    def known(self, frozen: Params) -> Int[Array, "W"] | None:
        """The draft vocabulary; None where it is all tokens."""
        return frozen.get("draft_vocab")

    def drafter_params(self, trainable, frozen):
        """With the draft vocabulary."""
        known_W = self.known(frozen)
        return trainable if known_W is None else {**trainable, "draft_vocab": known_W}


def count_labels(documents: "Documents", vocab_size: int, labels: str) -> Int64[np.ndarray, "V"]:
    """How often every token is a label in a split; `labels` as in the configs."""
    counts = np.zeros(vocab_size, np.int64)
    for index in range(len(documents)):
        document = documents[index]
        tokens = document["tokens"] if labels == "all" else document["tokens"][document["mask"] > 0]
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def most_frequent(counts: np.ndarray, size: int) -> Int32[np.ndarray, "W"]:
    """The `size` tokens with the highest counts, ascending; of equal counts the lower ids."""
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)
