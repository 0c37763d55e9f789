"""Next-token cross-entropy: pretraining a target, or finetuning one.

The loss at p is -log p(x_{p+1} | x_{<=p}) under `shift.py`'s contract with distance 1, averaged over the labels of the
whole batch. What training leaves behind is a target directory (Hugging Face format).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Float

from models import schema, transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.hf import load_config, save_target
from models.formats.target import check_vocabulary, load_target
from models.formats.tokenizer import Tokenizer
from train.objectives.guess import Guess, Labels, Weights, losses, measures
from train.objectives.objective import Batch, Objective, Params, Sums
from train.objectives.shift import label_mask, labels_at
from train.objectives.target_features import layout_of

_HARD = Weights(hard=1.0, soft=0.0, feature=0.0, decay=1.0)

# What the tokenizer decides; a config that repeated it could only contradict it.
FROM_TOKENIZER = ("vocab_size", "bos_id", "eos_ids")


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """The section `objective` of a language-model job.

    Attributes:
      name: `lm`.
      model: fields of `models.config.TransformerConfig` but those that the tokenizer decides; or None.
      init_from: a target directory to finetune; or None. Exactly one of the two is given.
      labels: which tokens are learnt: `assistant`, those that the data set marks, or `all`.
    """

    reads: ClassVar[str] = "text"

    name: Literal["lm"]
    model: Mapping[str, Any] | None = None
    init_from: str | None = None
    labels: Literal["assistant", "all"] = "all"

    def __post_init__(self):
        if (self.model is None) == (self.init_from is None):
            raise UserError("give either objective.model (a shape) or objective.init_from (a target directory)")
        if self.model is not None:
            for name in FROM_TOKENIZER:
                if name in self.model:
                    raise UserError(f"objective.model.{name} comes from the data set's tokenizer; leave it out")
            self.shape(vocab_size=1, bos_id=None, eos_ids=())

    @property
    def base(self) -> str | None:
        """The target to finetune, or None."""
        return self.init_from

    def shape(self, vocab_size: int, bos_id: int | None, eos_ids: tuple[int, ...]) -> TransformerConfig:
        """The model section completed by the tokenizer's facts. Raises UserError for a key that does not fit."""
        facts = {"vocab_size": vocab_size, "bos_id": bos_id, "eos_ids": eos_ids}
        return schema.parse(TransformerConfig, {**(self.model or {}), **facts}, "objective.model")


class LM(Objective):
    """The `lm` objective.

    Class attributes:
      encodes: whether its models have an encoder.
    """

    Config: ClassVar[type] = LMConfig
    product: ClassVar[str] = "target"
    recomputes = True
    encodes: ClassVar[bool] = False

    def __init__(self, config: LMConfig, tokenizer: Tokenizer):
        """`tokenizer` is the data's, and the base's where there is one. Raises UserError for a broken `init_from`."""
        self._config, self._tokenizer = config, tokenizer
        if config.init_from is None:
            self.model = config.shape(tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids)
        else:
            self.model = load_config(config.init_from)
            check_vocabulary(self.model, tokenizer, config.init_from)
            self.base = transformer.param_shapes(self.model, jnp.float32)
        if (self.model.encoder_layers > 0) != self.encodes:
            which = ("a decoder", "lm") if self.encodes else ("an encoder-decoder", "encoder_decoder")
            raise UserError(f"the model is {which[0]}, which the objective {which[1]} trains, not {config.name}")

    @property
    def inputs(self) -> Mapping[str, str | None]:
        """The target to finetune."""
        return {"objective.init_from": self._config.init_from}

    def load_base(self, mesh: Mesh) -> Params:
        """The target to finetune, in float32."""
        assert self._config.init_from is not None
        return load_target(self._config.init_from, dtype=jnp.float32, mesh=mesh).params

    def frozen_part(self, base: Params | None) -> None:
        """Nothing: what is finetuned is trainable."""

    def init(self, key: Array, base: Params | None) -> Params:
        """Random parameters, or the base's; layers stacked, in float32."""
        params = transformer.init(self.model, key, jnp.float32) if base is None else base
        return transformer.stack_layers(params)

    def loss(self, trainable: Params, frozen: None, batch: Batch, key: Array, progress: Array | float):
        """Mean cross-entropy over labels, in nats."""
        (total,), (weight,) = losses([self._guess(trainable, batch)], None, _HARD, self.compute.devices)
        return (total, weight), {}

    def evaluate(self, trainable: Params, frozen: None, batch: Batch) -> Sums:
        """Cross-entropy and first-choice accuracy per label."""
        (sums,) = measures([self._guess(trainable, batch)], None, _HARD, self.compute.devices)
        return sums

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """Adds perplexity per token, exp(loss)."""
        return {"loss": means["loss"], "perplexity": math.exp(means["loss"]), "accuracy": means["accuracy"]}

    def export(self, directory: Path, trainable: Params, frozen: None) -> None:
        """Writes a target directory."""
        save_target(directory, self.model, trainable, self._tokenizer, overwrite=True)

    def _guess(self, params, batch) -> Guess:
        """The next token at every position."""
        params = self.compute.cast(params)
        labels = Labels(*labels_at({**batch, "mask": label_mask(batch, self._config.labels)}, 1))
        read = Partial(functools.partial(_read, self.model), transformer.head_params(params))
        return Guess(self.hidden(params, batch), None, labels, read)

    def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T H"]:
        """What the head reads, at every position."""
        layout = layout_of(batch, self.compute.attention)
        return transformer.forward(self.model, params, batch["tokens"], layout, remat=self.compute.remat).hidden


def _read(model, params, hidden):
    return transformer.head(model, params, hidden)
