"""Replay: what draft heads would have guessed, computed as training does, at the places where the loop guessed.

The loop starts a step from every token that the target wrote. Running the training-time forward of the heads over the
whole finished text and walking the draft tree along it from those places must give the same hits by depth as the loop
counted. Where the two differ, the heads see something else in service than they did in training.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decoding.drafters.heads import HeadDrafter
from decoding.generate import Generation, bucket
from decoding.sampling import best_tokens
from models import transformer
from models.config import TransformerConfig
from models.layout import Layout
from models.target import Target
from models.transformer import Params


@functools.partial(jax.jit, static_argnames=("config", "drafter"))
def teacher_forced_ranks(
    config: TransformerConfig,
    drafter: HeadDrafter,
    target: Params,
    params: Params,
    tokens: Int[Array, "B T"],
) -> Int[Array, "D B T"]:
    """Rank of the true token in every head's list of guesses, at every position of whole texts.

    Args:
      config: shape of the target.
      drafter: heads and tree; D is the tree's depth.
      target: the target's parameters.
      params: the heads' parameters.
      tokens: texts, padded at the end.

    Returns:
      `[i, b, p]`: where head i, reading the feature at p and the true tokens p+1 .. p+1+i, ranks the token at p+2+i;
      the width of the tree at that depth when the token is not on the list.
    """
    heads, tree = drafter.heads, drafter.tree
    layout = Layout.causal(tokens.shape[0], tokens.shape[1])
    hidden_BTH = transformer.forward(config, target, tokens, layout).hidden
    feature_BTH = heads.features(config, params, hidden_BTH, layout)
    ranks = []
    for i in range(tree.max_depth):
        path = jnp.stack([_ahead(tokens, 1 + j) for j in range(i + 1)], axis=-1)
        path_BTPH = transformer.lookup(target, path)
        hidden = heads.hidden(params, i, feature_BTH, path_BTPH)
        count = int(tree.rank[tree.level(i + 1)].max()) + 1
        # One text at a time: the scores of all of them at once could be the largest array of the program.
        guesses_BTK = jax.lax.map(lambda h, i=i, count=count: best_tokens(heads.vocab(params, i, h), count), hidden)
        right_BTK = guesses_BTK == _ahead(tokens, 2 + i)[..., None]
        ranks.append(jnp.sum(jnp.cumsum(right_BTK, axis=-1) == 0, axis=-1, dtype=jnp.int32))
    return jnp.stack(ranks)


def _ahead(tokens: Int[Array, "B T"], distance: int) -> Int[Array, "B T"]:
    """The token `distance` places further on; zeros past the end."""
    return jnp.pad(tokens[:, distance:], ((0, 0), (0, distance)))


def replay_acceptance(
    target: Target,
    drafter: HeadDrafter,
    params: Params,
    prompts: Sequence[Sequence[int]],
    generation: Generation,
) -> Int[np.ndarray, "D"]:
    """Accepted drafts by depth according to the training-time forward, over all texts.

    Args:
      target: the model that wrote the texts.
      drafter: heads with a tree.
      params: the heads' parameters.
      prompts: what `generation` continues.
      generation: texts and who wrote each token, by a lossless decode of these prompts with this drafter.

    Returns:
      Int `[D]`, to be compared with the sum of `Stats.accepted_by_depth`.
    """
    tree = drafter.tree
    hits = np.zeros(tree.max_depth, np.int64)
    texts = [[*prompt, *new] for prompt, new in zip(prompts, generation.tokens, strict=True)]
    padded = np.zeros((len(texts), bucket(max(map(len, texts)))), np.int32)
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
                hits[depth - 1] += 1
    return hits
