"""Who takes part in an image benchmark: a VAR model alone, and pairs that collaborate at some scale.

Everybody is on one axis, the number N of scales that the larger model makes: 0 is the smaller one alone, K the larger
one alone, and between them lies collaborative decoding (CoDe), training-free or with models tuned for their N.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from decoding.images.generate import Stage, Tokenizer, code_stages
from decoding.images.scales import Drawing
from models.errors import UserError
from models.formats import image_models as files
from models.images.config import VARConfig, VQVAEConfig
from models.transformer import Params

DRAFTER, REFINER = "drafter", "refiner"
ALONE, TRAINING_FREE, TUNED = "alone", "training-free", "fine-tuned"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A VAR model that was read from a directory."""

    path: str
    config: VARConfig
    params: Params

    @classmethod
    def load(cls, path: str | Path) -> "Model":
        """Reads a directory.

        Raises:
          UserError: it is missing, damaged or of another kind.
        """
        return cls(str(path), *files.load(path, VARConfig))

    def record(self) -> dict[str, Any]:
        """What results tell about it."""
        return {"path": self.path, **_sizes(self.config, self.params)}


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """One way of making images.

    Attributes:
      name: unique in its benchmark.
      kind: `ALONE`, `TRAINING_FREE` or `TUNED`.
      draft_scales: N, the scales that the larger model makes.
      stages: what `generate_images` takes.
      roles: of each stage's model, `DRAFTER` or `REFINER`.
      paths: of each stage's model.
    """

    name: str
    kind: str
    draft_scales: int
    stages: tuple[Stage, ...]
    roles: tuple[str, ...]
    paths: tuple[str, ...]

    def makers(self) -> list[str]:
        """For every scale the role of the model that makes it."""
        first, found = 0, []
        for stage, role in zip(self.stages, self.roles, strict=True):
            found += [role] * (stage.last - first)
            first = stage.last
        return found


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a VQ-VAE's directory.

    Raises:
      UserError: it is missing, damaged or of another kind.
    """
    return Tokenizer(*files.load(path, VQVAEConfig))


def tokenizer_record(tokenizer: Tokenizer, path: str) -> dict[str, Any]:
    """What results tell about a tokenizer."""
    return {"path": path, **_sizes(tokenizer.config, tokenizer.params), "image_size": tokenizer.config.image_size}


def contenders(
    var: Model,
    refiner: Model | None,
    draft_scales: Sequence[int],
    tuned_drafters: Mapping[int, Model],
    tuned_refiners: Mapping[int, Model],
    drafting: Drawing,
    refining: Drawing,
) -> list[Contender]:
    """Everybody, the larger model alone first, then by falling N.

    Args:
      var: the larger model.
      refiner: the smaller one, training-free.
      draft_scales: the Ns at which the two collaborate as they are.
      tuned_drafters: N -> a model that drafts N scales; where there is none, `var` does.
      tuned_refiners: N -> a model that refines after N scales; where there is none, `refiner` does.
      drafting: how the larger model draws codes, alone too.
      refining: how the smaller one does.

    Raises:
      UserError: an N outside 1 to K - 1, or one without a refiner.
    """
    scales = var.config.num_scales
    tuned = {*tuned_drafters, *tuned_refiners}

    def alone(model: Model, name: str, n: int, role: str) -> Contender:
        drawing = drafting if role == DRAFTER else refining
        stage = Stage(model.config, model.params, model.config.num_scales, drawing)
        return Contender(name, ALONE, n, (stage,), (role,), (model.path,))

    def pair(kind: str, n: int, drafter: Model, finisher: Model | None) -> Contender:
        if finisher is None:
            raise UserError(f"which model shall refine after {n} scales? Give --refiner DIR")
        large, small = ((model.config, model.params) for model in (drafter, finisher))
        stages = tuple(code_stages(large, small, n, drafting, refining))
        name = f"CoDe N={n}" + (" fine-tuned" if kind == TUNED else "")
        return Contender(name, kind, n, stages, (DRAFTER, REFINER), (drafter.path, finisher.path))

    found = [alone(var, "VAR", scales, DRAFTER)]
    for n in sorted({*draft_scales, *tuned}, reverse=True):
        if n in draft_scales:
            found.append(pair(TRAINING_FREE, n, var, refiner))
        if n in tuned:
            found.append(pair(TUNED, n, tuned_drafters.get(n, var), tuned_refiners.get(n, refiner)))
    return found + ([alone(refiner, "refiner alone", 0, REFINER)] if refiner is not None else [])


def _sizes(config: VARConfig | VQVAEConfig, params: Params) -> dict[str, Any]:
    names = ("depth", "width", "num_heads", "num_classes", "vocab_size", "latent_channels")
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        **{name: getattr(config, name) for name in names if hasattr(config, name)},
        "scales": list(config.scales),
    }
