"""DSpark's drafter, and Domino's: DFlash's block, whose slots are then told one by one what stands before them.

One pass of the network fills all slots; a serial head (`models/heads/serial.py`) corrects a slot's logits by the tokens
that lead to it, at the price of a product with a matrix of rank r. So every candidate of a tree has a distribution of
its own, conditioned on its whole path, and any policy makes a tree of that in one pass: a chain drawn from the exact
conditionals, or the *lattice tree*, whose branches know their parents. What the head remembers of a path lies in the
scratch, per slot.

With `candidates` the K best tokens of a slot, by its own logits, are all that is scored after a parent: K columns of
the head's matrix instead of V. Distributions are then over these tokens, which is as lossless.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from decoding.drafters import dflash
from decoding.drafters.dflash import DFlash
from decoding.policies.admission import of_going
from decoding.policies.policy import Scores
from decoding.sampling import best_logits, best_tokens
from models.errors import UserError
from models.heads import vocabulary
from models.heads.serial import SerialHead
from models.transformer import Params


@struct.dataclass
class Told:
    """Scratch of `Network`.

    Attributes:
      logits: of a block's D drafting slots by themselves: of all outputs, or of each slot's candidates.
      outputs: these; None for all.
      hidden: what the slots' logits are read off.
      state: what the serial head remembers behind the token of each of S slots of the tree.
    """

    logits: Float[Array, "B D W"]
    outputs: Int[Array, "B D W"] | None
    hidden: Float[Array, "B D H"]
    state: Float[Array, "B S s"]


@struct.dataclass
class Network(dflash.Network):
    """A block and a serial head as a draft network (`decoding.policies.DraftNetwork`).

    Attributes:
      serial: shape of the head.
      candidates: K; None is all outputs.
    """

    serial: SerialHead = struct.field(pytree_node=False)
    candidates: int | None = struct.field(pytree_node=False)

    def begin(self, root, slots):
        """The one pass, and the first slot behind the root; see `DraftNetwork`."""
        hidden_BDH, logits = self.filled_block(root)
        outputs = None
        if self.candidates is not None:
            logits, outputs = best_logits(logits, self.candidates)
        told = Told(logits, outputs, hidden_BDH, self.serial.begin((root.shape[0], slots), hidden_BDH.dtype))
        return self._behind(told, 0, 0, root[:, None], told.state[:, :1])

    def extend(self, scratch, level, at, tokens, parents, seen):
        """The serial head alone; see `DraftNetwork`."""
        return self._behind(scratch, level, at, tokens, jnp.take_along_axis(scratch.state, parents[:, :, None], axis=1))

    def _behind(self, told: Told, slot: int, at: int, tokens: Int[Array, "B M"], state: Float[Array, "B M s"]):
        """What slot `slot` says after each of M tokens, and the scratch with their states."""
        serial, params = self.serial, self.params["serial"]
        before = serial.embed(params, self.target.params, tokens)
        hidden = jnp.broadcast_to(told.hidden[:, slot, None], (*tokens.shape, told.hidden.shape[2]))
        latent, state = serial.step(params, slot, state, hidden, before)
        logits, offered = told.logits[:, slot, None], self.known
        if told.outputs is None:
            logits = logits + serial.scores(params, latent)
        else:
            logits = logits + serial.scores_of(params, latent, told.outputs[:, slot])
            offered = vocabulary.tokens_of(self.known, told.outputs[:, slot, None])
            offered = jnp.broadcast_to(offered, logits.shape)
        sure = None
        if serial.confidence != "none":
            sure = of_going(jax.nn.sigmoid(serial.confidence_logit(params, hidden, before)), self.target.done)
        kept = jax.lax.dynamic_update_slice_in_dim(told.state, state.astype(told.state.dtype), at, axis=1)
        return Scores(logits, tokens=offered, confidence=sure), dataclasses.replace(told, state=kept)


@dataclasses.dataclass(frozen=True)
class DSpark(DFlash):
    """DSpark; with a GRU for its serial head, Domino.

    Attributes:
      serial: shape of the serial head.
      candidates: tokens of a slot that are scored after its predecessors; None is all.
    """

    serial: SerialHead = dataclasses.field(default_factory=SerialHead)
    candidates: int | None = None
    name: ClassVar[str] = "dspark"

    def outputs(self, config):
        return self.heads.outputs(config) if self.candidates is None else self.candidates

    @property
    def blind(self) -> int:
        return 0

    @property
    def confident(self) -> bool:
        return self.serial.confidence != "none"

    def check(self, config):
        self.serial.check()
        if self.heads.selector is not None:
            raise UserError("a serial head takes the place of DFlash2's selector: a drafter has one of them")
        most = self.heads.outputs(config)
        if self.candidates is not None and not 1 <= self.candidates <= most:
            raise UserError(f"candidates must be from 1 to {most}, or none for all, got {self.candidates}")
        super().check(config)

    def init_params(self, config, target, key):
        """Those of the block's network, and `serial`."""
        block_key, serial_key = jax.random.split(key)
        block = self.heads.init(config, target, block_key)
        return {**block, "serial": self.serial.init(config, target, serial_key, self.heads.outputs(config))}

    def network(self, params, target, state):
        """A block behind the text."""
        return Network(self.heads, params, target, state, self.policy.max_depth, self.serial, self.candidates)

    def teacher_forced(self, config, target, params, tokens, output, depth):
        """What the first `depth` slots are read off in blocks that begin everywhere in true texts, and what the serial
        head makes of the true tokens before them."""
        slots = super().teacher_forced(config, target, params, tokens, output, depth)
        hidden_BTDH, before_BTD = (jnp.stack(part, axis=2) for part in zip(*slots, strict=True))
        own = params["serial"]
        latent_BTDr = self.serial.latents(own, hidden_BTDH, self.serial.embed(own, target, before_BTD))
        return [(hidden_BTDH[:, :, k], latent_BTDr[:, :, k]) for k in range(depth)]

    def ranked(
        self,
        config,
        target: Params,
        params: Params,
        i: int,
        hidden: tuple[Float[Array, "*B H"], Float[Array, "*B r"]],
        count: int,
    ) -> Int[Array, "*B K"]:
        """The `count` best guesses of slot i, best first."""
        of_slot, latent = hidden
        logits, known = self.heads.logits(config, params, target, of_slot), self.heads.vocabulary(params)
        if self.candidates is None:
            outputs = best_tokens(logits + self.serial.scores(params["serial"], latent), count)
            return vocabulary.tokens_of(known, outputs)
        best, outputs = best_logits(logits, self.candidates)
        scores = best + self.serial.scores_of(params["serial"], latent[..., None, :], outputs)[..., 0, :]
        chosen = jnp.take_along_axis(outputs, best_tokens(scores, count), axis=-1)
        return vocabulary.tokens_of(known, chosen)
