"""The layers every network here is built from: RMSNorm, RoPE, attention over several key sources, the gated MLP.

Letters: B batch, T new rows, S cache slots, H width, N query heads, K key/value heads, G = N/K, D head size, F MLP
width. Matrix products run in the dtype of the parameters; norms, RoPE angles, softmax and scores run in float32 or,
if the parameters are wider, in theirs.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.attention import ALONE, Rows, Sources, attend, wide
from models.config import RopeScaling, TransformerConfig
from models.linear import Linear


def call(module: nn.Module, params: dict, *inputs) -> Any:
    """A Linen module as a pure function of its parameters."""
    return module.apply({"params": params}, *inputs)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, or * (1 + scale) when `zero_centred` (Gemma)."""

    epsilon: float
    zero_centred: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
        init = nn.initializers.zeros if self.zero_centred else nn.initializers.ones
        scale_H = self.param("scale", init, (x.shape[-1],)).astype(wide(x.dtype))
        x_wide = x.astype(wide(x.dtype))
        normed = x_wide * jax.lax.rsqrt(jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True) + self.epsilon)
        return (normed * (1 + scale_H if self.zero_centred else scale_H)).astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[Array, "half"]:
    """Radians per token of each rotary pair: theta^(-2i/D), stretched as `RopeScaling` says (Llama 3.1)."""
    frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    turns = scaling.original_max_position / wavelength
    keep = jnp.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def rope_angles(config: TransformerConfig, positions: Int[Array, "B T"]) -> Float[Array, "B T 1 half"]:
    """Rotation of every pair at every position, in radians; computed once per forward and shared by all layers."""
    frequency = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return (positions[..., None].astype(jnp.float32) * frequency)[:, :, None, :]


def apply_rope(x: Float[Array, "B T N D"], angles: Float[Array, "B T 1 half"]) -> Float[Array, "B T N D"]:
    """Rotates pairs (i, i + D/2), the half-split convention of Hugging Face checkpoints."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = jnp.split(x.astype(wide(x.dtype)), 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def joined_or_apart(module: nn.Module, names: tuple[str, ...], widths: list[int], bias: bool, x: Array) -> list[Array]:
    """Linear maps of one input: one by one, or as a single product where the parameters were joined for decoding.

    A few rows times many small kernels costs more than times few large ones (`models.transformer.for_decoding`).
    """
    if module.has_variable("params", joined_name(names)):
        both = Linear(sum(widths), use_bias=bias, name=joined_name(names))(x)
        return jnp.split(both, np.cumsum(widths)[:-1], axis=-1)
    return [Linear(width, use_bias=bias, name=name)(x) for name, width in zip(names, widths, strict=True)]


def joined_name(names: tuple[str, ...]) -> str:
    """`q`, `k`, `v` -> `q_k_v`."""
    return "_".join(names)


def key_rows(k: Float[Array, "B T K D"], v: Float[Array, "B T K D"], angles: Float[Array, "B T 1 half"]) -> Rows:
    """Keys, before RoPE, and values as attention reads them and caches keep them."""
    return {"k": apply_rope(k, angles).transpose(0, 2, 3, 1), "v": v.transpose(0, 2, 1, 3)}


class Attention(nn.Module):
    """Grouped-query self-attention of one block (Llama, Mistral, Qwen2 biases, Qwen3 q/k norms, Gemma-2 caps)."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTI, angles, layout, sources=ALONE, window=None, mix=attend):
        """Returns the attention output `[B, T, H]` and the fresh key/value rows.

        `x_BTI` may be of any width; `mix`, which has the arguments of `attend`, says who attends to what.
        """
        c = self.config
        B, T, _ = x_BTI.shape

        widths = [count * c.head_dim for count in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        projected = joined_or_apart(self, ("q", "k", "v"), widths, c.qkv_bias, x_BTI)
        q, k, v = (y.reshape(B, T, -1, c.head_dim) for y in projected)
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, c.zero_centred_norm, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, c.zero_centred_norm, name="k_norm")(k)
        rows = key_rows(k, v, angles)
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
        q = apply_rope(q, angles)
        mixed = mix(q, rows, sources, layout, scale=scale, cap=c.attention_softcap, window=window)
        return Linear(c.width, use_bias=c.output_bias, name="o")(mixed), rows


class CrossAttention(nn.Module):
    """Attention of a decoder's rows over a memory; its keys are not rotated, and neither are queries."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTH, layout, memory):
        """Returns the attention output `[B, T, H]`; `memory` is the layer's, as `MemoryRows` made it."""
        c = self.config
        q = Linear(c.num_heads * c.head_dim, use_bias=c.qkv_bias, name="q")(x_BTH)
        q = q.reshape(*x_BTH.shape[:2], -1, c.head_dim)
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
        mixed = attend(q, None, Sources(memory=memory), layout, scale=scale)
        return Linear(c.width, use_bias=c.output_bias, name="o")(mixed)


class MemoryRows(nn.Module):
    """Keys and values that a decoder's layer makes of an encoder's output; the parameters `k` and `v` of
    `CrossAttention`'s, computed once per text instead of at every step."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, encoded_BMH: Float[Array, "B M H"]) -> Rows:
        c = self.config
        width = c.num_kv_heads * c.head_dim
        k, v = (Linear(width, use_bias=c.qkv_bias, name=name)(encoded_BMH) for name in ("k", "v"))
        k, v = (x.reshape(*x.shape[:2], -1, c.head_dim) for x in (k, v))
        return {"k": k.transpose(0, 2, 3, 1), "v": v.transpose(0, 2, 1, 3)}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU, or GeGLU for Gemma; without a gate down(act(up(x)))."""

    width: int
    hidden: int
    activation: str = "silu"
    gated: bool = True
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        act = nn.silu if self.activation == "silu" else lambda y: nn.gelu(y, approximate=True)
        if self.gated:
            gate, up = joined_or_apart(self, ("gate", "up"), [self.hidden] * 2, self.use_bias, x)
            wider = act(gate) * up
        else:
            wider = act(Linear(self.hidden, use_bias=self.use_bias, name="up")(x))
        return Linear(self.width, use_bias=self.use_bias, name="down")(wider)


class Block(nn.Module):
    """One pre-norm residual block; Gemma-2 also norms what each half adds, a decoder's reads a memory between them."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTH, angles, layout, sources=ALONE, window=None):
        """Returns the residual stream `[B, T, H]` and the fresh key/value rows."""
        c = self.config

        def norm(name, y):
            return RMSNorm(c.norm_eps, c.zero_centred_norm, name=name)(y)

        x = norm("attention_norm", x_BTH)
        own = dataclasses.replace(sources, memory=None)
        mixed, rows = Attention(c, name="attention")(x, angles, layout, own, window)
        x_BTH = x_BTH + (norm("post_attention_norm", mixed) if c.post_norms else mixed)
        if sources.memory is not None:
            x = norm("cross_attention_norm", x_BTH)
            x_BTH = x_BTH + CrossAttention(c, name="cross_attention")(x, layout, sources.memory)
        mlp = MLP(c.width, c.mlp_width, c.activation, c.gated_mlp, c.mlp_bias, name="mlp")
        wider = mlp(norm("mlp_norm", x_BTH))
        return x_BTH + (norm("post_mlp_norm", wider) if c.post_norms else wider), rows
