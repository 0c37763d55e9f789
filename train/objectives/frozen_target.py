"""What objectives share that train something beside a target, which stays as it is."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from models import transformer
from models.errors import UserError
from models.formats.hf import load_config
from models.formats.target import check_vocabulary, load_target
from models.formats.tokenizer import Tokenizer
from train.objectives.objective import Compute, Objective, Params


class BesideFrozenTarget(Objective):
    """Base of these objectives. What is frozen is the target, with stacked layers, in the dtype of the computation.

    The `__init__` of a subclass ends with `prepare(Compute())`.

    Attributes:
      fingerprint: of the target, once it is loaded.
    """

    def __init__(self, config: Any, tokenizer: Tokenizer):
        """`tokenizer` is the target's, and the data's. Raises UserError for a missing or broken target."""
        self._config, self._tokenizer = config, tokenizer
        self.model = load_config(config.base)
        if self.model.encoder_layers:
            raise UserError(
                f"objective.target ({config.base}) is an encoder-decoder: {self.product}s are trained on decoders"
            )
        check_vocabulary(self.model, tokenizer, config.base)
        self.fingerprint: dict[str, int | str | None] = {}

    def prepare(self, compute: Compute) -> None:
        """Also decides the dtype of the target, whose layers are stacked: a scan compiles at once, however deep."""
        super().prepare(compute)
        shapes = transformer.param_shapes(self.model, compute.dtype)
        self.base: Params = jax.eval_shape(transformer.stack_layers, shapes)

    @property
    def inputs(self) -> Mapping[str, str | None]:
        """The target."""
        return {"objective.target": self._config.base}

    def load_base(self, mesh: Mesh) -> Params:
        """The target."""
        return self.load_target(mesh)

    def load_target(self, mesh: Mesh) -> Params:
        """The target's part of the base."""
        target = load_target(self._config.base, dtype=self.compute.dtype, mesh=mesh)
        # Now, while every process takes part: no single one may be able to read the whole embedding at the export.
        self.fingerprint = target.fingerprint()
        return transformer.stack_layers(target.params)
