"""The least objective that the trainer accepts, for tests of the trainer itself: its step compiles in no time."""

import dataclasses
import pathlib
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from train.config import TrainConfig, parse
from train.objectives import OBJECTIVES
from train.objectives.objective import Objective

SIZE = 6


@dataclasses.dataclass(frozen=True)
class LeastConfig:
    """The section `objective`."""

    reads: ClassVar[str] = "text"
    base: ClassVar[None] = None

    name: Literal["least"]


class Shape:
    """A model of short texts."""

    max_position = 64
    vocab_size = 280


class Least(Objective):
    """Numbers that all fall by the learning rate in every step: their slope is 1, and Adam's update its sign."""

    Config = LeastConfig
    product = "numbers"
    model = Shape()

    def __init__(self, config: LeastConfig, facts: Any):
        """Neither says anything."""

    def init(self, key, base):
        """Ones."""
        return {"numbers": jnp.ones(SIZE), "others": jnp.ones(2)}

    def loss(self, trainable, frozen, batch, key, progress):
        """The numbers' sum; what the step was given is told as metrics."""
        told = {
            "drawn": (jax.random.uniform(key), jnp.float32(1)),
            "progress": (jnp.float32(progress), jnp.float32(1)),
            "tokens": (jnp.sum(batch["tokens"]).astype(jnp.float32), jnp.float32(batch["tokens"].size)),
        }
        total = jnp.sum(trainable["numbers"]) + jnp.sum(trainable["others"])
        return (4 * total, jnp.float32(4)), told

    def evaluate(self, trainable, frozen, batch):
        """The mean token of what is not padding, and the numbers' mean."""
        text = batch["segments"] > 0
        return {
            "token": (jnp.sum(batch["tokens"] * text), jnp.sum(text)),
            "number": (jnp.mean(trainable["numbers"]), jnp.float32(1)),
        }

    def export(self, directory: pathlib.Path, trainable, frozen):
        """Writes the numbers."""
        directory.mkdir(exist_ok=True)
        np.save(directory / "numbers.npy", trainable["numbers"])


def least_config(data_set: pathlib.Path, **changes: Any) -> TrainConfig:
    """A job for it, once `OBJECTIVES` knows it; sections are updated by `changes`."""
    raw: dict[str, Any] = {
        "objective": {"name": "least"},
        "data": {"path": str(data_set)},
        "optimizer": {"learning_rate": 0.1, "warmup_steps": 2},
        "evaluation": {"every": 100},
        "checkpoint": {"every": 100},
        "metrics": {"every": 1},
        "steps": 5,
        "batch_size": 4,
        "length": 32,
    }
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return parse(raw, OBJECTIVES)
