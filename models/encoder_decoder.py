"""Encoder-decoders: a text read once, in both directions, and a decoder that attends to it in every layer.

    memory = encode(config, params, tokens, lengths)
    out = forward(config, params, inputs, *beside(memory, layout, prefix))

The prompt goes to the encoder, and the decoder's own text begins with `config.bos_id`. What its layers read of the
encoder's output, keys and values of their own, is computed once per prompt; a step of decoding costs what it costs a
decoder of that depth, whatever the prompt's length, but for the keys themselves (Elfeki et al. 2025, "Return of the
Encoder"; their released code agrees with it).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from models.attention import Rows, Sources, StackedRows
from models.config import TransformerConfig
from models.layers import MemoryRows, call
from models.layout import Layout
from models.transformer import Params, forward


@struct.dataclass
class Memory:
    """An encoded text, as a decoder's layers read it.

    Attributes:
      rows: keys and values, one entry per layer, or of stacked layers one with a leading axis of layers.
      tokens: the text.
      lengths: its tokens; what follows them is padding, which nothing sees.
    """

    rows: list[Rows] | StackedRows
    tokens: Int[Array, "B M"]
    lengths: Int[Array, "B"]

    @property
    def seen(self) -> Bool[Array, "B 1 M"]:
        """Which rows are text, for every row of the decoder."""
        return (jnp.arange(self.tokens.shape[1], dtype=jnp.int32) < self.lengths[:, None])[:, None]


def beside(memory: Memory | None, layout: Layout, prefix: Any = None, scratch: Any = None) -> tuple[Layout, Sources]:
    """Layout and sources of rows that also see a memory, if there is one."""
    if memory is None:
        return layout, Sources(prefix, scratch)
    return dataclasses.replace(layout, memory_seen=memory.seen), Sources(prefix, scratch, memory.rows)


def encode(
    config: TransformerConfig,
    params: Params,
    tokens: Int[Array, "B M"],
    lengths: Int[Array, "B"],
    attention: str = "dense",
    remat: str = "none",
) -> Memory:
    """Reads whole texts.

    Args:
      config: of an encoder-decoder.
      params: its parameters, layers as lists or stacked.
      tokens: texts, padded to one length.
      lengths: their tokens, at least one each.
      attention: of the encoder (`models.layout.Layout`).
      remat: as `forward` has it.
    """
    layout = Layout.encoder(lengths, tokens.shape[1], attention)
    assert config.encoder is not None
    encoded_BMH = forward(config.encoder, {**params, **params["encoder"]}, tokens, layout, remat=remat).hidden
    rows = MemoryRows(config)
    layers = params["layers"]
    if isinstance(layers, list):
        return Memory([call(rows, layer["cross_attention"], encoded_BMH) for layer in layers], tokens, lengths)
    by_layer = jax.vmap(lambda layer: call(rows, layer, encoded_BMH))(layers["cross_attention"])
    return Memory(by_layer, tokens, lengths)
