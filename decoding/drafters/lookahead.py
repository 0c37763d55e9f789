"""Lookahead decoding: the target drafts for itself, by solving for the next tokens in parallel.

Behind the pending token stand guesses of what follows, `ngram - 1` generations of them over `window` columns. They ride
along in every verify forward, and each column sees itself as a possible continuation of the text: its own older guess,
then each newer one behind it. The target's answer at the newest is one token more, which makes an n-gram per column and
becomes the newest generation of the next step (Jacobi iteration, of which all intermediate steps are kept). The n-grams
fill a pool, keyed by their first token, and those that begin with the pending token are the candidates (Fu et al. 2024,
"Break the Sequential Dependency of LLM Inference Using Lookahead Decoding", section 3).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from decoding.cache import behind
from decoding.drafter import Drafter, Riders
from decoding.sampling import argmax
from decoding.trees import TokenTree, refuse_huge
from models.errors import UserError
from models.sharding import fitted


@dataclasses.dataclass(frozen=True)
class Lookahead(Drafter):
    """The pool's n-grams as candidates, the window as riders.

    The state is `window`, int32 `[B, ngram - 1, window]`: generation r of column c guesses the token r + c places
    behind the pending one; and `pool`, int32 `[B, V, guesses, ngram - 1]`: what followed each token, newest first, -1
    where there is nothing, with more guesses where a larger tree shares it. The window moves on by one place per step,
    however many tokens the step commits.

    Attributes:
      window: columns, n-grams found per forward.
      ngram: tokens of an n-gram, its key included; the candidates are one shorter.
      guesses: n-grams kept, and offered, per token.
    """

    window: int = 7
    ngram: int = 5
    guesses: int = 7
    name: ClassVar[str] = "lookahead"
    bare_names: ClassVar[tuple[str, ...]] = ("lookahead", "lookahead:CANDIDATES")

    # On chats of SmolLM2-135M (docs/results/smollm2/sizes.json).
    known_sizes: ClassVar[tuple[tuple[int, float], ...]] = ((8, 1.40),)

    @classmethod
    def from_name(cls, argument):
        if not argument:
            return cls()
        if not argument.isdecimal():
            return None
        made = cls().with_budget(int(argument))
        if made is None:
            depth = cls().max_depth
            raise UserError(f"{cls.name}:CANDIDATES must be a multiple of {depth}, a guess's tokens, got {argument}")
        return made

    @property
    def max_nodes(self) -> int:
        return 1 + self.guesses * self.max_depth

    @property
    def max_depth(self) -> int:
        return self.ngram - 1

    @property
    def num_riders(self) -> int:
        # The pending token is the first column's oldest guess, and already there as node 0.
        return self.window * self.max_depth - 1

    def check(self, config):
        for field, least in (("window", 1), ("ngram", 2), ("guesses", 1)):
            if getattr(self, field) < least:
                raise UserError(f"{self.name} needs {field} of at least {least}, got {getattr(self, field)}")
        refuse_huge(max(self.max_nodes - 1, self.num_riders))

    def init(self, config, batch, capacity, dtype, mesh=None):
        shapes = {
            "window": (batch, self.max_depth, self.window),
            "pool": (batch, config.vocab_size, self.guesses, self.max_depth),
        }

        def empty(shape):
            spec = PartitionSpec("data", *(None,) * (len(shape) - 1))
            return jnp.full(shape, -1, jnp.int32, device=None if mesh is None else fitted(mesh, spec, shape))

        return {name: empty(shape) for name, shape in shapes.items()}

    def ingest(self, params, target, state, rows):
        """The prompt's n-grams fill the pool; of what is decoded, `observe` sees more than `ingest`."""
        if rows.source != "prompt":
            return state
        end_BR = rows.start.length[:, None] + jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)
        place_BRN = end_BR[:, :, None] + jnp.arange(-self.max_depth, 1, dtype=jnp.int32)
        grams_BRN = jax.vmap(lambda text, place: text[place])(target.text, jnp.maximum(place_BRN, 0))
        is_text_BR = (end_BR < (rows.start.length + rows.count)[:, None]) & (place_BRN[:, :, 0] >= 0)
        return {**state, "pool": remember(state["pool"], grams_BRN, is_text_BR)}

    def begin(self, params, target, state):
        """The window begins as if the end of the prompt were to come again."""
        reach = self.window + self.max_depth - 1
        ahead_RC = np.add.outer(np.arange(self.max_depth), np.arange(self.window)) - reach
        length_B11 = target.length[:, None, None]
        place_BRC = (length_B11 + ahead_RC) % length_B11
        return {**state, "window": jax.vmap(lambda text, place: text[place])(target.text, place_BRC)}

    def draft(self, params, target, state, root, keys):
        found_BGK = jax.vmap(lambda pool, token: pool[token, : self.guesses])(state["pool"], root)
        return merged_chains(root, found_BGK), None

    def riders(self, params, target, state, tree):
        if not self.num_riders:
            return None
        generation, column = (place.reshape(-1)[1:] for place in np.indices((self.max_depth, self.window)))
        sees_tree = np.zeros((1, self.num_riders, tree.tokens.shape[1]), bool)
        sees_tree[:, :, 0] = True
        return Riders(
            tokens=state["window"].reshape(-1, self.num_riders + 1)[:, 1:],
            positions=target.place.positions(jnp.asarray(generation + column, jnp.int32)[None]),
            sees_tree=jnp.asarray(sees_tree),
            sees_riders=jnp.asarray(staircase(self.max_depth, self.window)[None, 1:, 1:]),
        )

    def observe(self, params, target, state, tree, output, verdict, live):
        newest = np.arange(-self.window, 0) + self.num_riders
        rows = np.where(newest < 0, 0, tree.tokens.shape[1] + newest)
        answers_BC = argmax(output.logits[:, rows])
        window_BRC = state["window"].at[:, 0, 0].set(tree.tokens[:, 0])
        moved_BRC = jnp.concatenate([window_BRC, answers_BC[:, None]], axis=1)
        # The verdict, and with it every look into the pool, comes before the pool changes: XLA need not copy it.
        grams_BCR = behind(moved_BRC.swapaxes(1, 2), after=verdict.drafts[:, None])
        return {
            "window": jnp.where(live[:, None, None], moved_BRC[:, 1:], state["window"]),
            "pool": remember(state["pool"], grams_BCR, jnp.broadcast_to(live[:, None], answers_BC.shape)),
        }

    def with_budget(self, candidates, acceptance=None):
        guesses, rest = divmod(candidates, self.max_depth)
        return dataclasses.replace(self, guesses=guesses) if guesses and not rest else None


def staircase(generations: int, columns: int) -> Bool[np.ndarray, "R R"]:
    """Who sees whom in the window, by rows r * columns + c of generation r, column c (Fu et al. 2024, figure 5).

    A guess sees the oldest generation up to its own column, which leads to its place in the text, and then the newer
    ones of its column, itself included.
    """
    generation, column = (place.reshape(-1) for place in np.indices((generations, columns)))
    path = (generation == 0) & (column <= column[:, None])
    tower = (generation <= generation[:, None]) & (column == column[:, None])
    return path | tower


def remember(
    pool: Int[Array, "B V G K"], grams: Int[Array, "B M N"], take: Bool[Array, "B M"]
) -> Int[Array, "B V G K"]:
    """The pool after M n-grams of N = K + 1 tokens were put in one by one, wherever `take`.

    Each goes to the front of its token's list; an equal one that was there is taken out, else the last of the list is
    given up: the least recently found.
    """

    def put(pool_VGK, gram_N, take):
        kept_GK = pool_VGK[gram_N[0]]
        same_G = jnp.all(kept_GK == gram_N[1:], axis=1)
        moves_G = jnp.cumsum(same_G) - same_G == 0
        pushed_GK = jnp.concatenate([gram_N[None, 1:], kept_GK[:-1]])
        place = jnp.where(take, gram_N[0], pool_VGK.shape[0])
        return pool_VGK.at[place].set(jnp.where(moves_G[:, None], pushed_GK, kept_GK), mode="drop")

    def step(pool_BVGK, gram_and_take):
        return jax.vmap(put)(pool_BVGK, *gram_and_take), None

    return jax.lax.scan(step, pool, (grams.swapaxes(0, 1), take.swapaxes(0, 1)))[0]


def merged_chains(root: Int[Array, "B"], chains: Int[Array, "B G K"]) -> TokenTree:
    """G chains of K candidates below the root, -1 where there is none, as a tree in which siblings are distinct.

    The verifier descends into the first child that holds the target's token. Chains that begin alike must therefore
    share nodes, or all but the first of them would be lost: node 1 + k G + g belongs to chain g at depth k + 1 if no
    earlier chain begins with the same k + 1 tokens, and is invalid otherwise.
    """
    _, G, K = chains.shape
    index_G = jnp.arange(G, dtype=jnp.int32)
    differs_BGGK = chains[:, :, None] != chains[:, None]
    alike_BGGK = jnp.cumsum(differs_BGGK, axis=3) == 0
    # Every chain is like itself, so there is a first one.
    first_BGK = jnp.sum(jnp.cumsum(alike_BGGK, axis=2) == 0, axis=2, dtype=jnp.int32)
    own_BGK = (first_BGK == index_G[:, None]) & (chains >= 0)
    above_BGK = jnp.pad(first_BGK[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    siblings_BGGK = (above_BGK[:, :, None] == above_BGK[:, None]) & own_BGK[:, None]
    rank_BGK = jnp.sum(siblings_BGGK & (index_G < index_G[:, None])[None, :, :, None], axis=2, dtype=jnp.int32)
    parent_BGK = 1 + (jnp.arange(K, dtype=jnp.int32) - 1) * G + above_BGK
    parent_BGK = parent_BGK.at[:, :, 0].set(0)

    def nodes(at_root, of_chains):
        flat = of_chains.swapaxes(1, 2).reshape(-1, K * G)
        at_root = jnp.broadcast_to(jnp.asarray(at_root, flat.dtype), flat.shape[:1])
        return jnp.concatenate([at_root[:, None], flat], axis=1)

    depth_BGK = jnp.broadcast_to(jnp.arange(1, K + 1, dtype=jnp.int32), chains.shape)
    return TokenTree.grown(
        tokens=nodes(root, jnp.maximum(chains, 0)),
        parent=nodes(-1, parent_BGK),
        depth=nodes(0, depth_BGK),
        valid=nodes(True, own_BGK),
        rank=nodes(0, rank_BGK),
        width=G,
        rule="match",
    )
