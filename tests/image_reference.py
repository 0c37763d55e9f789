"""VAR and CoDe in float64 NumPy, written from their equations alone: slow, without caches, and shared with no model.

Trees of parameters are those of the models, nested dicts and lists of float64 arrays. `random_vqvae` and `random_var`
draw every tensor of one, because the native initialisation, with gates near zero, hides most mistakes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.images.config import VARConfig, VQVAEConfig

Tree = dict[str, Any]


# Parameters


def dense(rng: np.random.Generator, fan_in: int, fan_out: int, bias: bool = True) -> Tree:
    """A linear map that keeps the scale of its input, with a bias that shows."""
    kernel = rng.normal(0, fan_in**-0.5, (fan_in, fan_out))
    return {"kernel": kernel, **({"bias": rng.normal(0, 0.2, fan_out)} if bias else {})}


def conv(rng: np.random.Generator, side: int, fan_in: int, fan_out: int) -> Tree:
    """A convolution, likewise."""
    kernel = rng.normal(0, (side * side * fan_in) ** -0.5, (side, side, fan_in, fan_out))
    return {"kernel": kernel, "bias": rng.normal(0, 0.2, fan_out)}


def norm(rng: np.random.Generator, width: int) -> Tree:
    """Scale and bias of a norm."""
    return {"scale": rng.normal(1, 0.2, width), "bias": rng.normal(0, 0.2, width)}


def _res_block(rng, fan_in, fan_out) -> Tree:
    block = {
        "norm_1": norm(rng, fan_in),
        "conv_1": conv(rng, 3, fan_in, fan_out),
        "norm_2": norm(rng, fan_out),
        "conv_2": conv(rng, 3, fan_out, fan_out),
    }
    return block if fan_in == fan_out else {**block, "shortcut": conv(rng, 1, fan_in, fan_out)}


def _attention(rng, width) -> Tree:
    return {"norm": norm(rng, width), "qkv": conv(rng, 1, width, 3 * width), "out": conv(rng, 1, width, width)}


def _level(rng, fan_in, fan_out, blocks, attends, resampled) -> Tree:
    level = {f"block_{i}": _res_block(rng, fan_in if i == 0 else fan_out, fan_out) for i in range(blocks)}
    level |= {f"attention_{i}": _attention(rng, fan_out) for i in range(blocks if attends else 0)}
    return {**level, "resample": conv(rng, 3, fan_out, fan_out)} if resampled else level


def _middle(rng, width) -> Tree:
    blocks = {f"block_{i}": _res_block(rng, width, width) for i in range(2)}
    return {**blocks, "attention": _attention(rng, width)}


def random_vqvae(config: VQVAEConfig, seed: int = 0) -> Tree:
    """Every tensor of a VQ-VAE, drawn."""
    rng = np.random.default_rng(seed)
    widths = [config.width * m for m in config.multipliers]
    last, C = len(widths) - 1, config.latent_channels
    encoder = {
        "conv_in": conv(rng, 3, 3, widths[0]),
        "middle": _middle(rng, widths[-1]),
        "norm_out": norm(rng, widths[-1]),
        "conv_out": conv(rng, 3, widths[-1], C),
    }
    decoder = {
        "conv_in": conv(rng, 3, C, widths[-1]),
        "middle": _middle(rng, widths[-1]),
        "norm_out": norm(rng, widths[0]),
        "conv_out": conv(rng, 3, widths[0], 3),
    }
    for i, width in enumerate(widths):
        before, after = widths[max(i - 1, 0)], widths[min(i + 1, last)]
        encoder[f"level_{i}"] = _level(rng, before, width, config.blocks, i == last, i < last)
        decoder[f"level_{i}"] = _level(rng, after, width, config.blocks + 1, i == last, i > 0)
    return {
        "encoder": encoder,
        "decoder": decoder,
        "quant": conv(rng, 3, C, C),
        "post_quant": conv(rng, 3, C, C),
        "codebook": {"embedding": rng.normal(0, 0.5, (config.vocab_size, C))},
        "phi": [conv(rng, 3, C, C) for _ in range(config.phis)],
    }


def random_var(config: VARConfig, seed: int = 1) -> Tree:
    """Every tensor of a VAR, drawn; some of the attention scales pass the clamp at ln 100."""
    rng = np.random.default_rng(seed)
    C, K, L = config.width, len(config.scales), sum(p * p for p in config.scales)

    def block() -> Tree:
        return {
            "attention": {
                "qkv": dense(rng, C, 3 * C, bias=False),
                "q_bias": rng.normal(0, 0.3, C),
                "v_bias": rng.normal(0, 0.3, C),
                "log_scale": rng.uniform(2.5, 5.5, config.num_heads),
                "out": dense(rng, C, C),
            },
            "mlp": {"up": dense(rng, C, config.mlp_ratio * C), "down": dense(rng, config.mlp_ratio * C, C)},
            "modulation": {"offset": rng.normal(0, 0.3, (6, C))} if config.shared_modulation else dense(rng, C, 6 * C),
        }

    tree = {
        "word": dense(rng, config.latent_channels, C),
        "classes": {"embedding": rng.normal(0, 0.5, (config.num_classes + 1, C))},
        "levels": {"embedding": rng.normal(0, 0.5, (K, C))},
        "positions": {"start": rng.normal(0, 0.5, C), "embedding": rng.normal(0, 0.5, (L, C))},
        "layers": [block() for _ in range(config.depth)],
        "head": {"modulation": dense(rng, C, 2 * C), "vocab": dense(rng, C, config.vocab_size)},
    }
    return {**tree, "modulation": dense(rng, C, 6 * C)} if config.shared_modulation else tree


# Resampling


def _cubic(x: float, a: float = -0.75) -> float:
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def _up_rows(x: np.ndarray, size: int) -> np.ndarray:
    side = len(x)
    out = np.zeros((size, *x.shape[1:]))
    for o in range(size):
        source = (o + 0.5) * side / size - 0.5
        first = math.floor(source) - 1
        for tap in range(first, first + 4):
            out[o] += _cubic(source - tap) * x[min(max(tap, 0), side - 1)]
    return out


def _down_rows(x: np.ndarray, side: int) -> np.ndarray:
    size = len(x)
    return np.stack([x[o * size // side : math.ceil((o + 1) * size / side)].mean(0) for o in range(side)])


def up(x_BHWC: np.ndarray, size: int) -> np.ndarray:
    """Bicubic interpolation of square maps to `size`, rows first."""
    rows = _up_rows(x_BHWC.transpose(1, 2, 0, 3), size)
    return _up_rows(rows.transpose(1, 0, 2, 3), size).transpose(2, 1, 0, 3)


def down(x_BHWC: np.ndarray, side: int) -> np.ndarray:
    """Adaptive means of square maps."""
    rows = _down_rows(x_BHWC.transpose(1, 2, 0, 3), side)
    return _down_rows(rows.transpose(1, 0, 2, 3), side).transpose(2, 1, 0, 3)


# Which of four residual convolutions serves each scale, by the number of scales, as trained tokenizers have it.
PHIS = {4: [0, 1, 2, 3], 5: [0, 1, 2, 2, 3], 10: [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]}
PHIS[14] = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]


def phis(num_scales: int, count: int) -> list[int]:
    """The table for one or four convolutions."""
    ticks = np.linspace(1 / 12, 11 / 12, 4)
    nearest = [int(np.abs(ticks - k / (num_scales - 1)).argmin()) for k in range(num_scales)]
    return {1: [0] * num_scales, 4: PHIS.get(num_scales, nearest)}[count]


# Convolutional parts


def convolve(params: Tree, x: np.ndarray, stride: int = 1, padding: tuple[int, int] | None = None) -> np.ndarray:
    """NHWC convolution as a sum over its taps; padded to keep the size unless told otherwise."""
    kernel = params["kernel"]
    side = len(kernel)
    before, after = padding if padding is not None else (side // 2, side // 2)
    x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    H, W = ((n - side) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((len(x), H, W, kernel.shape[-1])) + params["bias"]
    for i in range(side):
        for j in range(side):
            seen = x[:, i : i + stride * (H - 1) + 1 : stride, j : j + stride * (W - 1) + 1 : stride]
            out += seen @ kernel[i, j]
    return out


def group_norm(params: Tree, x: np.ndarray) -> np.ndarray:
    """32 groups, or as many as divide both 32 and the width; eps 1e-6."""
    groups = math.gcd(32, x.shape[-1])
    grouped = x.reshape(*x.shape[:3], groups, -1)
    centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
    normed = centred / np.sqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-6)
    return normed.reshape(x.shape) * params["scale"] + params["bias"]


def silu(x: np.ndarray) -> np.ndarray:
    """x times its logistic function."""
    return x / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _run_res_block(params, x):
    h = convolve(params["conv_1"], silu(group_norm(params["norm_1"], x)))
    h = convolve(params["conv_2"], silu(group_norm(params["norm_2"], h)))
    return h + (convolve(params["shortcut"], x) if "shortcut" in params else x)


def _run_attention(params, x):
    B, H, W, C = x.shape
    qkv = convolve(params["qkv"], group_norm(params["norm"], x)).reshape(B, H * W, 3 * C)
    q, k, v = qkv[..., :C], qkv[..., C : 2 * C], qkv[..., 2 * C :]
    weights = softmax(np.einsum("btc,bsc->bts", q, k) / np.sqrt(C))
    return x + convolve(params["out"], np.einsum("bts,bsc->btc", weights, v).reshape(x.shape))


def _run_level(params, x):
    for i in range(sum(name.startswith("block") for name in params)):
        x = _run_res_block(params[f"block_{i}"], x)
        if f"attention_{i}" in params:
            x = _run_attention(params[f"attention_{i}"], x)
    return x


def _run_middle(params, x):
    x = _run_attention(params["attention"], _run_res_block(params["block_0"], x))
    return _run_res_block(params["block_1"], x)


def features(config: VQVAEConfig, params: Tree, images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] to the features that are quantised."""
    p, last = params["encoder"], len(config.multipliers) - 1
    x = convolve(p["conv_in"], images)
    for i in range(last + 1):
        x = _run_level(p[f"level_{i}"], x)
        if i < last:
            x = convolve(p[f"level_{i}"]["resample"], x, stride=2, padding=(0, 1))
    x = _run_middle(p["middle"], x)
    return convolve(params["quant"], convolve(p["conv_out"], silu(group_norm(p["norm_out"], x))))


def reconstruct(config: VQVAEConfig, params: Tree, f_hat: np.ndarray) -> np.ndarray:
    """f_hat to images, unbounded."""
    p = params["decoder"]
    x = _run_middle(p["middle"], convolve(p["conv_in"], convolve(params["post_quant"], f_hat)))
    for i in reversed(range(len(config.multipliers))):
        x = _run_level(p[f"level_{i}"], x)
        if i > 0:
            x = convolve(p[f"level_{i}"]["resample"], x.repeat(2, axis=1).repeat(2, axis=2))
    return convolve(p["conv_out"], silu(group_norm(p["norm_out"], x)))


def decode(config: VQVAEConfig, params: Tree, f_hat: np.ndarray) -> np.ndarray:
    """f_hat to images in [-1, 1]."""
    return np.clip(reconstruct(config, params, f_hat), -1, 1)


# Quantiser


def nearest(codebook: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Index of the closest code."""
    return ((z[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)


def added(config: VQVAEConfig, params: Tree, k: int, h_BTC: np.ndarray) -> np.ndarray:
    """What vectors at scale k add to f_hat."""
    K, p, size = len(config.scales), config.scales[k], config.scales[-1]
    h = h_BTC.reshape(len(h_BTC), p, p, -1)
    h = up(h, size) if k < K - 1 else h
    phi = params["phi"][phis(K, config.phis)[k]]
    return 0.5 * h + 0.5 * convolve(phi, h)


def tokens(config: VQVAEConfig, k: int, f: np.ndarray) -> np.ndarray:
    """A full map at scale k, row by row."""
    small = down(f, config.scales[k]) if k < len(config.scales) - 1 else f
    return small.reshape(len(f), -1, f.shape[-1])


def encode(config: VQVAEConfig, params: Tree, f: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Indices of every scale, and f_hat after it."""
    codebook = params["codebook"]["embedding"]
    residual, indices, f_hats = f.copy(), [], []
    for k in range(len(config.scales)):
        indices.append(nearest(codebook, tokens(config, k, residual)))
        residual = residual - added(config, params, k, codebook[indices[-1]])
        f_hats.append(f - residual)
    return indices, f_hats


def step(config: VQVAEConfig, params: Tree, k: int, f_hat: np.ndarray, h_BTC: np.ndarray):
    """f_hat with scale k, and what the transformer reads next, None at the end."""
    f_hat = f_hat + added(config, params, k, h_BTC)
    return f_hat, tokens(config, k + 1, f_hat) if k < len(config.scales) - 1 else None


def teacher_inputs(config: VQVAEConfig, params: Tree, indices: Sequence[np.ndarray]) -> np.ndarray:
    """What the transformer reads at scales 1 to K - 1."""
    codebook, size = params["codebook"]["embedding"], config.scales[-1]
    f_hat, inputs = np.zeros((len(indices[0]), size, size, config.latent_channels)), []
    for k in range(len(config.scales) - 1):
        f_hat, following = step(config, params, k, f_hat, codebook[indices[k]])
        inputs.append(following)
    return np.concatenate(inputs, axis=1)


# Transformer


def _linear(params: Tree, x: np.ndarray) -> np.ndarray:
    return x @ params["kernel"] + params["bias"]


def _layer_norm(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.sqrt((x**2).sum(-1, keepdims=True)), 1e-12)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _attend(config: VARConfig, params: Tree, x_BTC: np.ndarray, seen_TT: np.ndarray) -> np.ndarray:
    B, T, C = x_BTC.shape
    bias = np.concatenate([params["q_bias"], np.zeros(C), params["v_bias"]])
    qkv = (x_BTC @ params["qkv"]["kernel"] + bias).reshape(B, T, 3, config.num_heads, -1)
    q, k, v = _unit(qkv[:, :, 0]), _unit(qkv[:, :, 1]), qkv[:, :, 2]
    q = q * np.exp(np.minimum(params["log_scale"], np.log(100)))[:, None]
    scores = np.where(seen_TT, np.einsum("bthd,bshd->bhts", q, k), -np.inf)
    return _linear(params["out"], np.einsum("bhts,bshd->bthd", softmax(scores), v).reshape(B, T, C))


def logits(config: VARConfig, params: Tree, labels: np.ndarray, inputs_BTC: np.ndarray) -> np.ndarray:
    """Teacher-forced logits of as many whole scales as there are inputs for.

    Args:
      config: shape of the transformer.
      params: its parameters.
      labels: [B], of which `num_classes` is the null class.
      inputs_BTC: [B, T - 1, latent channels], what scales 1 and up read.

    Returns:
      [B, T, V].
    """
    T = inputs_BTC.shape[1] + 1
    level = np.repeat(np.arange(len(config.scales)), [p * p for p in config.scales])[:T]
    c = params["classes"]["embedding"][labels]
    first = c + params["positions"]["start"]
    x = np.concatenate([first[:, None], _linear(params["word"], inputs_BTC)], axis=1)
    x = x + params["levels"]["embedding"][level] + params["positions"]["embedding"][:T]
    seen = level[:, None] >= level
    for layer in params["layers"]:
        if config.shared_modulation:
            m = _linear(params["modulation"], silu(c)).reshape(-1, 1, 6, config.width) + layer["modulation"]["offset"]
        else:
            m = _linear(layer["modulation"], silu(c)).reshape(-1, 1, 6, config.width)
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = (m[:, :, i] for i in range(6))
        x = x + gate_1 * _attend(config, layer["attention"], _layer_norm(x) * (1 + scale_1) + shift_1, seen)
        hidden = _gelu(_linear(layer["mlp"]["up"], _layer_norm(x) * (1 + scale_2) + shift_2))
        x = x + gate_2 * _linear(layer["mlp"]["down"], hidden)
    m = _linear(params["head"]["modulation"], silu(c)).reshape(-1, 1, 2, config.width)
    return _linear(params["head"]["vocab"], _layer_norm(x) * (1 + m[:, :, 0]) + m[:, :, 1])


# Generation


def guided(conditional: np.ndarray, null: np.ndarray, k: int, num_scales: int, cfg: float) -> np.ndarray:
    """Logits under guidance that grows from nothing at the first scale to `cfg` at the last."""
    t = cfg * k / (num_scales - 1)
    return (1 + t) * conditional - t * null


def generate(
    vqvae: VQVAEConfig,
    tokenizer: Tree,
    models: Sequence[tuple[VARConfig, Tree]],
    labels: np.ndarray,
    cfg: float,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Greedy generation, every scale by a forward over all that came before it.

    Args:
      vqvae: shape of the tokenizer.
      tokenizer: its parameters.
      models: the transformer that makes each scale: K times the same one for VAR, a drafter N times and then a refiner
        for CoDe.
      labels: [B].
      cfg: guidance at the last scale.

    Returns:
      Indices of every scale, and f_hat after the last.
    """
    K, size = len(vqvae.scales), vqvae.scales[-1]
    f_hat = np.zeros((len(labels), size, size, vqvae.latent_channels))
    inputs, indices = np.zeros((len(labels), 0, vqvae.latent_channels)), []
    for k, (config, params) in enumerate(models):
        null = np.full_like(labels, config.num_classes)
        rows = vqvae.scales[k] ** 2
        scores = [logits(config, params, y, inputs)[:, -rows:] for y in (labels, null)]
        indices.append(guided(*scores, k, K, cfg).argmax(-1))
        f_hat, following = step(vqvae, tokenizer, k, f_hat, tokenizer["codebook"]["embedding"][indices[-1]])
        if following is not None:
            inputs = np.concatenate([inputs, following], axis=1)
    return indices, f_hat


def filtered(scores: np.ndarray, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Logits [..., V] with what is dropped at -inf: first all below the k-th largest, then the tail of mass 1 - p."""
    out = np.array(scores, dtype=np.float64)
    for row in out.reshape(-1, out.shape[-1]):
        if top_k:
            row[row < np.sort(row)[-top_k]] = -np.inf
        if top_p < 1:
            order = np.argsort(row, kind="stable")
            drop = np.cumsum(softmax(row[order])) <= 1 - top_p
            drop[-1] = False
            row[order[drop]] = -np.inf
    return out


def distribution(scores: np.ndarray, top_k: int = 0, top_p: float = 1.0, temperature: float = 1.0) -> np.ndarray:
    """Probabilities that are drawn from: filtered without the temperature, which then acts on what is left."""
    return softmax(filtered(scores, top_k, top_p) / temperature)
