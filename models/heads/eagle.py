"""EAGLE draft networks (Li et al. 2024a, 2024b, 2025): one transformer layer that continues the target's features.

The network reads pairs: a feature of the target at position p and the embedding of the *next* token, x_{p+1}. What the
layer returns stands in for the target's feature at p + 1 and, through a head, guesses x_{p+2}; paired with that guess
it is the next input. The RoPE position of the pair is p.

EAGLE-1 and EAGLE-2 are one network (`EagleHeads`); they differ in how the tree grows. f is the target's post-norm
feature; there is no norm at the input or at the end; embedding and head are the target's own:

    y = fc [E[x]; f];   g = y + attention(y);   g = g + mlp(mlp_norm(g));   logits = target head(g)

    {'fc': {'kernel' [2H, H], 'bias' [H] if `bias`},
     'layer': {'attention': {'q', 'k', 'v', 'o'}, 'mlp_norm': {'scale'}, 'mlp': {'gate', 'up', 'down'}}}

EAGLE-3 (`Eagle3Heads`) fuses the residual stream entering three layers, returns to no feature of the target's, and has
its own head over a draft vocabulary; f is fc of the three or the network's own g:

    f = fc [low; middle; high];   g = f + attention([input_norm(E[x]); hidden_norm(f)]);   g = g + mlp(mlp_norm(g))
    logits = vocab(norm(g)), of the tokens draft_vocab

    {'fc': {'kernel' [3H, H]}, 'input_norm': {'scale'}, 'hidden_norm': {'scale'},
     'layer': {'attention': {'q' [2H, N D], 'k', 'v' [2H, K D], 'o'}, 'mlp_norm': {'scale'}, 'mlp': ...},
     'norm': {'scale'}, and a head (`vocabulary.py`)}

EAGLE-3.1 is EAGLE-3 with norms at more places, against outputs that grow from step to step while the features that the
layer also reads do not. Each is a switch of `Eagle3Heads`: of the three before fc, one by one or together; of f in the
residual stream; and of g, which is then fed back as the head reads it.

    'fc_norm': three {'scale' [H]} with `fc_norm`; {'scale' [3H]} with `norm_before_fc`

Linear maps are {'kernel' [in, out]}, with a 'bias' on q, k, v and o where the target's attention has one.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models import transformer
from models.attention import ALONE, Rows, Sources, attend, attend_in_blocks, softcap, wide
from models.config import RopeScaling, TransformerConfig
from models.errors import UserError
from models.heads import vocabulary
from models.layers import MLP, Attention, RMSNorm, call, rope_angles
from models.layout import Layout
from models.linear import Linear, product
from models.transformer import Params


class DraftLayer(nn.Module):
    """Attention on `x` beside any residual stream, then a pre-norm MLP: a block whose first norm is the caller's."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BTI, residual_BTH, angles, layout, sources=ALONE, mix=attend):
        """Returns the residual stream `[B, T, H]` and the fresh key/value rows."""
        c = self.config
        mixed, rows = Attention(c, name="attention")(x_BTI, angles, layout, sources, None, mix)
        y_BTH = residual_BTH + mixed
        normed = RMSNorm(c.norm_eps, c.zero_centred_norm, name="mlp_norm")(y_BTH)
        return y_BTH + MLP(c.width, c.mlp_width, c.activation, name="mlp")(normed), rows


def draft_layer(config: TransformerConfig) -> DraftLayer:
    """The layer of a draft network whose layers are of the shape `config`."""
    return DraftLayer(dataclasses.replace(config, num_layers=1, windows=(), post_norms=False))


def init_draft_layer(config: TransformerConfig, inputs: int, key: Array) -> Params:
    """Parameters of such a layer whose attention reads rows of width `inputs`."""
    layout = Layout.causal(1, 1)
    x, residual = jnp.zeros((1, 1, inputs)), jnp.zeros((1, 1, config.width))
    return draft_layer(config).init(key, x, residual, rope_angles(config, layout.positions), layout)["params"]


_draw = nn.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A plain Llama layer for a draft network whose layer is not of the target's kind, as in several releases.

    Attributes:
      num_heads: query heads.
      num_kv_heads: key/value heads.
      head_dim: of every head.
      mlp_width: of the gated MLP.
      norm_eps: epsilon of every RMSNorm of the network.
      rope_theta: RoPE base.
      rope_scaling: how rotary frequencies are stretched.
      qkv_bias: biases on the q, k and v projections.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False

    def of(self, config: TransformerConfig) -> TransformerConfig:
        """The network's config, for a target of shape `config`."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = TransformerConfig(config.vocab_size, config.width, 1, max_position=config.max_position, **own)
        return dataclasses.replace(plain, family=config.family)


class _Network:
    """What the networks share: the shape of their one layer."""

    layer: LayerShape | None

    def layer_config(self, config: TransformerConfig) -> TransformerConfig:
        """The config of the network's layer and norms: the target's, or the network's own."""
        return config if self.layer is None else self.layer.of(config)


@dataclasses.dataclass(frozen=True)
class EagleHeads(_Network):
    """The network of EAGLE-1 and EAGLE-2 (Li et al. 2024a, section 3.1).

    Attributes:
      bias: fc has a bias, as in the release for Vicuna and Llama 2; not in that for Llama 3.
      layer: shape of the layer; None means the target's.
    """

    bias: bool = True
    layer: LayerShape | None = None

    @property
    def taps(self) -> tuple[str, ...]:
        """Features of the target that `fuse` reads."""
        return ("post_norm",)

    def check(self, config: TransformerConfig) -> None:
        """Any target will do."""

    def outputs(self, config: TransformerConfig) -> int:
        """W, the tokens that `logits` scores."""
        return config.vocab_size

    def init(self, config: TransformerConfig, target: Params, key: Array) -> Params:
        """A fresh network in the target's dtype."""
        fc_key, layer_key = jax.random.split(key)
        fc = {"kernel": _draw(fc_key, (2 * config.width, config.width))}
        if self.bias:
            fc["bias"] = jnp.zeros(config.width)
        params = {"fc": fc, "layer": init_draft_layer(self.layer_config(config), config.width, layer_key)}
        return jax.tree.map(lambda leaf: leaf.astype(target["embed"]["embedding"].dtype), params)

    def fuse(
        self, config: TransformerConfig, params: Params, taps: dict[str, Float[Array, "*B H"]]
    ) -> Float[Array, "*B H"]:
        """The feature f of a pair, from the target's."""
        return taps["post_norm"]

    def run(
        self,
        config: TransformerConfig,
        params: Params,
        feature: Float[Array, "B T H"],
        embedding: Float[Array, "B T H"],
        layout: Layout,
        sources: Sources = ALONE,
        mix: Callable = attend,
    ) -> tuple[Float[Array, "B T H"], Rows]:
        """The layer on T pairs.

        Args:
          config: shape of the target.
          params: of the network.
          feature: f of each pair, the target's through `fuse` or an earlier output of `run`.
          embedding: `transformer.lookup` of the token that follows.
          layout: positions of the pairs, which are those of their features, and who sees whom.
          sources: keys and values of the committed pairs, and of pairs drafted before in the same step.
          mix: the attention; training-time test has its own.

        Returns:
          What stands in for the feature at the next position, and the pairs' keys and values.
        """
        dense = Linear(config.width, use_bias=self.bias)
        y = call(dense, params["fc"], jnp.concatenate([embedding, feature], axis=-1))
        own = self.layer_config(config)
        angles = rope_angles(own, layout.positions)
        return call(draft_layer(own), params["layer"], y, y, angles, layout, sources, mix)

    def logits(
        self, config: TransformerConfig, params: Params, target: Params, hidden: Float[Array, "*B H"]
    ) -> Float[Array, "*B W"]:
        """Scores of the token after the pair's, of all V tokens, float32 or wider."""
        return transformer.head(config, target, hidden)

    def head_params(self, params: Params) -> Params:
        """Of the network's parameters, those that `logits` reads."""
        return {}

    def vocabulary(self, params: Params) -> Int[Array, "W"] | None:
        """Target ids of the tokens that `logits` scores; None means all, in order."""
        return None


# The switches that EAGLE-3.1 adds to `Eagle3Heads`, by the names that releases have for them.
EAGLE_31 = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")


@dataclasses.dataclass(frozen=True)
class Eagle3Heads(vocabulary.DraftVocabulary, _Network):
    """The network of EAGLE-3 (Li et al. 2025, section 3.1).

    Attributes:
      low: the first of three layers of the target whose incoming residual stream is read.
      middle: the second.
      high: the third.
      vocab_size: W, size of the draft vocabulary; 0 means the target's.
      layer: shape of the layer and norms; None means the target's.
      fc_norm: each of the three is normed before fc.
      norm_before_fc: the three are normed as one before fc.
      norm_before_residual: the residual stream begins with hidden_norm(f) in place of f.
      norm_output: the network's output, which is fed back, is norm(g) in place of g.
      head_norm: the head reads norm(g); some releases do without, and their `norm` is unused.
    """

    low: int
    middle: int
    high: int
    vocab_size: int = 0
    layer: LayerShape | None = None
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    head_norm: bool = True

    def __post_init__(self):
        if self.fc_norm and self.norm_before_fc:
            raise UserError("fc_norm and norm_before_fc exclude each other: features are normed one by one or as one")
        if self.norm_output and not self.head_norm:
            raise UserError("norm_output without head_norm is no network: what norm_output feeds back, the head reads")

    @property
    def taps(self) -> tuple[str, ...]:
        """Features of the target that `fuse` reads; one name for each layer, however often it is read."""
        return tuple(dict.fromkeys(self._layers))

    @property
    def _layers(self) -> tuple[str, ...]:
        return tuple(f"layer:{k}" for k in (self.low, self.middle, self.high))

    def check(self, config: TransformerConfig) -> None:
        """Raises UserError when the target lacks one of the layers or has fewer tokens than the draft vocabulary."""
        for name in ("low", "middle", "high"):
            if not 0 <= getattr(self, name) < config.num_layers:
                raise UserError(
                    f"EAGLE-3 reads what enters layer {getattr(self, name)} ({name}), but the target has layers 0 to "
                    f"{config.num_layers - 1}"
                )
        vocabulary.check(self.vocab_size, config)

    def init(self, config: TransformerConfig, target: Params, key: Array) -> Params:
        """A fresh network in the target's dtype, whose norm and head start as the target's, on its first W tokens."""
        fc_key, layer_key = jax.random.split(key)
        width, layer, head = config.width, self.layer_config(config), vocabulary.init(self.vocab_size, target)
        scale = (jnp.zeros if layer.zero_centred_norm else jnp.ones)(width)
        params: Params = {
            "fc": {"kernel": _draw(fc_key, (3 * width, width))},
            "input_norm": {"scale": scale},
            "hidden_norm": {"scale": scale},
            "layer": init_draft_layer(layer, 2 * width, layer_key),
            "norm": {"scale": jnp.array(target["final_norm"]["scale"])},
        }
        if self.fc_norm:
            params["fc_norm"] = [{"scale": scale} for _ in range(3)]
        if self.norm_before_fc:
            params["fc_norm"] = {"scale": jnp.tile(scale, 3)}
        return {**jax.tree.map(lambda leaf: leaf.astype(head["vocab"]["kernel"].dtype), params), **head}

    def fuse(
        self, config: TransformerConfig, params: Params, taps: dict[str, Float[Array, "*B H"]]
    ) -> Float[Array, "*B H"]:
        """The feature f of a pair, from the target's."""
        return self.fused(config, params, [taps[name] for name in self._layers])

    def fused(
        self, config: TransformerConfig, params: Params, features: Sequence[Float[Array, "*B H"]]
    ) -> Float[Array, "*B H"]:
        """What fc, and the norms before it, make of three features, low to high."""
        if self.fc_norm:
            features = [self._normed(config, p, x) for p, x in zip(params["fc_norm"], features, strict=True)]
        x = jnp.concatenate(features, axis=-1)
        if self.norm_before_fc:
            x = self._normed(config, params["fc_norm"], x)
        return product(x, params["fc"]["kernel"])

    def _normed(self, config: TransformerConfig, params: Params, x: Float[Array, "*B I"]) -> Float[Array, "*B I"]:
        own = self.layer_config(config)
        return call(RMSNorm(own.norm_eps, own.zero_centred_norm), params, x)

    def run(
        self,
        config: TransformerConfig,
        params: Params,
        feature: Float[Array, "B T H"],
        embedding: Float[Array, "B T H"],
        layout: Layout,
        sources: Sources = ALONE,
        mix: Callable = attend,
    ) -> tuple[Float[Array, "B T H"], Rows]:
        """The layer on T pairs; see `EagleHeads.run`."""
        own = self.layer_config(config)
        normed = self._normed(config, params["hidden_norm"], feature)
        x = jnp.concatenate([self._normed(config, params["input_norm"], embedding), normed], axis=-1)
        residual = normed if self.norm_before_residual else feature
        angles = rope_angles(own, layout.positions)
        hidden, rows = call(draft_layer(own), params["layer"], x, residual, angles, layout, sources, mix)
        return self._normed(config, params["norm"], hidden) if self.norm_output else hidden, rows

    def logits(
        self, config: TransformerConfig, params: Params, target: Params, hidden: Float[Array, "*B H"]
    ) -> Float[Array, "*B W"]:
        """Scores of the token after the pair's, of the W tokens of the draft vocabulary, float32 or wider."""
        if self.head_norm and not self.norm_output:
            hidden = self._normed(config, params["norm"], hidden)
        return vocabulary.scores(params, hidden)

    def head_params(self, params: Params) -> Params:
        """Of the network's parameters, those that `logits` reads."""
        return {name: params[name] for name in (("vocab",) if self.norm_output else ("norm", "vocab"))}


def eagle3_layers(num_layers: int) -> tuple[int, int, int]:
    """Which layers EAGLE-3 reads: 2, n/2 and n - 3 as released, and for shallow targets as far apart as these."""
    if num_layers >= 7:
        return 2, num_layers // 2, num_layers - 3
    return min(1, num_layers - 1), num_layers // 2, num_layers - 1


def unroll(
    heads: EagleHeads | Eagle3Heads,
    config: TransformerConfig,
    params: Params,
    feature: Float[Array, "B T H"],
    embeddings: Sequence[Float[Array, "B T H"]],
    layout: Layout,
    remat: bool = False,
) -> list[Float[Array, "B T H"]]:
    """What drafting computes along the true text, from every position at once (training-time test; EAGLE-3, 3.2).

    Step k runs pair (output of step k - 1 at index p, token at p + 1 + k), which stands at position p + k and is the
    k-th of a draft that began at p. It sees the true pairs up to p, which are step 0, and of the steps between them and
    itself only those of the same draft: the ones at its own index.

    Args:
      heads: the network.
      config: shape of the target.
      params: of the network.
      feature: f from the target, at every position.
      embeddings: for each step k those of the tokens at p + 1 + k.
      layout: of the text.
      remat: keep of a step what later ones read, and compute the rest again for its gradients.

    Returns:
      Outputs of the steps, `[B, T, H]` each.
    """
    outputs: list[Array] = []
    drafted: list[Rows] = []

    def step(k, params, feature, embedding, drafted):
        place = dataclasses.replace(layout, positions=layout.positions + k)
        mix = functools.partial(_attend_own_index, drafted[0], drafted[1:]) if k else attend
        return heads.run(config, params, feature, embedding, place, mix=mix)

    step = jax.checkpoint(step, static_argnums=0) if remat else step
    for k, embedding in enumerate(embeddings):
        feature, rows = step(k, params, feature, embedding, tuple(drafted))
        outputs.append(feature)
        drafted.append(rows)
    return outputs


def _attend_own_index(
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
    """`attend` in training-time test: `first` as the layout says, `between` and `rows` at the query's own index.

    The mask over all steps would be [T, k T]; of each step after the first only its diagonal is ever computed.
    """
    B, T, N, D = q_BTND.shape
    K = rows["v"].shape[1]
    dtype = wide(q_BTND.dtype)
    mixed_BTI, residual_BTN = attend_in_blocks(q_BTND, first, layout, scale=scale, cap=cap, window=window)
    q_BKTGD = (q_BTND * scale).reshape(B, T, K, N // K, D).transpose(0, 2, 1, 3, 4)
    residual_BKTG1 = residual_BTN.reshape(B, T, K, -1, 1).transpose(0, 2, 1, 3, 4)
    own = [*between, rows]
    # A product and a sum: as an einsum these would be B K T matrix products of a handful of numbers.
    wide_BKTGD = q_BKTGD.astype(dtype)
    each = [jnp.sum(wide_BKTGD * step["k"].swapaxes(2, 3)[:, :, :, None].astype(dtype), axis=-1) for step in own]
    own_BKTGI = softcap(jnp.stack(each, axis=-1), cap)
    # What `first` adds to the normaliser is its log-sum-exp.
    weight = jax.nn.softmax(jnp.concatenate([residual_BKTG1, own_BKTGI], axis=-1), axis=-1)
    mixed = weight[..., :1] * mixed_BTI.reshape(B, T, K, N // K, D).transpose(0, 2, 1, 3, 4)
    for i, step in enumerate(own, start=1):
        mixed += weight[..., i, None] * step["v"][:, :, :, None].astype(dtype)
    return mixed.astype(q_BTND.dtype).transpose(0, 2, 1, 3, 4).reshape(B, T, N * D)
