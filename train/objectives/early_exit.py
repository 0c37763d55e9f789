"""A lens for an early exit of a frozen target, which learns to say behind the first layers what the target says.

At every position the guess is of the next token, and its teacher is the target's own distribution there (`drafting.py`,
one guess deep). The residual stream that leaves the first layers is a feature of the target's forward: a job costs that
and a map of the stream, and any number of exits may be members of `several`.
"""

import dataclasses
import functools
from typing import ClassVar, Literal

from jax.tree_util import Partial

from decoding.drafters.early_exit import EarlyExit
from models import transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.heads import early_exit
from models.schema import require, require_weights
from train.objectives.drafting import DraftObjective
from train.objectives.guess import Guess, Weights
from train.objectives.shift import ahead


@dataclasses.dataclass(frozen=True)
class EarlyExitConfig:
    """The section `objective` of a job that trains a lens.

    Attributes:
      name: `early_exit`.
      target: directory of the target, which stays as it is.
      layers: of the target, which run.
      hard: weight of the cross-entropy with the text.
      soft: weight of the cross-entropy with the target's distribution.
      labels: which tokens are learnt: `assistant`, those that the data set marks, or `all`.
      loop_prompts: prompts from the valid split that every evaluation decodes, at most a batch; 0 is none.
      loop_tokens: new tokens per such prompt; 0 decodes nothing.
    """

    reads: ClassVar[str] = "text"

    name: Literal["early_exit"]
    target: str | None
    layers: int
    hard: float = 0.0
    soft: float = 1.0
    labels: Literal["assistant", "all"] = "assistant"
    loop_prompts: int = 4
    loop_tokens: int = 64

    def __post_init__(self):
        if self.target is None:
            raise UserError("objective.target must be the directory of the target whose exit it is")
        require_weights(self, "hard", "soft")
        for name in ("loop_prompts", "loop_tokens"):
            require(getattr(self, name) >= 0, f"objective.{name} must not be negative", getattr(self, name))
        if not self.hard + self.soft:
            raise UserError("objective.hard and objective.soft are both 0: there is nothing to learn")

    @property
    def weights(self) -> Weights:
        """Of the loss's terms."""
        return Weights(self.hard, self.soft, 0.0, 1.0)

    @property
    def base(self) -> str:
        """The target."""
        return str(self.target)

    def untrained(self, model: TransformerConfig) -> EarlyExit:
        """The drafter without parameters."""
        return EarlyExit(self.layers, lens=True)


class EarlyExitObjective(DraftObjective):
    """The `early_exit` objective."""

    Config: ClassVar[type] = EarlyExitConfig

    @property
    def depth(self) -> int:
        """One guess: what follows it the same exit says."""
        return 1

    @property
    def target_taps(self):  # type: ignore[override]
        """With the stream that leaves the first layers."""
        return (*super().target_taps, self._stream)

    @property
    def _stream(self) -> str:
        layers = self._config.layers
        return "pre_norm" if layers == self.model.num_layers else f"layer:{layers}"

    def guesses(self, params, frozen, batch, target, layout, key):
        """The exit at the token after every position, which is where the first draft is made."""
        hidden_BTH = early_exit.hidden(self.model, params, frozen, target.taps[self._stream])
        # The target's head is what it is: nothing is trained through it.
        read = Partial(functools.partial(transformer.head, self.model, transformer.head_params(frozen)))
        return [Guess(ahead(hidden_BTH, 1), None, self.labels(batch, 0), read)]
