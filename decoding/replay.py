"""Replay: what a drafter would have guessed, computed as training does, at the places where the loop guessed.

The loop starts a step from every token that the target wrote. Running the drafter's training-time forward over the
whole finished text and walking the draft tree along it from those places must give the same hits by depth as the loop
counted. Where the two differ, the drafter sees something else in service than it did in training.
"""

import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decoding.drafter import Drafter
from decoding.generate import Generation, bucket
from decoding.trees import Topology
from models import transformer
from models.config import TransformerConfig
from models.formats.target import Target
from models.layout import Layout
from models.transformer import Output, Params


@runtime_checkable
class Replayable(Protocol):
    """A drafter with a static tree of its best guesses, which can be computed for whole texts at once."""

    @property
    def ranked_tree(self) -> Topology | None:
        """The tree."""

    @property
    def taps(self) -> tuple[str, ...]:
        """Features of the target that `teacher_forced` wants."""

    def teacher_forced(
        self, config: TransformerConfig, target: Params, params: Params, tokens: Array, output: Output, depth: int
    ) -> list[Array]:
        """For each depth what its guesses are read off, `[B, T, H]`, with the true tokens as the path.

        At depth i + 1 the path of position p is the tokens p+1 .. p+1+i, and the guess is of token p+2+i.
        """

    def ranked(
        self, config: TransformerConfig, target: Params, params: Params, i: int, hidden: Array, count: int
    ) -> Array:
        """The `count` best guesses of depth i + 1, best first: `[..., count]` for `hidden` `[..., H]`."""


def is_replayable(drafter: Drafter) -> bool:
    """Whether `replay_acceptance` knows what this drafter would have guessed."""
    return isinstance(drafter, Replayable) and drafter.ranked_tree is not None


def _tree(drafter: Replayable) -> Topology:
    assert drafter.ranked_tree is not None, "only static trees of best guesses can be replayed"
    return drafter.ranked_tree


@functools.partial(jax.jit, static_argnames=("config", "drafter"))
def teacher_forced_ranks(
    config: TransformerConfig,
    drafter: Replayable,
    target: Params,
    params: Params,
    tokens: Int[Array, "B T"],
) -> Int[Array, "D B T"]:
    """Rank of the true token in every list of guesses, at every position of whole texts.

    Args:
      config: shape of the target.
      drafter: with a static tree, of depth D.
      target: the target's parameters.
      params: the drafter's parameters.
      tokens: texts, padded at the end.

    Returns:
      `[i, b, p]`: where the guesses of depth i + 1, made from the feature at p and the true tokens p+1 .. p+1+i, rank
      the token at p+2+i; the width of the tree at that depth when the token is not on the list.
    """
    tree = _tree(drafter)
    layout = Layout.causal(tokens.shape[0], tokens.shape[1])
    output = transformer.forward(config, target, tokens, layout, taps=drafter.taps)
    ranks = []
    for i, hidden in enumerate(drafter.teacher_forced(config, target, params, tokens, output, tree.max_depth)):
        count = int(tree.rank[tree.level(i + 1)].max()) + 1

        def guess(hidden, i=i, count=count):
            return drafter.ranked(config, target, params, i, hidden, count)

        # One text at a time: the scores of all of them at once could be the largest array of the program.
        right_BTK = jax.lax.map(guess, hidden) == _ahead(tokens, 2 + i)[..., None]
        ranks.append(jnp.sum(jnp.cumsum(right_BTK, axis=-1) == 0, axis=-1, dtype=jnp.int32))
    return jnp.stack(ranks)


def _ahead(tokens: Int[Array, "B T"], distance: int) -> Int[Array, "B T"]:
    """The token `distance` places further on; zeros past the end."""
    return jnp.pad(tokens[:, distance:], ((0, 0), (0, distance)))


def replay_acceptance(
    target: Target,
    drafter: Replayable,
    params: Params,
    prompts: Sequence[Sequence[int]],
    generation: Generation,
    length: int | None = None,
) -> Int[np.ndarray, "B D"]:
    """Accepted drafts of each text by depth, according to the training-time forward.

    Args:
      target: the model that wrote the texts.
      drafter: with a static tree.
      params: the drafter's parameters.
      prompts: what `generation` continues.
      generation: texts and who wrote each token, by a lossless decode of these prompts with this drafter.

      length: tokens to pad the texts to; by default a bucket that holds the longest.

    Returns:
      Int `[B, D]`, to be compared with each text's `Stats.accepted_by_depth`.
    """
    tree = _tree(drafter)
    hits = np.zeros((len(prompts), tree.max_depth), np.int64)
    texts = [[*prompt, *new] for prompt, new in zip(prompts, generation.tokens, strict=True)]
    padded = np.zeros((len(texts), length or bucket(max(map(len, texts)))), np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    ranks_DBT = np.asarray(teacher_forced_ranks(target.config, drafter, target.params, params, padded))
    for row, (prompt, writers) in enumerate(zip(prompts, generation.writers, strict=True)):
        for root in (len(prompt) + int(place) for place in np.flatnonzero(np.array(writers) == 0)):
            node = 0
            for depth in range(1, min(tree.max_depth, len(texts[row]) - 1 - root) + 1):
                rank = ranks_DBT[depth - 1, row, root - 1]
                children = tree.children[node]
                if rank >= len(children) or children[rank] < 0:
                    break
                node = children[rank]
                hits[row, depth - 1] += 1
    return hits
