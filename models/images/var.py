"""The VAR transformer (Tian et al. 2024, section 3): from all smaller scales, every code of the next one at once.

    c = class_features(params, labels)                          the class, or `num_classes` for none
    x = inputs(config, params, c, features, first, last)        what scales first to last - 1 read
    hidden, cache = forward(config, params, c, x, first, last, cache)
    scores = logits(config, params, hidden, c)

A call runs one scale or several. Within it a row sees every key of its own scale and of smaller ones, which is the mask
of training, the prefix pass of a refiner, and for a single scale no mask at all. Keys and values of scales that ran
before are in the cache; without one the scales begin at 0. Layers are a list (decoding, unrolled) or stacked (training,
and deep models on a GPU; scanned), and the cache is as they are. The class reaches every block as a scale, a shift and
a gate for each of its halves (adaLN); these are the same at every scale, so decoding computes them once
(`modulations`).

Matrix products run in the dtype of the kernels; the residual stream, norms, softmax and logits in float32 or wider.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.attention import wide
from models.images.config import VARConfig, scale_starts
from models.linear import wide_einsum
from models.transformer import Params

# Of every layer, or of stacked ones with a leading axis.
Cache = list[dict[str, Float[Array, "B N L D"]]] | dict[str, Float[Array, "d B N L D"]]
Modulation = Float[Array, "B 6 C"]

_EPSILON = 1e-6
_LARGEST_LOG_SCALE = math.log(100)


def init(config: VARConfig, key: Array, dtype=jnp.float32, gate: float = 1e-3) -> Params:
    """Random parameters, layers as a list, by the scheme of the published models.

    Kernels and tables have std sqrt(1 / 3C), outputs of residual branches 1 / sqrt(2 d) of that and the vocabulary map
    1 / 50; adaLN maps begin at half of it but for their gates, at `gate` of it (1e-3 for depth 16, 1e-5 for 30). The
    offsets of a shared adaLN begin at the same shares of sqrt(1 / C).

    Args:
      config: shape of the network.
      key: typed PRNG key.
      dtype: of the parameters.
      gate: factor on the rows of adaLN that make gates.
    """
    C, keys = config.width, iter(jax.random.split(key, 8 * config.depth + 16))
    parts = jnp.array([gate, gate, 0.5, 0.5, 0.5, 0.5], dtype)

    def normal(*shape, factor=1.0):
        draws = jax.random.truncated_normal(next(keys), -8, 8, shape, jnp.float32)
        return (draws * (factor * (3 * C) ** -0.5)).astype(dtype)

    def dense(fan_in, fan_out, factor=1.0):
        return {"kernel": normal(fan_in, fan_out, factor=factor), "bias": jnp.zeros(fan_out, dtype)}

    def modulation():
        if config.shared_modulation:
            return {"offset": normal(6, C, factor=3**0.5) * parts[:, None]}
        made = dense(C, 6 * C)
        return {**made, "kernel": made["kernel"] * jnp.repeat(parts, C)}

    def layer():
        branch, hidden = (2 * config.depth) ** -0.5, config.mlp_ratio * C
        return {
            "attention": {
                "qkv": {"kernel": normal(C, 3 * C)},
                "q_bias": jnp.zeros(C, dtype),
                "v_bias": jnp.zeros(C, dtype),
                "log_scale": jnp.full(config.num_heads, math.log(4), dtype),
                "out": dense(C, C, branch),
            },
            "mlp": {"up": dense(C, hidden), "down": dense(hidden, C, branch)},
            "modulation": modulation(),
        }

    params = {
        "word": dense(config.latent_channels, C),
        "classes": {"embedding": normal(config.num_classes + 1, C)},
        "levels": {"embedding": normal(config.num_scales, C)},
        "positions": {"start": normal(C), "embedding": normal(config.length, C)},
        "layers": [layer() for _ in range(config.depth)],
        "head": {"modulation": dense(C, 2 * C, 0.5), "vocab": dense(C, config.vocab_size, 0.02)},
    }
    return {**params, "modulation": dense(C, 6 * C)} if config.shared_modulation else params


def param_shapes(config: VARConfig, dtype=jnp.float32) -> Params:
    """The tree of `ShapeDtypeStruct`s that `init` would return, without allocating."""
    return jax.tree.map(lambda shape: shape, _param_shapes(config, jnp.result_type(dtype)))  # The caller's own.


@functools.cache
def _param_shapes(config: VARConfig, dtype: Any) -> Params:
    return jax.eval_shape(functools.partial(init, config, dtype=dtype), jax.random.key(0))


def init_cache(config: VARConfig, batch: int, length: int, dtype=jnp.float32, stacked: bool = False) -> Cache:
    """An empty cache of `length` tokens."""
    shape = (batch, config.num_heads, length, config.head_dim)
    if stacked:
        return {name: jnp.zeros((config.depth, *shape), dtype) for name in ("k", "v")}
    return [{"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} for _ in range(config.depth)]


def class_features(params: Params, labels: Int[Array, "B"]) -> Float[Array, "B C"]:
    """Embeddings of the labels; `num_classes` is no class."""
    return params["classes"]["embedding"][labels]


def inputs(
    config: VARConfig, params: Params, c_BC: Float[Array, "B C"], features: Float[Array, "B T E"], first: int, last: int
) -> Float[Array, "B R C"]:
    """What the first block reads at scales `first` to `last - 1`.

    Args:
      config: shape of the network.
      params: its parameters.
      c_BC: features of the class.
      features: of the tokenizer (`quantiser.step`) at these scales; scale 0 has none and reads the class instead.
      first: first scale.
      last: one past the last.
    """
    starts = scale_starts(config.scales)
    level_R = np.repeat(np.arange(first, last), np.diff(starts[first : last + 1]))
    at_position_RC = params["positions"]["embedding"][starts[first] : starts[last]]
    place_RC = params["levels"]["embedding"][level_R] + at_position_RC
    x_BRC = _dense(params["word"], features)
    if first == 0:
        begin_BC = c_BC + params["positions"]["start"]
        x_BRC = jnp.concatenate([begin_BC[:, None], x_BRC], axis=1)
    return (x_BRC + place_RC).astype(wide(x_BRC.dtype))


def modulations(
    config: VARConfig, params: Params, c_BC: Float[Array, "B C"]
) -> list[Modulation] | Float[Array, "d B 6 C"]:
    """Gates, scales and shifts of every block, (gate, gate, scale, scale, shift, shift) for attention and MLP; a list,
    or stacked, as layers are."""
    if not isinstance(params["layers"], list):
        return jax.lax.map(lambda layer: _modulation(config, params, layer, c_BC), params["layers"])
    return [_modulation(config, params, layer, c_BC) for layer in params["layers"]]


def forward(
    config: VARConfig,
    params: Params,
    c_BC: Float[Array, "B C"],
    x_BRC: Float[Array, "B R C"],
    first: int,
    last: int,
    cache: Cache | None = None,
    modulated: Sequence[Modulation] | Float[Array, "d B 6 C"] | None = None,
    keep: Float[Array, "d 2 B"] | None = None,
    remat: bool = False,
) -> tuple[Float[Array, "B R C"], Cache | None]:
    """Runs the rows of scales `first` to `last - 1` through all blocks.

    Args:
      config: shape of the network.
      params: its parameters.
      c_BC: features of the class.
      x_BRC: what `inputs` made.
      first: first scale.
      last: one past the last.
      cache: keys and values of scales 0 to `first - 1`, with room for these; None if `first` is 0.
      modulated: what `modulations` returned, where it is known already.
      keep: factor on what each half of each block adds, per batch row: stochastic depth.
      remat: of stacked layers, keep what enters a block alone, and compute the rest again for gradients.

    Returns:
      The residual stream after the last block, and the cache with these scales in it.
    """
    starts = scale_starts(config.scales)
    seen_RS = None
    if last - first > 1:
        level_S = np.repeat(np.arange(last), np.diff(starts[: last + 1]))
        seen_RS = level_S[starts[first] :, None] >= level_S
    if not isinstance(params["layers"], list):
        rows = (starts[first], starts[last], seen_RS)
        return _scan(config, params, c_BC, x_BRC, rows, cache, modulated, keep, remat)
    assert not isinstance(cache, dict)
    for i, layer in enumerate(params["layers"]):
        modulation = _modulation(config, params, layer, c_BC) if modulated is None else modulated[i]
        block = functools.partial(_block, config, layer, modulation, start=starts[first], end=starts[last])
        x_BRC, kept = block(
            x_BRC, seen_RS=seen_RS, cache=None if cache is None else cache[i], keep=None if keep is None else keep[i]
        )
        if cache is not None:
            cache = [*cache[:i], kept, *cache[i + 1 :]]
    return x_BRC, cache


def logits(
    config: VARConfig, params: Params, hidden_BRC: Float[Array, "B R C"], c_BC: Float[Array, "B C"]
) -> Float[Array, "B R V"]:
    """Scores of the codes, float32 or wider."""
    head = params["head"]
    scale_B1C, shift_B1C = jnp.split(_dense(head["modulation"], jax.nn.silu(c_BC))[:, None], 2, axis=-1)
    x_BRC = (_normed(hidden_BRC) * (1 + scale_B1C) + shift_B1C).astype(head["vocab"]["kernel"].dtype)
    scores = wide_einsum("BRC,CV->BRV", x_BRC, head["vocab"]["kernel"])
    return scores + head["vocab"]["bias"].astype(scores.dtype)


def teacher_forced(
    config: VARConfig,
    params: Params,
    labels: Int[Array, "B"],
    features: Float[Array, "B T E"],
    first: int,
    last: int,
    keep: Float[Array, "d 2 B"] | None = None,
    remat: bool = False,
) -> Float[Array, "B R V"]:
    """Scores of all codes of scales `first` to `last - 1`, given the true scales before each.

    Args:
      config: shape of the network.
      params: its parameters.
      labels: classes; `num_classes` for none.
      features: `quantiser.teacher_inputs`; those of scales from `last` on are not read and may be left out.
      first: first scale that is scored; the smaller ones are read all the same.
      last: one past the last.
      keep: see `forward`.
      remat: see `forward`.
    """
    starts = scale_starts(config.scales)
    c_BC = class_features(params, labels)
    x_BRC = inputs(config, params, c_BC, features[:, : starts[last] - 1], 0, last)
    hidden_BRC, _ = forward(config, params, c_BC, x_BRC, 0, last, keep=keep, remat=remat)
    return logits(config, params, hidden_BRC[:, starts[first] :], c_BC)


def _scan(config, params, c_BC, x_BRC, rows, cache, modulated, keep, remat):
    """Through stacked layers; the cache is carried, so that it is written in place."""
    start, end, seen_RS = rows

    def body(carry, of_layer):
        x_BRC, cache = carry
        layer, modulation, kept, i = of_layer
        if modulation is None:
            modulation = _modulation(config, params, layer, c_BC)
        own = None if cache is None else (cache, i)
        return _block(config, layer, modulation, x_BRC, start, end, seen_RS, own, kept), None

    if remat:
        body = jax.checkpoint(body, prevent_cse=False)
    of_layers = (params["layers"], modulated, keep, jnp.arange(config.depth, dtype=jnp.int32))
    return jax.lax.scan(body, (x_BRC, cache), of_layers)[0]


def _modulation(config, params, layer, c_BC) -> Modulation:
    if config.shared_modulation:
        made = _dense(params["modulation"], jax.nn.silu(c_BC)).reshape(-1, 6, config.width)
        return made + layer["modulation"]["offset"]
    return _dense(layer["modulation"], jax.nn.silu(c_BC)).reshape(-1, 6, config.width)


def _block(config, layer, modulation, x_BRC, start, end, seen_RS, cache, keep) -> tuple[Array, Any]:
    gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = jnp.split(modulation, 6, axis=1)
    added_BRC, cache = _attend(
        config, layer["attention"], _normed(x_BRC) * (1 + scale_1) + shift_1, start, end, seen_RS, cache
    )
    x_BRC = x_BRC + _kept(keep, 0, gate_1 * added_BRC)
    hidden = jax.nn.gelu(_dense(layer["mlp"]["up"], _normed(x_BRC) * (1 + scale_2) + shift_2), approximate=True)
    return x_BRC + _kept(keep, 1, gate_2 * _dense(layer["mlp"]["down"], hidden)), cache


def _kept(keep, half, added_BRC):
    return added_BRC if keep is None else added_BRC * keep[half][:, None, None]


def _attend(config, params, x_BRC, start, end, seen_RS, cache):
    """Attention with unit queries and keys and a learned temperature per head; scores are not divided by sqrt(D)."""
    qkv = _dense(params["qkv"], x_BRC)
    parts = (part.reshape(*part.shape[:2], config.num_heads, -1).swapaxes(1, 2) for part in jnp.split(qkv, 3, axis=-1))
    q_BNRD, k_BNRD, v_BNRD = parts
    dtype = wide(qkv.dtype)

    def per_head(bias):
        return bias.reshape(config.num_heads, 1, -1)

    scale_N11 = jnp.exp(jnp.minimum(params["log_scale"].astype(dtype), _LARGEST_LOG_SCALE))[:, None, None]
    q_BNRD = (_unit(q_BNRD + per_head(params["q_bias"])) * scale_N11).astype(qkv.dtype)
    fresh = {"k": _unit(k_BNRD).astype(qkv.dtype), "v": v_BNRD + per_head(params["v_bias"])}
    if cache is not None:
        # Written before it is read, so that the update is in place.
        cache, fresh = _remembered(cache, fresh, start, end)
        fresh = {name: rows.astype(qkv.dtype) for name, rows in fresh.items()}
    scores = wide_einsum("BNRD,BNSD->BNRS", q_BNRD, fresh["k"])
    if seen_RS is not None:
        scores = jnp.where(seen_RS, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(qkv.dtype)
    mixed_BRC = jnp.einsum("BNRS,BNSD->BNRD", weights, fresh["v"]).swapaxes(1, 2).reshape(x_BRC.shape)
    return _dense(params["out"], mixed_BRC), cache


def _remembered(cache, fresh, start, end) -> tuple[Any, Any]:
    """A layer's cache, or all layers' and its number, with fresh rows in it; and what the layer has up to `end`."""
    if isinstance(cache, dict):
        cache = {
            name: jax.lax.dynamic_update_slice_in_dim(cache[name], new.astype(cache[name].dtype), start, axis=2)
            for name, new in fresh.items()
        }
        return cache, {name: whole[:, :, :end] for name, whole in cache.items()}
    stacked, layer = cache

    def place(row):
        return [jnp.asarray(i, jnp.int32) for i in (layer, 0, 0, row, 0)]

    stacked = {
        name: jax.lax.dynamic_update_slice(stacked[name], new[None].astype(stacked[name].dtype), place(start))
        for name, new in fresh.items()
    }

    def read(whole):
        _, batch, heads, _, size = whole.shape
        return jax.lax.dynamic_slice(whole, place(0), (1, batch, heads, end, size))[0]

    return stacked, {name: read(whole) for name, whole in stacked.items()}


def _dense(params: Params, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    kernel = params["kernel"]
    y = x.astype(kernel.dtype) @ kernel
    return y + params["bias"] if "bias" in params else y


def _normed(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """LayerNorm without parameters, float32 or wider."""
    x = x.astype(wide(x.dtype))
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + _EPSILON)


def _unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Vectors of length 1, float32 or wider."""
    x = x.astype(wide(x.dtype))
    return x / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)), 1e-12)
