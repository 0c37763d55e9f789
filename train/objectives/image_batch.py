"""What a batch of labelled images holds, as objectives read it."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from train.objectives.objective import Batch


def pixels(batch: Batch) -> Float[Array, "B S S 3"]:
    """The images in [-1, 1]."""
    return batch["image"] / 127.5 - 1


def present(batch: Batch) -> Float[Array, "B"]:
    """1 for images, 0 for what only fills up a last batch (`train.data.images.PADDING`)."""
    return (batch["label"] >= 0).astype(jnp.result_type(float))
