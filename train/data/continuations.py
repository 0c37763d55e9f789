"""Documents that a target continues: text of its own to train draft heads on (self-distillation).

A head is of use where it guesses what the target will say, not what the author of a text said. Every document is a
window of another and the target's continuation; the continuation alone is marked as label.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from decoding.drafter import Drafter
from decoding.drafters.plain import Plain
from decoding.sampling import Sampling
from decoding.spread import generate_together
from models.errors import UserError
from models.formats.target import Target
from train.data import texts as data


def continuations(
    target: Target,
    documents: data.Documents,
    count: int,
    prompt: int,
    new: int,
    temperature: float,
    rows: int,
    seed: int,
    drafter: tuple[Drafter, Any] = (Plain(), None),
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[data.Document]:
    """`count` windows of `prompt` tokens, from documents long enough, each continued by up to `new` tokens.

    Windows are drawn with replacement, documents by their length, in batches of `rows` that decode together.
    `drafter`, with its parameters, speeds decoding up; `progress` is told a line per batch.
    """
    lengths = np.where(documents.lengths > prompt, documents.lengths - prompt, 0)
    if not lengths.sum():
        raise UserError(f"no document has more than {prompt} tokens; give a smaller --prompt_tokens")
    rng = np.random.default_rng(seed)
    began = time.monotonic()
    for first in range(0, count, rows):
        chosen = rng.choice(len(lengths), size=min(rows, count - first), p=lengths / lengths.sum())
        starts = rng.integers(0, lengths[chosen])
        prompts = [
            np.asarray(documents[int(index)]["tokens"])[start : start + prompt].tolist()
            for index, start in zip(chosen, starts, strict=True)
        ]
        decoded = generate_together(
            target,
            prompts,
            drafter=drafter[0],
            drafter_params=drafter[1],
            max_new_tokens=new,
            sampling=Sampling(temperature),
            seeds=seed * count + first,
        )
        for row, (text, continuation) in enumerate(zip(prompts, decoded.tokens, strict=True)):
            yield {
                "name": f"{documents[int(chosen[row])]['name']}@{starts[row]}",
                "tokens": np.array([*text, *continuation], np.int32),
                "mask": np.array([0] * len(text) + [1] * len(continuation), np.uint8),
            }
        done = first + len(prompts)
        speed = sum(map(len, decoded.tokens)) / (decoded.prefill_seconds + decoded.decode_seconds)
        progress(f"{done}/{count} documents, {speed:,.0f} tokens/s, {time.monotonic() - began:.0f} s")
