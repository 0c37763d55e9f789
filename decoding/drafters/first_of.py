"""First of several drafters: each is asked only where those before it have nothing to say.

Prompt lookup and recycled candidates cost nothing but find nothing in a text that does not repeat; a draft model always
has a guess and has to be run. This combinator takes each batch row's tree from the first drafter whose tree has a
candidate; the `draft` of a drafter that no row needs is skipped. All of them learn from everything: prompt, committed
rows and rejected nodes, whoever drafted them.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from decoding.cache import SLOTS
from decoding.drafter import Drafter, Riders
from decoding.trees import SAMPLED_RULES, TokenTree
from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class FirstOf(Drafter):
    """Several drafters in the order in which they are asked; parameters, state and memory are lists of theirs.

    Attributes:
      parts: at least two, none of them a combination itself.
    """

    parts: tuple[Drafter, ...]
    name: ClassVar[str] = "first_of"

    def __post_init__(self):
        if len(self.parts) < 2:
            raise UserError(f"a combination needs at least two drafters, got {len(self.parts)}")
        if any(isinstance(part, FirstOf) for part in self.parts):
            raise UserError("a combination holds a combination: name all its drafters in one list")

    @property
    def taps(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(tap for part in self.parts for tap in part.taps))

    @property
    def max_nodes(self) -> int:
        return max(part.max_nodes for part in self.parts)

    @property
    def max_depth(self) -> int:
        return max(part.max_depth for part in self.parts)

    @property
    def num_riders(self) -> int:
        return sum(part.num_riders for part in self.parts)

    def rule(self, greedy):
        """`point` if all their trees have it, else `match`.

        Raises:
          UserError: a drafter whose rule, at these sampling parameters, depends on its own distribution.
        """
        rules = [part.rule(greedy) for part in self.parts]
        for part, rule in zip(self.parts, rules, strict=True):
            if rule in SAMPLED_RULES:
                raise UserError(
                    f"{part.name} cannot be combined with another drafter: its candidates are drawn from its own "
                    f"distribution (acceptance rule {rule!r}), and joined trees need the rule match or point"
                )
        return "point" if set(rules) == {"point"} else "match"

    def check(self, config):
        for part in self.parts:
            part.check(config)

    def init_params(self, config, target, key):
        keys = jax.random.split(key, len(self.parts))
        return [part.init_params(config, target, key) for part, key in zip(self.parts, keys, strict=True)]

    def for_decoding(self, params, mesh=None):
        return [part.for_decoding(own, mesh) for part, own in self._with(params)]

    def init(self, config, batch, capacity, dtype, mesh=None):
        return [part.init(config, batch, capacity, dtype, mesh) for part in self.parts]

    @property
    def ingests(self) -> bool:
        return any(part.ingests for part in self.parts)

    def ingest(self, params, target, state, rows):
        # What came out of the joined tree is to each drafter a text that another wrote.
        if rows.source != "prompt":
            rows = dataclasses.replace(rows, source="other", nodes=None, drafted=None)
        return [part.ingest(own, target, s, rows) for part, own, s in self._with(params, state)]

    @property
    def begins(self) -> bool:
        return any(part.begins for part in self.parts)

    def begin(self, params, target, state):
        return [part.begin(own, target, s) for part, own, s in self._with(params, state)]

    def draft(self, params, target, state, root, keys):
        """The joined tree; nothing is kept, for `ingest` could not tell whose tree a row's text came from."""
        rule = self.rule(target.sampling.greedy)
        asked = self._with(params, state)
        part, own, s = asked[0]
        tree = part.draft(own, target, s, root, keys)[0]
        for part, own, s in asked[1:]:
            empty = ~jnp.any(jnp.broadcast_to(tree.valid, tree.tokens.shape)[:, 1:], axis=1)
            empty = empty if target.done is None else empty & ~target.done
            tree = joined(tree, _draft_if(jnp.any(empty), part, own, target, s, root, keys), empty, rule)
        return tree, None

    def riders(self, params, target, state, tree):
        every = [part.riders(own, target, s, tree) for part, own, s in self._with(params, state)]
        present = [riders for riders in every if riders is not None]
        if not present:
            return None
        batch = tree.tokens.shape[0]

        def rows(name):
            return [jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (getattr(riders, name) for riders in present)]

        count = sum(riders.tokens.shape[1] for riders in present)
        among, done = [], 0
        for seen in rows("sees_riders"):
            size = seen.shape[1]
            among.append(jnp.pad(seen, ((0, 0), (0, 0), (done, count - done - size))))
            done += size
        return Riders(
            tokens=jnp.concatenate(rows("tokens"), axis=1),
            positions=jnp.concatenate(rows("positions"), axis=1),
            sees_tree=jnp.concatenate(rows("sees_tree"), axis=1),
            sees_riders=jnp.concatenate(among, axis=1),
        )

    def observe(self, params, target, state, tree, output, verdict, live):
        after, start = [], tree.tokens.shape[1]
        for part, own, s in self._with(params, state):
            seen = _with_riders(output, tree.tokens.shape[1], start, part.num_riders)
            after.append(part.observe(own, target, s, tree, seen, verdict, live))
            start += part.num_riders
        return after

    def memory(self, state):
        kept = [part.memory(s) for part, s in zip(self.parts, state, strict=True)]
        return None if all(part is None for part in kept) else kept

    def recall(self, state, memory):
        if not isinstance(memory, list) or len(memory) != len(self.parts):
            raise UserError(f"{self.name} needs the memory of a combination, with one entry for each of its drafters")
        return [
            s if kept is None else part.recall(s, kept) for part, s, kept in zip(self.parts, state, memory, strict=True)
        ]

    def _with(self, params: list | None, *others: list) -> list[tuple]:
        """Every drafter with its own of each list; drafters none of which has parameters may be given None for them."""
        return list(zip(self.parts, params or [None] * len(self.parts), *others, strict=True))


def _with_riders(output, nodes: int, start: int, count: int):
    """An output of the tree's nodes and of the riders of one drafter alone."""
    if output.logits.shape[1] == nodes + count:
        return output

    def rows(x, axis=1):
        own = [jax.lax.slice_in_dim(x, 0, nodes, axis=axis), jax.lax.slice_in_dim(x, start, start + count, axis=axis)]
        return jnp.concatenate(own, axis=axis) if count else own[0]

    return dataclasses.replace(
        output,
        logits=rows(output.logits),
        hidden=rows(output.hidden),
        taps={name: rows(tap) for name, tap in output.taps.items()},
        rows=[{name: rows(layer[name], axis) for name, axis in SLOTS.items()} for layer in output.rows],
    )


def _draft_if(needed: Bool[Array, ""], drafter: Drafter, params, target, state, root, keys) -> TokenTree:
    """What `drafter` drafts, or an empty tree of the same shape where that is not needed."""

    def asked():
        return drafter.draft(params, target, state, root, keys)[0]

    def empty():
        # Only its shapes are read, so nothing of the draft is left in this branch.
        return jax.tree.map(jnp.zeros_like, asked())

    return jax.lax.cond(needed, asked, empty)


def joined(first: TokenTree, second: TokenTree, by_second: Bool[Array, "B"], rule: str) -> TokenTree:
    """Each batch row's tree from one of two, under `rule`."""
    nodes = max(first.tokens.shape[1], second.tokens.shape[1])
    width = max(first.children.shape[2], second.children.shape[2])

    def chosen(name, fill, *rest):
        def padded(tree):
            x = getattr(tree, name)
            sizes = (nodes, *rest)
            return jnp.pad(
                x,
                ((0, 0), *((0, to - have) for to, have in zip(sizes, x.shape[1:], strict=True))),
                constant_values=fill,
            )

        where = by_second.reshape(-1, *(1,) * (1 + len(rest)))
        return jnp.where(where, padded(second), padded(first))

    itself_and_root = jnp.eye(nodes, dtype=bool).at[:, 0].set(True)
    return TokenTree(
        tokens=chosen("tokens", 0),
        # Padding hangs below the root, and is not valid.
        parent=chosen("parent", 0),
        depth=chosen("depth", 1),
        valid=chosen("valid", False),
        children=chosen("children", -1, width),
        ancestors=chosen("ancestors", False, nodes) | itself_and_root,
        rule=rule,
    )
