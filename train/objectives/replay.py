"""What the training-time forward says about steps that a decoding loop has taken.

A loop's text tells its steps: tokens that the target wrote are roots, those between two roots are the drafts accepted
in between. Head i at the position before root r guesses token r + 1 + i from the true path, so with the rank-0 chain as
its tree the loop accepts depth d at r exactly if heads 0 .. d-1 all guess the text. If training and decoding mean the
same thing, both counts are the same integers.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from decoding.generate import Generation


def replay_hits(
    choices: Int[np.ndarray, "B T K"], prompts: Sequence[Sequence[int]], decoded: Generation
) -> Int[np.ndarray, "K"]:
    """How many of the loop's steps would have accepted depth d, for d = 1 .. K, by the heads' first choices.

    Args:
      choices: first choice of every head at every position of prompt and new tokens, teacher-forced.
      prompts: as decoded.
      decoded: greedily, with the rank-0 chain of K candidates as the tree.
    """
    hits = np.zeros(choices.shape[2], np.int64)
    for row, (prompt, new, writers) in enumerate(zip(prompts, decoded.tokens, decoded.writers, strict=True)):
        text = np.array([*prompt, *new])
        for root in (len(prompt) + offset for offset, writer in enumerate(writers) if writer == 0):
            for depth in range(1, min(len(hits), len(text) - 1 - root) + 1):
                if choices[row, root - 1, depth - 1] != text[root + depth]:
                    break
                hits[depth - 1] += 1
    return hits
