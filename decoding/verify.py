"""Verification: which candidates of a token tree become text, and which token comes next.

Under the laws `match` and `point` there is one rule: at each node draw the target's own token; if a child holds it,
descend, otherwise it is the next root. For deterministic children this is point-mass rejection sampling (SpecInfer's
verification with q = 1; EAGLE-2) in its simplest form, and at temperature 0 it is greedy verification. It walks from
the root, so the target distribution is evaluated at visited nodes only.

`typical` acceptance (Medusa, section 3.3) is here too. It is lossy: the text no longer follows the target distribution.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from decoding.sampling import Warps, draw
from decoding.trees import TokenTree


@dataclasses.dataclass(frozen=True)
class Typical:
    """Lossy typical acceptance: a candidate is kept when p(x) > min(epsilon, delta * exp(-entropy)) (Medusa, 3.3)."""

    epsilon: float = 0.09
    delta: float = 0.3


@struct.dataclass
class Verdict:
    """The accepted path of each batch row.

    Attributes:
      path: node indices from the root down, the last one repeated.
      drafts: accepted candidates; `path[:, :drafts + 1]` is root and accepted nodes.
      tokens: what the step emits: the accepted candidates, then at index `drafts` the next root.
    """

    path: Int[Array, "B R"]
    drafts: Int[Array, "B"]
    tokens: Int[Array, "B R"]


def verify(
    tree: TokenTree,
    logits: Float[Array, "B N V"],
    warps: Warps,
    keys: Array,
    length: Int[Array, "B"],
    max_depth: int,
) -> Verdict:
    """Lossless verification of a `match` or `point` tree.

    Args:
      tree: candidates; node i stands at position `length + depth(i)`.
      logits: the target's, at every node.
      warps: what makes logits the target distribution.
      keys: one per request.
      length: committed tokens, which is the root's position.
      max_depth: depth of the deepest node, static.
    """
    batch = tree.tokens.shape[0]
    children = jnp.broadcast_to(tree.children, (batch, *tree.children.shape[1:]))
    valid = jnp.broadcast_to(tree.valid, tree.tokens.shape)
    node = jnp.zeros(batch, jnp.int32)
    alive = jnp.ones(batch, bool)
    drafts = jnp.zeros(batch, jnp.int32)
    path, tokens = [node], []
    for depth in range(max_depth + 1):
        token = _draw_at(node, alive, logits, warps, keys, length + depth + 1, may_skip=depth > 0)
        tokens.append(token)
        if depth == max_depth:
            break
        offered = jnp.take_along_axis(children, node[:, None, None], axis=1)[:, 0]
        slot = jnp.maximum(offered, 0)
        hit = (offered >= 0) & jnp.take_along_axis(valid, slot, axis=1)
        hit &= jnp.take_along_axis(tree.tokens, slot, axis=1) == token[:, None]
        # Summing picks the hit without an argmax; `point` children are distinct, and of equal `match` children the
        # first in the order offered is as good as any.
        hit &= jnp.cumsum(hit, axis=1) == 1
        alive &= jnp.any(hit, axis=1)
        node = jnp.where(alive, jnp.sum(jnp.where(hit, slot, 0), axis=1, dtype=jnp.int32), node)
        drafts += alive.astype(jnp.int32)
        path.append(node)
    return Verdict(jnp.stack(path, axis=1), drafts, jnp.stack(tokens, axis=1))


def _draw_at(node, alive, logits, warps, keys, positions, may_skip):
    def evaluate():
        visited = jnp.take_along_axis(logits, node[:, None, None], axis=1)[:, 0]
        return draw(visited, warps, keys, positions)

    if warps.greedy or not may_skip:
        return evaluate()
    # Sorting a vocabulary costs more than a small forward: not for levels that no row reaches.
    return jax.lax.cond(jnp.any(alive), evaluate, lambda: jnp.zeros_like(node))


def verify_typical(
    tree: TokenTree,
    logits: Float[Array, "B N V"],
    rule: Typical,
    warps: Warps,
    keys: Array,
    length: Int[Array, "B"],
    max_depth: int,
) -> Verdict:
    """Lossy: the longest path of typical candidates, ties to the likeliest; the next root is drawn at its end.

    Rows at temperature 0 judge candidates at temperature 1.
    """
    batch, nodes = tree.tokens.shape
    temperature = jnp.where(warps.temperature > 0, warps.temperature, 1.0).astype(logits.dtype)
    logp_BNV = jax.nn.log_softmax(logits / temperature[:, None, None], axis=-1)
    entropy_BN = -jnp.sum(jnp.exp(logp_BNV) * logp_BNV, axis=-1)
    parent = jnp.broadcast_to(jnp.maximum(tree.parent, 0), (batch, nodes))
    logp_parent = jnp.take_along_axis(logp_BNV, parent[:, :, None], axis=1)
    logp_BN = jnp.take_along_axis(logp_parent, tree.tokens[:, :, None], axis=2)[:, :, 0]
    bound_BN = jnp.minimum(rule.epsilon, rule.delta * jnp.exp(-jnp.take_along_axis(entropy_BN, parent, axis=1)))
    is_root = tree.depth == 0
    kept = (tree.valid & (jnp.exp(logp_BN) > bound_BN)) | is_root
    ok = jnp.all(kept[:, None, :] | ~tree.ancestors, axis=2)
    depth = jnp.where(ok, tree.depth, -1)
    likelihood = jnp.sum(jnp.where(tree.ancestors & ~is_root[:, None, :], logp_BN[:, None, :], 0.0), axis=2)
    deepest = depth == jnp.max(depth, axis=1, keepdims=True)
    best = jnp.argmax(jnp.where(deepest, likelihood, -jnp.inf), axis=1).astype(jnp.int32)
    drafts = jnp.take_along_axis(depth, best[:, None], axis=1)[:, 0].astype(jnp.int32)
    ancestors = jnp.broadcast_to(tree.ancestors, (batch, nodes, nodes))
    on_path = jnp.take_along_axis(ancestors, best[:, None, None], axis=1)[:, 0]
    node_depth = jnp.broadcast_to(tree.depth, (batch, nodes))
    levels = jnp.arange(max_depth + 1)
    at_level = on_path[:, None, :] & (node_depth[:, None, :] == levels[None, :, None])
    path = jnp.sum(jnp.where(at_level, jnp.arange(nodes, dtype=jnp.int32), 0), axis=2, dtype=jnp.int32)
    path = jnp.where(levels <= drafts[:, None], path, best[:, None])
    last = jnp.take_along_axis(logits, best[:, None, None], axis=1)[:, 0]
    root = draw(last, warps, keys, length + drafts + 1)
    shifted = jnp.take_along_axis(tree.tokens, jnp.concatenate([path[:, 1:], path[:, -1:]], axis=1), axis=1)
    return Verdict(path, drafts, jnp.where(levels < drafts[:, None], shifted, root[:, None]))
