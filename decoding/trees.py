"""Draft trees: which candidate follows which.

A *topology* is static: a set of rank paths, where (0, 2) means "the third best child of the best child of the root". It
is hashable, so it can be a jit constant, and everything else (parents, depths, ancestors, children) follows from it. A
*token tree* is what a drafter hands to verification: a topology with tokens in it, batched. Node 0 is the root, the
pending token that the target chose and has not read yet; node i occupies row `i` of the verify forward and has the
text index `length + depth(i)`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from models.errors import UserError
from models.formats.text_files import parse_json, read_text

# How the candidates were proposed, which decides how they may be verified (decoding/verify.py):
#   match  independently of the verifier's draws
#   point  besides, deterministically, siblings distinct
#   iid    siblings drawn from one distribution, with replacement (SpecInfer)
#   swor   siblings drawn without replacement: each from what its elder siblings left (RSD, Sequoia, EAGLE-1)
ACCEPTANCE_RULES = ("match", "point", "iid", "swor")
SAMPLED_RULES = ("iid", "swor")

# In a tree, whose ancestors are their square, as a chain's paths are: a mistyped number would fill the memory.
MOST_CANDIDATES = 4096


@struct.dataclass
class TokenTree:
    """N candidate rows per batch row, root included.

    Attributes:
      tokens: candidate tokens; `tokens[:, 0]` is the root.
      parent: node index of each node's parent, -1 at the root; always smaller than the node's own.
      depth: 0 at the root.
      valid: nodes that take part; the others are never accepted.
      children: node indices in the order in which they are offered, padded with -1.
      ancestors: `[b, i, j]`: j is i or lies on the path from the root to i.
      rule: one of `ACCEPTANCE_RULES`.
      proposals: under the sampled rules, the exact distributions that children were drawn from.
      proposal_of: per node the row of `proposals` that its first child was drawn from; -1 for a node without.

    Raises:
      ValueError: an unknown rule, or proposals that are missing or do not belong to the rule.
    """

    tokens: Int[Array, "B N"]
    parent: Int[Array, "#B N"]
    depth: Int[Array, "#B N"]
    valid: Bool[Array, "#B N"]
    children: Int[Array, "#B N C"]
    ancestors: Bool[Array, "#B N N"]
    rule: str = struct.field(pytree_node=False)
    proposals: Float[Array, "B M V"] | None = None
    proposal_of: Int[Array, "#B N"] | None = None

    def __post_init__(self):
        if self.rule not in ACCEPTANCE_RULES:
            raise ValueError(f"a token tree's rule must be one of {', '.join(ACCEPTANCE_RULES)}, got {self.rule!r}")
        for name in ("proposals", "proposal_of"):
            if (getattr(self, name) is None) == (self.rule in SAMPLED_RULES):
                must = "needs" if self.rule in SAMPLED_RULES else "cannot have"
                raise ValueError(f"a token tree under the rule {self.rule!r} {must} {name}")

    @classmethod
    def grown(
        cls,
        tokens: Int[Array, "B N"],
        parent: Int[Array, "B N"],
        depth: Int[Array, "B N"],
        valid: Bool[Array, "B N"],
        rank: Int[Array, "B N"],
        width: int,
        rule: str,
        proposals: Float[Array, "B M V"] | None = None,
        proposal_of: Int[Array, "#B N"] | None = None,
    ) -> "TokenTree":
        """A tree whose topology is data: children and ancestors follow from the parents.

        Args:
          tokens: candidates; node 0 is the root.
          parent: -1 at the root; elsewhere an earlier node.
          depth: 0 at the root.
          valid: nodes that take part. An invalid node may have any earlier parent; its rank is ignored.
          rank: place among the siblings in the order offered; distinct among valid siblings.
          width: C, more than every valid rank.
          rule: one of `ACCEPTANCE_RULES`.
          proposals: see the class.
          proposal_of: see the class.
        """
        nodes = tokens.shape[1]
        index_N = jnp.arange(nodes, dtype=jnp.int32)
        of_parent_BNN = parent[:, :, None] == index_N
        ancestors_BNN = of_parent_BNN | (index_N[:, None] == index_N)
        for _ in range(max(nodes - 1, 1).bit_length()):
            # A product of counts: exact in float32, and the form of boolean product that every back end is fast at.
            reach = ancestors_BNN.astype(jnp.float32)
            ancestors_BNN = jnp.einsum("bij,bjk->bik", reach, reach) > 0

        def place(parent_N, rank_N, valid_N):
            row_N = jnp.where(valid_N & (parent_N >= 0), parent_N, nodes)
            return jnp.full((nodes, width), -1, jnp.int32).at[row_N, rank_N].set(index_N, mode="drop")

        children_BNC = jax.vmap(place)(parent, rank, valid)
        return cls(tokens, parent, depth, valid, children_BNC, ancestors_BNN, rule, proposals, proposal_of)


def refuse_huge(candidates: int) -> None:
    """Raises UserError for more candidates, or levels, than a tree may have: asked before they are made."""
    if candidates > MOST_CANDIDATES:
        raise UserError(f"a draft tree has at most {MOST_CANDIDATES} candidates and as many levels, got {candidates}")


@dataclasses.dataclass(frozen=True)
class Topology:
    """A static draft tree given by its rank paths, kept sorted by (length, lexicographic).

    Raises:
      UserError: a path whose parent or better-ranked sibling is missing, a negative rank or a duplicate; the message
        names the path.
    """

    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        refuse_huge(len(self.paths))
        paths = tuple(sorted((tuple(int(r) for r in path) for path in self.paths), key=lambda p: (len(p), p)))
        known = set(paths)
        if len(known) != len(paths):
            repeated = next(path for path in paths if paths.count(path) > 1)
            raise UserError(f"draft tree lists path {list(repeated)} twice")
        for path in paths:
            if not path or min(path) < 0:
                raise UserError(f"draft tree has the path {list(path)}: paths are non-empty lists of ranks from 0")
            if len(path) > 1 and path[:-1] not in known:
                raise UserError(f"draft tree has path {list(path)} without its parent {list(path[:-1])}")
            if path[-1] and (*path[:-1], path[-1] - 1) not in known:
                sibling = [*path[:-1], path[-1] - 1]
                raise UserError(f"draft tree has path {list(path)} without its better-ranked sibling {sibling}")
        object.__setattr__(self, "paths", paths)

    @functools.cached_property
    def size(self) -> int:
        """Nodes, root included."""
        return len(self.paths) + 1

    @functools.cached_property
    def max_depth(self) -> int:
        """Depth of the deepest node; 0 for a bare root."""
        return max((len(path) for path in self.paths), default=0)

    @functools.cached_property
    def max_rank(self) -> int:
        """Candidates that a head must provide: one more than the largest rank."""
        return max((max(path) + 1 for path in self.paths), default=0)

    @functools.cached_property
    def depth(self) -> np.ndarray:
        """Int32 `[N]`."""
        return np.array([0, *map(len, self.paths)], np.int32)

    @functools.cached_property
    def rank(self) -> np.ndarray:
        """Int32 `[N]`: rank among siblings; 0 at the root."""
        return np.array([0, *(path[-1] for path in self.paths)], np.int32)

    @functools.cached_property
    def parent(self) -> np.ndarray:
        """Int32 `[N]`: -1 at the root."""
        node = {(): 0} | {path: i + 1 for i, path in enumerate(self.paths)}
        return np.array([-1, *(node[path[:-1]] for path in self.paths)], np.int32)

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """Bool `[N, N]`: self, root and everything between."""
        seen = np.eye(self.size, dtype=bool)
        for i in range(1, self.size):
            seen[i] |= seen[self.parent[i]]
        return seen

    @functools.cached_property
    def children(self) -> np.ndarray:
        """Int32 `[N, C]`, padded with -1; C is at least 1."""
        lists: list[list[int]] = [[] for _ in range(self.size)]
        for i in range(1, self.size):
            lists[self.parent[i]].append(i)
        width = max(1, max(map(len, lists)))
        return np.array([row + [-1] * (width - len(row)) for row in lists], np.int32)

    def down_to(self, depth: int) -> "Topology":
        """Without what lies deeper."""
        return Topology(tuple(path for path in self.paths if len(path) <= depth))

    def level(self, depth: int) -> np.ndarray:
        """Nodes at `depth`, in order."""
        return np.flatnonzero(self.depth == depth).astype(np.int32)

    def expanded(self, depth: int) -> np.ndarray:
        """Nodes at `depth` that have children."""
        nodes = self.level(depth)
        return nodes[self.children[nodes, 0] >= 0]

    def to_record(self) -> list[list[int]]:
        """As JSON has it."""
        return [list(path) for path in self.paths]

    @classmethod
    def from_record(cls, raw: Any, where: str, place: str) -> "Topology":
        """The inverse of `to_record`; also takes what `load_topology` takes."""
        return load_topology(raw, f"{where} in {place}")

    def fill(
        self,
        tokens: Int[Array, "B N"],
        rule: str,
        proposals: Float[Array, "B M V"] | None = None,
        proposal_of: Int[np.ndarray, "1 P"] | Int[Array, "#B P"] | None = None,
    ) -> TokenTree:
        """The token tree of this topology with `tokens` in it.

        Args:
          tokens: one per node.
          rule: one of `ACCEPTANCE_RULES`.
          proposals: under a sampled rule, the distributions that first children were drawn from.
          proposal_of: which of them it was, for each node that has children, in the order of nodes.
        """
        has_children = self.children[:, 0] >= 0
        of_node = None
        if proposal_of is not None:
            of_node = jnp.where(has_children, proposal_of[:, np.maximum(np.cumsum(has_children) - 1, 0)], -1)
        return TokenTree(
            tokens=tokens,
            parent=jnp.asarray(self.parent)[None],
            depth=jnp.asarray(self.depth)[None],
            valid=jnp.ones((1, self.size), bool),
            children=jnp.asarray(self.children)[None],
            ancestors=jnp.asarray(self.ancestors)[None],
            rule=rule,
            proposals=proposals,
            proposal_of=of_node,
        )

    def check(self, *, heads: int, vocab_size: int) -> None:
        """Raises UserError when the tree is deeper than the heads reach or wider than the vocabulary."""
        if self.max_depth > heads:
            raise UserError(f"draft tree is {self.max_depth} deep, but the drafter has {heads} heads")
        if self.max_rank > vocab_size:
            raise UserError(
                f"draft tree asks for {self.max_rank} candidates, but the vocabulary has {vocab_size} tokens"
            )


def from_child_counts(counts: dict[tuple[int, ...], int]) -> Topology:
    """A topology from parent path -> number of children."""
    return Topology(tuple((*path, rank) for path, count in counts.items() for rank in range(count)))


def chain(depth: int) -> Topology:
    """The single best path, `depth` deep. Raises UserError where no tree is that large."""
    refuse_huge(depth)
    return Topology(tuple((0,) * (d + 1) for d in range(depth)))


# Published with Medusa and used at every size by Hydra; 63 candidates, depth histogram 10/28/23/2.
MC_SIM_7B_63 = from_child_counts(
    {(): 10, (0,): 10, (1,): 7, (2,): 3, (3,): 2}
    | {(rank,): 1 for rank in range(4, 10)}
    | {(0, 0): 10, (0, 1): 3, (0, 2): 2}
    | {(0, rank): 1 for rank in range(3, 8)}
    | {(1, 0): 2, (2, 0): 1, (0, 0, 0): 2}
)

# Published with EAGLE-1; 25 candidates, depth histogram 4/8/8/3/2.
EAGLE_25 = from_child_counts(
    {(): 4, (0,): 3, (1,): 2, (2,): 2, (3,): 1, (0, 0): 3, (0, 1): 2, (0, 2): 2, (1, 0): 1, (0, 0, 0): 3}
    | {(0, 0, 0, 0): 2}
)


def _of_digits(counts: str) -> Topology:
    """A topology from words such as `02:1`, the parent's ranks and its number of children; `:20` is the root."""
    pairs = (word.split(":") for word in counts.split())
    return from_child_counts({tuple(map(int, parent)): int(count) for parent, count in pairs})


# Published with Falcon for blocks of two, 8 and 4 levels deep; its list of the first names a path twice.
FALCON_165 = _of_digits(
    ":20 0:10 1:2 2:2 3:1 00:10 01:2 02:2 03:1 10:2 20:1 30:1 000:10 001:2 002:1 010:2 011:1 020:1 021:1 030:1 100:2 "
    "200:1 300:1 0000:10 0001:2 0002:1 0010:1 0020:1 0100:1 0200:1 0300:1 1000:1 2000:1 3000:1 00000:9 00001:2 00002:1 "
    "00010:1 00011:1 00020:1 00100:1 00200:1 01000:1 02000:1 03000:1 10000:1 20000:1 30000:1 000000:9 000001:2 "
    "000002:1 000010:1 000100:1 001000:1 002000:1 010000:1 020000:1 030000:1 100000:1 200000:1 0000000:8 0000001:2 "
    "0000002:1 0000010:1 0000011:1 0000020:1 0000100:1 0001000:1 0010000:1 0020000:1 0100000:1 0200000:1 0300000:1 "
    "1000000:1 2000000:1"
)
FALCON_75 = _of_digits(":20 0:11 1:4 2:4 00:7 01:10 02:1 03:1 10:1 20:1 000:10 010:1 020:1 030:1 100:1 200:1")

NAMED = {"mc_sim_7b_63": MC_SIM_7B_63, "eagle_25": EAGLE_25, "falcon_165": FALCON_165, "falcon_75": FALCON_75}


def load_topology(spec: "str | Path | Iterable[Sequence[int]]", where: str = "tree") -> Topology:
    """A topology from a published name, `chain:DEPTH`, a JSON file of paths, or the paths themselves.

    Raises:
      UserError: none of these, a file that is missing or not a list of lists of integers, or a tree that is not closed.
    """
    if isinstance(spec, str) and spec in NAMED:
        return NAMED[spec]
    if isinstance(spec, str) and spec.startswith("chain:") and spec[6:].isdigit():
        return chain(int(spec[6:]))
    if isinstance(spec, str | Path):
        path = Path(spec)
        if not path.is_file():
            names = ", ".join([*NAMED, "chain:DEPTH"])
            raise UserError(f"{where} {str(spec)!r} is neither a published tree ({names}) nor a file")
        spec = parse_json(read_text(path), str(path))
        where = str(path)
    if not isinstance(spec, list | tuple) or not all(
        isinstance(row, list | tuple) and all(isinstance(rank, int) for rank in row) for row in spec
    ):
        raise UserError(f"{where} must be a list of paths, each a list of integer ranks, such as [[0], [1], [0, 0]]")
    return Topology(tuple(tuple(row) for row in spec))
