"""Several drafters trained side by side on one frozen target, whose forward runs once per batch for all of them.

    loss = sum over members of the member's loss

A member is what a job of its own would be: an objective with its section of the config, parameters drawn from the same
key, its own noise, gradient norm and optimizer. So each ends where its own job would, given the same seed, data and
steps; only rounding differs, because the programs do. Parameters, metrics and exported directories go by the members'
names. Any objective that makes a drafter of a target can be a member.

With `source` `teacher` all learn from text that the target writes as training goes on (`written.py`): what it adds to a
prompt is what members learn whose labels are `assistant`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from models import schema, transformer
from models.errors import UserError
from models.formats.storage import new_directory, write_json
from models.formats.tokenizer import Tokenizer
from train.config import OptimizerConfig
from train.objectives.divergences import Divergence
from train.objectives.drafting import OnFrozenTarget
from train.objectives.objective import Batch, Compute, HostBatch, Objective, Params, Sums
from train.objectives.target_features import TargetFeatures, target_features
from train.objectives.written import Writer, as_rows, check_unwritten, check_writing, openings, write

if TYPE_CHECKING:  # Training steps are timed where TFDS is not installed.
    from train.data.texts import Documents


@dataclasses.dataclass(frozen=True)
class Member:
    """One drafter of several.

    Attributes:
      objective: the section of its own job, but for the target, which all share.
      optimizer: the section of its own job; None is that of the whole job. An average of parameters is kept of all
        members or of none, by the job's.
    """

    objective: Mapping[str, Any]
    optimizer: OptimizerConfig | None = None

    def __post_init__(self):
        if self.optimizer is not None:
            schema.require(self.optimizer.ema == 0, "optimizer.ema must be 0 here, and set for all", self.optimizer.ema)


@dataclasses.dataclass(frozen=True)
class SeveralConfig:
    """The section `objective` of a job that trains several drafters.

    Attributes:
      name: `several`.
      target: directory of the target, which stays as it is.
      members: name -> the fields of a `Member`; a name becomes a directory.
      source: whose text is learnt from: the `dataset`'s, or what the `teacher` writes behind its prompts.
      new_tokens: that it writes behind each; the rest of a row is for the prompt.
      sampling: the temperature of that; 0 is greedy.
      reuse: steps that learn from what was written once.
    """

    reads: ClassVar[str] = "text"

    name: Literal["several"]
    target: str | None
    members: Mapping[str, Any]
    source: Literal["dataset", "teacher"] = "dataset"
    new_tokens: int = 128
    sampling: float = 1.0
    reuse: int = 1

    def __post_init__(self):
        for name in ("new_tokens", "reuse"):
            schema.require(getattr(self, name) >= 1, f"objective.{name} must be at least 1", getattr(self, name))
        schema.require_weights(self, "sampling")
        check_unwritten(self)
        schema.require(
            self.target is not None, "objective.target must be the directory of the target to draft for", self.target
        )
        schema.require(bool(self.members), "objective.members must name at least one drafter", dict(self.members))
        _ = self.jobs  # What is wrong with members shows now.

    @property
    def base(self) -> str:
        """The target."""
        return str(self.target)

    @functools.cached_property
    def jobs(self) -> dict[str, tuple[type[OnFrozenTarget], Any, OptimizerConfig | None]]:
        """By name: class, section `objective` and optimizer of every member."""
        found = {}
        for name, raw in self.members.items():
            with _told_of(name):
                if not name or set(name) & set("/.\\"):
                    raise UserError("a name becomes a directory and must have neither dots nor slashes")
                if not isinstance(raw, Mapping):
                    raise UserError(f"a member has sections objective and perhaps optimizer, got {raw!r}")
                member = schema.parse(Member, raw)
                kind = _kind_of(member.objective)
                if member.objective.get("target") not in (None, self.target):
                    raise UserError("objective.target is the same for all, and stands outside of objective.members")
                section: Any = schema.parse(kind.Config, {**member.objective, "target": self.target}, "objective")
                found[name] = (kind, section, member.optimizer)
        return found


class SeveralObjective(Objective):
    """The `several` objective; trainables and what is frozen besides the target are dicts by the members' names."""

    Config: ClassVar[type] = SeveralConfig
    product: ClassVar[str] = "drafters"

    def __init__(self, config: SeveralConfig, tokenizer: Tokenizer):
        """`tokenizer` is the target's, and the data's. Raises UserError as the members do, with their names."""
        self._config = config
        self.members: dict[str, OnFrozenTarget] = {}
        for name, (kind, section, _) in config.jobs.items():
            with _told_of(name):
                self.members[name] = kind(section, tokenizer)
                if self.members[name].refresh_every:
                    raise UserError("it learns from text that it writes as it goes on, and all learn from one text")
                if getattr(section, "teacher_mesh", None) is not None:
                    raise UserError("objective.teacher_mesh splits a target that all have: it is for a job of its own")
        self._first = next(iter(self.members.values()))
        self.model = self._first.model
        self._writer = Writer(self.model, tokenizer)
        self.optimizers = {name: optimizer for name, (*_, optimizer) in config.jobs.items()}
        self.target_taps = tuple(dict.fromkeys(tap for one in self.members.values() for tap in one.target_taps))
        self.prepare(Compute())

    @property
    def divergences(self) -> tuple[Divergence, ...]:  # type: ignore[override]
        """Those of all members."""
        return tuple(divergence for one in self.members.values() for divergence in one.divergences)

    @property
    def recomputes(self) -> bool:  # type: ignore[override]
        """As every member says for itself."""
        return True

    def prepare(self, compute: Compute) -> None:
        """As every member does."""
        super().prepare(compute)
        for name, one in self.members.items():
            with _told_of(name):
                one.prepare(compute)
        target = {key: self._first.base[key] for key in transformer.param_shapes(self.model)}
        of_members = {name: one.base.items() for name, one in self.members.items()}
        beside = {name: {key: leaf for key, leaf in of if key not in target} for name, of in of_members.items()}
        self.base = {"target": target, "beside": beside}

    @property
    def refresh_every(self) -> int:  # type: ignore[override]
        """Text is written for so many steps."""
        return self._config.reuse if self._config.source == "teacher" else 0

    def refresh(self, trainable: Params, frozen: Params, batch: HostBatch, key: Array) -> HostBatch:
        """What the target writes behind the batch's prompts."""
        config, length = self._config, batch["tokens"].shape[1]
        room = length - config.new_tokens
        if not (prompts := openings(batch, room)):
            return batch
        target = self._writer.of(frozen["target"], self.compute)
        made = write(target, prompts, config.new_tokens, room, config.sampling, key).tokens
        return as_rows(prompts, made, [[True] * len(new) for new in made], length)

    def check(self, length: int | None) -> None:
        """As every member does."""
        if self.refresh_every:
            check_writing(self._config.new_tokens, length)
        for name, member in self.members.items():
            with _told_of(name):
                member.check(length)

    def scan_data(self, documents: "Documents") -> None:
        """As every member does."""
        for name, member in self.members.items():
            with _told_of(name):
                member.scan_data(documents)

    @property
    def inputs(self) -> Mapping[str, str | None]:
        """The target, and what members name besides."""
        target = {"objective.target": self._first.inputs["objective.target"]}
        own = {
            key.replace("objective.", f"objective.members.{name}.", 1): path
            for name, one in self.members.items()
            for key, path in one.inputs.items()
            if key not in target
        }
        return {**target, **own}

    def load_base(self, mesh: Mesh) -> Params:
        """The target, once, and what members keep beside it."""
        target = self._first.load_target(mesh)
        for one in self.members.values():
            one.fingerprint = self._first.fingerprint
        return {"target": target, "beside": {name: one.beside_target(mesh) for name, one in self.members.items()}}

    def frozen_part(self, base: Params) -> Params:
        """The target, and what members keep beside it while they learn."""
        beside = {}
        for name, one in self.members.items():
            kept = one.frozen_part(_base_of(base, name)) or {}
            beside[name] = {key: part for key, part in base["beside"][name].items() if key in kept}
        return {"target": base["target"], "beside": beside}

    def init(self, key: Array, base: Params) -> Params:
        """Every member's, from the same key."""
        return {name: one.init(key, _base_of(base, name)) for name, one in self.members.items()}

    def read_target(self, frozen: Params, batch: Batch) -> TargetFeatures:
        """The target's features on a batch, with the taps of all."""
        return target_features(self.model, frozen["target"], batch, self.target_taps, self.compute.attention)

    def loss(self, trainable: Params, frozen: Params, batch: Batch, key: Array, progress: Array | float):
        """The terms of all members, one after the other; a member's metrics go by its name, its loss among them."""
        target, terms, metrics = self.read_target(frozen, batch), [], {}
        for name, one in self.members.items():
            (sums, weights), told = one.loss_on(target, trainable[name], _base_of(frozen, name), batch, key, progress)
            terms.append((sums, weights))
            told = {"loss": (jnp.sum(sums / jnp.maximum(weights, 1)), jnp.float32(1)), **told}
            metrics.update(_named(name, told))
        sums, weights = (jnp.concatenate([*map(jnp.atleast_1d, parts)]) for parts in zip(*terms, strict=True))
        return (sums, weights), metrics

    def evaluate(self, trainable: Params, frozen: Params, batch: Batch) -> Sums:
        """Of every member, by name."""
        target, sums = self.read_target(frozen, batch), {}
        for name, one in self.members.items():
            sums.update(_named(name, one.evaluate_on(target, trainable[name], _base_of(frozen, name), batch)))
        return sums

    def report(self, means: dict[str, Any]) -> dict[str, float]:
        """Of every member, by name."""
        found = {}
        for name, one in self.members.items():
            own = {key.removeprefix(f"{name}/"): mean for key, mean in means.items() if key.startswith(f"{name}/")}
            found.update(_named(name, one.report(own)))
        return found

    def probe(self, trainable: Params, frozen: Params, batches: Iterator[Batch]) -> dict[str, float]:
        """Of every member, by name, on the same prompts."""
        batch, found = next(batches), {}
        for name, one in self.members.items():
            found.update(_named(name, one.probe(trainable[name], _base_of(frozen, name), iter([batch]))))
        return found

    def export(self, directory: Path, trainable: Params, frozen: Params) -> None:
        """Writes a directory of drafter directories, which go by the members' names."""
        with new_directory(directory, "members.json", overwrite=True) as partial:
            for name, one in self.members.items():
                one.export(partial / name, trainable[name], _base_of(frozen, name))
            write_json(partial / "members.json", {"members": list(self.members)})


def _kind_of(section: Mapping[str, Any]) -> type[OnFrozenTarget]:
    from train.objectives import OBJECTIVES  # Which lists this one too.

    kinds = {name: kind for name, kind in OBJECTIVES.items() if issubclass(kind, OnFrozenTarget)}
    if (name := section.get("name")) not in kinds:
        raise UserError(
            f"objective.name must be one of {', '.join(kinds)}, which make drafters, got {name!r}"
            f"{schema.nearest(name, kinds)}"
        )
    return kinds[str(name)]


def _base_of(base: Params, name: str) -> Params:
    return {**base["target"], **base["beside"][name]}


def _named(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}/{key}": value for key, value in values.items()}


@contextlib.contextmanager
def _told_of(name: str) -> Iterator[None]:
    """A member's complaints are told with its name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"objective.members.{name}: {error}") from None
