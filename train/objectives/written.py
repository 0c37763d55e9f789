"""Text that is written while a drafter learns, by its teacher or by itself, in place of what the data set holds.

All of it runs on the host, through the decoder that serves (`decoding/generate.py`), between a batch and its step. A
batch's rows give the prompts, one each: a chat's up to where an answer begins, any other text's first quarter. What is
written stands behind them, row by row, and it alone is marked as label. Who writes is decided per batch, and all draws
come from the step's key, so that a run that is interrupted writes the same text again.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from decoding.generate import Generation, bucket, generate, slots_needed
from decoding.sampling import Sampling
from models import processes, schema, transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.target import Target
from models.formats.tokenizer import Tokenizer
from models.sharding import mesh_of
from train.objectives.objective import Compute, HostBatch, Params


class Writer:
    """A model that writes, from parameters as training has them; what decoding wants of frozen ones is made once."""

    def __init__(self, model: TransformerConfig, tokenizer: Tokenizer):
        """Of that shape and tokenizer."""
        self._model, self._tokenizer = model, tokenizer
        self._made: tuple[Params, Target] | None = None

    def of(self, params: Params, compute: Compute) -> Target:
        """The model ready to decode, in the dtype of the computation."""
        if self._made is None or self._made[0] is not params:
            served = _served(params, compute, mesh_of(params))
            self._made = params, Target(self._model, served, self._tokenizer)
        return self._made[1]


@functools.partial(jax.jit, static_argnames=("compute", "mesh"))
def _served(params: Params, compute: Compute, mesh: Mesh | None) -> Params:
    """Parameters as decoding reads them, made by one program."""
    return transformer.for_decoding(compute.cast(params), mesh)


def check_unwritten(config: Any) -> None:
    """Raises UserError where a section says how text is written, and its `source` is the data set."""
    if config.source == "dataset":
        why = "is for text that is written, not for objective.source 'dataset'"
        schema.require_defaults(config, "new_tokens", "sampling", "reuse", why=why)


def check_writing(new_tokens: int, length: int | None) -> None:
    """Whether rows of `length` tokens have room for prompts, and one process does all. Raises UserError."""
    if length is not None and new_tokens >= length:
        raise UserError(
            f"objective.new_tokens ({new_tokens}) must be smaller than config.length ({length}), so that there is room "
            "for prompts"
        )
    if processes.count() > 1:
        raise UserError("text is written by one process: with several, make it first (scripts.continue_dataset)")


def openings(batch: HostBatch, room: int) -> list[list[int]]:
    """A prompt from every row, as many as there are rows; empty where there is no text.

    That is the text of a document up to where labels begin in it, of the first such document that has its beginning in
    the row, or, failing that, of the first. Where labels begin nowhere, it is the document at the end of the row's
    first quarter. Rows that are padding get the prompt of another.

    Args:
      batch: `tokens`, `segments` and `mask`, [B, T], the mask true for labels.
      room: tokens of a prompt; of a longer one the last ones are taken.
    """
    found: list[list[int]] = []
    for tokens, segments, mask in zip(batch["tokens"], batch["segments"], batch["mask"].astype(bool), strict=True):
        same = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        ends = np.flatnonzero(same & mask[1:] & ~mask[:-1]) + 1
        if not len(ends):
            ends = np.array([max(min(len(tokens) // 4, int(np.sum(segments > 0))), 1)])
        firsts = [int(np.argmax(segments == segments[end - 1])) for end in ends]
        whole = next((i for i, first in enumerate(firsts) if first > 0), 0)
        is_text = segments[ends[whole] - 1] > 0
        found.append(tokens[firsts[whole] : ends[whole]][-room:].tolist() if is_text else [])
    others = list(filter(None, found))
    return [prompt or others[row % len(others)] for row, prompt in enumerate(found)] if others else []


def write(
    target: Target,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    room: int,
    temperature: float,
    key: jax.Array,
    drafter: Any = None,
) -> Generation:
    """`prompts` continued by `target`.

    Args:
      target: who writes.
      prompts: of at most `room` tokens.
      new_tokens: at most so many, where no end token comes first.
      room: so that batches of other prompts run the same program.
      temperature: 0 is greedy.
      key: for the draws.
      drafter: the pair that speeds it up; None is plain decoding.
    """
    seeds = np.asarray(jax.random.bits(key, (len(prompts),)), np.uint32).tolist()
    depth = 0 if drafter is None else drafter[0].max_depth
    return generate(
        target,
        prompts,
        drafter=drafter,
        max_new_tokens=new_tokens,
        sampling=Sampling(temperature),
        seeds=seeds,
        capacity=bucket(slots_needed(room, new_tokens, depth)),
    )


def as_rows(
    prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]], counted: Sequence[Sequence[bool]], length: int
) -> HostBatch:
    """A batch of `length` tokens a row: every prompt with what was written behind it, of which what is `counted` is
    marked as label."""
    shape = (len(prompts), length)
    batch: HostBatch = {
        "tokens": np.zeros(shape, np.int32),
        "segments": np.zeros(shape, np.int32),
        "mask": np.zeros(shape, np.uint8),
    }
    for row, (prompt, new, counts) in enumerate(zip(prompts, written, counted, strict=True)):
        begin, end = len(prompt), len(prompt) + len(new)
        batch["tokens"][row, :end] = [*prompt, *new]
        batch["segments"][row, :end] = 1
        batch["mask"][row, begin:end] = counts
    return batch


def corrected(writers: Sequence[int], depth: int) -> list[bool]:
    """Which tokens stand where a draft was rejected: the target wrote them, in the place of what the drafter offered.

    Neither the first token, which nobody drafted, nor the bonus token of a step that kept all its drafts.

    Args:
      writers: of a chain's text, as `Generation.writers` has them.
      depth: of the chain.
    """
    before = [depth, *writers][: len(writers)]
    return [writer == 0 and last != depth for writer, last in zip(writers, before, strict=True)]
