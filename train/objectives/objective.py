"""What the trainer asks of a method: parameters, a loss, what to measure, what to leave behind.

An objective is built once per run as `Objective(config, tokenizer)` and holds no arrays. Parameters come from two
places: *base* parameters are read from disk (a target to finetune, or to train heads on), *trainable* ones are made by
`init` from a key and the base. If the base is frozen it travels beside the trainables as an argument: it is never
differentiated, never donated and never seen by the optimizer.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

from jax.sharding import Mesh
from jaxtyping import Array, Float

from models.config import TransformerConfig
from models.tokenizer import Tokenizer
from train.data import Documents

Params = Any  # nested dicts (and lists) of arrays
Batch = dict[str, Array]
Sums = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]  # name -> (sum, weight)


class Objective(Protocol):
    """One way of learning parameters.

    Attributes:
      Config: the dataclass of the config's section `objective`; its field `name` is the name in `OBJECTIVES`, its
        property `base` the directory of the target that the job starts from, or None.
      product: what training makes, `target` or `drafter`; the directory of that name in the workdir receives it.
      model: shape of the language model that is trained, or that heads are trained on.
      base: shapes and dtypes of the parameters that `load_base` returns, or None when nothing is loaded.
      base_is_frozen: whether the base goes on as frozen parameters; otherwise it only feeds `init`.
    """

    Config: ClassVar[type]
    product: ClassVar[str]
    model: TransformerConfig
    base: Params | None
    base_is_frozen: bool

    def __init__(self, config: Any, tokenizer: Tokenizer):
        """`config` is a `Config`; `tokenizer` is the data's, and the base's where there is one."""

    def survey(self, documents: Documents) -> None:
        """Looks through the training split, once, before anything is loaded; usually there is no need."""

    def load_base(self, mesh: Mesh) -> Params:
        """Reads the base from disk into its shardings on `mesh`."""

    def init(self, key: Array, base: Params | None) -> Params:
        """Trainable parameters, as a pure function (it is jitted and evaluated for shapes alone)."""

    def loss(
        self, trainable: Params, frozen: Params | None, batch: Batch, key: Array
    ) -> tuple[tuple[Float[Array, "*terms"], Float[Array, "*terms"]], Sums]:
        """The loss of one global batch, and metrics.

        Returns:
          (sums, weights), scalars or one entry per term: the trainer minimises the sum over terms of sum / weight;
          and named (sum, weight) pairs to log.
        """

    def evaluate(self, trainable: Params, frozen: Params | None, batch: Batch) -> Sums:
        """Named (sum, weight) pairs of one batch, without noise; the trainer adds them up over the valid split."""

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """The numbers shown for the valid split, from the means of what `evaluate` returned."""

    def probe(self, trainable: Params, frozen: Params | None, batches: Iterator[Batch]) -> dict[str, float]:
        """Anything that an evaluation measures by running a decoder on held-out batches; usually nothing."""

    def export(self, directory: Path, trainable: Params, frozen: Params | None) -> None:
        """Writes the finished product to `directory`, whole or not at all, replacing what is there."""
