"""Networks that guess a block: rows that share a distribution share their draws where that is exact, and only there."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from decoding.policies import DySpec, Scores, Static
from tests.decoding.drafter_cases import LOPSIDED
from tests.decoding.policies.test_policies import DEPTH, FEW, KEYS, ROOTS, WARM, grow_many, grown_by, softmax

pytestmark = pytest.mark.usefixtures("x64")


@dataclasses.dataclass(frozen=True)
class Block:
    """A draft network whose levels are slots of one block: all rows of a level share a distribution."""

    logits: np.ndarray
    scores: type[Scores] = Scores

    @property
    def vocab_size(self):
        return self.logits.shape[1]

    def begin(self, root, slots):
        return self._slot(root[:, None], 0), ()

    def extend(self, scratch, level, at, tokens, parents, seen):
        return self._slot(tokens, level), ()

    def _slot(self, tokens, level):
        logits = jnp.broadcast_to(jnp.asarray(self.logits)[level], (len(tokens), 1, self.vocab_size))
        return self.scores(logits, jnp.zeros((1, tokens.shape[1]), jnp.int32))


class OneList(Scores):
    """Makes rows that share a distribution share their draws as well, whatever the policy asks for."""

    def each(self):
        return self

    def of_target(self, outputs):
        return self.of_rows(outputs)

    def over_target(self, q, vocab_size):
        return self.of_rows(q)


def test_rows_of_a_block_share_one_list_where_the_topology_is_static() -> None:
    """Each parent takes the beginning of its level's list; the distribution is there once for all of them."""
    q = np.array([softmax(row) for row in FEW])
    policies = {"top": ("point", 1), "without": ("swor", 1), "with": ("iid", 1)}
    for draws, (rule, rows) in policies.items():
        tree = grown_by(Static(LOPSIDED, draws), Block(np.resize(FEW, (DEPTH, 3))), ROOTS % 3, KEYS, WARM).tree
        assert tree.rule == rule
        for depth in range(1, LOPSIDED.max_depth + 1):
            nodes = LOPSIDED.level(depth)
            for b in range(3):
                lists = {(int(LOPSIDED.rank[n]), int(tree.tokens[b, n])) for n in nodes}
                assert len(lists) == len({rank for rank, _ in lists}), "one token for a rank, whoever the parent is"
            if rule != "point":
                above = np.unique(LOPSIDED.parent[nodes])
                assert np.asarray(tree.proposal_of)[0, above].tolist() == [depth - 1] * len(above)
                np.testing.assert_allclose(tree.proposals[:, depth - 1], np.resize(q, (DEPTH, 3))[[depth - 1] * 3])
        assert rule == "point" or tree.proposals.shape[1] == rows * LOPSIDED.max_depth


def test_rows_of_a_block_draw_apart_where_values_decide_how_many_stay() -> None:
    """The second row's first child, where it is in the tree, follows q: whether it stays says nothing of which it is.

    Under one list for both rows it would: the better row's second child is worth less the likelier the first is, and
    leaves its place to the other row.
    """
    block = np.array([[1.0, 0.4, 0.0], [1.5, 0.0, -0.5], [0.0, 0.0, 0.0]])
    q = softmax(block[1])

    def p_value(scores: type[Scores]) -> float:
        stats = pytest.importorskip("scipy.stats")
        tokens, parent, depth = grow_many(DySpec(budget=4, depth=2, width=2, branch=2), Block(block, scores))
        # Nodes 1 and 2 are the level above; of its children that of the second row comes last, if there is one.
        held = (depth[:, 2] == 1) & (parent[:, 3] == 1) & (parent[:, 4] == 2) & (tokens[:, 1] == 0)
        counts = np.bincount(tokens[held, 4], minlength=3)
        return float(stats.chisquare(counts, q * counts.sum()).pvalue)

    assert p_value(Scores) > 1e-4
    assert p_value(OneList) < 1e-12
