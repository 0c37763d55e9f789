"""The entries `target` and `samples` of a decode benchmark's results (`eval/report/text.py` gives the keys)."""

from collections.abc import Sequence
from typing import Any

import jax

from decoding.generate import Generation
from eval.text.benchmark import Contender
from eval.text.prompts import Prompt
from models.formats.target import Target
from models.formats.tokenizer import StreamDecoder, TokenIds, Tokenizer


def describe_target(target: Target, **facts: Any) -> dict[str, Any]:
    """The entry `target`: where it is, how large, and whatever else is known of it."""
    config = target.config
    return {
        "path": str(target.path) if target.path else None,
        "family": config.family,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(target.params)),
        "layers": config.num_layers,
        "width": config.width,
        "vocab_size": config.vocab_size,
        "dtype": str(target.params["embed"]["embedding"].dtype),
        **facts,
    }


def samples(
    target: Target, contenders: Sequence[Contender], prompts: Sequence[Prompt], made: Sequence[Sequence[Generation]]
) -> list[dict[str, Any]]:
    """The entry `samples`: texts with the writer of every token, each prompt by each contender.

    Args:
      target: the model; without a tokenizer there are no texts to show.
      contenders: who decoded.
      prompts: what was continued, and perhaps more.
      made: by contender, what it made of the first prompts.
    """
    if target.tokenizer is None:
        return []
    entries = []
    for prompt, generations in zip(prompts, zip(*made, strict=True), strict=False):
        text = prompt.text or target.tokenizer.decode(prompt.tokens)
        for contender, generation in zip(contenders, generations, strict=True):
            pieces = text_pieces(target.tokenizer, prompt.tokens, generation.tokens[0], generation.writers[0])
            who = {"drafter": contender.drafter.name, "path": contender.path}
            entries.append({"prompt": text, **who, "pieces": pieces})
    return entries


def text_pieces(
    tokenizer: Tokenizer, prompt: TokenIds, tokens: Sequence[int], writers: Sequence[int]
) -> list[tuple[str, int]]:
    """Per token behind `prompt` its text and its writer; a character of several tokens is the text of the last."""
    decoder = StreamDecoder(tokenizer, prompt)
    pieces = [(decoder.feed([token]), writer) for token, writer in zip(tokens, writers, strict=True)]
    if pieces and (rest := decoder.flush()):
        pieces[-1] = (pieces[-1][0] + rest, pieces[-1][1])
    return pieces
