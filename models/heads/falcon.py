"""Falcon's draft network (Gao et al. 2024): an EAGLE that guesses k tokens at once, one per row of a block.

The network reads pairs as EAGLE does: a feature of the target at position p and the embedding of the next token,
x_{p+1}; the RoPE position of the pair is p. What it returns stands in for the target's feature at p + k, and through
the target's own head guesses x_{p+k+1}. Pairs stand in blocks of k, in which they see each other both ways (relaxed
causal mask; `models.layout.BlockCausal`), so that the last k true pairs, one block, guess the k tokens behind the
root. These k outputs, paired with k tokens that were guessed, are the next block. f is the target's post-norm feature:

    y = lstm2(lstm1([E[x]; f]));   g = y + attention(y);   g = g + mlp(mlp_norm(g))
    then, where there are more layers, g = g + attention(attention_norm(g));   g = g + mlp(mlp_norm(g))
    logits = target head(g), or those of a draft vocabulary (`vocabulary.py`)

    {'lstm': [{'input': {'kernel' [2H, 3H], 'bias' [3H]}}, {'input': {'kernel' [H, 3H], 'bias' [3H]}}],
     'layers': [{'attention': {'q', 'k', 'v', 'o'}, 'mlp_norm': {'scale'}, 'mlp': {'gate', 'up', 'down'}},
                {'attention_norm': {'scale'}, and the same}, ...]}

The published program gives every pair to its LSTM as a text of its own, from a state of zeros (`per_position`). It is
then a gated network without memory, whose gates are i, g and o: there is nothing to forget. In the mode `recurrent` it
reads the text pair by pair; gates are i, f, g, o, kernels 4H wide, and each layer has 'state': {'kernel' [H, 4H]} too.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.attention import ALONE, Rows, Sources, attend, attend_in_blocks, softcap, wide
from models.config import TransformerConfig
from models.errors import UserError
from models.heads import vocabulary
from models.heads.eagle import DraftLayer, LayerShape
from models.layers import RMSNorm, call, rope_angles
from models.layout import BlockCausal, Layout
from models.linear import product
from models.transformer import Params

_draw = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class FalconHeads(vocabulary.DraftVocabulary):
    """Shape of the network.

    Attributes:
      block: k, pairs of a block and tokens guessed per pass; 2 to 4 as published.
      layers: Llama layers behind the LSTM.
      lstm_mode: what the LSTM's state is: zeros for every pair, or that of the pair before.
      dropout: rate between the LSTM's layers, in training (0.1 as published).
      layer: shape of the layers; None means the target's.
      vocab_size: W, size of the draft vocabulary; 0 reads the target's own head.
    """

    block: int = 2
    layers: int = 1
    lstm_mode: Literal["per_position", "recurrent"] = "per_position"
    dropout: float = 0.0
    layer: LayerShape | None = None
    vocab_size: int = 0

    def __post_init__(self):
        """Raises UserError for numbers that make no network."""
        for name in ("block", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"a Falcon network needs a {name} of at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in 0..1, 1 excluded, got {self.dropout}")

    def check(self, config: TransformerConfig) -> None:
        """Raises UserError when the network does not fit the target."""
        vocabulary.check(self.vocab_size, config)

    @property
    def recurrent(self) -> bool:
        """Whether the LSTM goes on from pair to pair."""
        return self.lstm_mode == "recurrent"

    def layer_config(self, config: TransformerConfig) -> TransformerConfig:
        """The config of the network's layers and norms: the target's, or the network's own."""
        own = config if self.layer is None else self.layer.of(config)
        return dataclasses.replace(own, num_layers=self.layers, windows=(), post_norms=False)

    def init(self, config: TransformerConfig, target: Params, key: Array) -> Params:
        """A fresh network in the target's dtype."""
        own, width = self.layer_config(config), config.width
        gates = (4 if self.recurrent else 3) * width
        lstm_key, *layer_keys = jax.random.split(key, self.layers + 1)
        layout, x = Layout.causal(1, 1), jnp.zeros((1, 1, width))
        angles = rope_angles(own, layout.positions)
        params: Params = {"lstm": [], "layers": []}
        for inputs, key in zip((2 * width, width), jax.random.split(lstm_key), strict=True):
            input_key, state_key = jax.random.split(key)
            part = {"input": {"kernel": _draw(input_key, (inputs, gates)), "bias": jnp.zeros(gates)}}
            params["lstm"].append(
                part | ({"state": {"kernel": _draw(state_key, (width, gates))}} if self.recurrent else {})
            )
        for i, key in enumerate(layer_keys):
            layer = DraftLayer(own).init(key, x, x, angles, layout)["params"]
            norm = {"scale": (jnp.zeros if own.zero_centred_norm else jnp.ones)(width)}
            params["layers"].append({**({"attention_norm": norm} if i else {}), **layer})
        params = jax.tree.map(lambda leaf: leaf.astype(target["embed"]["embedding"].dtype), params)
        return {**params, **vocabulary.init(self.vocab_size, target)} if self.vocab_size else params

    def join(
        self,
        params: Params,
        feature: Float[Array, "B T H"],
        embedding: Float[Array, "B T H"],
        state: Float[Array, "B 4 H"] | None = None,
        begins: Bool[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Float[Array, "B T H"], Float[Array, "B T 4 H"] | None]:
        """The LSTM on T pairs.

        Args:
          params: of the network.
          feature: of each pair, the target's or an earlier output of `run`.
          embedding: `transformer.lookup` of the token that follows.
          state: c and h of both layers behind the pair before; None is zeros. Of a recurrent network alone.
          begins: pairs that begin a text, and are read from a state of zeros whatever came before.
          dropout_key: drops what goes from layer to layer; None is without.

        Returns:
          y, which the layers read; and of a recurrent network the state behind every pair, in the order c, h, c, h.
        """
        first, second = params["lstm"]
        x_BTI = jnp.concatenate([embedding, feature], axis=-1)
        drop = jnp.ones((), feature.dtype)
        if dropout_key is not None and self.dropout:
            kept = jax.random.bernoulli(dropout_key, 1 - self.dropout, feature.shape)
            drop = kept.astype(feature.dtype) / (1 - self.dropout)
        if not self.recurrent:
            inner_BTH = _gated(_affine(first, x_BTI))
            return _gated(_affine(second, inner_BTH * drop)), None

        batch, length, width = feature.shape
        state = jnp.zeros((batch, 4, width), feature.dtype) if state is None else state
        kept_BT = jnp.ones((batch, length), feature.dtype) if begins is None else 1 - begins.astype(feature.dtype)

        def step(state, row):
            x_BG, drop_BH, kept_B = row
            c1, h1, c2, h2 = jnp.moveaxis(state * kept_B[:, None, None], 1, 0)
            c1, h1 = _remembering(x_BG + product(h1, first["state"]["kernel"]), c1)
            c2, h2 = _remembering(_affine(second, h1 * drop_BH) + product(h2, second["state"]["kernel"]), c2)
            state = jnp.stack([c1, h1, c2, h2], axis=1)
            return state, state

        rows = _affine(first, x_BTI), jnp.broadcast_to(drop, feature.shape), kept_BT
        _, states = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), rows))
        states_BT4H = jnp.moveaxis(states, 0, 1)
        return states_BT4H[:, :, 3], states_BT4H

    def run(
        self,
        config: TransformerConfig,
        params: Params,
        joined: Float[Array, "B T H"],
        layout: Layout,
        sources: Sources = ALONE,
        mixes: Sequence[Callable] | None = None,
    ) -> tuple[Float[Array, "B T H"], list[Rows]]:
        """The layers on T pairs.

        Args:
          config: shape of the target.
          params: of the network.
          joined: y of each pair, from `join`.
          layout: positions of the pairs, which are those of their features, and who sees whom.
          sources: per layer keys and values of other pairs.
          mixes: the attention of each layer; None is `attend`.

        Returns:
          What stands in for the feature k places on, and per layer the pairs' keys and values.
        """
        own, rows, g_BTH = self.layer_config(config), [], joined
        angles = rope_angles(own, layout.positions)
        for i, layer in enumerate(params["layers"]):
            x_BTH = g_BTH
            if i:
                x_BTH = call(RMSNorm(own.norm_eps, own.zero_centred_norm), layer["attention_norm"], g_BTH)
            mix = attend if mixes is None else mixes[i]
            g_BTH, fresh = call(DraftLayer(own), layer, x_BTH, g_BTH, angles, layout, sources.layer(i), mix)
            rows.append(fresh)
        return g_BTH, rows

    def whole(
        self,
        config: TransformerConfig,
        params: Params,
        feature: Float[Array, "B T H"],
        embedding: Float[Array, "B T H"],
        layout: Layout,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T H"]:
        """What stands in for the feature k places on, at every pair of whole texts; the rest as in `join` and `run`."""
        joined, _ = self.join(params, feature, embedding, begins=_begins(layout), dropout_key=dropout_key)
        return self.run(config, params, joined, layout)[0]


def _affine(part: Params, x: Float[Array, "*B I"]) -> Float[Array, "*B G"]:
    return product(x, part["input"]["kernel"]) + part["input"]["bias"]


def _gated(gates: Float[Array, "*B G"]) -> Float[Array, "*B H"]:
    """An LSTM's output from a state of zeros."""
    i, g, o = jnp.split(gates, 3, axis=-1)
    return nn.sigmoid(o) * jnp.tanh(nn.sigmoid(i) * jnp.tanh(g))


def _remembering(gates: Float[Array, "*B G"], c: Float[Array, "*B H"]) -> tuple[Array, Array]:
    """An LSTM's new c and h."""
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
    return c, nn.sigmoid(o) * jnp.tanh(c)


def _begins(layout: Layout) -> Bool[Array, "B T"]:
    """Where documents begin."""
    first_BT = jnp.zeros(layout.positions.shape, bool).at[:, 0].set(True)
    if layout.segments is None:
        return first_BT
    return first_BT.at[:, 1:].set(layout.segments[:, 1:] != layout.segments[:, :-1])


def guesses_everywhere(
    heads: FalconHeads,
    config: TransformerConfig,
    params: Params,
    feature: Float[Array, "B T H"],
    embeddings: Sequence[Float[Array, "B T H"]],
    layout: Layout,
    depth: int,
) -> list[Float[Array, "B T H"]]:
    """What drafting computes along the true text, for drafts that begin at every position.

    A draft whose root stands behind position p lines its blocks up with p: pairs p - k + 1 to p are a block, and so are
    the k before them. There are k ways to cut a text so, each of which serves every k-th position; they lie side by
    side in the batch here, each text padded in front until its blocks begin where the array does.

    Args:
      heads: the network.
      config: shape of the target.
      params: of the network.
      feature: the target's, at every position.
      embeddings: for each place j < depth those of the tokens at p + 1 + j; only one of k is read.
      layout: of the text, causal.
      depth: of the draft.

    Returns:
      For each i < depth what the guesses of the token at p + 2 + i are read off, `[B, T, H]`; zeros where a document
      has no pair for it yet.
    """
    k, (batch, length, width) = heads.block, feature.shape
    joined_BTH, states_BT4H = heads.join(params, feature, embeddings[0], begins=_begins(layout))
    segments = jnp.ones((batch, length), jnp.int32) if layout.segments is None else layout.segments
    blocks = -(-length // k)

    def cut(x: Array) -> Array:
        """The text k times, the r-th time so that position r ends a block: `[k B, blocks * k, ...]`."""
        wide_ = jnp.pad(x, [(0, 0), (k - 1, blocks * k - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.concatenate([wide_[:, r : r + blocks * k] for r in range(k)])

    segments = cut(segments)
    place = dataclasses.replace(
        layout,
        positions=cut(layout.positions),
        horizon=jnp.zeros((k * batch, 1), jnp.int32),
        order=BlockCausal(k),
        segments=segments,
    )
    last = segments.reshape(-1, blocks, k)
    exists = (last == last[:, :, -1:]).reshape(-1, blocks * k, 1)
    outputs: list[Array] = []
    drafted: list[list[Rows]] = []
    joined, states = cut(joined_BTH), None if states_BT4H is None else cut(states_BT4H)
    for step in range(-(-depth // k)):
        if step:
            follows = jnp.where(exists, cut(embeddings[step * k]), 0)
            joined, states = _next_block(heads, params, outputs[-1], follows, states)
        mixes = None
        if drafted:
            mixes = [
                functools.partial(_attend_own_block, k, drafted[0][i], [rows[i] for rows in drafted[1:]])
                for i in range(heads.layers)
            ]
        at = dataclasses.replace(place, positions=place.positions + step * k)
        hidden, rows = heads.run(config, params, joined, at, mixes=mixes)
        outputs.append(jnp.where(exists, hidden, 0))
        drafted.append(rows)

    def everywhere(i: int) -> Float[Array, "B T H"]:
        of_block = outputs[i // k].reshape(k, batch, blocks, k, width)[:, :, :, i % k]
        return of_block.transpose(1, 2, 0, 3).reshape(batch, blocks * k, width)[:, :length]

    return [everywhere(i) for i in range(depth)]


def _next_block(heads, params, hidden, embedding, states):
    """y of every drafted block, and the states behind its pairs, from what the block before it put out."""
    if states is None:
        return heads.join(params, hidden, embedding)

    def by_block(x):
        return x.reshape(-1, heads.block, *x.shape[2:])

    joined, after = heads.join(params, by_block(hidden), by_block(embedding), by_block(states)[:, -1])
    return joined.reshape(hidden.shape), after.reshape(states.shape)


def _attend_own_block(
    k: int,
    first: Rows,
    between: Sequence[Rows],
    q_BTND: Float[Array, "B T N D"],
    rows: Rows,
    sources: Sources,
    layout: Layout,
    *,
    scale: float,
    cap: float | None = None,
    window: None = None,
) -> Float[Array, "B T N*D"]:
    """`attend` for drafted blocks: `first` as the layout says, `between` and `rows` in the query's own block alone."""
    assert layout.segments is not None, "what pads a text is a document of its own"
    B, T, N, D = q_BTND.shape
    K, C = rows["v"].shape[1], T // k
    dtype = wide(q_BTND.dtype)
    mixed_BTI, residual_BTN = attend_in_blocks(q_BTND, first, layout, scale=scale, cap=cap, window=window)

    def by_block(x, last):
        return x.reshape(B, C, k, K, N // K, last).transpose(0, 3, 1, 2, 4, 5)

    q_BKCQGD = by_block(q_BTND * scale, D)
    own = [*between, rows]
    keys_BKCDJ = jnp.concatenate([r["k"].reshape(B, K, D, C, k).transpose(0, 1, 3, 2, 4) for r in own], axis=4)
    values_BKCJD = jnp.concatenate([r["v"].reshape(B, K, C, k, D) for r in own], axis=3)
    s_BKCQGJ = softcap(jnp.einsum("BKCQGD,BKCDJ->BKCQGJ", q_BKCQGD, keys_BKCDJ).astype(dtype), cap)
    segments_BCQ = layout.segments.reshape(B, C, k)
    seen_BCQJ = jnp.tile(segments_BCQ[:, :, :, None] == segments_BCQ[:, :, None, :], (1, 1, 1, len(own)))
    s_BKCQGJ = jnp.where(seen_BCQJ[:, None, :, :, None], s_BKCQGJ, jnp.finfo(dtype).min)
    # What `first` adds to the normaliser is its log-sum-exp.
    weight = jax.nn.softmax(jnp.concatenate([by_block(residual_BTN, 1), s_BKCQGJ], axis=-1), axis=-1)
    mixed = weight[..., :1] * by_block(mixed_BTI, D)
    mixed += jnp.einsum("BKCQGJ,BKCJD->BKCQGD", weight[..., 1:].astype(values_BKCJD.dtype), values_BKCJD)
    return mixed.astype(q_BTND.dtype).transpose(0, 2, 3, 1, 4, 5).reshape(B, T, N * D)
