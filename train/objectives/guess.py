"""A guess of a token with its scores still to be read, and what it costs: the one loss of all that learn next tokens.

Guess i of position p answers for a label, and is compared with its teacher, the target at p + 1 + i, if there is one:

    hard * -log q(x) + soft * -sum_v t(v) log q(v) + feature * SmoothL1(g, h)

with q the guess, in the soft term at a temperature of its own, x the label, t the teacher, g what the guess's
vocabulary map reads and h the teacher's feature.
Scores over the vocabulary, of guesses and of the teacher, exist of one piece of the text at a time (`pieces.py`), and
what the teacher says there serves all guesses.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from decoding.sampling import argmax, top_k
from models.heads import vocabulary
from models.sharding import keep_batch
from train.objectives.block_losses import d_pace
from train.objectives.divergences import Divergence
from train.objectives.pieces import mapped, pieces_of, separable_sums, summed
from train.objectives.shift import ahead, behind, log_likelihood

# What the soft term may be: the cross-entropy, or a divergence with its default numbers, none of those that draw.
Compared = Literal["cross_entropy", "forward_kl", "reverse_kl", "jsd", "tvd", "nla", "hybrid"]


def divergence_of(name: Compared) -> Divergence | None:
    """As `Weights` has it."""
    return None if name == "cross_entropy" else Divergence(name)


class Weights(NamedTuple):
    """Weights of the loss's terms; rho, by which guess i counts rho^i; the guess's temperature in the soft term, or
    another divergence in its place, none of those that draw; and whether guesses of one position count as D-PACE has
    it, a hard term alone."""

    hard: float
    soft: float
    feature: float
    decay: float
    temperature: float = 1.0
    divergence: Divergence | None = None
    d_pace: bool = False


class Labels(NamedTuple):
    """The tokens that guesses answer for, whether they count, and how much; None is all alike."""

    tokens: Int[Array, "B S"]
    counted: Bool[Array, "B S"]
    weight: Float[Array, "B S"] | None = None


class Guess(NamedTuple):
    """What is guessed at one depth, its logits still to be read.

    Attributes:
      hidden: what the vocabulary map reads.
      at: the positions that are guessed from; None is all T of them.
      labels: what the guesses answer for.
      read: the vocabulary map, from rows `[..., H]` of `hidden` to logits `[..., W]`. The loss calls it as late and for
        as many rows as it likes. Its bound arguments are what is trained through it; what it closes over is not.
    """

    hidden: Float[Array, "B S H"]
    at: Int[Array, "B S"] | None
    labels: Labels
    read: Partial


class Teacher(NamedTuple):
    """The frozen target on a text, its logits still to be read.

    Attributes:
      scored: arrays `[B, T, ...]` that `read` makes logits from.
      read: from rows of them to logits `[..., W]` of the tokens that guesses are of.
      feature: what guesses' features are compared with; None where nothing does.
      known: those tokens; None is all, in order.
      choice: its first choice at every position, among all tokens; None where nobody asks.
      learnt: where its first choice is one of the known tokens; None is everywhere.
    """

    scored: Any
    read: Callable[[Any], Array]
    feature: Float[Array, "B T H"] | None = None
    known: Int[Array, "W"] | None = None
    choice: Int[Array, "B T"] | None = None
    learnt: Bool[Array, "B T"] | None = None


def first_choices(read: Callable[[Any], Array], scored: Any, devices: int = 1) -> Int[Array, "B T"]:
    """The best token at every position, by a head that reads `scored`."""
    return mapped(lambda rows: argmax(_read(read, rows)), scored, pieces_of([(read, scored)], devices))


def log_masses(
    read: Callable[..., Array], scored: Any, known: Int[Array, "W"], devices: int = 1
) -> Float[Array, "B T"]:
    """log of how probable the tokens `known` are together at every position, by a head that reads `scored`."""

    def mass(rows):
        logits = _read(read, rows)
        return jax.nn.logsumexp(logits[..., known], axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    return mapped(mass, scored, pieces_of([(read, scored)], devices))


def losses(
    guesses: Sequence[Guess], teacher: Teacher | None, weights: Weights, devices: int = 1
) -> tuple[Float[Array, "D"], Float[Array, "D"]]:
    """(sums, weights): by depth, the loss over the labels that count, before its decay, and their number.

    Where guesses are of fewer tokens than the target's, labels count only where its first choice is one of these, and
    with a hard term only where they are themselves.

    Args:
      guesses: by depth.
      teacher: None where there is no soft or feature term.
      weights: of the terms.
      devices: that share the work.
    """
    found: dict[int, tuple[Array, Array]] = {}
    if weights.d_pace:
        guesses = paced(guesses, devices)
    for depths, reads, hiddens, rows in _groups(guesses, teacher, weights):

        def score(k, read, hidden, rows, taught):
            return _loss(weights, _read(read, hidden), hidden, k, rows, taught)

        share = functools.partial(_taught, teacher, weights)
        sums = separable_sums(share, score, reads, hiddens, rows, _pieces(reads, hiddens, teacher, rows, devices))
        found.update((i, (sums[k], jnp.sum(rows.learnt[k]).astype(sums.dtype))) for k, i in enumerate(depths))
    totals, counts = zip(*(found[i] for i in range(len(guesses))), strict=True)
    return jnp.stack(totals), jnp.stack(counts)


def paced(guesses: Sequence[Guess], devices: int = 1) -> list[Guess]:
    """The guesses, all of every position and of all tokens, with D-PACE's weights for their labels."""
    assert all(guess.at is None for guess in guesses), "a block of guesses is made from one place"
    likely = []
    for guess in jax.lax.stop_gradient(list(guesses)):

        def of_label(piece, read=guess.read):
            hidden, tokens = piece
            return log_likelihood(_read(read, hidden), tokens)

        likely.append(
            mapped(of_label, (guess.hidden, guess.labels.tokens), pieces_of([(guess.read, guess.hidden)], devices))
        )
    counted_BSD = jnp.stack([guess.labels.counted for guess in guesses], axis=-1)
    weight_BSD = d_pace(jnp.stack(likely, axis=-1), counted_BSD)
    return [guess._replace(labels=guess.labels._replace(weight=weight_BSD[..., i])) for i, guess in enumerate(guesses)]


def measures(
    guesses: Sequence[Guess], teacher: Teacher | None, weights: Weights, devices: int = 1
) -> list[dict[str, tuple[Array, Array]]]:
    """By depth (sum, weight) of the `loss`; of how often the first choice is the text's token (`accuracy`); and, where
    the teacher's is known, of how often it is that (`agreement`), which is what greedy verification would accept."""
    found: dict[int, dict[str, tuple[Array, Array]]] = {}
    for depths, reads, hiddens, rows in _groups(guesses, teacher, weights):

        def measure(piece, reads=reads):
            hiddens, rows = piece
            taught = _taught(teacher, weights, rows)
            sums = []
            for k, (read, hidden) in enumerate(zip(reads, hiddens, strict=True)):
                logits = _read(read, hidden)
                choice = vocabulary.tokens_of(None if teacher is None else teacher.known, argmax(logits))
                sums.append({"loss": _loss(weights, logits, hidden, k, rows, taught)})
                for name, right in (("accuracy", rows.tokens[k]), ("agreement", rows.choice)):
                    if right is not None:
                        sums[k][name] = jnp.sum((choice == right) & rows.counted[k]).astype(logits.dtype)
            return sums

        sums = summed(measure, (hiddens, rows), _pieces(reads, hiddens, teacher, rows, devices))
        for k, i in enumerate(depths):
            of = {name: rows.learnt[k] if name == "loss" else rows.counted[k] for name in sums[k]}
            found[i] = {name: (value, jnp.sum(of[name]).astype(value.dtype)) for name, value in sums[k].items()}
    return [found[i] for i in range(len(guesses))]


class _Rows(NamedTuple):
    """What guesses whose teacher stands at the same places are compared with; of what differs, one each. `outputs` are
    `tokens` as outputs of the guess."""

    tokens: list[Int[Array, "B S"]]
    outputs: list[Int[Array, "B S"]]
    counted: list[Bool[Array, "B S"]]
    learnt: list[Bool[Array, "B S"]]
    weight: list[Float[Array, "B S"] | None]
    scored: Any
    feature: Float[Array, "B S H"] | None
    choice: Int[Array, "B S"] | None


def _groups(guesses: Sequence[Guess], teacher: Teacher | None, weights: Weights):
    """(depths, maps, features, rows) of guesses whose teacher stands at the same places: of all that are made from
    everywhere, moved to where it stands, which loses nothing that has a label; and of each of the others."""
    everywhere = [i for i, guess in enumerate(guesses) if guess.at is None]
    for depths in [everywhere] * bool(everywhere) + [[i] for i, guess in enumerate(guesses) if guess.at is not None]:
        at = guesses[depths[0]].at

        def lined_up(i, x, at=at):
            return x if at is not None or teacher is None else behind(x, i + 1)

        def taught(x, at=at, first=depths[0]):
            return x if at is None else jax.tree.map(lambda leaf: picked(ahead(leaf, first + 1), at), x)

        tokens = [lined_up(i, guesses[i].labels.tokens) for i in depths]
        counted = [lined_up(i, guesses[i].labels.counted) for i in depths]
        facts = None if teacher is None else (teacher.scored, teacher.feature, teacher.choice, teacher.learnt)
        scored, feature, choice, learnt = taught(facts) if facts else [None] * 4
        known = None if teacher is None else teacher.known
        outputs = [vocabulary.outputs_of(known, x) for x in tokens]
        learns = [x if learnt is None else x & learnt for x in counted]
        if known is not None and weights.hard:
            learns = [x & (output >= 0) for x, output in zip(learns, outputs, strict=True)]
        weight = [jax.tree.map(functools.partial(lined_up, i), guesses[i].labels.weight) for i in depths]
        rows = _Rows(tokens, outputs, counted, learns, weight, scored, feature, choice)
        yield depths, [guesses[i].read for i in depths], [lined_up(i, guesses[i].hidden) for i in depths], rows


def _pieces(reads, hiddens, teacher: Teacher | None, rows: _Rows, devices: int) -> int:
    teachers = [] if teacher is None else [(teacher.read, rows.scored)]
    return pieces_of([*zip(reads, hiddens, strict=True), *teachers], devices)


def _read(read: Callable[[Any], Array], hidden: Any) -> Float[Array, "B S W"]:
    """Scores, where the rows are that they are of."""
    return keep_batch(read(jax.tree.map(keep_batch, hidden)))


def _taught(teacher: Teacher | None, weights: Weights, rows: _Rows) -> Float[Array, "B S W"] | None:
    """The teacher's distributions, where they are asked for; for a divergence their logarithms."""
    if teacher is None or not weights.soft:
        return None
    scores = _read(teacher.read, rows.scored)
    return weights.divergence.log_probabilities(scores) if weights.divergence else jax.nn.softmax(scores, axis=-1)


def _loss(weights: Weights, logits, hidden, k: int, rows: _Rows, taught) -> Float[Array, ""]:
    """The loss of the k-th guess, over the rows that count."""
    loss_BS = jnp.zeros(logits.shape[:-1], logits.dtype)
    if weights.hard:
        loss_BS -= weights.hard * log_likelihood(logits, rows.outputs[k])
    if weights.soft and weights.divergence:
        loss_BS += weights.soft * weights.divergence.between(weights.divergence.log_probabilities(logits), taught)
    elif weights.soft:
        tempered = logits / weights.temperature
        expected_BS = jnp.sum(taught * tempered, axis=-1)
        loss_BS += weights.soft * (jax.nn.logsumexp(tempered, axis=-1) - expected_BS)
    if weights.feature:
        loss_BS += weights.feature * jnp.mean(optax.huber_loss(hidden, rows.feature), axis=-1)
    if (weight_BS := rows.weight[k]) is not None:
        loss_BS *= weight_BS
    return jnp.sum(loss_BS * rows.learnt[k])


def picked(values: Array, at: Int[Array, "B S"] | None) -> Array:
    """`values[b, at[b, s]]`, along axis 1; all of them for None."""
    return values if at is None else jax.vmap(lambda row, places: row[places])(values, at)


def drawn_places(valid: Bool[Array, "B T"], count: int, key: Array) -> tuple[Int[Array, "B A"], Bool[Array, "B A"]]:
    """Some of the valid places of every row without replacement, ascending, and which of them are: rows that have
    fewer than `count` are filled up."""
    length = valid.shape[1]
    noise_BT = jax.random.uniform(key, valid.shape)
    chance_BA, at_BA = top_k(jnp.where(valid, noise_BT, -1.0), min(count, length))
    order_BA = jnp.sort(jnp.where(chance_BA >= 0, at_BA, length), axis=1)
    return jnp.minimum(order_BA, length - 1).astype(jnp.int32), order_BA < length
