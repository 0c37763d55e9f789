"""What drafters learn from: the frozen target's features on a batch, wherever they come from.

An objective asks `read_target` of `drafting.py` once per batch and passes the answer on to its loss, so that several
drafters share one forward.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from models import transformer
from models.config import TransformerConfig
from models.layout import Layout
from train.objectives.objective import Batch, Params


class TargetFeatures(NamedTuple):
    """The target on a batch, its logits still to be read.

    Attributes:
      hidden: post-norm features.
      taps: the features asked for by name.
      scored: arrays `[B, T, ...]` that `read` makes logits from.
      read: from rows of `scored`, any number of leading axes, to float32 logits `[..., V]`. A loss calls it as late and
        for as many rows as it likes.
    """

    hidden: Float[Array, "B T H"]
    taps: dict[str, Float[Array, "B T H"]]
    scored: Any
    read: Callable[[Any], Float[Array, "*R V"]]

    @property
    def logits(self) -> Float[Array, "B T V"]:
        """At every position."""
        return self.read(self.scored)


def run_target(
    model: TransformerConfig, frozen: Params, batch: Batch, layout: Layout, taps: Sequence[str]
) -> TargetFeatures:
    """The target's forward on the text of a batch."""
    output = transformer.forward(model, frozen, batch["tokens"], layout, taps=taps)
    return TargetFeatures(output.hidden, output.taps, output.hidden, lambda rows: transformer.head(model, frozen, rows))
