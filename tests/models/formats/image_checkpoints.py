"""Published image checkpoints in miniature: the key patterns and shapes of the real files, random values."""

import numpy as np

from models.images.config import VARConfig, VQVAEConfig

Tensors = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


def draw(shapes: Shapes, seed: int = 0) -> Tensors:
    """Random float32 tensors of those shapes."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def var(config: VARConfig, buffers: bool = True, seed: int = 0) -> Tensors:
    """`var_d*.pth`, and CoDe's `drafter_*.pth` and `refiner_*.pth`."""
    C, V, H, F = config.width, config.vocab_size, config.num_heads, config.mlp_ratio * config.width
    K, L = len(config.scales), sum(p * p for p in config.scales)
    shapes: Shapes = {
        "pos_start": (1, 1, C),
        "pos_1LC": (1, L, C),
        "word_embed.weight": (C, config.latent_channels),
        "word_embed.bias": (C,),
        "class_emb.weight": (config.num_classes + 1, C),
        "lvl_embed.weight": (K, C),
        "head_nm.ada_lin.1.weight": (2 * C, C),
        "head_nm.ada_lin.1.bias": (2 * C,),
        "head.weight": (V, C),
        "head.bias": (V,),
    }
    if config.shared_modulation:
        shapes |= {"shared_ada_lin.1.weight": (6 * C, C), "shared_ada_lin.1.bias": (6 * C,)}
    for i in range(config.depth):
        shapes |= {
            f"blocks.{i}.attn.scale_mul_1H11": (1, H, 1, 1),
            f"blocks.{i}.attn.q_bias": (C,),
            f"blocks.{i}.attn.v_bias": (C,),
            f"blocks.{i}.attn.mat_qkv.weight": (3 * C, C),
            f"blocks.{i}.attn.proj.weight": (C, C),
            f"blocks.{i}.attn.proj.bias": (C,),
            f"blocks.{i}.ffn.fc1.weight": (F, C),
            f"blocks.{i}.ffn.fc1.bias": (F,),
            f"blocks.{i}.ffn.fc2.weight": (C, F),
            f"blocks.{i}.ffn.fc2.bias": (C,),
        }
        if config.shared_modulation:
            shapes |= {f"blocks.{i}.ada_gss": (1, 1, 6, C)}
        else:
            shapes |= {f"blocks.{i}.ada_lin.1.weight": (6 * C, C), f"blocks.{i}.ada_lin.1.bias": (6 * C,)}
    tensors = draw(shapes, seed)
    if buffers:
        level = np.repeat(np.arange(K), [p * p for p in config.scales])
        tensors["lvl_1L"] = level[None]
        tensors["attn_bias_for_masking"] = np.where(level[:, None] >= level, 0, -np.inf).astype(np.float32)[None, None]
        tensors |= {f"blocks.{i}.attn.zero_k_bias": np.zeros(C, np.float32) for i in range(config.depth)}
    return tensors


def vae(config: VQVAEConfig, buffers: bool = True, seed: int = 0) -> Tensors:
    """`vae_ch160v4096z32.pth`."""
    widths, C = config.widths, config.latent_channels
    last, top = len(widths) - 1, widths[-1]
    shapes: Shapes = {}

    def conv(name: str, fan_in: int, fan_out: int, side: int = 3) -> None:
        shapes.update({f"{name}.weight": (fan_out, fan_in, side, side), f"{name}.bias": (fan_out,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def block(name: str, fan_in: int, fan_out: int) -> None:
        norm(f"{name}.norm1", fan_in)
        conv(f"{name}.conv1", fan_in, fan_out)
        norm(f"{name}.norm2", fan_out)
        conv(f"{name}.conv2", fan_out, fan_out)
        if fan_in != fan_out:
            conv(f"{name}.nin_shortcut", fan_in, fan_out, side=1)

    def attention(name: str) -> None:
        norm(f"{name}.norm", top)
        conv(f"{name}.qkv", top, 3 * top, side=1)
        conv(f"{name}.proj_out", top, top, side=1)

    for half, levels, count in (("encoder", "down", config.blocks), ("decoder", "up", config.blocks + 1)):
        conv(f"{half}.conv_in", *((3, widths[0]) if half == "encoder" else (C, top)))
        for i, width in enumerate(widths):
            entering = widths[max(i - 1, 0)] if half == "encoder" else widths[min(i + 1, last)]
            for j in range(count):
                block(f"{half}.{levels}.{i}.block.{j}", entering if j == 0 else width, width)
                if i == last:
                    attention(f"{half}.{levels}.{i}.attn.{j}")
        block(f"{half}.mid.block_1", top, top)
        attention(f"{half}.mid.attn_1")
        block(f"{half}.mid.block_2", top, top)
        norm(f"{half}.norm_out", top if half == "encoder" else widths[0])
        conv(f"{half}.conv_out", *((top, C) if half == "encoder" else (widths[0], 3)))
    for i in range(last):
        conv(f"encoder.down.{i}.downsample.conv", widths[i], widths[i])
        conv(f"decoder.up.{i + 1}.upsample.conv", widths[i + 1], widths[i + 1])
    conv("quant_conv", C, C)
    conv("post_quant_conv", C, C)
    for j in range(config.phis):
        conv(f"quantize.quant_resi.qresi_ls.{j}", C, C)
    shapes["quantize.embedding.weight"] = (config.vocab_size, C)
    if buffers:
        shapes["quantize.ema_vocab_hit_SV"] = (len(config.scales), config.vocab_size)
    return draw(shapes, seed)
