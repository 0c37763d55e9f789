"""What the trainer asks of a method: parameters, a loss, what to measure, what to leave behind.

An objective is built once per run as `Objective(config, facts)` and holds no arrays. What it reads, text or images, its
config says; `facts` is what the data decides about the model: the tokenizer of text, the names of the classes of images
(`train/data/corpus.py`). Parameters come from two places: *base* parameters are read from disk (a target to finetune,
or to train heads on; the tokenizer of images), *trainable* ones are made by `init` from a key and the base. The part
of the base that stays frozen travels beside the trainables as an argument: it is never differentiated, never donated
and never seen by the optimizer. What an evaluation, a probe and the export get as trainable is their average over the
steps where the optimizer keeps one (`optimizer.ema`).
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from models.errors import UserError
from train.config import OptimizerConfig

Params = Any  # nested dicts (and lists) of arrays
Batch = dict[str, Array]
HostBatch = dict[str, np.ndarray]
# name -> (sum, weight); an evaluation may also sum arrays, such as counts of what was used.
Sums = dict[str, tuple[Float[Array, "..."], Float[Array, ""]]]
# Nested as parameters are, as far down as something was replaced: for a leaf a bool array that broadcasts to it, for
# anything that was left alone None.
Replaced = Any

# What a config must tell besides, by what its objective reads.
_ALSO_READ = {"text": "base", "images": "image_size"}


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a step computes what its objective says.

    Attributes:
      precision: `float32`, or `bfloat16` over float32 parameters; `auto` is float32 on a CPU and bfloat16 elsewhere.
      devices: that share the work.
      remat: what is computed again for gradients instead of being kept: `none`, `products` keeps the results of
        products with parameters, `layers` keeps what enters a layer, or a step of a draft.
    """

    precision: str = "auto"
    devices: int = 1
    remat: str = "none"

    @property
    def dtype(self) -> Any:
        """Of products, and of frozen parameters."""
        on_cpu = jax.default_backend() == "cpu"
        narrow = self.precision == "bfloat16" or (self.precision == "auto" and not on_cpu)
        return jnp.bfloat16 if narrow else jnp.float32

    @property
    def attention(self) -> str:
        """Of whole texts (`models.layout.Layout`)."""
        return "fused" if jax.default_backend() in ("gpu", "tpu") and self.dtype == jnp.bfloat16 else "blocks"

    def cast(self, params: Params) -> Params:
        """Parameters as products read them: float32 becomes `dtype`, and the rest stays."""
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype) if leaf.dtype == jnp.float32 else leaf, params)


class Objective(abc.ABC):
    """One way of learning parameters. A subclass must define what is abstract here; the rest does nothing by default.

    Attributes:
      Config: the dataclass of the config's section `objective`. Its field `name` is the name in `OBJECTIVES`; its class
        variable `reads` is `text`, and then its property `base` is the directory of the target that the job starts
        from, or None, and `source_length`, if it has one, tells tokens of prompts that lie apart from their answers;
        or `images`, and then its property `image_size` is their side.
      product: what training makes, `target` or `drafter` for instance; the directory of that name in the workdir
        receives it.
      model: shape of the model that is trained, or that heads are trained on.
      base: shapes and dtypes of the parameters that `load_base` returns, or None when nothing is loaded.
      compute: how to compute.
      target_taps: what the loss reads of a frozen target on a batch: names of features, `logits` for its distribution;
        where there are some, what `read_target` returns may be kept on disk.
      divergences: of `train/objectives/divergences.py`, by which the loss compares the target's distribution.
      optimizers: top-level keys of the trainables that are updated each for itself, by an optimizer of its own or, for
        None, by one like the job's; empty where one updates all.
      refresh_every: steps that learn from what one call of `refresh` made; 0 never calls it.
      recomputes: whether it follows `compute.remat`. Heads of a few layers on a frozen target, which keeps nothing for
        gradients, do not.
      asks_of_config: names that a `Config` must have besides `name`, `reads` and what goes with that.
    """

    Config: ClassVar[type]
    product: ClassVar[str]
    model: Any
    base: Params | None = None
    compute: Compute = Compute()
    target_taps: tuple[str, ...] = ()
    divergences: tuple[Any, ...] = ()
    optimizers: Mapping[str, OptimizerConfig | None] = MappingProxyType({})
    refresh_every: int = 0
    recomputes: bool = False
    asks_of_config: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def __init__(self, config: Any, facts: Any):
        """`config` is a `Config`; `facts` is the data's, and the base's where there is one."""

    @classmethod
    def require_complete(cls) -> None:
        """Raises UserError when a member is missing without which nothing can be trained."""
        missing = [name for name in ("Config", "product") if not hasattr(cls, name)]
        missing += sorted(getattr(cls, "__abstractmethods__", ()))
        if hasattr(cls, "Config"):
            if not dataclasses.is_dataclass(cls.Config):
                raise UserError(f"the objective {cls.__name__} is incomplete: its Config is no dataclass")
            known = {*dir(cls.Config), *(field.name for field in dataclasses.fields(cls.Config))}
            wanted = ("name", "reads", *cls.asks_of_config)
            if reads := getattr(cls.Config, "reads", None):
                if reads not in _ALSO_READ:
                    raise UserError(
                        f"the objective {cls.__name__} is incomplete: its Config.reads is {reads!r}, expected one of "
                        f"{', '.join(_ALSO_READ)}"
                    )
                wanted += (_ALSO_READ[reads],)
            missing += [f"Config.{name}" for name in wanted if name not in known]
        if missing:
            raise UserError(f"the objective {cls.__name__} is incomplete: it does not define {', '.join(missing)}")

    def check(self, length: int | None) -> None:
        """Looks whether the job can be carried through, once the objective is made and before anything is read.

        Args:
          length: tokens per row; None for images.

        Raises:
          UserError: something is missing, or could not work.
        """
        if not hasattr(self, "model"):
            raise UserError(f"the objective {type(self).__name__} is incomplete: its __init__ does not set model")

    def prepare(self, compute: Compute) -> None:
        """Says how to compute, once, before anything else is asked.

        Raises:
          UserError: to compute again what this objective always keeps.
        """
        if compute.remat != "none" and not self.recomputes:
            raise UserError(
                f"remat must be none, got {compute.remat}: the objective {type(self).__name__} computes nothing again"
            )
        self.compute = compute

    @property
    def inputs(self) -> Mapping[str, str | None]:
        """What it reads from disk besides the data: key of the config -> its path, or None where that is not used."""
        return {}

    def read_target(self, frozen: Params, batch: Batch) -> Any:
        """What the loss reads of a frozen target on a batch (`train/objectives/target_features.py`)."""
        raise UserError(f"the objective {type(self).__name__} is incomplete: it has target_taps, but no read_target")

    def scan_data(self, split: Any, /) -> None:  # noqa: B027 - nothing is what most do
        """Looks through the training split, once, before anything is loaded."""

    def load_base(self, mesh: Mesh) -> Params:
        """Reads the base from disk into its shardings on `mesh`."""
        raise UserError(f"the objective {type(self).__name__} is incomplete: it has a base, but no load_base")

    def base_mesh(self, mesh: Mesh) -> Mesh:
        """The mesh that the base lies on, of the same devices as the job's `mesh`."""
        return mesh

    def frozen_part(self, base: Params | None) -> Params | None:
        """What of the base goes on as frozen parameters, given its arrays or their shapes; the rest feeds `init`."""
        return base

    @abc.abstractmethod
    def init(self, key: Array, base: Params | None) -> Params:
        """Trainable parameters, as a pure function (it is jitted and evaluated for shapes alone)."""

    def refresh(self, trainable: Params, frozen: Params | None, batch: HostBatch, key: Array) -> HostBatch:
        """What the steps that follow learn from besides what their batches hold, or in its place: text of their own.

        On the host, between batch and step, so it may decode, and keep arrays for that; nothing that it keeps outlives
        the run: one that goes on from a checkpoint calls it anew, with the same arguments.

        Args:
          trainable: as the step finds it.
          frozen: what is not.
          batch: this process's rows, as the corpus makes them.
          key: of the step, for draws.

        Returns:
          Arrays by name, of as many rows.
        """
        return {}

    def refreshed(self, length: int | None) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape per row and dtype of what `refresh` adds to a batch whose rows have so many tokens, by name."""
        return {}

    @abc.abstractmethod
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

    def replace(
        self,
        trainable: Params,
        frozen: Params | None,
        batch: Batch,
        step: Int[Array, ""],
        progress: Float[Array, ""],
        key: Array,
    ) -> tuple[Params, Replaced]:
        """The trainables after an update, number `step` from 1, some replaced by other means than gradients.

        `progress` is the share of the run's steps that are done, to 1. Traced into the step. Where the second result is
        true, the average of the parameters begins anew.
        """
        return trainable, None

    @abc.abstractmethod
    def evaluate(self, trainable: Params, frozen: Params | None, batch: Batch) -> Sums:
        """Named (sum, weight) pairs of one batch, without noise; the trainer adds them up over the valid split."""

    def report(self, means: dict[str, Any]) -> dict[str, float]:
        """The numbers shown for the valid split, from the means of what `evaluate` returned."""
        return {name: float(value) for name, value in means.items()}

    def probe(self, trainable: Params, frozen: Params | None, batches: Iterator[Batch]) -> dict[str, float]:
        """Anything that an evaluation measures by running a decoder on held-out batches."""
        return {}

    @abc.abstractmethod
    def export(self, directory: Path, trainable: Params, frozen: Params | None) -> None:
        """Writes the finished product to `directory`, whole or not at all, replacing what is there."""
