"""A coprocessor reads a frozen target's KV cache and answers with latents, which the target then reads as if they were
tokens (differentiable cache augmentation, arXiv 2412.17747).

At an *augmentation point* behind token p, a network of the target's own architecture runs over N learnt embeddings, the
*soft tokens*, whose keys and values besides their own are the target's cache up to p, just as it is. What leaves its
last layer are the latents z: N vectors that the target takes as input embeddings behind p. Nothing of the text is read
again, and the target's parameters stay what they are.

    z = f(soft; cache[<= p])        y ~ target(. | cache[<= p], z, ...)

Who sees whom, around every point by itself: soft tokens and latents see the cache up to p, and each other in order or
all; tokens behind the latents see the cache up to p, all latents, and each other in order. Points of one text share its
cache and never see one another.

    {'soft': {'embedding' [N, H], 'gate' [H]},
     'network': {'layers' (stacked), 'final_norm', 'adapters' (stacked) {'attention': {'q': {'a', 'b'}}},
                 'latent': {'scale' [1]}}}

of which there is what the kind and the flags of `CoprocessorConfig` ask for.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import block_diag
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from models import schema, transformer
from models.attention import Rows, Sources, StackedRows, wide
from models.config import TransformerConfig
from models.errors import UserError
from models.layers import joined_name
from models.layout import Blocks, Layout
from models.transformer import Params

# Kernels that low-rank adapters stand beside, by part of a layer.
ADAPTED = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


@dataclasses.dataclass(frozen=True)
class CoprocessorConfig:
    """What a coprocessor is; the target says the rest.

    Attributes:
      kind: `full`, a network of its own that begins as a copy of the target; `scratch`, one that begins at random;
        `lora`, the target's weights, shared, with low-rank adapters beside them; and two baselines: `soft`, the target
        itself, of which soft tokens alone are learnt, and `pause`, no network at all: the soft tokens are the latents.
      num_latents: N.
      reads: the target's `cache`, or the features of its `last_layer`, which the network makes keys and values of.
      rank: of adapters.
      lora_scale: what they add is multiplied by this (alpha over rank).
      z_tap: latents are the network's features after its final norm, or before.
      z_scale: `match_rms` gives every latent the root mean square of the target's input embeddings.
      z_base: `last_token` makes the last latent, off which the next token is read, the input embedding of the token
        before the latents plus a learnt gate, at first 0, times what it would have been (ours, not the paper's).
      latent_attn: whether soft tokens see each other in order (`causal`) or all (`bidirectional`).
      suffix_attn: the same of latents in the target.
      positions: latents take positions of their own (`advance`), as they do slots, or all stand at p (`hold`), so that
        tokens keep their distances.
      max_lag: training puts latents 0 to so many tokens behind what the coprocessor has read, as where it works beside
        the target and is late.

    Raises:
      UserError: a value that no coprocessor has, or one that its kind does not read: `rank` and `lora_scale` are of
        `lora`; `pause` has no network, so that nothing is said of one.
    """

    kind: Literal["full", "scratch", "lora", "soft", "pause"] = "full"
    num_latents: int = 8
    reads: Literal["cache", "last_layer"] = "cache"
    rank: int = 64
    lora_scale: float = 1.0
    z_tap: Literal["post_norm", "pre_norm"] = "post_norm"
    z_scale: Literal["none", "match_rms"] = "none"
    z_base: Literal["none", "last_token"] = "none"
    latent_attn: Literal["causal", "bidirectional"] = "causal"
    suffix_attn: Literal["causal", "bidirectional"] = "causal"
    positions: Literal["advance", "hold"] = "advance"
    max_lag: int = 0

    def __post_init__(self):
        schema.require(self.num_latents >= 1, "num_latents must be at least 1", self.num_latents)
        schema.require(self.rank >= 1, "rank must be at least 1", self.rank)
        schema.require(self.max_lag >= 0, "max_lag must not be negative", self.max_lag)
        scale = self.lora_scale
        schema.require(0 < scale < math.inf, "lora_scale must be a number above 0", scale)
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            if field.name in self._unread and given != field.default:
                raise UserError(f"a coprocessor of kind {self.kind!r} has no {field.name}: leave it out, got {given!r}")

    @property
    def _unread(self) -> tuple[str, ...]:
        """What this kind has no use for."""
        of_network = ("reads", "z_tap", "z_scale", "latent_attn", "max_lag") if self.kind == "pause" else ()
        return of_network if self.kind == "lora" else ("rank", "lora_scale", *of_network)

    def check_target(self, target_config: TransformerConfig) -> None:
        """Raises UserError where a target of that shape cannot have such latents."""
        if not self.shift and any(target_config.windows):
            raise UserError(
                "latents that hold the position of the text before them need a target without sliding windows: use a "
                "coprocessor with positions 'advance'"
            )

    @property
    def shift(self) -> int:
        """Positions by which latents move the tokens behind them."""
        return self.num_latents if self.positions == "advance" else 0

    @property
    def needs_features(self) -> bool:
        """Whether the network reads the target's `post_norm` features of the text (`read_features`), not its cache."""
        return self.reads == "last_layer" and self.kind != "pause"

    def latent_positions(self, last: Int[Array, "B M"]) -> Int[Array, "B M N"]:
        """Where latents stand behind tokens at positions `last`; soft tokens stand there too."""
        index_N = jnp.arange(self.num_latents, dtype=last.dtype)
        return last[..., None] + (1 + index_N if self.positions == "advance" else 0 * index_N)

    def order(self, size: int, attention: str) -> Blocks:
        """Who sees whom in groups of `size` rows that begin with latents, whose own order is `attention`."""
        return Blocks(size, causal=True, together=self.num_latents if attention == "bidirectional" else 0)


class Points(NamedTuple):
    """Augmentation points of B texts.

    Attributes:
      positions: where the last token stands that is seen.
      horizon: slots of the cache that are seen, counted from slot 0.
      since: the first of them, where the cache holds packed documents; None is slot 0.
    """

    positions: Int[Array, "B M"]
    horizon: Int[Array, "B M"]
    since: Int[Array, "B M"] | None = None


def init_params(config: CoprocessorConfig, target_config: TransformerConfig, target: Params, key: Array) -> Params:
    """A fresh coprocessor in the target's dtype, layers stacked; those of `target` may lie in any way."""
    soft_key, network_key = jax.random.split(key)
    table_VH = transformer.embed(target_config, target, jnp.arange(target_config.vocab_size, dtype=jnp.int32))
    tokens_N = jax.random.choice(
        soft_key, len(table_VH), (config.num_latents,), replace=config.num_latents > len(table_VH)
    )
    params: Params = {"soft": {"embedding": table_VH[tokens_N]}}
    if config.z_base == "last_token":
        params["soft"]["gate"] = jnp.zeros_like(table_VH[0])
    network: Params = {}
    if config.kind in ("full", "scratch"):
        own = target if config.kind == "full" else transformer.init(target_config, network_key, table_VH.dtype)
        network = {
            name: leaf for name, leaf in _stacked(target_config, own).items() if name in ("layers", "final_norm")
        }
        if config.z_tap == "pre_norm":
            del network["final_norm"]
    if config.kind == "lora":
        layers = _stacked(target_config, target)["layers"]
        network["adapters"] = _init_adapters(layers, config.rank, network_key)
    if config.z_scale == "match_rms" and config.kind != "pause":
        network["latent"] = {"scale": jnp.mean(_rms(table_VH))[None].astype(table_VH.dtype)}
    params = {**params, "network": network} if network else params
    return jax.tree.map(jnp.array, params)


def latents(
    config: CoprocessorConfig,
    params: Params,
    target_config: TransformerConfig,
    target: Params,
    cache: list[Rows] | StackedRows,
    points: Points,
    last: Int[Array, "B M"],
    *,
    prefix_positions: Int[Array, "#B S"] | None = None,
    prefix_seen: Bool[Array, "#B S"] | None = None,
    attention: str = "dense",
    remat: str = "none",
) -> Float[Array, "B M N H"]:
    """The latents of all points, in one pass, as the target reads them.

    Args:
      config: of the coprocessor.
      params: its parameters, laid out as those of the target: layers stacked, or after `for_decoding`.
      target_config: shape of the target.
      target: its parameters.
      cache: keys and values of the text: the target's; with `config.needs_features` what `read_features` made.
      points: what is seen.
      last: the tokens that latents are put behind, which may have come after what is seen.
      prefix_positions: where the tokens in the cache's slots stand; None where slot and position agree.
      prefix_seen: slots that may be seen at all, such as all but those of earlier latents; None is all.
      attention: `dense`, or of many points `blocks` (`models.layout.Layout`).
      remat: of stacked layers (`models.transformer.forward`).
    """
    batch, count = points.positions.shape
    soft_NH = params["soft"]["embedding"]
    soft_BMNH = jnp.broadcast_to(soft_NH, (batch, count, *soft_NH.shape))

    def upon_base(z_BMNH):
        if config.z_base == "none":
            return z_BMNH
        base_BMH = transformer.embed(target_config, target, last).astype(z_BMNH.dtype)
        end_BM1H = base_BMH[:, :, None] + params["soft"]["gate"] * z_BMNH[:, :, -1:]
        return jnp.concatenate([z_BMNH[:, :, :-1], end_BM1H], axis=2)

    if config.kind == "pause":
        return upon_base(soft_BMNH)
    layout = _around(
        points,
        config.latent_positions(points.positions),
        config.order(config.num_latents, config.latent_attn),
        prefix_positions,
        prefix_seen,
        attention,
    )
    rows = soft_BMNH.reshape(batch, -1, soft_NH.shape[-1])
    output = transformer.forward(
        target_config, network(config, params, target), rows, layout, Sources(cache), taps=(config.z_tap,), remat=remat
    )
    z = output.taps[config.z_tap].reshape(soft_BMNH.shape)
    if config.z_scale == "match_rms":
        scale = jax.lax.stop_gradient(params["network"]["latent"]["scale"]).astype(wide(z.dtype))
        z = (z * (scale / _rms(z))).astype(z.dtype)
    return upon_base(z)


def augmented(
    config: CoprocessorConfig,
    target_config: TransformerConfig,
    target: Params,
    cache: list[Rows] | StackedRows,
    points: Points,
    z: Float[Array, "B M N H"],
    ahead: Int[Array, "B M A"],
    *,
    prefix_positions: Int[Array, "#B S"] | None = None,
    attention: str = "dense",
    remat: str = "none",
) -> Float[Array, "B M N+A H"]:
    """The target's post-norm features of latents and the tokens behind them, at all points in one pass.

    Args:
      config: of the coprocessor.
      target_config: shape of the target.
      target: its parameters.
      cache: its keys and values of the text.
      points: where latents are put, which may be behind where the coprocessor read.
      z: latents.
      ahead: the tokens that follow them.
      prefix_positions: as for `latents`.
      attention: as for `latents`.
      remat: as for `latents`.
    """
    batch, _, number, width = z.shape
    shift = number if config.positions == "advance" else 0
    after_BMA = points.positions[..., None] + shift + 1 + jnp.arange(ahead.shape[-1], dtype=jnp.int32)
    positions_BMG = jnp.concatenate([config.latent_positions(points.positions)[..., :number], after_BMA], axis=-1)
    rows_BMGH = jnp.concatenate([z, transformer.embed(target_config, target, ahead).astype(z.dtype)], axis=2)
    order = config.order(number + ahead.shape[-1], config.suffix_attn)
    layout = _around(points, positions_BMG, order, prefix_positions, None, attention)
    output = transformer.forward(
        target_config, target, rows_BMGH.reshape(batch, -1, width), layout, Sources(cache), remat=remat
    )
    return output.hidden.reshape(rows_BMGH.shape)


def read_features(
    config: CoprocessorConfig,
    params: Params,
    target_config: TransformerConfig,
    target: Params,
    features: Float[Array, "B T H"],
    layout: Layout,
    sources: Sources = Sources(),
    remat: str = "none",
) -> list[Rows] | StackedRows:
    """Keys and values that a network of `reads="last_layer"` makes of the target's `post_norm` features of a text.

    Args:
      config: of the coprocessor.
      params: its parameters.
      target_config: shape of the target.
      target: its parameters.
      features: of T tokens.
      layout: of these tokens, as the target read them.
      sources: what it made of the tokens before, in a cache of its own.
      remat: of stacked layers.
    """
    own = network(config, params, target)
    return transformer.forward(target_config, own, features, layout, sources, remat=remat).rows


def network(config: CoprocessorConfig, params: Params, target: Params) -> Params:
    """The network as a transformer; what it does not have of its own is the target's, the same arrays."""
    own = params.get("network", {})
    if config.kind == "lora":
        layers, adapters = target["layers"], own["adapters"]
        if isinstance(layers, list):
            pairs = zip(layers, adapters, strict=True)
            return {**target, "layers": [_adapted(layer, beside, config.lora_scale) for layer, beside in pairs]}
        return {**target, "layers": _adapted(layers, adapters, config.lora_scale)}
    return {**target, **{name: own[name] for name in ("layers", "final_norm") if name in own}}


def for_decoding(config: CoprocessorConfig, params: Params, mesh: Mesh | None = None) -> Params:
    """Parameters as decoding reads them, beside a target's after `models.transformer.for_decoding`."""
    own = dict(params.get("network", {}))
    if "layers" in own:
        own["layers"] = transformer.for_decoding({"layers": own["layers"]}, mesh)["layers"]
    if "adapters" in own:
        adapters = transformer.unstack_layers({"layers": own["adapters"]})["layers"]
        own["adapters"] = adapters if mesh is not None else [_joined(layer) for layer in adapters]
    return {**params, "network": own} if own else params


def _around(points: Points, positions_BMG, order, prefix_positions, prefix_seen, attention) -> Layout:
    """The layout of groups of rows at points."""
    batch, count, size = positions_BMG.shape

    def of_rows(values_BM):
        return values_BM if count == 1 else jnp.repeat(values_BM, size, axis=1, total_repeat_length=count * size)

    return Layout(
        positions_BMG.reshape(batch, -1).astype(jnp.int32),
        of_rows(points.horizon),
        order,
        prefix_positions=prefix_positions,
        prefix_seen=prefix_seen,
        since=None if points.since is None else of_rows(points.since),
        attention=attention,
    )


def _stacked(target_config: TransformerConfig, params: Params) -> Params:
    """Parameters with stacked layers, nothing joined."""
    if not isinstance(params["layers"], list):
        return params
    return transformer.stack_layers(transformer.split_projections(target_config, params))


def _rms(x: Float[Array, "*B H"]) -> Float[Array, "*B 1"]:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(wide(x.dtype))), axis=-1, keepdims=True))


def _init_adapters(layers: Params, rank: int, key: Array) -> Params:
    """`a` [L, in, r] is He-uniform, `b` [L, r, out] zero, so that the network begins as the target."""
    keys = iter(jax.random.split(key, sum(map(len, ADAPTED.values()))))

    def beside(kernel):
        depth, inputs, outputs = kernel.shape
        bound = (6 / inputs) ** 0.5
        a = jax.random.uniform(next(keys), (depth, inputs, rank), kernel.dtype, -bound, bound)
        return {"a": a, "b": jnp.zeros((depth, rank, outputs), kernel.dtype)}

    return {part: {name: beside(layers[part][name]["kernel"]) for name in names} for part, names in ADAPTED.items()}


def _adapted(layers: Params, adapters: Params, scale: float) -> Params:
    """A layer, or stacked ones, with adapters beside the kernels."""

    def beside(module, lora):
        return {**module, "lora": {"a": scale * lora["a"], "b": lora["b"]}}

    def part(name):
        return {**layers[name], **{k: beside(layers[name][k], lora) for k, lora in adapters[name].items()}}

    return {**layers, **{name: part(name) for name in adapters}}


def _joined(adapters: Params) -> Params:
    """Adapters of a layer as they stand beside joined projections: of q, k and v side by side, each to its own."""

    def of_part(part: Params, names: tuple[str, ...]) -> Params:
        lora: dict[str, Any] = {
            "a": jnp.concatenate([part[name]["a"] for name in names], axis=-1),
            "b": block_diag(*(part[name]["b"] for name in names)),
        }
        rest = {name: leaf for name, leaf in part.items() if name not in names}
        return {**rest, joined_name(names): lora}

    return {name: of_part(adapters[name], names) for name, names in transformer.JOINED.items()}
