"""How far a student's distribution of the next token lies from its teacher's: the divergences of distillation.

What looks at one row is a pure function of log-probabilities, float32 or wider: q the student's, p the teacher's at the
same place, over V tokens. With alpha = sum_v min(p, q), the chance that verification keeps a token drawn from q:

    forward_kl           sum p log(p / q)                          its gradient in the student's logits: q - p
    reverse_kl           sum q log(q / p)                          q (log(q / p) - reverse_kl)
    jsd                  b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q
                                                                   (1 - b) q (log(q / m) - KL(q || m))
    skewed_kl            KL(p || s p + (1 - s) q)                  DistiLLM (Ko et al. 2024)
    skewed_reverse_kl    KL(q || s q + (1 - s) p)
    tvd                  sum |p - q| / 2 = 1 - alpha               q (s - sum q s) / 2,  s = sign(q - p)
    tvd++                -A(y) log q(y),  y drawn from q           -A(y) (e_y - q)       (Goel et al. 2024)
    nla                  -log max(alpha, 1e-5)                     that of tvd over alpha (LK losses)
    hybrid               w KL(p || q) + (1 - w) tvd,  w = exp(-3 alpha)

jsd at b = 0 is defined as forward and at b = 1 as reverse KL, as others have it; the formula itself tends to 0 there.
tvd++ rewards a drawn token with 1 where p(y) > q(y), and A is the reward less its mean, over its standard deviation,
over the rows of the batch; without the division and the mean its expected gradient is exactly that of tvd. At a
temperature both distributions are flattened and the result is multiplied by its square.

A token that p cannot draw (a logit of -inf) adds nothing to what p weighs, 0 log 0 being 0. Where q weighs, it costs as
if p gave it e^-50: finite, steep, and no part of q is dropped. A row in which p has no token at all costs nothing.

`divergence_sums` is the loss of a text: teacher and student bring what their vocabulary maps read, and scores of both
exist of a piece of the text at a time (`pieces.py`), one column of a batch at least, whatever the vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from decoding.sampling import argmax, invert
from models import schema
from models.sharding import keep_batch
from train.objectives.pieces import mapped, pieces_of, separable_sums, summed
from train.objectives.shift import log_likelihood

_LEAST_ALPHA = 1e-5
_LEAST_LOG = -50.0  # Of p, where q weighs it.

Names = Literal[
    "forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "tvd", "tvd++", "nla", "hybrid"
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Which divergence, and its numbers; see the module.

    Attributes:
      name: of it.
      beta: b of `jsd`.
      skew: s of the skewed ones.
      temperature: of both distributions.
    """

    name: Names = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    temperature: float = 1.0

    def __post_init__(self):
        schema.require(0 <= self.beta <= 1, "divergence.beta must lie in 0..1", self.beta)
        schema.require(0 <= self.skew < 1, "divergence.skew must lie in 0..1, 1 excluded", self.skew)
        schema.require(0 < self.temperature < math.inf, "divergence.temperature must be positive", self.temperature)
        for field, names in (("beta", ("jsd",)), ("skew", ("skewed_kl", "skewed_reverse_kl"))):
            if self.name not in names:
                schema.require_defaults(self, field, why=f"is for {' and '.join(names)}", where="divergence")

    @property
    def drawn(self) -> bool:
        """Whether it is estimated from a token drawn per row, and wants `Rows.uniform`."""
        return self.name == "tvd++"

    @property
    def floored(self) -> bool:
        """Whether a token that the teacher cannot draw costs what the floor under its probability says."""
        return (
            self.name == "reverse_kl"
            or (self.name == "jsd" and self.beta == 1)
            or (self.name == "skewed_reverse_kl" and self.skew == 0)
        )

    def log_probabilities(self, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """At the temperature, float32 or wider."""
        return log_probabilities(logits, self.temperature)

    def between(self, log_q: Float[Array, "*B V"], log_p: Float[Array, "*B V"]) -> Float[Array, "*B"]:
        """Of every row, given `log_probabilities` of both; `log_p` is taken as constant. Not for what is `drawn`."""
        log_p = jax.lax.stop_gradient(log_p)
        possible = jnp.any(log_p > -jnp.inf, axis=-1)
        # What has no distribution must not spoil the gradients of what has: it is compared with the uniform one.
        log_p = jnp.where(possible[..., None], log_p, -math.log(log_p.shape[-1]))
        return jnp.where(possible, self.temperature**2 * self._of(log_q, log_p), 0)

    def _of(self, log_q, log_p):
        match self.name:
            case "reverse_kl":
                return reverse_kl(log_q, log_p)
            case "jsd":
                return jsd(log_q, log_p, self.beta)
            case "skewed_kl":
                return kl(log_p, mixture(self.skew, log_p, log_q))
            case "skewed_reverse_kl":
                return kl(log_q, mixture(self.skew, log_q, jnp.maximum(log_p, _LEAST_LOG)))
            case "tvd":
                return tvd(log_q, log_p)
            case "nla":
                return nla(log_q, log_p)
            case "hybrid":
                return hybrid(log_q, log_p)
        assert self.name == "forward_kl", f"{self.name} is not between two distributions alone"
        return forward_kl(log_q, log_p)


def log_probabilities(logits: Float[Array, "*B V"], temperature: float = 1.0) -> Float[Array, "*B V"]:
    """log softmax(logits / temperature), float32 or wider; of a row of -inf alone it is that row."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    possible = jnp.any(logits > -jnp.inf, axis=-1, keepdims=True)
    return jnp.where(possible, jax.nn.log_softmax(jnp.where(possible, logits, 0), axis=-1), -jnp.inf)


def acceptance(log_q: Float[Array, "*B V"], log_p: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """alpha, the chance that a token drawn from q survives verification against p."""
    return jnp.sum(jnp.minimum(jnp.exp(log_q), jnp.exp(log_p)), axis=-1)


def l1(log_q: Float[Array, "*B V"], log_p: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """sum |q - p|, twice the total variation."""
    return jnp.sum(jnp.abs(jnp.exp(log_q) - jnp.exp(log_p)), axis=-1)


def tvd(log_q: Float[Array, "*B V"], log_p: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Total variation, 1 - alpha."""
    return l1(log_q, log_p) / 2


def kl(log_a: Float[Array, "*B V"], log_b: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(a || b); tokens that a cannot draw add nothing."""
    a = jnp.exp(log_a)
    return jnp.sum(a * (jnp.where(a > 0, log_a, 0) - jnp.where(a > 0, log_b, 0)), axis=-1)


def forward_kl(log_q: Float[Array, "*B V"], log_p: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(p || q)."""
    return kl(log_p, log_q)


def reverse_kl(log_q: Float[Array, "*B V"], log_p: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(q || p), where p gives every token e^-50 at least."""
    return kl(log_q, jnp.maximum(log_p, _LEAST_LOG))


def jsd(log_q: Float[Array, "*B V"], log_p: Float[Array, "*B V"], beta: float = 0.5) -> Float[Array, "*B"]:
    """The generalised Jensen-Shannon divergence, whose end points are the two KLs."""
    if beta == 0:
        return forward_kl(log_q, log_p)
    if beta == 1:
        return reverse_kl(log_q, log_p)
    between = mixture(beta, log_p, log_q)
    return beta * kl(log_p, between) + (1 - beta) * kl(log_q, between)


def mixture(share: float, log_a: Float[Array, "*B V"], log_b: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """log(share a + (1 - share) b)."""
    if share == 0:
        return log_b
    log_a, log_b = log_a + math.log(share), log_b + math.log1p(-share)
    possible = (log_a > -jnp.inf) | (log_b > -jnp.inf)
    mixed = jnp.logaddexp(jnp.where(possible, log_a, 0), jnp.where(possible, log_b, 0))
    return jnp.where(possible, mixed, -jnp.inf)


def nla(log_q: Float[Array, "*B V"], log_p: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Negative log-acceptance."""
    return -jnp.log(jnp.maximum(acceptance(log_q, log_p), _LEAST_ALPHA))


def hybrid(
    log_q: Float[Array, "*B V"], log_p: Float[Array, "*B V"], weight: Float[Array, "*#B"] | None = None
) -> Float[Array, "*B"]:
    """KL where little is accepted, total variation where much is; `weight` is that of KL, None each row's own."""
    weight = hybrid_weight(acceptance(log_q, log_p)) if weight is None else weight
    return weight * forward_kl(log_q, log_p) + (1 - weight) * tvd(log_q, log_p)


def hybrid_weight(alpha: Float[Array, "*B"], decay: float = 3.0) -> Float[Array, "*B"]:
    """Of KL, at an acceptance of a row or at the mean one of a batch; taken as constant."""
    return jnp.exp(-decay * jax.lax.stop_gradient(alpha))


def drawn(log_q: Float[Array, "*B V"], uniform: Float[Array, "*B 2"]) -> Int[Array, "*B"]:
    """A token of every row, drawn from q by two uniform numbers."""
    mass = jnp.exp(log_q).reshape(-1, log_q.shape[-1])
    return invert(mass, uniform.reshape(-1, 2)).reshape(log_q.shape[:-1])


def rewards(log_q: Float[Array, "*B V"], log_p: Float[Array, "*B V"], tokens: Int[Array, "*B"]) -> Bool[Array, "*B"]:
    """Whether verification would always keep these tokens: p(y) > q(y)."""
    at = tokens[..., None].astype(jnp.int32)
    return jnp.take_along_axis(log_p > log_q, at, axis=-1)[..., 0]


def standardised(reward: Bool[Array, "*B"], counted: Bool[Array, "*B"]) -> Float[Array, "*B"]:
    """The advantage of every row: its reward less the mean, over the deviation; 0 where it does not count."""
    number = jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
    centred = jnp.where(counted, reward - jnp.sum(reward & counted) / number, 0)
    return centred / (jnp.sqrt(jnp.sum(centred**2) / number) + 1e-8)


class Student(NamedTuple):
    """One network that is taught, its logits still to be read.

    Attributes:
      hidden: what its vocabulary map reads.
      read: the vocabulary map, from rows of `hidden` to logits; its bound arguments are what is trained through it.
    """

    hidden: Float[Array, "B S H"]
    read: Partial


class Rows(NamedTuple):
    """What students are compared with, place by place.

    Attributes:
      counted: where.
      scored: arrays `[B, S, ...]` that the teacher's logits are made from.
      labels: tokens of the text; None where nobody asks.
      uniform: two numbers in [0, 1) per row, for divergences that draw.
      weight: of every row in the sums; None is 1.
    """

    counted: Bool[Array, "B S"]
    scored: Any
    labels: Int[Array, "B S"] | None = None
    uniform: Float[Array, "B S 2"] | None = None
    weight: Float[Array, "B S"] | None = None


def divergence_sums(
    divergence: Divergence,
    students: Sequence[Student],
    teacher: Callable[[Any], Array],
    rows: Rows,
    *,
    soft: float = 1.0,
    hard: float = 0.0,
    devices: int = 1,
) -> Float[Array, "N"]:
    """Of each student the sum over the rows that count of soft * divergence + hard * -log q(label).

    Differentiable in the students' features and maps, and in nothing else.

    Args:
      divergence: which.
      students: that learn from the same teacher at the same places, such as the exits of one network.
      teacher: from rows of `rows.scored` to its logits.
      rows: what is known of them.
      soft: weight of the divergence.
      hard: weight of the text's own tokens, which are compared at temperature 1.
      devices: that share the work.
    """
    hiddens, reads = [student.hidden for student in students], [student.read for student in students]
    pieces = _pieces(students, teacher if soft else None, rows, devices)
    advantages = None
    if soft and divergence.drawn:
        advantages = [_advantages(divergence, student, teacher, rows, pieces) for student in students]

    def share(piece):
        return divergence.log_probabilities(_read(teacher, piece[0].scored)) if soft else None

    def score(k, read, hidden, piece, log_p):
        rows, advantages = piece
        logits = _read(read, hidden)
        loss = jnp.zeros(logits.shape[:-1], jnp.promote_types(logits.dtype, jnp.float32))
        if hard:
            loss -= hard * log_likelihood(logits, rows.labels)
        if advantages is not None:
            tokens, advantage = advantages[k]
            factor = soft * divergence.temperature**2
            loss -= factor * advantage * log_likelihood(logits / divergence.temperature, tokens)
        elif soft:
            loss += soft * divergence.between(divergence.log_probabilities(logits), log_p)
        return jnp.sum(jnp.where(rows.counted, loss if rows.weight is None else loss * rows.weight, 0))

    return separable_sums(share, score, reads, hiddens, (rows, advantages), pieces)


def divergence_measures(
    divergence: Divergence, students: Sequence[Student], teacher: Callable[[Any], Array], rows: Rows, devices: int = 1
) -> list[dict[str, Float[Array, ""]]]:
    """Of each student, sums over the rows that count, at temperature 1 but for `loss`, the divergence (of `drawn` ones
    that of `tvd`, which they estimate): `alpha`, what verification keeps of sampled drafts; `agreement`, of greedy
    ones; `accuracy`, its first choice being the label; and `cross_entropy` with the labels."""
    divergence = dataclasses.replace(divergence, name="tvd") if divergence.drawn else divergence
    plain = dataclasses.replace(divergence, temperature=1.0)

    def measure(piece):
        hiddens, rows = piece
        scores = _read(teacher, rows.scored)
        log_p, choice, found = plain.log_probabilities(scores), argmax(scores), []
        for student, hidden in zip(students, hiddens, strict=True):
            logits = _read(student.read, hidden)
            log_q = plain.log_probabilities(logits)
            values = {
                "loss": divergence.between(divergence.log_probabilities(logits), divergence.log_probabilities(scores)),
                "alpha": acceptance(log_q, log_p),
                "agreement": argmax(logits) == choice,
                "accuracy": argmax(logits) == rows.labels,
                "cross_entropy": -log_likelihood(logits, rows.labels),
            }
            found.append(
                {name: jnp.sum(jnp.where(rows.counted, x, 0)).astype(log_q.dtype) for name, x in values.items()}
            )
        return found

    return summed(measure, ([one.hidden for one in students], rows), _pieces(students, teacher, rows, devices))


def _advantages(divergence, student, teacher, rows, pieces):
    """(tokens, advantages) of tokens that the student draws at its rows."""

    def draw(piece):
        hidden, rows = piece
        log_q = divergence.log_probabilities(_read(student.read, hidden))
        log_p = divergence.log_probabilities(_read(teacher, rows.scored))
        tokens = drawn(log_q, rows.uniform)
        kept, possible = rewards(log_q, log_p, tokens), jnp.any(log_p > -jnp.inf, axis=-1)
        return jnp.stack([tokens, kept.astype(jnp.int32), possible.astype(jnp.int32)], axis=-1)

    found = mapped(draw, jax.lax.stop_gradient((student.hidden, rows)), pieces)
    return found[..., 0], standardised(found[..., 1] > 0, rows.counted & (found[..., 2] > 0))


def _pieces(students, teacher, rows: Rows, devices: int) -> int:
    teachers = [] if teacher is None else [(teacher, rows.scored)]
    return pieces_of([*((student.read, student.hidden) for student in students), *teachers], devices)


def _read(read: Callable[[Any], Array], hidden: Any) -> Float[Array, "B S V"]:
    """Scores, where the rows are that they are of."""
    return keep_batch(read(jax.tree.map(keep_batch, hidden)))
