"""P-EAGLE's network (arXiv 2602.01469): EAGLE-3 in several layers, which guesses several tokens in one causal pass.

A row of depth 0 is a pair as EAGLE-3 reads it, the fused feature f at position p with the embedding of x_{p+1}, and
guesses x_{p+2}. Behind it, its *anchor*, may stand rows of depth d = 1, 2, ... that know nothing more: in place of
feature and embedding they have two learned vectors, the first of which fc reads as it reads the target's features. Such
a row stands at position p + d and guesses x_{p+2+d}. The first layer is EAGLE-3's, further ones are ordinary:

    f = fc [low; middle; high],  or fc(mask_hidden)
    g = f + attention([input_norm(e); hidden_norm(f)]);   g = g + mlp(mlp_norm(g))
    g = g + attention(attention_norm(g));                 g = g + mlp(mlp_norm(g))       for each further layer
    logits = vocab(norm(g))

A row (i, d), of depth d behind the anchor at i, sees (j, e) of the same document if e = 0 and j <= i, or if j = i and
e <= d. So what is kept of a text are keys and values of depth 0, drafting is one causal pass over the pair that ends in
the root and the rows behind it, and training computes depth 0 once and then whatever *rollouts* it likes.

    as `Eagle3Heads`, and {'mask_hidden' [3H], 'mask_embedding' [H],
     'blocks': [{'attention_norm': {'scale'}, 'attention', 'mlp_norm', 'mlp'}], one for each further layer,
     'embed': {'embedding' [V, H]} if `own_embedding`}
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models import transformer
from models.attention import ALONE, BLOCK, Rows, Sources, attend, softcap
from models.config import TransformerConfig
from models.errors import UserError
from models.heads.eagle import Eagle3Heads, draft_layer, init_draft_layer
from models.layers import RMSNorm, call, rope_angles
from models.layout import Layout
from models.linear import wide_einsum
from models.transformer import Params


class Rollouts(NamedTuple):
    """Rows of depth 1 and more behind anchors of a text, those of depth 1 first.

    Attributes:
      anchors: where the anchor of each row lies in the text; by depth.
      counted: whether the row is one, or fills up its depth; by depth.
      chain: for each row those of its anchor, by depth, itself the last; -1 behind that. Rows are counted over all
        depths.
    """

    anchors: list[Int[Array, "B _"]]
    counted: list[Bool[Array, "B _"]]
    chain: Int[Array, "B R E"]


@dataclasses.dataclass(frozen=True)
class PEagleHeads(Eagle3Heads):
    """The network of P-EAGLE, with EAGLE-3's vocabulary and EAGLE-3.1's norms but `norm_output`.

    Attributes:
      num_layers: of the network.
      own_embedding: it has an embedding of its own, not the target's.
    """

    num_layers: int = 4
    own_embedding: bool = False

    def check(self, config: TransformerConfig) -> None:
        """Raises UserError when the network does not fit the target."""
        super().check(config)
        if self.num_layers < 1:
            raise UserError(f"P-EAGLE needs at least one layer, got {self.num_layers}")
        if self.norm_output:
            raise UserError("norm_output is of EAGLE-3: P-EAGLE feeds nothing back that could be normed")

    def init(self, config: TransformerConfig, target: Params, key: Array) -> Params:
        """A fresh network in the target's dtype: `Eagle3Heads.init`, and masks drawn as what they stand for varies."""
        first_key, hidden_key, embedding_key, *keys = jax.random.split(key, self.num_layers + 2)
        own, table, width = self.layer_config(config), target["embed"]["embedding"], config.width
        scale = (jnp.zeros if own.zero_centred_norm else jnp.ones)(width)
        more = {
            "mask_hidden": jax.random.normal(hidden_key, (3 * width,)),
            "mask_embedding": jnp.std(table) * jax.random.normal(embedding_key, (width,)),
            "blocks": [{"attention_norm": {"scale": scale}, **init_draft_layer(own, width, each)} for each in keys],
        }
        if self.own_embedding:
            more["embed"] = {"embedding": jnp.array(table)}
        more = jax.tree.map(lambda leaf: leaf.astype(table.dtype), more)
        return {**super().init(config, target, first_key), **more}

    def lookup(self, params: Params, target: Params, tokens: Int[Array, "*B"]) -> Float[Array, "*B H"]:
        """Embeddings as the network reads them."""
        return transformer.lookup(params if self.own_embedding else target, tokens)

    def masks(
        self, config: TransformerConfig, params: Params, batch: int, rows: int
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        """f and embedding of rows of depth 1 and more."""
        parts = jnp.split(params["mask_hidden"], 3)
        shape = (batch, rows, config.width)
        feature = self.fused(config, params, parts)
        return jnp.broadcast_to(feature, shape), jnp.broadcast_to(params["mask_embedding"], shape)

    def run_layers(
        self,
        config: TransformerConfig,
        params: Params,
        feature: Float[Array, "B T H"],
        embedding: Float[Array, "B T H"],
        layout: Layout,
        sources: Sources = ALONE,
        mix: Callable = attend,
        remat: bool = False,
    ) -> tuple[Float[Array, "B T H"], list[Rows]]:
        """All layers on T rows; the inherited `run` is the first alone.

        Args:
          config: shape of the target.
          params: of the network.
          feature: f of each row.
          embedding: what it reads beside f.
          layout: positions of the rows, and who sees whom.
          sources: of a stack of layers.
          mix: the attention of every layer.
          remat: keep of a layer its inputs and what is returned, and compute the rest again for its gradients.

        Returns:
          What `logits` reads, and the rows' keys and values, one entry per layer.
        """
        own = self.layer_config(config)
        angles = rope_angles(own, layout.positions)
        run = functools.partial(Eagle3Heads.run, self, config)

        def ordinary(params, y_BTH, _, layout, sources):
            x = call(RMSNorm(own.norm_eps, own.zero_centred_norm), params["attention_norm"], y_BTH)
            rest = {name: part for name, part in params.items() if name != "attention_norm"}
            return call(draft_layer(own), rest, x, y_BTH, angles, layout, sources, mix)

        layers: list[tuple[Callable, Params]] = [(functools.partial(run, mix=mix), params)]
        layers += [(ordinary, each) for each in params["blocks"]]
        hidden, rows = feature, list[Rows]()
        for k, (layer, of_layer) in enumerate(layers):
            layer = jax.checkpoint(layer) if remat else layer
            hidden, fresh = layer(of_layer, hidden, embedding, layout, sources.layer(k))
            rows.append(fresh)
        return hidden, rows

    def roll_out(
        self,
        config: TransformerConfig,
        params: Params,
        text: Sequence[Rows],
        layout: Layout,
        rollouts: Rollouts,
        remat: bool = False,
    ) -> list[Float[Array, "B _ H"]]:
        """What `logits` reads of rows behind anchors, by depth.

        Args:
          config: shape of the target.
          params: of the network.
          text: keys and values of depth 0, one entry per layer.
          layout: of the text.
          rollouts: the rows.
          remat: as for `run_layers`.
        """
        sizes = [anchors.shape[1] for anchors in rollouts.anchors]
        at_BR = jnp.concatenate(rollouts.anchors, axis=1)
        depth_R = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
        place_BR = jnp.take_along_axis(layout.positions, at_BR, axis=1)
        # Positions begin anew with every document of a row.
        place = Layout(place_BR + depth_R, at_BR + 1, since=at_BR - place_BR)
        mix = functools.partial(_attend_in_rollouts, rollouts.chain)
        inputs = self.masks(config, params, *at_BR.shape)
        hidden, _ = self.run_layers(config, params, *inputs, place, Sources(list(text)), mix, remat)
        return jnp.split(hidden, np.cumsum(sizes)[:-1], axis=1)


def every_rollout(batch: int, rows: int, depth: int) -> Rollouts:
    """`depth` rows behind every place of a text."""
    at_BT = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (batch, rows))
    chain = [[at_BT + e * rows if e <= d else jnp.full_like(at_BT, -1) for e in range(depth)] for d in range(depth)]
    by_depth = [jnp.stack(columns, axis=-1) for columns in chain]
    return Rollouts([at_BT] * depth, [jnp.ones_like(at_BT, bool)] * depth, jnp.concatenate(by_depth, axis=1))


def sampled_rollouts(
    key: Array, counted: Sequence[Bool[Array, "B T"]], sizes: Sequence[int], most: Int[Array, "B E"]
) -> Rollouts:
    """Rollouts that end at random: of the anchors that have a row at one depth, some have another behind it.

    With one random number per anchor, the same at all depths: which of those that are left come first among themselves
    is not told by which were left, so that at every depth all choices are equally likely.

    Args:
      key: typed PRNG key.
      counted: for depths 1, 2, ..., the anchors whose row there has a label.
      sizes: for each depth how many rows there is room for, none more than the one before.
      most: for each depth how many rows a text has at most.
    """
    batch, rows = counted[0].shape
    anchors_BC = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (batch, rows))
    there_BC = jnp.ones((batch, rows), bool)
    number_BC = jax.random.uniform(key, (batch, rows))
    chain_BCE = jnp.zeros((batch, rows, 0), jnp.int32)
    anchors, valid, chains = list[Array](), list[Array](), list[Array]()
    offset = 0
    for d, size in enumerate(sizes):
        eligible_BC = there_BC & jnp.take_along_axis(counted[d], anchors_BC, axis=1)
        found_BC, index_BC = jax.lax.top_k(jnp.where(eligible_BC, number_BC, -1.0), size)
        anchors_BC = jnp.take_along_axis(anchors_BC, index_BC, axis=1)
        there_BC = (found_BC >= 0) & (jnp.arange(size) < most[:, d, None])
        number_BC = found_BC
        own_BC1 = jnp.broadcast_to(offset + jnp.arange(size, dtype=jnp.int32), (batch, size))[..., None]
        chain_BCE = jnp.concatenate([jnp.take_along_axis(chain_BCE, index_BC[..., None], axis=1), own_BC1], axis=-1)
        anchors.append(anchors_BC)
        valid.append(there_BC)
        chains.append(jnp.pad(chain_BCE, ((0, 0), (0, 0), (0, len(sizes) - d - 1)), constant_values=-1))
        offset += size
    return Rollouts(anchors, valid, jnp.concatenate(chains, axis=1))


def _attend_in_rollouts(
    chain_BTE: Int[Array, "B T E"],
    q_BTND: Float[Array, "B T N D"],
    rows: Rows,
    sources: Sources,
    layout: Layout,
    *,
    scale: float,
    cap: float | None = None,
    window: None = None,
) -> Float[Array, "B T N*D"]:
    """`attend` of rows that see the text as the layout says, and of each other those in their chain.

    A piece of the rows at a time, so that scores of all of them with all of the text never exist at once.
    """
    B, T, N, D = q_BTND.shape
    K, S = sources.prefix["v"].shape[1:3]
    k_BTKD, v_BTKD = rows["k"].transpose(0, 3, 1, 2), rows["v"].transpose(0, 2, 1, 3)
    pick = jax.vmap(lambda values, index: values[index])
    slot_S = jnp.arange(S, dtype=jnp.int32)

    def piece(inputs):
        q_BQND, chain_BQE, horizon_BQ, since_BQ = inputs
        q_BQKGD = (q_BQND * scale).reshape(B, -1, K, N // K, D)
        at_BQE = jnp.maximum(chain_BQE, 0)
        s_BQKGS = wide_einsum("BQKGD,BKDS->BQKGS", q_BQKGD, sources.prefix["k"])
        s_BQKGE = wide_einsum("BQKGD,BQEKD->BQKGE", q_BQKGD, pick(k_BTKD, at_BQE))
        seen_BQS = (slot_S >= since_BQ[:, :, None]) & (slot_S < horizon_BQ[:, :, None])
        seen = jnp.concatenate([seen_BQS, chain_BQE >= 0], axis=-1)[:, :, None, None]
        scores = softcap(jnp.concatenate([s_BQKGS, s_BQKGE], axis=-1), cap)
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1).astype(q_BTND.dtype)
        mixed = wide_einsum("BQKGS,BKSD->BQKGD", weights[..., :S], sources.prefix["v"])
        mixed += wide_einsum("BQKGE,BQEKD->BQKGD", weights[..., S:], pick(v_BTKD, at_BQE))
        return mixed.astype(q_BTND.dtype).reshape(B, -1, N * D)

    inputs = (q_BTND, chain_BTE, layout.horizon, layout.since)
    count = min(-(-B * N * T * S // BLOCK), T)
    if count == 1:
        return piece(inputs)
    size = -(-T // count)

    def cut(values):
        filled = jnp.pad(values, [(0, 0), (0, -T % size)] + [(0, 0)] * (values.ndim - 2))
        return jnp.moveaxis(filled.reshape(B, -1, size, *values.shape[2:]), 1, 0)

    found = jax.lax.map(jax.checkpoint(piece), jax.tree.map(cut, inputs))
    return jnp.moveaxis(found, 0, 1).reshape(B, -1, N * D)[:, :T]
