"""Token Recycling: a table remembers, for every token, the candidates that the target last saw behind it.

Verification scores every node of a draft tree, and all but one path of that work is usually thrown away. Here the best
few next tokens of *every* node, accepted or rejected, replace the table's entry for the node's token, and the next tree
is grown by walking the table from the root, one gather per level. Nothing is trained. The table may outlive a request
(`Generation.memory`), and may be warmed with the prompt (Luo et al. 2024, "Turning Trash into Treasure").
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from decoding.drafters.static_tree import StaticTreeDrafter
from decoding.sampling import best_tokens
from decoding.tree_search import NETWORK_DEPTH, probing_tree
from decoding.trees import Topology, from_child_counts
from models.errors import UserError
from models.sharding import fitted

# The template published with Token Recycling: 80 candidates, depth histogram 8/21/25/15/8/3.
TOKEN_RECYCLING_80 = from_child_counts(
    {(): 8, (0,): 8, (1,): 4, (2,): 3, (3,): 2}
    | {(rank,): 1 for rank in range(4, 8)}
    | {(0, 0): 8, (0, 1): 3, (0, 2): 2, (1, 0): 2}
    | {(0, rank): 1 for rank in range(3, 8)}
    | {path: 1 for path in ((1, 1), (2, 0), (3, 0), (4, 0), (5, 0))}
    | {(0, 0, 0): 5, (0, 0, 1): 2}
    | {(0, 0, rank): 1 for rank in range(2, 5)}
    | {path: 1 for path in ((0, 1, 0), (0, 2, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0))}
    | {(0, 0, 0, 0): 3}
    | {path: 1 for path in ((0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0))}
    | {(0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1}
)

# Prompt positions whose logits are recycled at once: those of a whole chunk could be the program's largest array.
_WARM_ROWS = 16


@dataclasses.dataclass(frozen=True)
class TokenRecycling(StaticTreeDrafter):
    """A walk through the table of recycled candidates.

    The state is the table, int32 `[B, V, K]`, best candidate first, -1 where nothing is known yet; K is one more than
    the largest rank of the tree, or of a larger tree that shares the table. Batch rows have tables of their own, so a
    row's drafts depend on its own text alone.

    Attributes:
      tree: the candidates.
      warm_start: recycle the prompt's logits too (the published method begins with what it remembers, or nothing).
    """

    tree: Topology = TOKEN_RECYCLING_80
    warm_start: bool = False
    name: ClassVar[str] = "token_recycling"
    bare_names: ClassVar[tuple[str, ...]] = ("token_recycling", "token_recycling:CANDIDATES")
    taps: ClassVar[tuple[str, ...]] = ("post_norm",)

    # On chats of SmolLM2-135M (docs/results/smollm2/sizes.json).
    known_sizes: ClassVar[tuple[tuple[int, float], ...]] = (
        (1, 1.14),
        (2, 1.18),
        (4, 1.22),
        (8, 1.27),
        (16, 1.33),
        (32, 1.37),
    )

    @classmethod
    def from_name(cls, argument):
        if not argument:
            return cls()
        if not argument.isdecimal() or int(argument) < 1:
            return None
        candidates = int(argument)
        return cls() if candidates == len(TOKEN_RECYCLING_80.paths) else cls().with_budget(candidates)

    def init(self, config, batch, capacity, dtype, mesh=None):
        shape = (batch, config.vocab_size, self.tree.max_rank)
        place = None if mesh is None else fitted(mesh, PartitionSpec("data", None, None), shape)
        return jnp.full(shape, -1, jnp.int32, device=place)

    @property
    def ingests(self) -> bool:
        return self.warm_start

    def ingest(self, params, target, state, rows):
        if not self.warm_start or rows.source != "prompt":
            return state
        best_RBK = jax.lax.map(
            lambda hidden_BH: best_tokens(target.head(hidden_BH), state.shape[2]),
            rows.taps["post_norm"].swapaxes(0, 1),
            batch_size=_WARM_ROWS,
        )
        is_text_BR = jnp.arange(rows.tokens.shape[1]) < rows.count[:, None]
        return remember(state, rows.tokens, best_RBK.swapaxes(0, 1), is_text_BR)

    def draft(self, params, target, state, root, keys):
        tree = self.tree
        levels = [root[:, None]]
        for depth in range(1, tree.max_depth + 1):
            nodes = tree.level(depth)
            above_BM = levels[-1][:, np.searchsorted(tree.level(depth - 1), tree.parent[nodes])]
            ranks = np.asarray(tree.rank[nodes])
            found_BM = jax.vmap(lambda table, tokens, ranks=ranks: table[tokens, ranks])(
                state, jnp.maximum(above_BM, 0)
            )
            levels.append(jnp.where(above_BM >= 0, found_BM, -1))
        tokens_BN = jnp.concatenate(levels, axis=1)
        filled = tree.fill(jnp.maximum(tokens_BN, 0), self.rule(target.sampling.greedy))
        return dataclasses.replace(filled, valid=tokens_BN >= 0), None

    def observe(self, params, target, state, tree, output, verdict, live):
        best_BNK = best_tokens(output.logits[:, : tree.tokens.shape[1]], state.shape[2])
        return remember(state, tree.tokens, best_BNK, tree.valid & live[:, None])

    def memory(self, state):
        """The table."""
        return state

    def recall(self, state, memory):
        """Begins with the table of an earlier request; beginning without one is how it is reset.

        Raises:
          UserError: a table of another batch size, vocabulary or tree.
        """
        if jnp.shape(memory) != state.shape or not jnp.issubdtype(jnp.result_type(memory), jnp.integer):
            raise UserError(
                f"{self.name} cannot continue from a memory of shape {list(jnp.shape(memory))}: this request's table "
                f"is {list(state.shape)} (batch, vocabulary, candidates)"
            )
        return memory

    def probing(self):
        return self.with_tree(probing_tree(NETWORK_DEPTH))

    def with_budget(self, candidates, acceptance=None):
        """Without counts, the tree that is best where guess k is right in proportion to 1 / (k + 1.4)."""
        if acceptance is None:
            return self.with_tree(probing_tree(NETWORK_DEPTH, candidates))
        return super().with_budget(candidates, acceptance)


def remember(
    table: Int[Array, "B V K"], tokens: Int[Array, "B N"], best: Int[Array, "B N K"], take: Bool[Array, "B N"]
) -> Int[Array, "B V K"]:
    """The table after the entries of `tokens` were replaced by `best`, wherever `take`.

    Where a row holds a token several times the last one wins. Writing only that one makes the scatter deterministic:
    its indices are unique, those of the others lie past the table and are dropped.
    """
    count, size = tokens.shape[1], table.shape[1]
    index_N = jnp.arange(count, dtype=jnp.int32)
    same_BNN = (tokens[:, :, None] == tokens[:, None, :]) & take[:, None, :] & (index_N > index_N[:, None])
    place_BN = jnp.where(take & ~jnp.any(same_BNN, axis=2), tokens, size + index_N)
    return jax.vmap(lambda old, at, new: old.at[at].set(new, mode="drop", unique_indices=True))(table, place_BN, best)
