"""What the trainer asks of a method: parameters, a loss, what to measure, what to leave behind.

An objective is built once per run as `Objective(config, facts)` and holds no arrays. What it reads, text or images, its
config says; `facts` is what the data decides about the model: the tokenizer of text, the names of the classes of images
(`train/data/corpus.py`). Parameters come from two places: *base* parameters are read from disk (a target to finetune,
or to train heads on; the tokenizer of images), *trainable* ones are made by `init` from a key and the base. The part
of the base that stays frozen travels beside the trainables as an argument: it is never differentiated, never donated
and never seen by the optimizer. What an evaluation, a probe and the export get as trainable is their average over the
steps where the optimizer keeps one (`optimizer.ema`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

Params = Any  # nested dicts (and lists) of arrays
Batch = dict[str, Array]
# name -> (sum, weight); an evaluation may also sum arrays, such as counts of what was used.
Sums = dict[str, tuple[Float[Array, "..."], Float[Array, ""]]]


class Objective(Protocol):
    """One way of learning parameters.

    Attributes:
      Config: the dataclass of the config's section `objective`. Its field `name` is the name in `OBJECTIVES`; its class
        variable `reads` is `text`, and then its property `base` is the directory of the target that the job starts
        from, or None; or `images`, and then its property `image_size` is their side.
      product: what training makes, `target` or `drafter` for instance; the directory of that name in the workdir
        receives it.
      model: shape of the model that is trained, or that heads are trained on.
      base: shapes and dtypes of the parameters that `load_base` returns, or None when nothing is loaded.
    """

    Config: ClassVar[type]
    product: ClassVar[str]
    model: Any
    base: Params | None

    def __init__(self, config: Any, facts: Any):
        """`config` is a `Config`; `facts` is the data's, and the base's where there is one."""

    def survey(self, split: Any, /) -> None:
        """Looks through the training split, once, before anything is loaded; usually there is no need."""

    def load_base(self, mesh: Mesh) -> Params:
        """Reads the base from disk into its shardings on `mesh`."""

    def frozen_part(self, base: Params | None) -> Params | None:
        """What of the base goes on as frozen parameters, given its arrays or their shapes; the rest feeds `init`."""

    def init(self, key: Array, base: Params | None) -> Params:
        """Trainable parameters, as a pure function (it is jitted and evaluated for shapes alone)."""

    def loss(
        self, trainable: Params, frozen: Params | None, batch: Batch, key: Array, progress: Float[Array, ""]
    ) -> tuple[tuple[Float[Array, "*terms"], Float[Array, "*terms"]], Sums]:
        """The loss of one global batch, and metrics.

        Args:
          trainable: what is learnt.
          frozen: what is not.
          batch: as the corpus makes it.
          key: for noise.
          progress: the share of the run's steps that are done, from 0.

        Returns:
          (sums, weights), scalars or one entry per term: the trainer minimises the sum over terms of sum / weight;
          and named (sum, weight) pairs to log.
        """

    def renew(
        self,
        trainable: Params,
        frozen: Params | None,
        batch: Batch,
        step: Int[Array, ""],
        progress: Float[Array, ""],
        key: Array,
    ) -> Params:
        """The trainables after an update, number `step` from 1, by other means than gradients; usually as they are.

        `progress` is the share of the run's steps that are done, to 1. Traced into the step: what returns `trainable`
        itself costs nothing. What comes back changed takes its place in the average of the parameters too.
        """

    def evaluate(self, trainable: Params, frozen: Params | None, batch: Batch) -> Sums:
        """Named (sum, weight) pairs of one batch, without noise; the trainer adds them up over the valid split."""

    def report(self, means: dict[str, Any]) -> dict[str, float]:
        """The numbers shown for the valid split, from the means of what `evaluate` returned."""

    def probe(self, trainable: Params, frozen: Params | None, batches: Iterator[Batch]) -> dict[str, float]:
        """Anything that an evaluation measures by running a decoder on held-out batches; usually nothing."""

    def export(self, directory: Path, trainable: Params, frozen: Params | None) -> None:
        """Writes the finished product to `directory`, whole or not at all, replacing what is there."""
