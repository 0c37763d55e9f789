"""Heads that let a slot of a block know which token stands before it: DSpark's Markov heads and Domino's GRU.

A block network fills D slots in one pass, h_k each, and reads logits U_k off every one by itself; two likely phrases
then mix. Slot k's predecessor x_k is the anchor for k = 0 and else what was chosen in slot k - 1. A head turns the
predecessors x_0 .. x_k into a *latent* of rank r and adds its scores: U'_k = U_k + latent_k W. With e = E[x_k]:

    vanilla  latent = e                                                        DSpark (arXiv 2607.05147), a bigram
    gated    latent = sigmoid(gate [h; e]) * e
    rnn      g, c, o = joint [s; e; h];  s = sigmoid(g) s + (1 - sigmoid(g)) tanh(c);  latent = tanh(o)
    gru      r, z = sigmoid(..);  n = tanh(W_in e + r * (W_hn s));  s = (1 - z) n + z s;
             latent = silu(down [h; s])                                        Domino (arXiv 2605.29707)

The state s is 0 at the start of every block. E is a table of the head's own, [V, r]; Domino's is the target's, raw. The
first `plain` slots keep U. A *confidence* head says, of a slot whose predecessors all survived verification, how
probably it survives too: sigmoid(confidence [h; e]).

    {'embed': {'embedding' [V, r]}, 'vocab': {'kernel' [r, W]}, with a draft vocabulary of W tokens, else of all V
     'gate': {'kernel' [H + r, r], 'bias'}                                          gated
     'joint': {'kernel' [2r + H, 3r], 'bias'}                                       rnn
     'input': {'kernel' [H, 3s]}, 'state': {'kernel' [s, 3s]}, 'down': {'kernel' [H + s, r]}   gru: r, z, n
     'confidence': {'kernel' [H or H + r, 1], 'bias'}}
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models import transformer
from models.attention import wide
from models.config import TransformerConfig
from models.errors import UserError
from models.linear import Kernel, product
from models.sharding import split_vocabulary
from models.transformer import Params

_draw = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class SerialHead:
    """Shape of a head.

    Attributes:
      kind: see the module.
      rank: r.
      state: width of the GRU's state; the others' follows from their kind.
      plain: first slots that are left as they are.
      confidence: what the confidence head reads: h, or h and e (`both`); `none` is without.
    """

    kind: Literal["vanilla", "gated", "rnn", "gru"] = "vanilla"
    rank: int = 256
    state: int = 1024
    plain: int = 0
    confidence: Literal["none", "hidden", "both"] = "both"

    def check(self) -> None:
        """Raises UserError for sizes that no head has."""
        if self.rank < 1 or self.state < 1 or self.plain < 0:
            raise UserError(
                f"a serial head needs a rank and a state of at least 1 and no fewer than 0 plain slots, got "
                f"{self.rank}, {self.state} and {self.plain}"
            )
        if self.kind == "gru" and self.confidence == "both":
            raise UserError(
                "a GRU has no table of tokens for a confidence head to read: confidence must be none or hidden"
            )

    @property
    def state_width(self) -> int:
        """Width of s; 0 for the kinds that look one token back."""
        return {"vanilla": 0, "gated": 0, "rnn": self.rank, "gru": self.state}[self.kind]

    def init(self, config: TransformerConfig, target: Params, key: Array, outputs: int | None = None) -> Params:
        """A fresh head in the target's dtype, which leaves logits as they are and is sure of nothing.

        Args:
          config: shape of the target.
          target: its parameters.
          key: for what is drawn.
          outputs: W, tokens that are scored; None is all.
        """
        table_key, first_key, second_key, third_key = jax.random.split(key, 4)
        H, V, r, s = config.width, config.vocab_size, self.rank, self.state
        params: Params = {"vocab": {"kernel": jnp.zeros((r, V if outputs is None else outputs))}}
        if self.kind == "gru":
            like_torch = nn.initializers.uniform(2 * s**-0.5)
            params["input"] = {"kernel": like_torch(first_key, (H, 3 * s)) - s**-0.5}
            params["state"] = {"kernel": like_torch(second_key, (s, 3 * s)) - s**-0.5}
            params["down"] = {"kernel": _draw(third_key, (H + s, r))}
        else:
            params["embed"] = {"embedding": nn.initializers.normal(1.0)(table_key, (V, r))}
        if self.kind == "gated":
            params["gate"] = {"kernel": _draw(first_key, (H + r, r)), "bias": jnp.zeros(r)}
        if self.kind == "rnn":
            params["joint"] = {"kernel": _draw(first_key, (2 * r + H, 3 * r)), "bias": jnp.zeros(3 * r)}
        if self.confidence != "none":
            inputs = H + (r if self.confidence == "both" else 0)
            params["confidence"] = {"kernel": jnp.zeros((inputs, 1)), "bias": jnp.zeros(1)}
        return jax.tree.map(lambda leaf: leaf.astype(target["embed"]["embedding"].dtype), params)

    def embed(self, params: Params, target: Params, tokens: Int[Array, "*B"]) -> Float[Array, "*B E"]:
        """e of predecessors."""
        return transformer.lookup(target if self.kind == "gru" else params, tokens)

    def begin(self, shape: tuple[int, ...], dtype) -> Float[Array, "*B S"]:
        """s before a block."""
        return jnp.zeros((*shape, self.state_width), dtype)

    def step(
        self,
        params: Params,
        slot: int,
        state: Float[Array, "*B S"],
        hidden: Float[Array, "*B H"],
        before: Float[Array, "*B E"],
    ) -> tuple[Float[Array, "*B r"], Float[Array, "*B S"]]:
        """One slot.

        Args:
          params: of the head.
          slot: which.
          state: s before it.
          hidden: h of the slot.
          before: e of its predecessor.

        Returns:
          Its latent, and s behind it.
        """
        latent, state = self._step(params, state, hidden, before)
        return jnp.zeros_like(latent) if slot < self.plain else latent, state

    def latents(
        self, params: Params, hidden: Float[Array, "*B D H"], before: Float[Array, "*B D E"]
    ) -> Float[Array, "*B D r"]:
        """All slots of blocks whose predecessors are known; equals `step` after `step`."""
        state = self.begin(hidden.shape[:-2], hidden.dtype)
        if not self.state_width:
            latent = self._step(params, jnp.zeros((*hidden.shape[:-1], 0), hidden.dtype), hidden, before)[0]
        else:

            def run(state, slot):
                latent, state = self._step(params, state, *slot)
                return state, latent

            slots = [jnp.moveaxis(x, -2, 0) for x in (hidden, before)]
            latent = jnp.moveaxis(jax.lax.scan(run, state, slots)[1], 0, -2)
        plain_D1 = (jnp.arange(hidden.shape[-2]) < self.plain)[:, None]
        return jnp.where(plain_D1, 0, latent) if self.plain else latent

    def _step(self, params, state, hidden, before):
        if self.kind == "vanilla":
            return before, state
        if self.kind == "gated":
            return nn.sigmoid(_linear(params["gate"], hidden, before)) * before, state
        if self.kind == "rnn":
            gate, candidate, output = jnp.split(_linear(params["joint"], state, before, hidden), 3, axis=-1)
            gate = nn.sigmoid(gate)
            return jnp.tanh(output), gate * state + (1 - gate) * jnp.tanh(candidate)
        of_input, of_state = _linear(params["input"], before), _linear(params["state"], state)
        (r_in, z_in, n_in), (r_s, z_s, n_s) = (jnp.split(x, 3, axis=-1) for x in (of_input, of_state))
        keep = nn.sigmoid(z_in + z_s)
        state = (1 - keep) * jnp.tanh(n_in + nn.sigmoid(r_in + r_s) * n_s) + keep * state
        return nn.silu(_linear(params["down"], hidden, state)), state

    def scores(self, params: Params, latent: Float[Array, "*B r"]) -> Float[Array, "*B W"]:
        """What is added to the logits of all outputs, float32 or wider."""
        return split_vocabulary(product(latent, params["vocab"]["kernel"], wide(latent.dtype)))

    def scores_of(
        self, params: Params, latent: Float[Array, "*B M r"], outputs: Int[Array, "*B K"]
    ) -> Float[Array, "*B M K"]:
        """What is added to the logits of K outputs, for each of M latents; `scores` at these."""
        columns = _columns(params["vocab"]["kernel"], outputs)
        return jnp.einsum("...Mr,...Kr->...MK", latent, columns, preferred_element_type=wide(latent.dtype))

    def confidence_logit(
        self, params: Params, hidden: Float[Array, "*B H"], before: Float[Array, "*B E"]
    ) -> Float[Array, "*B"]:
        """Of the probability that a slot survives verification, given that its predecessors did, float32 or wider."""
        inputs = (hidden, before) if self.confidence == "both" else (hidden,)
        return _linear(params["confidence"], *inputs)[..., 0].astype(wide(hidden.dtype))


def _linear(params: Params, *inputs: Array) -> Array:
    y = product(jnp.concatenate(inputs, axis=-1), params["kernel"])
    return y + params["bias"] if "bias" in params else y


def _columns(kernel: Kernel, outputs: Int[Array, "*B K"]) -> Float[Array, "*B K r"]:
    if kernel.ndim == 2:
        return jnp.moveaxis(jnp.take(kernel, outputs, axis=1), 0, -1)
    block = kernel.shape[2]
    return jnp.asarray(kernel[outputs // block, :, outputs % block])
