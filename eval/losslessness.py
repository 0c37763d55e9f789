"""Is sampled text really distributed as the target says? Exact law against observed counts, by chi-square.

On a vocabulary of a few tokens every string of two or three tokens can be listed with its probability, from the
target's own forward and the sampling warps. Thousands of decodes of one prompt are then counted against that law. A
small p says that the decoder samples from something else; a large one says that this many samples could not tell.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from decoding.drafter import Drafter
from decoding.drafters.plain import Plain
from decoding.generate import generate, slots_needed
from decoding.sampling import Sampling, batch_warps, warp_logits
from decoding.verify import Typical
from models.target import Target


@dataclasses.dataclass(frozen=True)
class ChiSquare:
    """One goodness-of-fit test.

    Attributes:
      statistic: sum of (observed - expected)^2 / expected over cells; infinite if something impossible was seen.
      degrees: cells minus one.
      p_value: probability of a statistic at least as large when the law holds.
      samples: how many strings were counted.
    """

    statistic: float
    degrees: int
    p_value: float
    samples: int


def string_law(target: Target, prompt: Sequence[int], length: int, sampling: Sampling) -> Float[np.ndarray, "*V"]:
    """Probability of every continuation of `prompt` by `length` tokens, an array with `length` axes of size V.

    Args:
      target: its vocabulary should be tiny: V^(length - 1) texts go through one forward.
      prompt: token ids.
      length: tokens per string.
      sampling: settings, of a temperature above 0.
    """
    vocab_size = target.config.vocab_size
    strings = list(itertools.product(range(vocab_size), repeat=length - 1))
    logits_BTV = target.apply([[*prompt, *string] for string in strings]).logits[:, len(prompt) - 1 :]
    warps = batch_warps([sampling] * (len(strings) * length))
    warped = warp_logits(logits_BTV.reshape(-1, vocab_size), warps)
    p_BTV = np.asarray(jax.nn.softmax(warped, axis=-1), np.float64).reshape(logits_BTV.shape)
    law = np.ones((vocab_size,) * length)
    for string, p_TV in zip(strings, p_BTV, strict=True):
        seen = np.prod([p_TV[place, token] for place, token in enumerate(string)])
        law[string] = seen * p_TV[length - 1]
    return law


def chi_square(counts: Int[np.ndarray, "*V"], law: Float[np.ndarray, "*V"], fewest: float = 5.0) -> ChiSquare:
    """Pearson's test; cells that expect fewer than `fewest` strings are pooled into one.

    Args:
      counts: observed strings.
      law: their probabilities.
      fewest: below this the chi-square approximation is poor.
    """
    samples = int(counts.sum())
    observed, expected = counts.ravel().astype(np.float64), law.ravel() * samples
    small = expected < fewest
    observed = np.append(observed[~small], observed[small].sum())
    cells = np.append(expected[~small], expected[small].sum())
    impossible = bool(np.any(counts.ravel()[expected == 0] > 0))
    if cells[-1] == 0:
        observed, cells = observed[:-1], cells[:-1]
    statistic = np.inf if impossible else float(np.sum((observed - cells) ** 2 / cells))
    degrees = max(len(cells) - 1, 1)
    tail = jax.scipy.special.gammaincc(jnp.asarray(degrees / 2), jnp.asarray(min(statistic, 1e30) / 2))
    return ChiSquare(statistic, degrees, float(tail), samples)


def sampled_strings(
    target: Target,
    prompt: Sequence[int],
    length: int,
    settings: Sequence[Sampling],
    *,
    drafter: Drafter | None = None,
    drafter_params: Any = None,
    samples: int = 4096,
    batches: int = 1,
    seed: int = 0,
    typical: Typical | None = None,
) -> Int[np.ndarray, "settings samples length"]:
    """Continuations of one prompt, `samples` for each setting, all in `batches` batches of one shape."""
    rows = [sampling for sampling in settings for _ in range(samples // batches)]
    depth = (drafter or Plain()).max_depth
    drawn = []
    for batch in range(batches):
        generation = generate(
            target,
            [prompt] * len(rows),
            drafter=drafter,
            drafter_params=drafter_params,
            max_new_tokens=length,
            sampling=rows,
            seeds=seed + batch * len(rows),
            stop=[],
            typical=typical,
            # Thousands of rows attend to every slot: no more of them than must be.
            capacity=slots_needed(len(prompt), length, depth),
        )
        drawn.append(np.array(generation.tokens).reshape(len(settings), -1, length))
    return np.concatenate(drawn, axis=1)


def count_strings(strings: Int[np.ndarray, "samples length"], vocab_size: int) -> Int[np.ndarray, "*V"]:
    """How often each string occurs, in the shape of `string_law`."""
    counts = np.zeros((vocab_size,) * strings.shape[1], np.int64)
    np.add.at(counts, tuple(strings.T), 1)
    return counts
