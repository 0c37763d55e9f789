"""The programs of a generation, compiled ahead to be asked for memory; `generate_images` will run these very ones."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from decoding.images.generate import Stage
from decoding.images.scales import Drawing, Draws, Sketch, run
from models.images.config import VQVAEConfig
from models.transformer import Params


class Program(NamedTuple):
    """One stage, compiled for a batch.

    Attributes:
      compiled: `run` for the stage's scales.
      draws: how its codes are drawn.
      seconds: of its compilation.
    """

    compiled: Any
    draws: Draws
    seconds: float

    def make(self, codes: Any, params: Params, labels: Array, sketch: Sketch) -> Sketch:
        """The next sketch: `codes` are the quantiser's parameters, `params` the transformer's."""
        return self.compiled(codes, params, labels, self.draws, sketch, None)


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
