"""The programs of a generation, compiled ahead, so that they can be asked for memory and timed without dispatch."""

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
      call: takes the leaves of (codes, params, labels, draws, sketch) and returns those of the next sketch.
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
        leaves, structure = jax.tree.flatten((codes, stage.params, labels, draws, sketch))

        def call(leaves, structure=structure, config=stage.config, first=first, last=stage.last):
            return jax.tree.leaves(run(tokenizer, config, *jax.tree.unflatten(structure, leaves), first, last))

        started = time.perf_counter()
        lowered = jax.jit(call).lower(leaves)
        programs.append(Program(lowered.compile(), draws, time.perf_counter() - started))
        f_hat, prefix, *indices = (jnp.zeros(leaf.shape, leaf.dtype) for leaf in lowered.out_info)
        sketch, first = Sketch(f_hat, prefix, indices), stage.last
    return programs
