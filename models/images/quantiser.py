"""The multi-scale residual quantiser (VAR, section 3.2 and algorithms 1, 2): features become K maps of codes.

Scale k quantises what the smaller scales left: the residual is averaged down to p_k x p_k, every vector takes its
nearest code, and these, interpolated to full size and smoothed by a residual convolution phi, are taken off it. The
running sum f_hat of what was taken off is all that the next scale, the transformer and the decoder see.

Everything runs in float32, or wider where the parameters are, at full matrix precision whatever the default: codes are
decided by differences that fewer bits cannot see. `params` are those of `models.images.vqvae`, of which these
functions read `codebook` and `phi`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from models.attention import wide
from models.images.config import VQVAEConfig
from models.images.resample import down_matrix, phi_table, resample, up_matrix
from models.transformer import Params

_FULL = jax.lax.Precision.HIGHEST


def nearest(codebook_VC: Float[Array, "V C"], z: Float[Array, "*B C"]) -> Int[Array, "*B"]:
    """The code with the smallest Euclidean distance to each vector, the first of equals; int32."""
    dtype = wide(z.dtype)
    codes_VC = codebook_VC.astype(dtype)
    # |z|^2 is the same for all codes; adding it would only round the rest.
    lengths_V = jnp.sum(jnp.square(codes_VC), axis=-1)
    distance = lengths_V - 2 * jnp.einsum("...C,VC->...V", z.astype(dtype), codes_VC, precision=_FULL)
    # Two reductions, which XLA's CPU back end vectorises; its argmin is several times slower.
    index_V = jnp.arange(len(codes_VC), dtype=jnp.int32)
    best = jnp.min(distance, axis=-1, keepdims=True)
    return jnp.min(jnp.where(distance == best, index_V, len(codes_VC) - 1), axis=-1)


def embed(params: Params, indices: Int[Array, "*B"]) -> Float[Array, "*B C"]:
    """Rows of the codebook, float32 or wider."""
    codebook = params["codebook"]["embedding"]
    return codebook.astype(wide(codebook.dtype))[indices]


def contribution(
    config: VQVAEConfig, params: Params, k: int, codes: Int[Array, "B T"] | Float[Array, "B T C"]
) -> Float[Array, "B H W C"]:
    """What the codes of scale k, or vectors in their place, row by row, add to f_hat: phi(up(codes))."""
    p = config.scales[k]
    are_indices = jnp.issubdtype(codes.dtype, jnp.integer)
    h_BTC = embed(params, codes) if are_indices else codes.astype(wide(codes.dtype))
    h = h_BTC.reshape(-1, p, p, h_BTC.shape[-1])
    if k < config.num_scales - 1:
        h = resample(up_matrix(p, config.scales[-1]), h)
    phi = params["phi"][phi_table(config.num_scales, config.phis)[k]]
    kernel, bias = phi["kernel"].astype(h.dtype), phi["bias"].astype(h.dtype)
    smooth = jax.lax.conv_general_dilated(
        h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=_FULL
    )
    return 0.5 * h + 0.5 * (smooth + bias)


def tokens_of(config: VQVAEConfig, k: int, f_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B T C"]:
    """A full map at the side of scale k, as its p_k^2 vectors, row by row."""
    p = config.scales[k]
    small = f_BHWC if k == config.num_scales - 1 else resample(down_matrix(config.scales[-1], p), f_BHWC)
    return small.reshape(len(f_BHWC), p * p, -1)


def first_f_hat(config: VQVAEConfig, batch: int, dtype=jnp.float32) -> Float[Array, "B H W C"]:
    """f_hat before the first scale: zeros, float32 or `dtype` if that is wider."""
    return jnp.zeros((batch, config.scales[-1], config.scales[-1], config.latent_channels), wide(dtype))


def step(
    config: VQVAEConfig,
    params: Params,
    k: int,
    f_hat_BHWC: Float[Array, "B H W C"],
    codes: Int[Array, "B T"] | Float[Array, "B T C"],
) -> tuple[Float[Array, "B H W C"], Float[Array, "B T2 C"] | None]:
    """Adds scale k to f_hat.

    Args:
      config: the tokenizer.
      params: its parameters.
      k: the scale, static.
      f_hat_BHWC: the sum of the scales before.
      codes: indices of scale k, row by row, or vectors in place of their embeddings.

    Returns:
      f_hat with scale k, and what the transformer reads to predict scale k + 1, None after the last.
    """
    f_hat_BHWC = f_hat_BHWC + contribution(config, params, k, codes)
    return f_hat_BHWC, tokens_of(config, k + 1, f_hat_BHWC) if k < config.num_scales - 1 else None


def quantise(
    config: VQVAEConfig, params: Params, features_BHWC: Float[Array, "B H W C"]
) -> tuple[list[Float[Array, "B H W C"]], list[Int[Array, "B _"]]]:
    """f_hat after every scale and the indices of every scale, `[B, p_k^2]` row by row.

    f_hat is differentiable in the codebook and the phis, and not in the features, on which it depends by indices alone:
    gradients reach those straight through (`straight_through`) and by `quantiser_loss`.
    """
    residual = features_BHWC.astype(wide(features_BHWC.dtype))
    f_hat = first_f_hat(config, len(residual), residual.dtype)
    f_hats, indices = [], []
    for k in range(config.num_scales):
        indices.append(nearest(params["codebook"]["embedding"], tokens_of(config, k, residual)))
        added = contribution(config, params, k, indices[-1])
        residual = residual - added
        f_hat = f_hat + added
        f_hats.append(f_hat)
    return f_hats, indices


def encode(config: VQVAEConfig, params: Params, features_BHWC: Float[Array, "B H W C"]) -> list[Int[Array, "B _"]]:
    """Indices of every scale, `[B, p_k^2]` row by row, int32."""
    return quantise(config, params, features_BHWC)[1]


def accumulate(config: VQVAEConfig, params: Params, indices: Sequence[Int[Array, "B _"]]) -> Float[Array, "B H W C"]:
    """f_hat after the given scales, the first ones or all: what the decoder makes an image of."""
    f_hat = contribution(config, params, 0, indices[0])
    for k in range(1, len(indices)):
        f_hat = f_hat + contribution(config, params, k, indices[k])
    return f_hat


def teacher_inputs(config: VQVAEConfig, params: Params, indices: Sequence[Int[Array, "B _"]]) -> Float[Array, "B L1 C"]:
    """What the transformer reads at scales 1 to K - 1 when the scales before are `indices`: `[B, L - 1, C]`.

    The last scale's own indices are not read and may be left out.
    """
    f_hat = first_f_hat(config, len(indices[0]), params["codebook"]["embedding"].dtype)
    inputs = []
    for k in range(config.num_scales - 1):
        f_hat = f_hat + contribution(config, params, k, indices[k])
        inputs.append(tokens_of(config, k + 1, f_hat))
    return jnp.concatenate(inputs, axis=1)


def straight_through(features: Float[Array, "*B"], f_hat: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """f_hat, whose gradient goes to the features."""
    features = features.astype(f_hat.dtype)
    return features + jax.lax.stop_gradient(f_hat - features)


def quantiser_loss(
    features: Float[Array, "B H W C"],
    f_hats: Sequence[Float[Array, "B H W C"]],
    commitment: float | Float[Array, ""] = 0.25,
) -> Float[Array, "B"]:
    """Per image, the mean over scales of commitment * mse(sg f_hat_k, f) + mse(f_hat_k, sg f) (VAR, section 3.2)."""
    features = features.astype(f_hats[0].dtype)

    def mse(x, y):
        return jnp.mean(jnp.square(x - y), axis=(1, 2, 3))

    stop = jax.lax.stop_gradient
    terms = [commitment * mse(stop(f_hat), features) + mse(f_hat, stop(features)) for f_hat in f_hats]
    return sum(terms[1:], terms[0]) / len(terms)


def usage(
    config: VQVAEConfig, indices: Sequence[Int[Array, "B _"]], counted: Bool[Array, "B"] | None = None
) -> Int[Array, "K V"]:
    """How often every scale took every code, in the images that are `counted`, by default all."""
    one_B1 = 1 if counted is None else counted[:, None].astype(jnp.int32)
    none_V = jnp.zeros(config.vocab_size, jnp.int32)
    return jnp.stack([none_V.at[index].add(one_B1) for index in indices])
