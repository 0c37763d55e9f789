"""Verification: which candidates of a token tree become text, and which token comes next.

It walks from the root, one node per level, so the target distribution p is evaluated at visited nodes only. What
happens at a node depends on how its children were proposed, which the tree says (`TokenTree.rule`):

* `match`, `point`: draw the target's own token; if a child holds it, descend, otherwise it is the next root. For
  deterministic children this is point-mass rejection sampling (EAGLE-2) in its simplest form, and at temperature 0 it
  is greedy verification. The text is that of plain decoding, token for token.
* `iid`, `swor`: try the children in order. Child x, drawn from q, is accepted with probability min(1, p(x) / q(x));
  a rejection leaves the residual p <- norm(max(p - q, 0)), and, where siblings are drawn without replacement (`swor`),
  q without x for the next. If all are rejected the next root is drawn from the last residual. `iid` is multi-round
  speculative sampling (Miao et al. 2024, SpecInfer, section 4.3), and with one child the rule of Leviathan et al.
  2023; `swor` is recursive rejection sampling (Jeon et al. 2024, RSD, section 3).

`typical` acceptance (Medusa, section 3.3) is here too. It is lossy: the text no longer follows the target distribution.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from decoding.sampling import SamplingParameters, argmax, draw, noise, target_probabilities, unless_broken
from decoding.trees import SAMPLED_RULES, TokenTree
from models.sharding import row_wise


@struct.dataclass
class Typical:
    """Lossy typical acceptance: a candidate is kept when p(x) > min(epsilon, delta * exp(-entropy)) (Medusa, 3.3).

    Numbers, or in a request one of each for every row.
    """

    epsilon: float | Float[Array, "B"] = 0.09
    delta: float | Float[Array, "B"] = 0.3


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
    logits: Float[Array, "B _ V"],
    sampling: SamplingParameters,
    keys: Array,
    length: Int[Array, "B"],
    max_depth: int,
    live: Bool[Array, "B"] | None = None,
) -> Verdict:
    """Lossless verification under the tree's rule: output follows the target distribution.

    Args:
      tree: the candidates.
      logits: the target's, at every node; rows past the tree's are ignored.
      sampling: sampling settings.
      keys: request keys.
      length: index of the root in the text.
      max_depth: of the deepest candidate.
      live: rows whose text goes on; of others nothing is judged. None is all.
    """
    batch = tree.tokens.shape[0]
    children = jnp.broadcast_to(tree.children, (batch, *tree.children.shape[1:]))
    valid = jnp.broadcast_to(tree.valid, tree.tokens.shape)
    try_children = functools.partial(_try_children, rule=tree.rule) if tree.rule in SAMPLED_RULES else _meet_target
    depths = jnp.arange(max_depth + 1, dtype=jnp.int32)

    def at_node(node, depth):
        """The target's token at every row's node, and the child that holds it or -1."""
        offered = _at(children, node)
        slot = jnp.maximum(offered, 0)
        offered = jnp.where(jnp.take_along_axis(valid, slot, axis=1), offered, -1)
        held = jnp.take_along_axis(tree.tokens, slot, axis=1)
        proposal = None
        if tree.proposals is not None and tree.proposal_of is not None:
            row = _at(jnp.broadcast_to(tree.proposal_of, tree.tokens.shape), node)
            proposal = _at(tree.proposals, jnp.maximum(row, 0))
        # Devices share the logits of visited nodes alone, and each judges its own rows.
        arguments = (sampling, keys, offered, held, length + depth + 1, proposal)
        return row_wise(try_children, _at(logits, node), *arguments)

    def descend(walk):
        token, child = at_node(walk.node, walk.depth)
        here = walk.alive[:, None] & (depths == walk.depth)
        alive = walk.alive & (child >= 0)
        node = jnp.where(alive, child, walk.node)
        return _Walk(
            depth=walk.depth + 1,
            node=node,
            alive=alive,
            drafts=walk.drafts + alive.astype(jnp.int32),
            path=jnp.where(depths > walk.depth, node[:, None], walk.path),
            tokens=jnp.where(here, token[:, None], walk.tokens),
        )

    # A loop over depth, which ends where no row goes on: one program for a level, and no work for those not reached.
    root, nothing = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, max_depth + 1), jnp.int32)
    walk = _Walk(jnp.int32(0), root, jnp.ones(batch, bool) if live is None else live, root, nothing, nothing)
    if max_depth:
        walk = jax.lax.while_loop(lambda walk: (walk.depth <= max_depth) & jnp.any(walk.alive), descend, walk)
    else:
        walk = descend(walk)
    return Verdict(walk.path, walk.drafts, walk.tokens)


@struct.dataclass
class _Walk:
    """How far verification came: where each row stands, and while `alive` it goes on."""

    depth: Int[Array, ""]
    node: Int[Array, "B"]
    alive: Bool[Array, "B"]
    drafts: Int[Array, "B"]
    path: Int[Array, "B R"]
    tokens: Int[Array, "B R"]


def _at(values: Shaped[Array, "B N *C"], node: Int[Array, "B"]) -> Shaped[Array, "B *C"]:
    """What every row has at its node."""
    index = node.reshape(-1, *[1] * (values.ndim - 1))
    return jnp.take_along_axis(values, index, axis=1)[:, 0]


def _meet_target(visited, sampling, keys, offered, held, indices, proposal):
    """Rules `match` and `point`: the target's own token, and the child that holds it or -1."""
    token = draw(visited, sampling, keys, indices)
    hit = (offered >= 0) & (held == token[:, None])
    # `point` children are distinct, and of equal `match` children the first in the order offered is as good as any.
    hit &= jnp.cumsum(hit, axis=1) == 1
    return token, jnp.sum(jnp.where(hit, offered + 1, 0), axis=1, dtype=jnp.int32) - 1


def _try_children(visited, sampling, keys, offered, held, indices, proposal, rule):
    """Rules `iid` and `swor`: the accepted child or -1, and its token or one drawn from the last residual."""
    p_BV = target_probabilities(visited, sampling)
    q_BV = proposal.astype(p_BV.dtype)
    count = offered.shape[1]
    # Beside the noise that `draw` takes from this key, which the residual below uses.
    uniform_BC = jax.vmap(
        lambda key, p: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, p), 1), (count,), p_BV.dtype)
    )(keys, indices)
    vocabulary_V = jnp.arange(p_BV.shape[1], dtype=jnp.int32)
    child, token = jnp.full_like(offered[:, 0], -1), jnp.zeros_like(held[:, 0])
    for c in range(count):
        is_x_BV = vocabulary_V == held[:, c, None]
        mass = jnp.sum(q_BV, axis=1, keepdims=True)
        # p and q may round to the same vector, which leaves no residual, or the list be longer than q has tokens.
        tried = (offered[:, c] >= 0) & (child < 0) & (mass[:, 0] > 0)
        proposal_BV = q_BV / jnp.where(mass > 0, mass, 1)
        p_x, q_x = (jnp.sum(jnp.where(is_x_BV, x, 0), axis=1) for x in (p_BV, proposal_BV))
        accepted = tried & (uniform_BC[:, c] * q_x < p_x)
        child = jnp.where(accepted, offered[:, c], child)
        token = jnp.where(accepted, held[:, c], token)
        residual_BV = jnp.maximum(p_BV - proposal_BV, 0)
        left = jnp.sum(residual_BV, axis=1, keepdims=True)
        rejected = (tried & ~accepted)[:, None]
        p_BV = jnp.where(rejected & (left > 0), residual_BV / jnp.where(left > 0, left, 1), p_BV)
        if rule == "swor":
            q_BV = jnp.where(rejected & is_x_BV, 0, q_BV)
    drawn = argmax(jnp.log(p_BV) + noise(keys, indices, p_BV.shape[1], p_BV.dtype))
    return jnp.where(child >= 0, token, unless_broken(visited, drawn)), child


def verify_typical(
    tree: TokenTree,
    logits: Float[Array, "B _ V"],
    rule: Typical,
    sampling: SamplingParameters,
    keys: Array,
    length: Int[Array, "B"],
    max_depth: int,
) -> Verdict:
    """Lossy: the longest path of typical candidates, ties to the likeliest; the next root is drawn at its end.

    Rows at temperature 0 judge candidates at temperature 1.
    """
    batch, nodes = tree.tokens.shape
    logits = logits[:, :nodes]
    temperature = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0).astype(logits.dtype)
    logp_BNV = jax.nn.log_softmax(logits / temperature[:, None, None], axis=-1)
    entropy_BN = -jnp.sum(jnp.exp(logp_BNV) * logp_BNV, axis=-1)
    parent = jnp.broadcast_to(jnp.maximum(tree.parent, 0), (batch, nodes))
    logp_parent = jnp.take_along_axis(logp_BNV, parent[:, :, None], axis=1)
    logp_BN = jnp.take_along_axis(logp_parent, tree.tokens[:, :, None], axis=2)[:, :, 0]
    epsilon_B1, delta_B1 = (jnp.reshape(x, (-1, 1)) for x in (rule.epsilon, rule.delta))
    bound_BN = jnp.minimum(epsilon_B1, delta_B1 * jnp.exp(-jnp.take_along_axis(entropy_BN, parent, axis=1)))
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
    root = draw(last, sampling, keys, length + drafts + 1)
    shifted = jnp.take_along_axis(tree.tokens, jnp.concatenate([path[:, 1:], path[:, -1:]], axis=1), axis=1)
    return Verdict(path, drafts, jnp.where(levels < drafts[:, None], shifted, root[:, None]))
