"""The one transformer forward that trains targets, serves them, and is the target of every drafter.

    forward(config, params, inputs, layout, sources, layers, taps) -> Output(logits, hidden, taps, rows)

It is a pure function. The KV cache is one of the sources of keys, which it only reads: the keys and values of the new
rows come back in `Output.rows`, and whoever decides which rows become text writes those (`decoding/cache.py`).
Parameters are plain nested dicts in one of two layouts: a *list* of layers (decoding; stacked weights cost about 3x
inside a token loop on CPU) or one *stacked* layer tree with a leading axis, scanned (training; compile time does not
grow with depth). Caches lie as the layers do.

    {'embed': {'embedding'}, 'layers': [...] or {...}, 'final_norm': {'scale'}, 'head': {'kernel'} unless tied,
     'encoder': {'layers', 'final_norm'} of an encoder-decoder (models/encoder_decoder.py)}
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from models.attention import ALONE, Rows, Sources, StackedRows, softcap, wide
from models.config import TransformerConfig
from models.layers import Block, MemoryRows, RMSNorm, call, joined_name, rope_angles
from models.layout import Layout
from models.linear import (
    Kernel,
    Table,
    in_blocks,
    product,
    product_with_rows,
    rows_of_table,
    table_in_blocks,
    whole,
    whole_table,
)
from models.sharding import keep_batch, split_vocabulary

FEW_LAYERS = 16  # As many as a GPU runs without a loop over them.

Params = dict
Cache = list[Rows]


@struct.dataclass
class Output:
    """What a forward computed for its T new rows.

    Attributes:
      logits: scores of the next token, float32 or wider; XLA drops the head's product when they are not used.
      hidden: the residual stream after the final norm, which the head multiplies.
      taps: the features asked for by name.
      rows: fresh keys (RoPE-rotated) and values: one entry per layer that ran, or of stacked layers one with a leading
        axis of layers.
    """

    logits: Float[Array, "B T V"]
    hidden: Float[Array, "B T H"]
    taps: dict[str, Float[Array, "B T H"]]
    rows: list[Rows] | StackedRows


def init(config: TransformerConfig, key: Array, dtype=jnp.float32) -> Params:
    """Random parameters, layers as a list: kernels of std 1/sqrt(fan-in), residual outputs further by 1/sqrt(2 L)."""
    embed_key, head_key, *layer_keys = jax.random.split(key, config.num_layers + 2)
    draw = nn.initializers.normal(0.02)
    params = {
        "embed": {"embedding": draw(embed_key, (config.vocab_size, config.width), dtype)},
        **_init_stack(config, layer_keys, dtype),
    }
    if not config.tied_embeddings:
        params["head"] = {"kernel": draw(head_key, (config.width, config.vocab_size), dtype)}
    if config.encoder is not None:
        keys = jax.random.split(jax.random.fold_in(key, 1), config.encoder_layers)
        params["encoder"] = _init_stack(config.encoder, list(keys), dtype)
    return params


def _init_stack(config: TransformerConfig, keys: Sequence[Array], dtype) -> Params:
    shapes = _layer_shapes(config)
    norm = (jnp.zeros if config.zero_centred_norm else jnp.ones)((config.width,), dtype)
    return {"layers": [_init_layer(config, shapes, key, dtype) for key in keys], "final_norm": {"scale": norm}}


@functools.cache
def _layer_shapes(config: TransformerConfig) -> Params:
    return jax.eval_shape(functools.partial(_layer, config), jax.random.key(0))


def _layer(config: TransformerConfig, key: Array) -> Params:
    """One layer as Linen initialises it, with what makes a memory's rows where it reads one."""
    x = jnp.zeros((1, 1, config.width), jnp.float32)
    layout, sources, of_memory = Layout.causal(1, 1), ALONE, {}
    if config.encoder_layers:
        memory, made = MemoryRows(config).init_with_output(key, x)
        layout = dataclasses.replace(layout, memory_seen=jnp.ones((1, 1, 1), bool))
        sources = Sources(memory=memory)
        of_memory = made["params"]
    made = Block(config).init(key, x, rope_angles(config, layout.positions), layout, sources)["params"]
    if of_memory:
        made = {**made, "cross_attention": {**made["cross_attention"], **of_memory}}
    return made


def _init_layer(config: TransformerConfig, shapes: Params, key: Array, dtype) -> Params:
    leaves, structure = jax.tree.flatten_with_path(shapes)
    out = []
    for leaf_key, (path, shape) in zip(jax.random.split(key, len(leaves)), leaves, strict=True):
        owner, name = path[-2].key, path[-1].key
        if name == "kernel":
            depth = 2 * config.num_layers if owner in ("o", "down") else 1
            std = (shape.shape[0] * depth) ** -0.5
            out.append(nn.initializers.normal(std)(leaf_key, shape.shape, dtype))
        else:
            ones = name == "scale" and not config.zero_centred_norm
            out.append((jnp.ones if ones else jnp.zeros)(shape.shape, dtype))
    return jax.tree.unflatten(structure, out)


def param_shapes(config: TransformerConfig, dtype=jnp.float32) -> Params:
    """The tree of `ShapeDtypeStruct`s that `init` would return, without allocating."""
    # Of the dtype that JAX makes of it, float32 where 64 bits are off. A tree of the caller's own.
    return jax.tree.map(lambda shape: shape, _param_shapes(config, jnp.result_type(dtype)))


@functools.cache
def _param_shapes(config: TransformerConfig, dtype: Any) -> Params:
    return jax.eval_shape(functools.partial(init, config, dtype=dtype), jax.random.key(0))


def stack_layers(params: Params) -> Params:
    """List of layers -> one layer tree with a leading layer axis (the training layout)."""
    return _of_stacks(lambda layers: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), params)


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`; done once, outside any loop."""

    def unstack(stacked):
        count = jax.tree.leaves(stacked)[0].shape[0]
        return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)]

    return _of_stacks(unstack, params)


def _of_stacks(function: Callable[[Any], Any], params: Params) -> Params:
    """Parameters after `function` was applied to the layers, and to those of an encoder."""
    changed = {**params, "layers": function(params["layers"])}
    return {**changed, "encoder": _of_stacks(function, params["encoder"])} if "encoder" in params else changed


# Maps of the same input, which decoding on one device runs as one product.
JOINED = {"attention": ("q", "k", "v"), "mlp": ("gate", "up")}


def for_decoding(params: Params, mesh: Mesh | None = None, joined: Collection[str] = tuple(JOINED)) -> Params:
    """Parameters as decoding reads them: a list of layers, whose projections are joined where there is no mesh.

    On CPU large kernels are then in blocks (`models/linear.py`), a tied embedding's table too. Parameters that are in
    that form already come back as they are. `joined` are the parts of a layer whose projections are.
    """
    if not isinstance(params["layers"], list):
        params = unstack_layers(params)
    if mesh is not None:
        return params
    return _map_tables(table_in_blocks, map_kernels(in_blocks, join_projections(params, joined)))


def map_kernels(function: Callable[[Kernel], Kernel], params: Any) -> Any:
    """Parameters after `function` was applied to every kernel among them."""

    def mapped(path, leaf):
        return function(leaf) if path[-1] == jax.tree_util.DictKey("kernel") else leaf

    return jax.tree.map_with_path(mapped, params)


def _map_tables(function: Callable[[Table], Table], params: Params) -> Params:
    """Parameters after `function` was applied to an embedding that is the head as well."""
    if "embed" not in params or "head" in params:
        return params
    return {**params, "embed": {"embedding": function(params["embed"]["embedding"])}}


def join_projections(params: Params, joined: Collection[str] = tuple(JOINED)) -> Params:
    """Layers whose q, k, v and gate, up kernels lie side by side in one kernel; the forward takes them either way.

    For one device: split over `tensor`, a joined kernel would put parts of q, k and v in the wrong places. What is
    joined already stays as it is.
    """

    def join(module, names):
        if joined_name(names) in module or names[0] not in module:
            return module
        parts = [module[name] for name in names]
        rest = {name: leaf for name, leaf in module.items() if name not in names}
        return {**rest, joined_name(names): jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *parts)}

    def of(layers):
        return [{**layer, **{name: join(layer[name], JOINED[name]) for name in joined}} for layer in layers]

    return _of_stacks(of, params)


def split_projections(config: TransformerConfig, params: Params) -> Params:
    """The inverse of `for_decoding` but for stacking; parameters that are not joined come back as they are."""
    params = _map_tables(whole_table, map_kernels(whole, params))
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ends = {"attention": [query, query + key], "mlp": [config.mlp_width]}

    def split(module, names, ends):
        if joined_name(names) not in module:
            return module
        rest = {name: leaf for name, leaf in module.items() if name != joined_name(names)}
        leaves = {kind: jnp.split(leaf, ends, axis=-1) for kind, leaf in module[joined_name(names)].items()}
        return {**rest, **{name: {kind: leaf[i] for kind, leaf in leaves.items()} for i, name in enumerate(names)}}

    def apart(layers):
        halves = JOINED.items()
        return [
            {**layer, **{name: split(layer[name], parts, ends[name]) for name, parts in halves}} for layer in layers
        ]

    return _of_stacks(apart, params)


def embed(config: TransformerConfig, params: Params, tokens: Int[Array, "*B"]) -> Float[Array, "*B H"]:
    """Input embeddings, scaled if the family does so."""
    x = lookup(params, tokens)
    return x * jnp.asarray(config.width**0.5, x.dtype) if config.embed_scale else x


def lookup(params: Params, tokens: Int[Array, "*B"]) -> Float[Array, "*B H"]:
    """Raw rows of the embedding table, which draft heads read: not scaled, whatever the family."""
    return rows_of_table(params["embed"]["embedding"], tokens)


def head(config: TransformerConfig, params: Params, hidden: Float[Array, "*B H"]) -> Float[Array, "*B V"]:
    """Logits of post-norm features, float32 or wider, soft-capped if the family does so."""
    dtype = wide(hidden.dtype)
    if config.tied_embeddings:
        logits = product_with_rows(hidden, params["embed"]["embedding"], dtype)
    else:
        logits = product(hidden, params["head"]["kernel"], dtype)
    return softcap(split_vocabulary(logits), config.logit_softcap)


def head_params(params: Params) -> Params:
    """Of all parameters those that `head` reads."""
    name = "head" if "head" in params else "embed"
    return {name: params[name]}


def final_norm(config: TransformerConfig, params: Params, residual: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """The norm between the last block and the head."""
    return call(RMSNorm(config.norm_eps, config.zero_centred_norm), params["final_norm"], residual)


def forward(
    config: TransformerConfig,
    params: Params,
    inputs: Int[Array, "B T"] | Float[Array, "B T H"],
    layout: Layout,
    sources: Sources = ALONE,
    layers: tuple[int, int] | None = None,
    taps: Sequence[str] = (),
    remat: str = "none",
) -> Output:
    """Runs the new rows through the stack, or through a slice of it.

    Args:
      config: the shape of the network.
      params: its parameters, layers as a list or stacked.
      inputs: token ids, or embeddings / the residual stream entering layer `layers[0]`.
      layout: positions and visibility of the new rows.
      sources: keys and values beside those of the new rows, of every layer of the whole stack.
      layers: half-open range of layers to run; None means all.
      taps: features to return: `pre_norm` (the residual stream leaving the last layer run), `post_norm`, `layer:k`
        (the residual stream entering layer k).
      remat: of stacked layers, what is computed again for gradients: `none`, all but the results of products with
        parameters (`products`), or all inside a layer (`layers`).

    Raises:
      ValueError: a tap that does not exist, a slice of stacked layers, or the decoder of an encoder-decoder without its
        memory.
    """
    if config.encoder_layers and sources.memory is None:
        raise ValueError("the decoder of an encoder-decoder reads a memory (models/encoder_decoder.py)")
    lo, hi = layers or (0, config.num_layers)
    inner = [int(tap.removeprefix("layer:")) for tap in taps if tap.startswith("layer:")]
    known = {"pre_norm", "post_norm", *(f"layer:{k}" for k in range(lo, hi))}
    if unknown := set(taps) - known:
        raise ValueError(f"no tap {sorted(unknown)[0]!r}: have pre_norm, post_norm and layer:{lo} to layer:{hi - 1}")
    x_BTH = embed(config, params, inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs
    angles = rope_angles(config, layout.positions)
    block = Block(config)
    taken: dict[str, Array] = {}
    rows: list[Rows] | StackedRows
    if isinstance(params["layers"], list):
        rows = []
        for k in range(lo, hi):
            if k in inner:
                taken[f"layer:{k}"] = x_BTH
            x_BTH, fresh = call(block, params["layers"][k], x_BTH, angles, layout, sources.layer(k), config.window(k))
            rows.append(fresh)
    else:
        if (lo, hi) != (0, config.num_layers):
            raise ValueError("stacked layers run whole; use unstack_layers to run a slice of them")
        x_BTH, entering, rows = _scan_layers(config, params["layers"], x_BTH, angles, layout, sources, inner, remat)
        taken.update(entering)
    hidden_BTH = final_norm(config, params, x_BTH)
    taken.update(pre_norm=x_BTH, post_norm=hidden_BTH)
    logits_BTV = head(config, params, hidden_BTH)
    return Output(logits_BTV, hidden_BTH, {tap: taken[tap] for tap in taps}, rows)


def _at_a_turn(layers: int) -> int:
    """How many layers one turn of the loop over stacked ones runs: on a GPU all of a few, so that what is kept for
    gradients is not copied into stacks and out of them, a seventh of a step of 12 layers. More take long to compile."""
    return layers if jax.default_backend() == "gpu" and layers <= FEW_LAYERS else 1


def _scan_layers(config, stacked, x_BTH, angles, layout, sources, inner, remat):
    """The residual stream behind the last layer, the streams entering the layers `inner` by name, and all rows.

    The carry is the stream and those that were asked for, not one of every layer. Sources are inputs of the scan, so
    that no layer's cache is carried through others.
    """
    block = Block(config)
    # A traced window needs a number even where attention is global: one no position difference reaches.
    windows = jnp.array([w or 2**30 for w in config.windows], jnp.int32) if any(config.windows) else None
    wanted = sorted(set(inner))
    # Where a layer's stream goes; all that nobody asked for goes to one more place, and is overwritten.
    places = (
        jnp.full(config.num_layers, len(wanted), jnp.int32)
        .at[jnp.array(wanted, jnp.int32)]
        .set(jnp.arange(len(wanted), dtype=jnp.int32))
    )

    def body(carry, of_layer):
        x, taken = keep_batch(carry[0]), carry[1]
        layer, window, keys, place = of_layer
        taken = taken.at[place].set(x) if wanted else taken
        y, rows = call(block, layer, x, angles, layout, keys, window)
        return (y, taken), rows

    if remat != "none":
        kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "products" else None
        body = jax.checkpoint(body, policy=kept, prevent_cse=False)
    taken = jnp.zeros((len(wanted) + 1, *x_BTH.shape), x_BTH.dtype) if wanted else None
    of_layers = (stacked, windows, sources, places)
    # What a loop computes again would, without one, be found to be there already, and kept.
    turn = _at_a_turn(config.num_layers) if remat == "none" else 1
    (x_BTH, taken), rows = jax.lax.scan(body, (x_BTH, taken), of_layers, unroll=turn)
    entering = {} if taken is None else {f"layer:{k}": taken[i] for i, k in enumerate(wanted)}
    return x_BTH, entering, rows
