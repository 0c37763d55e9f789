"""First of two drafters: the second is asked only where the first has nothing to say.

Prompt lookup and recycled candidates cost nothing but find nothing in a text that does not repeat; a draft model always
has a guess and has to be run. This combinator takes each batch row's tree from the first drafter if that tree has a
candidate, otherwise from the second, whose `draft` is skipped when no row needs it. Both learn from everything: prompt,
committed rows and rejected nodes, whoever drafted them.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from decoding.cache import SLOTS
from decoding.drafter import Drafter, Riders
from decoding.drafters.plain import Plain
from decoding.trees import SAMPLED_RULES, TokenTree
from models.errors import UserError

_PARTS = ("first", "second")


@dataclasses.dataclass(frozen=True)
class FirstOf(Drafter):
    """Two drafters, either of which may be another combination; parameters, state and memory are dicts of their two.

    Attributes:
      first: drafts for the rows where it finds a candidate.
      second: drafts for the others.
    """

    first: Drafter = dataclasses.field(default_factory=Plain)
    second: Drafter = dataclasses.field(default_factory=Plain)
    name: ClassVar[str] = "first_of"

    @property
    def _parts(self) -> dict[str, Drafter]:
        return {name: getattr(self, name) for name in _PARTS}

    @property
    def taps(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys([*self.first.taps, *self.second.taps]))

    @property
    def max_nodes(self) -> int:
        return max(part.max_nodes for part in self._parts.values())

    @property
    def max_depth(self) -> int:
        return max(part.max_depth for part in self._parts.values())

    @property
    def num_riders(self) -> int:
        return sum(part.num_riders for part in self._parts.values())

    def rule(self, greedy):
        """`point` if both trees have it, else `match`.

        Raises:
          UserError: a drafter whose rule, at these sampling settings, depends on its own distribution.
        """
        rules = [part.rule(greedy) for part in self._parts.values()]
        for part, rule in zip(self._parts.values(), rules, strict=True):
            if rule in SAMPLED_RULES:
                raise UserError(
                    f"{part.name} cannot be combined with another drafter: its candidates are drawn from its own "
                    f"distribution (rule {rule!r}), and joined trees need the rule match or point"
                )
        return "point" if set(rules) == {"point"} else "match"

    def check(self, config):
        for part in self._parts.values():
            part.check(config)

    def init_params(self, config, target, key):
        keys = dict(zip(_PARTS, jax.random.split(key), strict=True))
        return {name: part.init_params(config, target, keys[name]) for name, part in self._parts.items()}

    def fuse(self, params):
        return {name: part.fuse(_of(params, name)) for name, part in self._parts.items()}

    def prepare(self, params):
        return {name: part.prepare(_of(params, name)) for name, part in self._parts.items()}

    def init(self, config, batch, capacity, dtype, mesh=None):
        return {name: part.init(config, batch, capacity, dtype, mesh) for name, part in self._parts.items()}

    def ingest(self, params, target, state, rows):
        # Nodes are those of the joined tree. A drafter that kept what it computed for its own cannot tell them apart,
        # so it reads the new text as it read the prompt.
        kept = rows.drafted or {}

        def seen_by(name, part):
            if name not in kept:
                return dataclasses.replace(rows, drafted=None)
            if isinstance(part, FirstOf):
                return dataclasses.replace(rows, drafted=kept[name])
            return dataclasses.replace(rows, nodes=None, drafted=None)

        return {
            name: part.ingest(_of(params, name), target, state[name], seen_by(name, part))
            for name, part in self._parts.items()
        }

    def draft(self, params, target, state, root, keys):
        """The joined tree; of what the drafters keep beside their own, only which of them kept anything."""
        first, first_kept = self.first.draft(params["first"], target, state["first"], root, keys)
        by_second = ~jnp.any(jnp.broadcast_to(first.valid, first.tokens.shape)[:, 1:], axis=1)
        second, second_kept = _draft_if(
            jnp.any(by_second), self.second, params["second"], target, state["second"], root, keys
        )
        kept = {name: own for name, own in zip(_PARTS, (first_kept, second_kept), strict=True) if own is not None}
        drafted = {name: own if isinstance(self._parts[name], FirstOf) else () for name, own in kept.items()}
        return joined(first, second, by_second, self.rule(target.sampling.greedy)), drafted or None

    def riders(self, params, target, state, tree):
        both = [part.riders(params[name], target, state[name], tree) for name, part in self._parts.items()]
        present = [riders for riders in both if riders is not None]
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
        after, start = {}, tree.tokens.shape[1]
        for name, part in self._parts.items():
            own = _with_riders(output, tree.tokens.shape[1], start, part.num_riders)
            after[name] = part.observe(params[name], target, state[name], tree, own, verdict, live)
            start += part.num_riders
        return after

    def memory(self, state):
        kept = {name: part.memory(state[name]) for name, part in self._parts.items()}
        return None if all(part is None for part in kept.values()) else kept

    def recall(self, state, memory):
        if not isinstance(memory, dict) or set(memory) != set(_PARTS):
            raise UserError(f"{self.name} needs the memory of a combination, with one entry for each of its drafters")
        return {
            name: state[name] if memory[name] is None else part.recall(state[name], memory[name])
            for name, part in self._parts.items()
        }


def _of(params: dict | None, name: str) -> Any:
    """One drafter's parameters; two drafters that have none may be given None."""
    return None if params is None else params[name]


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


def _draft_if(needed: Bool[Array, ""], drafter: Drafter, params, target, state, root, keys) -> tuple[TokenTree, Any]:
    """What `drafter` drafts, or zeros of the same shapes where that is not needed."""
    structures = []

    def asked():
        leaves, structure = jax.tree.flatten(drafter.draft(params, target, state, root, keys))
        structures.append(structure)
        return leaves

    shapes = jax.eval_shape(asked)
    leaves = jax.lax.cond(needed, asked, lambda: [jnp.zeros(leaf.shape, leaf.dtype) for leaf in shapes])
    return jax.tree.unflatten(structures[-1], leaves)


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
