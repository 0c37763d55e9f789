"""How much memory a way of making images takes: what its compiled programs say, and what its caches must.

Every stage of a generation is a program, and what one leaves behind is small, so the peak is the largest program plus
the parameters of the models that wait meanwhile. Programs are asked, not watched: the numbers are those of the
compiler's buffer assignment for this batch and device, without the runtime's own overhead.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from decoding.images import generate
from decoding.images.generate import Stage, Tokenizer
from decoding.images.scales import Sketch
from eval.images.programs import compile_stages
from models.images.config import VARConfig, scale_starts


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """Bytes of one compiled program.

    Attributes:
      parameters: those that it reads, which are among the arguments.
      arguments: all that goes in.
      temporaries: scratch, the cache of keys and values among it.
      outputs: what comes out, as far as it does not take an argument's place.
    """

    parameters: int
    arguments: int
    temporaries: int
    outputs: int

    @property
    def total(self) -> int:
        """All of it at once."""
        return self.arguments + self.temporaries + self.outputs


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """A transformer stage: its program, and the cache that the formula gives it."""

    program: ProgramMemory
    cache: int


@dataclasses.dataclass(frozen=True)
class Peak:
    """A whole generation at its fullest moment, in bytes.

    Attributes:
      parameters: of all its models and the tokenizer, which stay in memory.
      working: the most that any of its programs takes beside parameters.
      total: both.
      cache: the largest cache of keys and values by `cache_bytes`.
    """

    parameters: int
    working: int
    total: int
    cache: int


def cache_bytes(
    config: VARConfig, last: int, batch: int, guided: bool = True, key_bytes: int = 4, value_bytes: int = 4
) -> int:
    """Bytes of a VAR model's keys and values once it has made scales 0 to `last - 1`.

    d * L_N * C * (bytes of a key + bytes of a value) per image and branch, with two branches under guidance: the class
    and no class. For CoDe it says why there is a gain: the drafter's cache ends after the N scales that it makes,
    L_N = sum of p_k^2 over k < N, and the refiner's has fewer layers and less width. The published models keep keys in
    float32 and values in half precision (key_bytes 4, value_bytes 2): 448 MiB per image for depth 30, 127.5 MiB for
    depth 16 (CoDe, Chen et al. 2024, table 1, whose figures this meets to 0.1%).

    Args:
      config: shape of the model.
      last: one past the last scale that it makes.
      batch: images.
      guided: whether there is guidance.
      key_bytes: of one number.
      value_bytes: of one number.
    """
    length = scale_starts(config.scales)[last]
    return (2 if guided else 1) * batch * config.depth * length * config.width * (key_bytes + value_bytes)


def stage_memory(tokenizer: Tokenizer, stages: Sequence[Stage], batch: int) -> list[StageMemory]:
    """Per stage of a generation of `batch` images what its program takes; programs are compiled, not run.

    Args:
      tokenizer: the VQ-VAE.
      stages: as `generate_images` takes them, each with one drawing for all images.
      batch: images.
    """
    codes = {name: tokenizer.params[name] for name in ("codebook", "phi")}
    found = []
    for stage, program in zip(stages, compile_stages(tokenizer.config, codes, stages, batch), strict=True):
        itemsize = stage.params["classes"]["embedding"].dtype.itemsize
        cache = cache_bytes(stage.config, stage.last, batch, program.draws.guided, itemsize, itemsize)
        found.append(StageMemory(_of(program.compiled, (codes, stage.params)), cache))
    return found


def decoder_memory(tokenizer: Tokenizer, at_once: int) -> ProgramMemory:
    """What the program takes that makes pixels of f_hat, `at_once` images at a time."""
    config, params = tokenizer
    f_hat = Sketch.empty(config, at_once, params["codebook"]["embedding"].dtype).f_hat
    # What encodes images is no part of this program, though it is handed over.
    read = {name: params[name] for name in ("decoder", "post_quant")}
    return _of(generate.pixels_of.lower(config, params, f_hat).compile(), read)


def peak(tokenizer: Tokenizer, stages: Sequence[Stage], parts: Sequence[StageMemory], decoder: ProgramMemory) -> Peak:
    """What a whole generation needs.

    Args:
      tokenizer: the VQ-VAE.
      stages: as `generate_images` takes them.
      parts: of `stage_memory`.
      decoder: of `decoder_memory`.
    """
    parameters = sum(_bytes(params) for params in (tokenizer.params, *(stage.params for stage in stages)))
    programs = (*(part.program for part in parts), decoder)
    working = max(program.total - program.parameters for program in programs)
    return Peak(parameters, working, parameters + working, max(part.cache for part in parts))


def _bytes(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _of(compiled: Any, params: Any) -> ProgramMemory:
    facts = compiled.memory_analysis()
    outputs = facts.output_size_in_bytes - facts.alias_size_in_bytes
    return ProgramMemory(_bytes(params), facts.argument_size_in_bytes, facts.temp_size_in_bytes, outputs)
