"""Is sampled text really distributed as the target says? The exact distribution against observed counts, by chi-square.

    >>> target = tiny_target()
    >>> results = check_losslessness(target, drafter, params, [1, 2, 3], 3, [Sampling(temperature=1.0)])
    >>> print(format_table(results))

On a vocabulary of a few tokens every string of two or three tokens can be listed with its probability, from the
target's own forward and the sampling parameters. Thousands of decodes of one prompt are then counted against it. A
small p says that the decoder samples from something else; a large one says that this many samples could not tell. What
the test would catch is told by the acceptance length beside it: drafts that nobody accepts prove little.
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
from decoding.generate import generate, slots_needed
from decoding.sampling import Sampling, apply_sampling, batch_sampling
from decoding.stats import Stats
from decoding.verify import Typical
from models import transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.target import Target

# Below this a result is taken for a failure: one lossless run in ten thousand gets there by chance.
SMALLEST_P = 1e-4
_MOST_STRINGS = 100_000


@dataclasses.dataclass(frozen=True)
class ChiSquare:
    """One goodness-of-fit test.

    Attributes:
      statistic: sum of (observed - expected)^2 / expected over cells; infinite if something impossible was seen.
      degrees: cells minus one.
      p_value: probability of a statistic at least as large when they follow the distribution.
      samples: how many strings were counted.
    """

    statistic: float
    degrees: int
    p_value: float
    samples: int


@dataclasses.dataclass(frozen=True)
class Check:
    """What came out for one sampling setting.

    Attributes:
      sampling: the setting.
      rule: the rule that the drafter's trees carried (`decoding.trees.ACCEPTANCE_RULES`).
      test: the strings drawn against the target's distribution.
      acceptance_length: tokens per target forward while drawing them; 1 means that no draft was ever accepted.
    """

    sampling: Sampling
    rule: str
    test: ChiSquare
    acceptance_length: float

    @property
    def passed(self) -> bool:
        """The strings may well follow the distribution."""
        return self.test.p_value > SMALLEST_P


def check_losslessness(
    target: Target,
    drafter: Drafter,
    drafter_params: Any,
    prompt: Sequence[int],
    length: int,
    settings: Sequence[Sampling],
    samples: int = 4096,
    *,
    batches: int = 1,
    seed: int = 0,
    typical: Typical | None = None,
) -> list[Check]:
    """Draws strings with a drafter and compares them with the target's exact distribution.

    Args:
      target: of a tiny vocabulary, such as `tiny_target`.
      drafter: what is to be judged.
      drafter_params: its parameters for that target.
      prompt: token ids.
      length: tokens per string; the first is not drafted, so at least 2, and 3 to see a draft's second level.
      settings: sampling settings of a temperature above 0, one result each.
      samples: strings per setting, in all batches.
      batches: splits the work where memory is short.
      seed: of the first string; the others count up.
      typical: lossy typical acceptance, which must not pass.

    Raises:
      UserError: a vocabulary too large to list all strings, strings too short to be drafted, or a temperature of 0.
    """
    if length < 2:
        raise UserError(f"strings of {length} tokens are too short to judge drafts by: length must be at least 2")
    exact = {sampling: string_distribution(target, prompt, length, sampling) for sampling in dict.fromkeys(settings)}
    decoded = dict(drafter=drafter, drafter_params=drafter_params, samples=samples, batches=batches)
    strings, stats = sampled_strings(target, prompt, length, settings, **decoded, seed=seed, typical=typical)
    return [
        Check(
            sampling,
            drafter.rule(greedy=False),
            chi_square(count_strings(drawn, target.config.vocab_size), exact[sampling]),
            counted.acceptance_length,
        )
        for sampling, drawn, counted in zip(settings, strings, stats, strict=True)
    ]


def format_table(results: Sequence[Check]) -> str:
    """One line per result."""
    lines = [f"{'setting':32} {'rule':5} {'samples':>7} {'chi2':>9} {'df':>4} {'p':>8} {'tau':>5}"]
    for result in results:
        default = Sampling()
        names = [field.name for field in dataclasses.fields(Sampling)]
        chosen = {name: getattr(result.sampling, name) for name in names}
        setting = " ".join(f"{name}={value:g}" for name, value in chosen.items() if value != getattr(default, name))
        test = result.test
        lines.append(
            f"{setting:32} {result.rule:5} {test.samples:7} {test.statistic:9.1f} {test.degrees:4} {test.p_value:8.2g} "
            f"{result.acceptance_length:5.2f}" + ("" if result.passed else "  NOT the target's distribution")
        )
    return "\n".join(lines)


def tiny_target(vocab_size: int = 5, seed: int = 0, dtype=jnp.float32, **config) -> Target:
    """A random target small enough to list its strings, with weights large enough to make them unequal.

    Args:
      vocab_size: V.
      seed: of its weights.
      dtype: of them.
      config: entries of `TransformerConfig` that should be otherwise than here.
    """
    shape = dict(width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24) | config
    network = TransformerConfig(vocab_size=vocab_size, **shape)
    params = transformer.init(network, jax.random.key(seed), dtype)
    params = jax.tree.map(lambda leaf: leaf * (8 if leaf.ndim > 1 else 1), params)
    return Target(network, transformer.for_decoding(params))


def string_distribution(
    target: Target, prompt: Sequence[int], length: int, sampling: Sampling
) -> Float[np.ndarray, "*V"]:
    """Probability of every continuation of `prompt` by `length` tokens, an array with `length` axes of size V.

    Args:
      target: its vocabulary should be tiny: V^(length - 1) texts go through one forward.
      prompt: token ids.
      length: tokens per string.
      sampling: settings, of a temperature above 0.

    Raises:
      UserError: too many strings, or a temperature of 0.
    """
    vocab_size = target.config.vocab_size
    if vocab_size**length > _MOST_STRINGS:
        raise UserError(
            f"{vocab_size} tokens make {vocab_size**length} strings of {length}, too many to list: use a target of a "
            "tiny vocabulary, such as eval.losslessness.tiny_target()"
        )
    if sampling.temperature == 0:
        raise UserError(
            "at temperature 0 there is one string and nothing to draw: compare it with plain decoding's instead"
        )
    strings = list(itertools.product(range(vocab_size), repeat=length - 1))
    logits_BTV = target.apply([[*prompt, *string] for string in strings]).logits[:, len(prompt) - 1 :]
    parameters = batch_sampling([sampling] * (len(strings) * length))
    shaped = apply_sampling(logits_BTV.reshape(-1, vocab_size), parameters)
    p_BTV = np.asarray(jax.nn.softmax(shaped, axis=-1), np.float64).reshape(logits_BTV.shape)
    exact = np.ones((vocab_size,) * length)
    for string, p_TV in zip(strings, p_BTV, strict=True):
        seen = np.prod([p_TV[place, token] for place, token in enumerate(string)])
        exact[string] = seen * p_TV[length - 1]
    return exact


def chi_square(
    counts: Int[np.ndarray, "*V"], expected_share: Float[np.ndarray, "*V"], fewest: float = 5.0
) -> ChiSquare:
    """Pearson's test; cells that expect fewer than `fewest` strings are pooled into one.

    Args:
      counts: observed strings.
      expected_share: their probabilities.
      fewest: below this the chi-square approximation is poor.
    """
    samples = int(counts.sum())
    observed, expected = counts.ravel().astype(np.float64), expected_share.ravel() * samples
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
) -> tuple[Int[np.ndarray, "settings samples length"], list[Stats]]:
    """Continuations of one prompt, `samples` for each setting, all in `batches` batches of one shape.

    Returns:
      The strings, and per setting what decoding them counted.
    """
    share = samples // batches
    rows = [sampling for sampling in settings for _ in range(share)]
    depth = 0 if drafter is None else drafter.max_depth
    drawn, counted = [], []
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
        drawn.append(np.array(generation.tokens).reshape(len(settings), share, length))
        parts = [generation.stats[start : start + share] for start in range(0, len(rows), share)]
        counted.append([Stats.total(part) for part in parts])
    return np.concatenate(drawn, axis=1), [Stats.total(parts) for parts in zip(*counted, strict=True)]


def count_strings(strings: Int[np.ndarray, "samples length"], vocab_size: int) -> Int[np.ndarray, "*V"]:
    """How often each string occurs, in the shape of `string_distribution`."""
    counts = np.zeros((vocab_size,) * strings.shape[1], np.int64)
    np.add.at(counts, tuple(strings.T), 1)
    return counts
