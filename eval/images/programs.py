"""The programs of a generation, compiled ahead to be asked for memory; `generate_images` will run these very ones."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from decoding.images.generate import Stage
from decoding.images.scales import Drawing, Draws, Sketch, run
from models.images.config import VQVAEConfig


class Program(NamedTuple):
    """One stage, compiled for a batch.

    Attributes:
      call: takes (codes, params, labels, draws, sketch, None) and returns the next sketch.
      draws: how its codes are drawn.
      seconds: of its compilation.
    """

    call: Any
    draws: Draws
    seconds: float


def compile_stages(tokenizer: VQVAEConfig, codes: Any, stages: Sequence[Stage], batch: int) -> list[Program]:
    """The programs that make a batch of images, one per stage; each stage has one drawing for all images.

    Args:
      tokenizer: shape of the VQ-VAE.
      codes: the quantiser's parameters.
      stages: as `generate_images` takes them.
      batch: images.
    """
    labels, keys = jnp.zeros(batch, jnp.int32), jax.vmap(jax.random.key)(jnp.arange(batch, dtype=jnp.uint32))
    sketch, first, programs = Sketch.empty(tokenizer, batch, codes["codebook"]["embedding"].dtype), 0, []
    for stage in stages:
        assert isinstance(stage.drawing, Drawing)
        draws = Draws.of([stage.drawing] * batch, keys, tokenizer.num_scales)
        started = time.perf_counter()
        # JAX keeps what it compiled for a call of the very same form: this batch, one device, nothing kept of images.
        lowered = run.lower(
            tokenizer, stage.config, codes, stage.params, labels, draws, sketch, first, stage.last, None
        )
        programs.append(Program(lowered.compile(), draws, time.perf_counter() - started))
        sketch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), lowered.out_info)
        first = stage.last
    return programs
