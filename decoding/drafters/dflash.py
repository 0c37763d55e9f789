"""DFlash's drafter, and JetSpec's: one pass fills a block of slots, and a policy makes a tree of what they say.

The state is keys and values of the target's fused features, one row per layer and committed token: nothing of a block
is kept. All levels of a tree are answered from the pass that `begin` runs, one distribution per slot, whatever the
parents are; with DFlash2's selector, K candidates per slot whose scores depend on the parent's token. Only the slots
that the tree asks for are read off the head, and of a causal block, whose slots see none behind them, no others run.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from decoding.cache import commit, init_cache
from decoding.drafters.network_drafter import NetworkDrafter, TrainedNetwork
from decoding.policies import TreePolicy
from decoding.policies.policy import Scores
from decoding.sampling import best_logits, best_tokens
from models.errors import UserError
from models.heads import vocabulary
from models.heads.dflash import Anchors, DFlashHeads
from models.transformer import Output, Params


@struct.dataclass
class Filled:
    """Scratch of `Network`: what a block's D drafting slots say.

    Attributes:
      logits: of all outputs, or of the selector's candidates.
      tokens: these, the target's; None without a selector.
      hidden: what the selector's gate reads; None without.
    """

    logits: Float[Array, "B D W"]
    tokens: Int[Array, "B D W"] | None = None
    hidden: Float[Array, "B D H"] | None = None


@struct.dataclass
class Network(TrainedNetwork):
    """A block as a draft network (`decoding.policies.DraftNetwork`).

    Attributes:
      depth: levels of the tree.
    """

    depth: int = struct.field(pytree_node=False)

    @property
    def known(self) -> Int[Array, "W"] | None:
        """Target tokens of outputs; None is all."""
        return self.heads.vocabulary(self.params)

    def filled_block(self, root: Int[Array, "B"]) -> tuple[Float[Array, "B D H"], Float[Array, "B D W"]]:
        """The one pass over a block that begins with the root: what the head reads of the slots that are asked for, and
        their logits."""
        config, target, heads = self.target.config, self.target.params, self.heads.down_to(self.depth)
        length_B1 = self.target.length[:, None]
        layout = heads.layout(length_B1, length_B1)
        inputs = heads.inputs(target, root[:, None])
        hidden = heads.run(config, self.params, inputs, layout, self.state["context"])
        hidden_BDH = heads.drafting(hidden)[:, 0, : self.depth]
        return hidden_BDH, heads.logits(config, self.params, target, hidden_BDH)

    def begin(self, root, slots):
        """The one pass; see `DraftNetwork`."""
        hidden_BDH, logits_BDW = self.filled_block(root)
        filled = Filled(logits_BDW)
        if self.heads.selector is not None:
            best, outputs = best_logits(logits_BDW, self.heads.selector.candidates)
            filled = Filled(best, vocabulary.tokens_of(self.known, outputs), hidden_BDH)
        return self._after(filled, 0, root[:, None]), filled

    def extend(self, scratch, level, at, tokens, parents, seen):
        """Nothing is run; see `DraftNetwork`."""
        return self._after(scratch, level, tokens), scratch

    def _after(self, filled: Filled, slot: int, before: Int[Array, "B M"]) -> Scores:
        logits_BW = filled.logits[:, slot]
        if filled.tokens is None or filled.hidden is None:
            return Scores(logits_BW[:, None], jnp.zeros((1, before.shape[1]), jnp.int32), self.known)
        tokens_BW = filled.tokens[:, slot]
        scores_BMW = self.heads.scores_after(self.params, logits_BW, tokens_BW, filled.hidden[:, slot], before)
        return Scores(scores_BMW, tokens=jnp.broadcast_to(tokens_BW[:, None], scores_BMW.shape))


@dataclasses.dataclass(frozen=True)
class DFlash(NetworkDrafter):
    """DFlash; JetSpec is the same with a causal block. Static policies say how a chain is drafted: of best tokens
    (`top`, rule `point`), or drawn from the slots (`without`, which on a chain is one draw each).

    Attributes:
      heads: shape of the network.
      policy: how its guesses make a tree.
    """

    heads: DFlashHeads
    policy: TreePolicy
    name: ClassVar[str] = "dflash"

    @property
    def taps(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.heads.taps

    def outputs(self, config):
        return self.heads.selector.candidates if self.heads.selector else self.heads.outputs(config)

    @property
    def blind(self) -> int:
        return 0 if self.heads.selector else self.heads.depth

    def check(self, config):
        self.heads.check(config)
        super().check(config)
        if self.policy.max_depth > self.heads.depth:
            raise UserError(
                f"the draft tree is {self.policy.max_depth} deep, but a block of {self.heads.block} drafts "
                f"{self.heads.depth} tokens"
            )

    def init_params(self, config, target, key):
        return self.heads.init(config, target, key)

    def for_decoding(self, params, mesh=None):
        return self.heads.for_decoding(params, mesh)

    def init(self, config, batch, capacity, dtype, mesh=None):
        """`context`, a cache of the network's layers: at slot p what the target says of token p."""
        return {"context": init_cache(self.heads.layer_config(config), batch, capacity, dtype, mesh=mesh)}

    def ingest(self, params, target, state, rows):
        fused_BRH = self.heads.fuse(target.config, params, rows.taps)
        index_R = jnp.arange(fused_BRH.shape[1], dtype=jnp.int32)
        # Rows that are not text leave zeros, so that the state is a function of the text alone, unused slots included.
        true_BR = index_R < rows.count[:, None]
        masks = {"k": true_BR[:, None, None, :], "v": true_BR[:, None, :, None]}
        fresh = self.heads.context_rows(target.config, params, fused_BRH, rows.start.length[:, None] + index_R)
        fresh = [{name: jnp.where(masks[name], row, 0) for name, row in layer.items()} for layer in fresh]
        return {"context": commit(state["context"], fresh, None, rows.start.length)}

    def probing(self):
        policy = self.policy.probing()
        tree = None if policy is None else policy.topology
        if policy is None or tree is None or tree.max_depth <= self.heads.depth:
            return super().probing()
        return self.with_policy(dataclasses.replace(policy, tree=tree.down_to(self.heads.depth)))  # type: ignore[call-arg]

    def with_budget(self, candidates, acceptance=None):
        fitted = super().with_budget(candidates, acceptance)
        return None if fitted is None or fitted.max_depth > self.heads.depth else fitted

    def network(self, params, target, state):
        """A block behind the text."""
        return Network(self.heads, params, target, state, self.policy.max_depth)

    def teacher_forced(
        self, config, target: Params, params: Params, tokens: Int[Array, "B T"], output: Output, depth: int
    ) -> list[tuple[Float[Array, "B T H"], Int[Array, "B T"]]]:
        """What the first `depth` slots are read off in blocks that begin everywhere in true texts, and the tokens
        before them."""
        batch, length = tokens.shape
        index_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        context = self.heads.context_rows(config, params, self.heads.fuse(config, params, output.taps), index_BT)
        padded = jnp.pad(tokens, ((0, 0), (0, depth)))
        before = [padded[:, 1 + k : 1 + k + length] for k in range(depth)]
        anchors = Anchors(before[0], index_BT + 1, index_BT + 1, jnp.zeros_like(index_BT))
        hidden_BADH = self.heads.at_anchors(config, params, target, context, anchors, index_BT)
        return [(hidden_BADH[:, :, k], before[k]) for k in range(depth)]

    def ranked(
        self,
        config,
        target: Params,
        params: Params,
        i: int,
        hidden: tuple[Float[Array, "*B H"], Int[Array, "*B"]],
        count: int,
    ) -> Int[Array, "*B K"]:
        """The `count` best guesses of slot i, best first."""
        of_slot, before = hidden
        logits, known = self.heads.logits(config, params, target, of_slot), self.heads.vocabulary(params)
        if self.heads.selector is None:
            return vocabulary.tokens_of(known, best_tokens(logits, count))
        best, outputs = best_logits(logits, self.heads.selector.candidates)
        tokens = vocabulary.tokens_of(known, outputs)
        scores = self.heads.scores_after(params, best, tokens, of_slot, before[..., None])
        return jnp.take_along_axis(tokens, best_tokens(scores[..., 0, :], count), axis=-1)
