"""Sampled text follows the target distribution: chi-square against exact enumeration, and what the test can catch.

Every test here draws strings of 3 tokens over a vocabulary of 5 (at most 125 cells), 2048 strings per setting, with
fixed seeds; it passes at p > 1e-4. Where drafts are verified by meeting the target's own draws, the strings must
be those of plain decoding besides, seed by seed. What a rule does with far more keys is in test_sampled_rules.py.
"""

import dataclasses
import functools
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafter import Drafter
from decoding.drafters.network_drafter import NetworkDrafter
from decoding.generate import generate
from decoding.policies import DySpec, Expanding, Scores, Static, StochasticBeam, TreePolicy
from decoding.policies import Slots as SlotsPolicy
from decoding.sampling import Sampling, draw
from decoding.trees import SAMPLED_RULES, TokenTree, from_child_counts
from decoding.verify import Typical, verify
from eval.losslessness import (
    SMALLEST_P,
    Check,
    ChiSquare,
    check_losslessness,
    chi_square,
    count_strings,
    format_table,
    sampled_strings,
    string_distribution,
    tiny_target,
)
from models.errors import UserError
from tests.decoding.drafter_cases import CASES

# A longer prompt would be read by thousands of rows, in chunks of sixteen.
SAMPLES, PROMPT, LENGTH, VOCAB = 2048, [1], 3, 5
SETTINGS = {
    "temperature": Sampling(temperature=1.5),
    "top_p": Sampling(temperature=2.0, top_p=0.7),
    "top_k": Sampling(temperature=3.0, top_k=3),
    "min_p": Sampling(temperature=1.5, min_p=0.4),
}
WIDE = from_child_counts({(): 3, (0,): 3, (1,): 3, (2,): 3})

pytestmark = pytest.mark.usefixtures("x64")

GROUP_BY = "rule"  # Policies of a rule share a program and its run; all others, what little the target's take.


@functools.cache
def target():
    with jax.enable_x64(True):
        return tiny_target(VOCAB, dtype=jnp.float64)


@functools.cache
def exact(setting: str) -> np.ndarray:
    with jax.enable_x64(True):
        return string_distribution(target(), PROMPT, LENGTH, SETTINGS[setting])


@functools.cache
def plain_strings() -> np.ndarray:
    with jax.enable_x64(True):
        drafter, params = CASES["none"](target(), jax.random.key(3))
        arguments = dict(drafter=drafter, drafter_params=params, samples=SAMPLES, seed=1)
        return sampled_strings(target(), PROMPT, LENGTH, list(SETTINGS.values()), **arguments)[0]


def judge(strings: np.ndarray) -> dict[str, ChiSquare]:
    return {
        setting: chi_square(count_strings(drawn, VOCAB), exact(setting))
        for setting, drawn in zip(SETTINGS, strings, strict=True)
    }


def check(drafter: Drafter, params, samples: int = SAMPLES, **settings) -> dict[str, Check]:
    settings = settings or SETTINGS
    results = check_losslessness(target(), drafter, params, PROMPT, LENGTH, list(settings.values()), samples, seed=1)
    print(format_table(results))
    return dict(zip(settings, results, strict=True))


# Drafters that cost nothing: a table of bigrams is the draft network, and a policy makes the tree.


@dataclasses.dataclass(frozen=True)
class Bigrams:
    """The draft network: what follows a token depends on that token alone."""

    table: jax.Array
    vocab_size: int = VOCAB

    def begin(self, root, slots):
        return Scores(self.table[root][:, None]), ()

    def extend(self, scratch, level, at, tokens, parents, seen):
        return Scores(self.table[tokens]), ()


@dataclasses.dataclass(frozen=True)
class Table(NetworkDrafter):
    """A drafter made of a policy; its parameters are the logits of the table."""

    policy: TreePolicy
    name: ClassVar[str] = "table"

    def network(self, params, target, state):
        return Bigrams(params)


@dataclasses.dataclass(frozen=True)
class Slots:
    """A block network: what stands in a slot depends on the slot alone, and all rows of a level share one distribution.

    Attributes:
      table: logits, a row for each slot.
    """

    table: jax.Array
    vocab_size: int = VOCAB

    def begin(self, root, slots):
        return self._slot(root[:, None], 0), ()

    def extend(self, scratch, level, at, tokens, parents, seen):
        return self._slot(tokens, level), ()

    def _slot(self, tokens, level):
        logits = jnp.broadcast_to(self.table[level], (len(tokens), 1, VOCAB))
        return Scores(logits, jnp.zeros((1, tokens.shape[1]), jnp.int32))


class Block(Table):
    """A drafter whose network guesses a block in one pass."""

    def network(self, params, target, state):
        return Slots(params)


class RankedAsIfDrawn(Table):
    """Known to be wrong: the most likely children, offered with q as if they had been drawn from it."""

    def draft(self, params, target, state, root, keys):
        ranking = dataclasses.replace(target.sampling, temperature=jnp.zeros_like(target.sampling.temperature))
        return self.policy.grow(Bigrams(params), root, keys, ranking).tree, None


class PrunedByOwnProbability(Table):
    """Known to be wrong: children are drawn, and those whose own q is small are deleted afterwards."""

    def draft(self, params, target, state, root, keys):
        tree, _ = super().draft(params, target, state, root, keys)
        row = jnp.broadcast_to(tree.proposal_of, tree.tokens.shape)
        above = jnp.take_along_axis(row, jnp.maximum(jnp.broadcast_to(tree.parent, row.shape), 0), axis=1)
        q_BNV = jnp.take_along_axis(tree.proposals, jnp.maximum(above, 0)[:, :, None], axis=1)
        own_BN = jnp.take_along_axis(q_BNV, tree.tokens[:, :, None], axis=2)[:, :, 0]
        return dataclasses.replace(tree, valid=tree.valid & ((tree.depth == 0) | (own_BN >= 0.12))), None


def table() -> jax.Array:
    """Not flat, and not the target's."""
    return 1.2 * jax.random.normal(jax.random.key(5), (VOCAB, VOCAB), jnp.float64)


@dataclasses.dataclass(frozen=True)
class RowByRow(Drafter):
    """Several drafters of one rule and one set of parameters, each for an equal share of the rows, in one program."""

    parts: tuple[Table, ...]
    name: ClassVar[str] = "row_by_row"

    @property
    def max_nodes(self):
        return max(part.max_nodes for part in self.parts)

    @property
    def max_depth(self):
        return max(part.max_depth for part in self.parts)

    def rule(self, greedy):
        (rule,) = {part.rule(greedy) for part in self.parts}
        return rule

    def draft(self, params, target, state, root, keys):
        share = len(root) // len(self.parts)
        trees = []
        for i, part in enumerate(self.parts):
            rows = slice(i * share, (i + 1) * share)
            view = dataclasses.replace(target, sampling=jax.tree.map(lambda x, rows=rows: x[rows], target.sampling))
            trees.append(part.draft(params, view, state, root[rows], keys[rows])[0])

        def joined(name: str, fill: int | bool) -> jax.Array:
            values = [getattr(tree, name) for tree in trees]
            sizes = np.max([value.shape[1:] for value in values], axis=0)
            padding = [[(0, 0), *((0, most - n) for most, n in zip(sizes, x.shape[1:], strict=True))] for x in values]
            padded = [jnp.pad(x, pad, constant_values=fill) for x, pad in zip(values, padding, strict=True)]
            return jnp.concatenate([jnp.broadcast_to(x, (share, *sizes)) for x in padded])

        fills = dict(tokens=0, parent=0, depth=0, valid=False, children=-1, ancestors=False)
        fills |= dict(proposals=0, proposal_of=-1) if self.rule(False) in SAMPLED_RULES else {}
        fields = {name: joined(name, fill) for name, fill in fills.items()}
        # A node of padding sees itself, as every row must see something.
        fields["ancestors"] |= jnp.eye(self.max_nodes, dtype=bool)
        return TokenTree(**fields, rule=self.rule(False)), None


# By rule, what grows the trees; those of one rule share a program.
POLICIES = {
    "swor": {
        "swor 3x3": Table(Static(WIDE, "without")),
        "every token": Table(Static(from_child_counts({(): VOCAB, (0,): VOCAB}), "without")),
        "beam": Table(StochasticBeam(width=3, depth=2)),
        "dyspec": Table(DySpec(budget=8, depth=3, width=3, branch=3)),
        "block 3x3": Block(Static(WIDE, "without")),
        "ranked as if drawn": RankedAsIfDrawn(Static(WIDE, "without")),
        "pruned by own probability": PrunedByOwnProbability(Static(WIDE, "without")),
    },
    "iid": {"iid 3x3": Table(Static(WIDE, "with")), "block iid 3x3": Block(Static(WIDE, "with"))},
    "point": {
        "top 3x3": Table(Static(WIDE, "top")),
        "slots": Block(SlotsPolicy(depth=3, total=9)),
        "accum_logp": Block(Expanding(depth=3, total=9, width=3)),
    },
}
WRONG = ("ranked as if drawn", "pruned by own probability")


@functools.cache
def of_policies(rule: str) -> dict[str, dict[str, Check]]:
    """Every policy of a rule by its name, with a vocabulary that is cut and with one that is not."""
    settings, parts = ("temperature", "top_p"), POLICIES[rule]
    with jax.enable_x64(True):
        drafter = RowByRow(tuple(parts.values()))
        asked = [SETTINGS[setting] for _ in parts for setting in settings]
        results = iter(check_losslessness(target(), drafter, table(), PROMPT, LENGTH, asked, SAMPLES, seed=1))
    return {name: {setting: next(results) for setting in settings} for name in parts}


@pytest.mark.parametrize(
    ("rule", "name"), [(rule, name) for rule, parts in POLICIES.items() for name in parts if name not in WRONG]
)
def test_policies_are_lossless(rule: str, name: str) -> None:
    for setting, result in of_policies(rule)[name].items():
        assert result.rule == rule and result.test.samples == SAMPLES and result.test.degrees > 5
        assert result.passed, f"{setting}: {result}"
        assert result.acceptance_length > 1.1, "nothing was accepted, so nothing was shown"


@pytest.mark.parametrize(("rule", "name"), [("swor", name) for name in WRONG])
def test_known_bad_constructions_are_caught(rule: str, name: str) -> None:
    """Both are found in published code; a harness that lets them through shows nothing."""
    result = of_policies(rule)[name]["temperature"]
    assert result.rule == rule and not result.passed and result.test.p_value < 1e-12
    assert "NOT the target's distribution" in format_table([result])


def test_drafts_and_verification_draw_from_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read off all draws of a decode that begins at the first position: new in every step, and never the verifier's."""
    used: dict[bool, list] = {True: [], False: []}

    def watched(draw):
        def drawing(key, *arguments):
            by_drafter = sys._getframe(1).f_globals["__name__"].startswith("decoding.policies")
            jax.debug.callback(lambda data: used[by_drafter].append(tuple(data.tolist())), jax.random.key_data(key))
            return draw(key, *arguments)

        return drawing

    for name in ("gumbel", "uniform"):
        monkeypatch.setattr(jax.random, name, watched(getattr(jax.random, name)))
    drafter = Table(Static(from_child_counts({(): 2, (0,): 1}), "without"))
    arguments = dict(drafter=drafter, drafter_params=table(), max_new_tokens=30, stop=[], seeds=5)
    generation = generate(target(), [[2]], sampling=Sampling(temperature=1.5), **arguments)
    jax.effects_barrier()
    by_drafter, by_verifier = used[True], used[False]
    assert len(by_drafter) == len(set(by_drafter)) == 2 * generation.stats[0].steps > 20
    # A residual's noise and the numbers for the children, at every position.
    assert len(set(by_verifier)) >= 2 * 29 and not set(by_drafter) & set(by_verifier)


def test_what_cannot_be_judged_is_refused() -> None:
    drafter, settings = Table(Static(WIDE, "top")), [Sampling(temperature=1.0)]
    with pytest.raises(UserError, match="64 tokens make 262144 strings of 3, too many to list"):
        check_losslessness(tiny_target(64), drafter, table(), PROMPT, 3, settings)
    with pytest.raises(UserError, match="strings of 1 tokens are too short"):
        check_losslessness(target(), drafter, table(), PROMPT, 1, settings)
    with pytest.raises(UserError, match="at temperature 0 there is one string"):
        check_losslessness(target(), drafter, table(), PROMPT, 2, [Sampling()])


def test_it_is_a_distribution_and_sampling_bites() -> None:
    for setting in SETTINGS:
        assert exact(setting).shape == (VOCAB,) * LENGTH and abs(exact(setting).sum() - 1) < 1e-9
    assert (exact("temperature") > 0).all() and (exact("temperature") * SAMPLES > 5).sum() > 25
    # Three of five tokens at every place.
    assert (exact("top_k") > 0).sum() == 3**LENGTH
    assert 1 < (exact("top_p") > 0).sum() < VOCAB**LENGTH and 1 < (exact("min_p") > 0).sum() < VOCAB**LENGTH


def test_it_is_the_product_of_conditionals() -> None:
    string = (4, 0, 2)
    logits = np.asarray(target().apply([[*PROMPT, *string]]).logits)[0, len(PROMPT) - 1 : -1] / 1.5
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    assert np.isclose(exact("temperature")[string], np.prod([p[i, token] for i, token in enumerate(string)]), rtol=1e-9)


# Drafts that are drawn. Ranked ones are above, and the battery compares longer texts with plain decoding's, token for
# token, in programs that it has anyway; here they run with `-m slow`.
BY_DEFAULT = ("nested",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in BY_DEFAULT else [pytest.mark.slow]) for name in CASES if name != "none"],
)
def test_sampled_strings_follow_the_target(name: str) -> None:
    drafter, params = CASES[name](target(), jax.random.key(3))
    settings = list(SETTINGS.values())
    if drafter.rule(greedy=False) in SAMPLED_RULES:
        for setting, result in check(drafter, params, 1024).items():
            assert result.test.degrees > 5 and result.passed, f"{setting}: {result}"
        return
    # Drafts change how the text is made, never which text a seed makes; and plain text follows the distribution.
    arguments = dict(drafter=drafter, drafter_params=params, samples=SAMPLES, seed=1)
    strings, stats = sampled_strings(target(), PROMPT, LENGTH, settings, **arguments)
    assert np.array_equal(strings, plain_strings())
    assert all(counted.committed == SAMPLES * (LENGTH - 1) for counted in stats)


def test_plain_strings_follow_the_target() -> None:
    for setting, result in judge(plain_strings()).items():
        assert result.samples == SAMPLES and result.degrees > 5
        assert result.p_value > SMALLEST_P, f"{setting}: {result}"


def test_typical_acceptance_is_caught() -> None:
    arguments = (target(), POLICIES["point"]["top 3x3"], table(), PROMPT, LENGTH, list(SETTINGS.values()), SAMPLES)
    for result in check_losslessness(*arguments, seed=1, typical=Typical()):
        assert result.test.samples == SAMPLES and result.test.p_value < 1e-12, result


def redraws_after_rejection(tree, logits, sampling, keys, length, max_depth, live):
    """A published mistake: when every child is rejected, the next token is drawn afresh, as if none had been tried."""
    verdict = verify(tree, logits, sampling, keys, length, max_depth, live)
    last = jnp.take_along_axis(verdict.path, verdict.drafts[:, None], axis=1)
    visited = jnp.take_along_axis(logits, last[:, :, None], axis=1)[:, 0]
    again = draw(visited, sampling, keys, length + 1000 + verdict.drafts)
    places = jnp.arange(verdict.tokens.shape[1])
    return dataclasses.replace(
        verdict, tokens=jnp.where(places == verdict.drafts[:, None], again[:, None], verdict.tokens)
    )


def test_a_biased_verifier_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoding.verify.verify", redraws_after_rejection)
    # Two batches: a shape that no other test has compiled with the verifier as it is.
    results = check_losslessness(
        target(), POLICIES["point"]["top 3x3"], table(), PROMPT, LENGTH, list(SETTINGS.values()), SAMPLES, batches=2
    )
    assert not any(result.passed for result in results)
    assert results[0].test.p_value < 1e-12


def test_another_temperature_and_the_impossible_are_seen() -> None:
    warmer = string_distribution(target(), PROMPT, LENGTH, Sampling(temperature=1.0))
    assert chi_square(count_strings(plain_strings()[0], VOCAB), warmer).p_value < 1e-6
    impossible = plain_strings()[2].copy()
    impossible[0] = np.argwhere(exact("top_k") == 0)[0]
    assert chi_square(count_strings(impossible, VOCAB), exact("top_k")).p_value == 0


def test_chi_square_arithmetic() -> None:
    stats = pytest.importorskip("scipy.stats")
    shares, counts = np.array([0.5, 0.3, 0.19, 0.006, 0.004]), np.array([480, 320, 185, 9, 6])
    ours = chi_square(counts, shares)
    theirs = stats.chisquare([480, 320, 185, 9, 6], shares * 1000)
    # 0.004 x 1000 < 5 is pooled, alone, into the last cell.
    assert (
        ours.degrees == 4 and np.isclose(ours.statistic, theirs.statistic) and np.isclose(ours.p_value, theirs.pvalue)
    )
    pooled = chi_square(counts, shares, fewest=7)
    theirs = stats.chisquare([480, 320, 185, 15], [500, 300, 190, 10])
    assert pooled.degrees == 3 and np.isclose(pooled.p_value, theirs.pvalue)
