"""Hydra heads (Ankner et al. 2024): draft heads that read the candidates before them.

Head i at a node whose path from the root is y_0 .. y_i reads z = [f; E[y_0]; ...; E[y_i]], with E the target's frozen
embedding, so the guesses along one path agree with each other. Its first block maps the (i+2)H-wide z to H through a
linear skip; the rest is as in Medusa, but for a bias on the vocabulary map.

f is the target's post-norm feature h_p (Hydra), or, in Hydra++, the output at p of one more transformer block with its
own final norm, run causally over the features (section 4: prefix attention), and then every head has 4 blocks.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.attention import Sources, wide
from models.config import TransformerConfig
from models.heads.medusa import ResBlock, check_counts, vocab_kernel
from models.layers import Block, RMSNorm, call, rope_angles
from models.layout import Layout
from models.linear import wide_einsum
from models.sharding import split_vocabulary
from models.transformer import Params


@dataclasses.dataclass(frozen=True)
class HydraHeads:
    """Shape of a set of Hydra heads.

    Attributes:
      num_heads: K, depth that the heads reach.
      num_layers: m, blocks per head, the widening one included (1 in Hydra, 4 in Hydra++).
      prefix: the extra transformer block of Hydra++.
      dropout: rate before every block and before the vocabulary map, in training (0.2 in Hydra++).
    """

    num_heads: int = 4
    num_layers: int = 1
    prefix: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        """Raises UserError for numbers of heads or blocks that no release has."""
        check_counts(self.num_heads, self.num_layers)

    def init(self, config: TransformerConfig, target: Params, key: Array) -> Params:
        """Fresh heads; vocabulary maps start as the target's own head."""
        dtype = target["embed"]["embedding"].dtype
        prefix_key, *head_keys = jax.random.split(key, self.num_heads + 1)

        def head(i, key):
            widths = [(i + 2) * config.width] + [config.width] * (self.num_layers - 1)
            keys = jax.random.split(key, self.num_layers)
            return {
                "blocks": [
                    ResBlock(config.width).init(k, jnp.zeros((1, w)))["params"]
                    for k, w in zip(keys, widths, strict=True)
                ],
                "vocab": {"kernel": jnp.array(vocab_kernel(target)), "bias": jnp.zeros(config.vocab_size)},
            }

        params: Params = {"heads": [head(i, k) for i, k in enumerate(head_keys)]}
        if self.prefix:
            layout = Layout.causal(1, 1)
            x = jnp.zeros((1, 1, config.width))
            params["prefix"] = {
                "block": Block(config).init(prefix_key, x, rope_angles(config, layout.positions), layout)["params"],
                "norm": RMSNorm(config.norm_eps, config.zero_centred_norm).init(prefix_key, x)["params"],
            }
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def features(
        self, config: TransformerConfig, params: Params, post_norm_BTH: Float[Array, "B T H"], layout: Layout
    ) -> Float[Array, "B T H"]:
        """What the heads read, for whole texts (training)."""
        return self.prefix_rows(config, params, post_norm_BTH, layout)[0] if self.prefix else post_norm_BTH

    def prefix_rows(self, config, params, post_norm_BTH, layout, cache=None):
        """The prefix block on new rows: its normed output `[B, T, H]` and its fresh keys and values."""
        x, rows = call(
            Block(config),
            params["prefix"]["block"],
            post_norm_BTH,
            rope_angles(config, layout.positions),
            layout,
            Sources(cache),
        )
        norm = RMSNorm(config.norm_eps, config.zero_centred_norm)
        return call(norm, params["prefix"]["norm"], x), rows

    def hidden(
        self,
        params: Params,
        i: int,
        feature: Float[Array, "*B H"],
        path: Float[Array, "*B P H"],
        dropout_key: Array | None = None,
    ) -> Float[Array, "*B H"]:
        """What head i's vocabulary map reads.

        Args:
          params: all heads.
          i: which head; its path has P = i + 1 tokens.
          feature: f at the position that chose the root.
          path: target embeddings of the root and of the candidates above the one to guess.
          dropout_key: drops activations in training; None in decoding.
        """
        width = feature.shape[-1]
        x = jnp.concatenate([feature[..., None, :], path], axis=-2).reshape(*feature.shape[:-1], (i + 2) * width)
        blocks = params["heads"][i]["blocks"]
        keys = [None] * (len(blocks) + 1) if dropout_key is None else jax.random.split(dropout_key, len(blocks) + 1)
        for block, key in zip(blocks, keys, strict=False):
            x = call(ResBlock(width), block, self._drop(x, key))
        return self._drop(x, keys[-1])

    def join_inputs(self, params: Params) -> Params:
        """The heads' first blocks, cut by what they read instead of by head.

        z is a concatenation, so a first block is a sum of one product per piece of z, and a piece that several heads
        read can meet all of their kernels at once. Source 0 is f, source 1 + j is E[y_j], read by heads j and up. A
        tree then needs one product per node instead of one per path, with few wide kernels instead of many narrow ones.

        Returns:
          `sources`: per source a kernel [H, heads that read it, 2H], skip and gate side by side; `bias` [heads, 2H].
        """
        first = [head["blocks"][0] for head in params["heads"]]
        sources = []
        for source in range(len(first) + 1):
            readers = first[max(source - 1, 0) :]
            pieces = [
                jnp.concatenate([jnp.split(block[name]["kernel"], i + 2)[source] for name in ("residual", "linear")], 1)
                for i, block in enumerate(readers, start=max(source - 1, 0))
            ]
            sources.append(jnp.stack(pieces, axis=1))
        bias = jnp.stack([jnp.concatenate([b["residual"]["bias"], b["linear"]["bias"]]) for b in first])
        return {"sources": sources, "bias": bias}

    def hidden_joined(self, params: Params, i: int, summed: Float[Array, "*B H2"]) -> Float[Array, "*B H"]:
        """What head i's vocabulary map reads, from the sum of its sources' products and its bias; equals `hidden`."""
        skip, gate = jnp.split(summed, 2, axis=-1)
        x = skip + nn.silu(gate)
        for block in params["heads"][i]["blocks"][1:]:
            x = call(ResBlock(x.shape[-1]), block, x)
        return x

    def _drop(self, x, key):
        if key is None or self.dropout == 0:
            return x
        return nn.Dropout(self.dropout, deterministic=False).apply({}, x, rngs={"dropout": key})

    def vocab(self, params: Params, i: int, hidden: Float[Array, "*B H"]) -> Float[Array, "*B V"]:
        """Logits of head i, float32 or wider."""
        vocab = params["heads"][i]["vocab"]
        dtype = wide(hidden.dtype)
        logits = split_vocabulary(wide_einsum("...H,HV->...V", hidden, vocab["kernel"]))
        return logits + vocab["bias"].astype(dtype)
