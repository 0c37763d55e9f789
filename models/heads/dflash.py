"""DFlash's network (arXiv 2602.06036): a block of mask tokens is filled in one pass that reads the target's features.

The residual streams entering several layers of the target are fused once per token of the text, and every layer of the
network has keys and values of that for all of the text (the *context*); the embedding is the target's own, and so is
the head, unless the network has one over a draft vocabulary (`vocabulary.py`). A block is S rows, the anchor (the
pending token, at position a) and mask tokens behind it, at their true positions:

    c_t = hidden_norm(fc [h_t^1; ...; h_t^n])
    K = [k_norm(W_k c); k_norm(W_k x)],  V = [W_v c; W_v x],  x = attention_norm(y)     RoPE at true positions
    y = y + attention(x);   y = y + mlp(mlp_norm(y));   logits = target head(norm(y))

The context is what precedes the anchor, whose own feature does not exist yet. Rows of a block see each other, or with
`causal` none behind them (JetSpec, arXiv 2606.18394). Row k predicts the token at its own position, so that the
anchor's row predicts nothing; `shifted` it predicts the one after (DSpark, arXiv 2607.05147).

DFlash2 has two more parts, both optional. Around both halves of a layer a *convolution* over a row and the one before
it in the block, whose kernel depends on the row, side 0 on what the half reads and side 1 on what it adds:

    d_i = W_p x_i, as [side, tap, group];   z'_i[c] = sum_t (base[side, t, c] + d_i[side, t, c // 16]) z_{i-t}[c]

And a *selector*: of the K best tokens of every row, scores of pairs of neighbours, U being the logits and y as above:

    S_k(a -> b) = U_k(b) + <A[a] * (W_h norm(y_k)), B[b]>

    {'fc': {'kernel' [nH, H]}, 'hidden_norm': {'scale'}, 'norm': {'scale'},
     'layers': [{'attention_norm', 'attention': {'q', 'k', 'v', 'o', 'q_norm', 'k_norm'}, 'mlp_norm', 'mlp',
                 'attention_conv', 'mlp_conv': {'base' [2, 2, H], 'projection': {'kernel' [H, 4H/16]}}}],
     'selector': {'predecessor', 'successor' [V, r], 'hidden': {'kernel' [H, r]}},
     and a head with a draft vocabulary}
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from models import transformer
from models.attention import ALONE, BLOCK, Rows, Sources, wide
from models.config import TransformerConfig
from models.errors import UserError
from models.heads import vocabulary
from models.heads.eagle import LayerShape
from models.layers import MLP, Attention, RMSNorm, call, key_rows, rope_angles
from models.layout import Blocks, Layout
from models.linear import in_blocks, product
from models.transformer import Params

GROUP = 16  # Channels that share a dynamic kernel of the convolution.

_draw = nn.initializers.lecun_normal()


class Convolution(nn.Module):
    """DFlash2's kernels, of both sides, for the rows they are computed from; the identity at the start."""

    @nn.compact
    def __call__(self, x_BTH: Float[Array, "B T H"]) -> Float[Array, "2 2 B T H"]:
        """`[side, tap]`."""
        width = x_BTH.shape[-1]
        groups = width // GROUP
        identity = lambda key, shape: jnp.zeros(shape).at[:, 0].set(1)  # noqa: E731 - an initializer
        base_22H = self.param("base", identity, (2, 2, width))
        kernel = self.param("projection", lambda key: {"kernel": jnp.zeros((width, 4 * groups))})["kernel"]
        shift = product(x_BTH, kernel.astype(x_BTH.dtype)).reshape(*x_BTH.shape[:2], 2, 2, groups)
        shift_22BTG = jnp.moveaxis(shift, (2, 3), (0, 1))
        return base_22H[:, :, None, None].astype(x_BTH.dtype) + jnp.repeat(shift_22BTG, GROUP, axis=-1)


def convolved(kernel_2BTH: Float[Array, "2 B T H"], z_BTH: Float[Array, "B T H"], size: int) -> Float[Array, "B T H"]:
    """A row and the one before it, which the first of a block of `size` rows lacks."""
    first_T1 = (jnp.arange(z_BTH.shape[1]) % size == 0)[:, None]
    before_BTH = jnp.where(first_T1, 0, jnp.roll(z_BTH, 1, axis=1))
    return kernel_2BTH[0] * z_BTH + kernel_2BTH[1] * before_BTH


class BlockLayer(nn.Module):
    """One pre-norm layer over the rows of blocks of `size`; with `convolution`, DFlash2's."""

    config: TransformerConfig
    size: int
    convolution: bool

    @nn.compact
    def __call__(self, y_BTH, angles, layout, sources=ALONE, window=None):
        """Returns the residual stream `[B, T, H]`."""
        c = self.config

        def half(name, y_BTH, function):
            x_BTH = RMSNorm(c.norm_eps, name=f"{name}_norm")(y_BTH)
            if not self.convolution:
                return y_BTH + function(x_BTH)
            kernels = Convolution(name=f"{name}_conv")(x_BTH)
            added_BTH = function(convolved(kernels[0], x_BTH, self.size))
            return y_BTH + convolved(kernels[1], added_BTH, self.size)

        attention = Attention(c, name="attention")
        y_BTH = half("attention", y_BTH, lambda x: attention(x, angles, layout, sources, window)[0])
        return half("mlp", y_BTH, MLP(c.width, c.mlp_width, c.activation, name="mlp"))


class Anchors(NamedTuple):
    """Where blocks begin in a text.

    Attributes:
      tokens: the anchors.
      positions: theirs.
      horizon: slots of the context that a block sees.
      since: the first of them.
    """

    tokens: Int[Array, "B A"]
    positions: Int[Array, "B A"]
    horizon: Int[Array, "B A"]
    since: Int[Array, "B A"]


@dataclasses.dataclass(frozen=True)
class Selector:
    """DFlash2's choice among candidates.

    Attributes:
      rank: r, width of the codebooks.
      candidates: K, tokens of a row that are scored.
    """

    rank: int = 256
    candidates: int = 16


@dataclasses.dataclass(frozen=True)
class DFlashHeads(vocabulary.DraftVocabulary):
    """Shape of the network.

    Attributes:
      target_layers: layers of the target whose incoming residual stream is fused, in this order. (Releases count the
        layers whose output it is, one less.)
      mask_token: the token whose embedding fills a block.
      num_layers: of the network.
      block: S, rows of a block, the anchor's included.
      window: sliding window of every layer, by positions, over the context and the block; None is all.
      causal: rows of a block see none behind them.
      shifted: row k predicts the token after its own, not its own, and the anchor's row predicts too.
      convolution: DFlash2's.
      selector: DFlash2's; None is without.
      layer: shape of a layer; None takes its sizes from the target.
      vocab_size: W, size of the draft vocabulary; 0 reads the target's own head.
    """

    target_layers: tuple[int, ...]
    mask_token: int
    num_layers: int = 5
    block: int = 16
    window: int | None = None
    causal: bool = False
    shifted: bool = False
    convolution: bool = False
    selector: Selector | None = None
    layer: LayerShape | None = None
    vocab_size: int = 0

    @property
    def taps(self) -> tuple[str, ...]:
        """Features of the target that `fuse` reads; one name for each layer, however often it is read."""
        return tuple(dict.fromkeys(f"layer:{k}" for k in self.target_layers))

    @property
    def depth(self) -> int:
        """D, tokens that a block drafts."""
        return self.block if self.shifted else self.block - 1

    def down_to(self, depth: int) -> "DFlashHeads":
        """As much of the block as the first `depth` drafting slots need: of a causal one the rows up to them."""
        return dataclasses.replace(self, block=self.block - self.depth + depth) if self.causal else self

    def check(self, config: TransformerConfig) -> None:
        """Raises UserError when the network does not fit the target."""
        if missing := [k for k in self.target_layers if not 0 <= k < config.num_layers]:
            raise UserError(
                f"DFlash reads what enters layer {missing[0]}, but the target has layers 0 to {config.num_layers - 1}"
            )
        if not self.target_layers:
            raise UserError("DFlash needs at least one layer of the target to read")
        if not 0 <= self.mask_token < config.vocab_size:
            raise UserError(
                f"DFlash fills blocks with token {self.mask_token}, but the target has tokens 0 to "
                f"{config.vocab_size - 1}"
            )
        if self.num_layers < 1 or self.depth < 1:
            raise UserError(
                f"DFlash needs at least one layer and a block that drafts at least one token, got {self.num_layers} "
                f"layers and a block of {self.block}"
            )
        if self.window is not None and self.window < 1:
            raise UserError(f"DFlash's window must be at least 1, got {self.window}")
        if self.convolution and config.width % GROUP:
            raise UserError(f"DFlash2's convolution needs a width that is a multiple of {GROUP}, got {config.width}")
        vocabulary.check(self.vocab_size, config)
        if (chosen := self.selector) and not (1 <= chosen.candidates <= self.outputs(config) and chosen.rank >= 1):
            raise UserError(
                f"DFlash2's selector needs a rank of at least 1 and 1 to {self.outputs(config)} candidates, got "
                f"{chosen.rank} and {chosen.candidates}"
            )

    def layer_config(self, config: TransformerConfig) -> TransformerConfig:
        """The network's layers as a transformer's: Qwen3's kind, with norms on queries and keys and no biases."""
        names = ("num_heads", "num_kv_heads", "head_dim", "mlp_width", "norm_eps", "rope_theta", "rope_scaling")
        shape = self.layer or LayerShape(**{name: getattr(config, name) for name in names})
        windows = (self.window,) * self.num_layers
        return dataclasses.replace(shape.of(config), num_layers=self.num_layers, qk_norm=True, windows=windows)

    def _layer(self, config: TransformerConfig) -> BlockLayer:
        return BlockLayer(self.layer_config(config), self.block, self.convolution)

    def init(self, config: TransformerConfig, target: Params, key: Array) -> Params:
        """A fresh network in the target's dtype, whose last norm starts as the target's."""
        fc_key, chosen_key, *layer_keys = jax.random.split(key, self.num_layers + 2)
        width, count = config.width, len(self.target_layers)
        x, layout = jnp.zeros((1, self.block, width)), Layout.causal(1, self.block)
        angles = rope_angles(self.layer_config(config), layout.positions)
        last = target["final_norm"]["scale"]
        params = {
            "fc": {"kernel": _draw(fc_key, (count * width, width))},
            "hidden_norm": {"scale": jnp.ones(width)},
            "layers": [self._layer(config).init(each, x, angles, layout)["params"] for each in layer_keys],
            "norm": {"scale": last + 1 if config.zero_centred_norm else jnp.array(last)},
        }
        if self.selector is not None:
            # With one factor at zero it begins as the choice by logits, and has a gradient.
            before, gate = jax.random.split(chosen_key)
            codebook = (config.vocab_size, self.selector.rank)
            params["selector"] = {
                "predecessor": nn.initializers.normal(1.0)(before, codebook),
                "successor": jnp.zeros(codebook),
                "hidden": {"kernel": _draw(gate, (width, self.selector.rank))},
            }
        params = jax.tree.map(lambda leaf: leaf.astype(target["embed"]["embedding"].dtype), params)
        return {**params, **vocabulary.init(self.vocab_size, target)} if self.vocab_size else params

    def for_decoding(self, params: Params, mesh: Mesh | None = None) -> Params:
        """Parameters as decoding reads them; queries, keys and values stay apart, for the context has no queries."""
        if mesh is not None:
            return params
        layers = transformer.for_decoding({"layers": params["layers"]}, joined=("mlp",))["layers"]
        rest = {name: part for name, part in params.items() if name != "layers"}
        return {**transformer.map_kernels(in_blocks, rest), "layers": layers}

    def fuse(
        self, config: TransformerConfig, params: Params, taps: dict[str, Float[Array, "*B H"]]
    ) -> Float[Array, "*B H"]:
        """c, from the target's features."""
        x = jnp.concatenate([taps[f"layer:{k}"] for k in self.target_layers], axis=-1)
        norm = RMSNorm(self.layer_config(config).norm_eps)
        return call(norm, params["hidden_norm"], product(x, params["fc"]["kernel"]))

    def context_rows(
        self, config: TransformerConfig, params: Params, fused: Float[Array, "B T H"], positions: Int[Array, "B T"]
    ) -> list[Rows]:
        """Keys and values of the context, one entry per layer, as a cache keeps them.

        Args:
          config: shape of the target.
          params: of the network.
          fused: c of T tokens.
          positions: where they stand.
        """
        own = self.layer_config(config)
        angles = rope_angles(own, positions)
        norm = RMSNorm(own.norm_eps)

        def of_layer(attention):
            heads = (*fused.shape[:2], own.num_kv_heads, own.head_dim)
            k, v = (product(fused, attention[name]["kernel"]).reshape(heads) for name in ("k", "v"))
            return key_rows(call(norm, attention["k_norm"], k), v, angles)

        return [of_layer(layer["attention"]) for layer in params["layers"]]

    def inputs(self, target: Params, anchors: Int[Array, "B A"]) -> Float[Array, "B R H"]:
        """The R = A S rows of A blocks: the embedding of the anchor, and those of mask tokens behind it."""
        tokens_BAS = (
            jnp.full((*anchors.shape, self.block), self.mask_token, jnp.int32)
            .at[:, :, 0]
            .set(anchors.astype(jnp.int32))
        )
        return transformer.lookup(target, tokens_BAS.reshape(len(anchors), -1))

    def layout(
        self,
        positions: Int[Array, "B A"],
        horizon: Int[Array, "B A"],
        since: Int[Array, "B A"] | None = None,
        prefix_positions: Int[Array, "B T"] | None = None,
    ) -> Layout:
        """Who sees whom among the rows of A blocks and the context.

        Args:
          positions: of the anchors.
          horizon: slots of the context that a block sees.
          since: the first of them; None is slot 0.
          prefix_positions: where the tokens in these slots stand; None where slot and position agree.
        """
        batch, count = positions.shape

        def of_rows(values_BA):
            return jnp.repeat(values_BA, self.block, axis=1) if count > 1 else values_BA

        return Layout(
            (positions[:, :, None] + jnp.arange(self.block, dtype=jnp.int32)).reshape(batch, -1),
            of_rows(horizon),
            Blocks(self.block, causal=self.causal),
            prefix_positions=prefix_positions,
            since=None if since is None else of_rows(since),
            # Blocks of one text never see one another: no scores between them.
            attention="blocks" if count > 1 else "dense",
        )

    def run(
        self,
        config: TransformerConfig,
        params: Params,
        inputs: Float[Array, "B R H"],
        layout: Layout,
        context: Sequence[Rows],
    ) -> Float[Array, "B R H"]:
        """One pass over A blocks: what the target's head reads, of every row.

        Args:
          config: shape of the target.
          params: of the network.
          inputs: as `inputs` makes them.
          layout: as `layout` makes it.
          context: keys and values of the text, one entry per layer: `context_rows`, or a cache of them.
        """
        own = self.layer_config(config)
        angles, y_BTH = rope_angles(own, layout.positions), inputs
        for layer, rows in zip(params["layers"], context, strict=True):
            y_BTH = call(self._layer(config), layer, y_BTH, angles, layout, Sources(rows), self.window)
        return call(RMSNorm(own.norm_eps), params["norm"], y_BTH)

    def drafting(self, hidden: Float[Array, "B R H"]) -> Float[Array, "B A D H"]:
        """Of the outputs of A blocks those that draft tokens, in the order of the text."""
        hidden_BASH = hidden.reshape(hidden.shape[0], -1, self.block, hidden.shape[-1])
        return hidden_BASH[:, :, self.block - self.depth :]

    def at_anchors(
        self,
        config: TransformerConfig,
        params: Params,
        target: Params,
        context: Sequence[Rows],
        anchors: Anchors,
        prefix_positions: Int[Array, "#B T"],
        devices: int = 1,
    ) -> Float[Array, "B A D H"]:
        """What the target's head reads of blocks at many places of a text, a piece of them at a time.

        Args:
          config: shape of the target.
          params: of the network.
          target: the target's parameters.
          context: `context_rows` of the text.
          anchors: where the blocks begin.
          prefix_positions: where the tokens of the text stand.
          devices: that share the work.
        """
        own, (batch, count) = self.layer_config(config), anchors.tokens.shape

        def piece(anchors):
            layout = self.layout(anchors.positions, anchors.horizon, anchors.since, prefix_positions)
            hidden = self.run(config, params, self.inputs(target, anchors.tokens), layout, context)
            return self.drafting(hidden)

        scores = batch * own.num_heads * count * self.block * prefix_positions.shape[1]
        pieces = min(-(-scores // (BLOCK * devices)), count)
        if pieces == 1:
            return piece(anchors)
        size = -(-count // pieces)

        def cut(values_BA):
            filled = jnp.pad(values_BA, ((0, 0), (0, -count % size)))
            return jnp.moveaxis(filled.reshape(batch, -1, size), 1, 0)

        found = jax.lax.map(jax.checkpoint(piece), jax.tree.map(cut, anchors))
        return jnp.moveaxis(found, 0, 1).reshape(batch, -1, *found.shape[3:])[:, :count]

    def scores_after(
        self,
        params: Params,
        best: Float[Array, "*B K"],
        tokens: Int[Array, "*B K"],
        hidden: Float[Array, "*B H"],
        before: Int[Array, "*B M"],
    ) -> Float[Array, "*B M K"]:
        """DFlash2's scores of the K best tokens of a row after each of M tokens.

        Args:
          params: of the network.
          best: logits of the tokens.
          tokens: the target's, as many as the selector has candidates.
          hidden: what they were read off.
          before: tokens that may stand before.
        """
        chosen = params["selector"]
        gate_Br = product(hidden, chosen["hidden"]["kernel"])
        gated_BMr = chosen["predecessor"][before] * gate_Br[..., None, :]
        pairs_BMK = jnp.einsum("...mr,...kr->...mk", gated_BMr, chosen["successor"][tokens])
        return best[..., None, :] + pairs_BMK.astype(wide(best.dtype))


def dflash_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """Which layers of a target to read, by what enters them.

    As released, the outputs of layers round(1 + i (L - 4) / (n - 1)), of layer L // 2 for n = 1. For targets too
    shallow for n different ones, what enters any of the layers after the first, as many as there are.
    """
    if count == 1:
        return (min(num_layers // 2 + 1, num_layers - 1),)
    if num_layers - 3 >= count:
        return tuple(round(1 + i * (num_layers - 4) / (count - 1)) + 1 for i in range(count))
    first = min(1, num_layers - 1)
    few = min(count, num_layers - first)
    return tuple(round(first + i * (num_layers - 1 - first) / max(few - 1, 1)) for i in range(few))
