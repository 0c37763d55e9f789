"""Medusa heads (Cai et al. 2024, section 3.1): K heads on one feature, each blind to what the others guess.

Head i reads h_p, the target's post-norm feature at position p, and predicts x_{p+2+i}. It is m residual blocks
`x + SiLU(A x + b)` and a linear map to the vocabulary that starts as the target's own head.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.config import TransformerConfig
from models.layers import call
from models.linear import whole, whole_table, wide_einsum
from models.schema import require
from models.sharding import split_vocabulary
from models.transformer import Params

_MOST = 64


class ResBlock(nn.Module):
    """skip(x) + SiLU(A x + b), A = 0 at the start; the skip is a linear map where the width changes (Hydra)."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B H"]:
        gate = nn.Dense(self.width, kernel_init=nn.initializers.zeros, name="linear")(x)
        if x.shape[-1] == self.width:
            return x + nn.silu(gate)
        return nn.Dense(self.width, kernel_init=_torch_uniform, name="residual")(x) + nn.silu(gate)


# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of the linear layer that Hydra's residual connection is.
_torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def vocab_kernel(target: Params) -> Float[Array, "H V"]:
    """The target's output head as a kernel, transposed from the embedding when they are tied."""
    if "head" in target:
        return jnp.asarray(whole(target["head"]["kernel"]))
    return jnp.asarray(whole_table(target["embed"]["embedding"]).T)


def check_counts(num_heads: int, num_layers: int) -> None:
    """Raises UserError for numbers of heads, or of layers in one, that would be made one by one for ever."""
    for name, count in (("num_heads", num_heads), ("num_layers", num_layers)):
        require(1 <= count <= _MOST, f"heads.{name} must be from 1 to {_MOST}", count)


@dataclasses.dataclass(frozen=True)
class MedusaHeads:
    """Shape of a set of Medusa heads.

    Attributes:
      num_heads: K, how many tokens ahead the last head looks, counted after the root.
      num_layers: m, residual blocks per head.
    """

    num_heads: int = 4
    num_layers: int = 1

    prefix: ClassVar[bool] = False  # The target's features are read as they are (see `HydraHeads`).

    def __post_init__(self):
        """Raises UserError for numbers of heads or blocks that no release has."""
        check_counts(self.num_heads, self.num_layers)

    def init(self, config: TransformerConfig, target: Params, key: Array) -> Params:
        """Heads that at first predict what the target's own head does."""
        dtype = target["embed"]["embedding"].dtype
        x = jnp.zeros((1, config.width), dtype)

        def head(key):
            blocks = [ResBlock(config.width).init(k, x)["params"] for k in jax.random.split(key, self.num_layers)]
            return {"blocks": blocks, "vocab": {"kernel": jnp.array(vocab_kernel(target))}}

        return jax.tree.map(
            lambda leaf: leaf.astype(dtype), {"heads": [head(k) for k in jax.random.split(key, self.num_heads)]}
        )

    def features(self, config, params: Params, post_norm_BTH, layout):
        """Medusa reads the target's feature as it is."""
        return post_norm_BTH

    def hidden(
        self,
        params: Params,
        i: int,
        feature: Float[Array, "*B H"],
        path: Float[Array, "*B P H"],
        dropout_key: Array | None = None,
    ) -> Float[Array, "*B H"]:
        """What head i's vocabulary map reads; the embeddings of the path are not used, and nothing is dropped."""
        x = feature
        for block in params["heads"][i]["blocks"]:
            x = call(ResBlock(x.shape[-1]), block, x)
        return x

    def vocab(self, params: Params, i: int, hidden: Float[Array, "*B H"]) -> Float[Array, "*B V"]:
        """Logits of head i, float32 or wider."""
        kernel = params["heads"][i]["vocab"]["kernel"]
        return split_vocabulary(wide_einsum("...H,HV->...V", hidden, kernel))
