"""VAR and its decoder in PyTorch, for comparison: the published shapes with torch's own operations.

Random weights, float32, keys and values in a cache that grows by concatenation, fused attention, top-k and a sorted
top-p; with the threads that JAX may use.
"""

import importlib.util
import math
import os
import time
from typing import Any

import numpy as np

from decoding.images.scales import Drawing
from models.images.config import VARConfig, VQVAEConfig
from models.images.resample import phi_table


def is_installed() -> bool:
    """Whether torch can be imported."""
    return importlib.util.find_spec("torch") is not None


class TorchVAR:
    """A transformer of a shape with random weights, ready to be timed (`eval.timing.Timed`)."""

    def __init__(self, tokenizer: VQVAEConfig, config: VARConfig, batch: int, drawing: Drawing):
        """`tokenizer` gives the quantiser's sizes; `batch` images per sample, each with and without its class."""
        self._torch, self._draw = _torch(), lambda *shape: 0.02 * self._torch.randn(*shape)
        self._tokenizer, self._config, self._batch, self._drawing = tokenizer, config, batch, drawing
        C, E = config.width, tokenizer.latent_channels
        self._codes = self._torch.randn(tokenizer.vocab_size, E)
        self._phi = [self._dense(E, E, 3, 3) for _ in range(tokenizer.phis)]
        self._word, self._head = self._dense(C, E), self._dense(config.vocab_size, C)
        self._head_modulation, self._places = self._dense(2 * C, C), self._draw(1, config.length, C)
        self._classes = self._draw(2 * batch, C)
        self._layers = [
            {
                "modulation": self._dense(6 * C, C),
                "qkv": self._dense(3 * C, C),
                "out": self._dense(C, C),
                "up": self._dense(config.mlp_ratio * C, C),
                "down": self._dense(C, config.mlp_ratio * C),
                "scale": self._torch.full((1, config.num_heads, 1, 1), 4.0),
            }
            for _ in range(config.depth)
        ]

    def sample(self) -> float:
        """Seconds per batch."""
        started = time.perf_counter()
        with self._torch.inference_mode():
            self._generate()
        return time.perf_counter() - started

    def _dense(self, *shape: int) -> tuple[Any, Any]:
        return self._draw(*shape), self._torch.zeros(shape[0])

    def _generate(self) -> Any:
        F, scales = self._torch.nn.functional, self._config.scales
        side, K = scales[-1], len(scales)
        silu = F.silu(self._classes)
        modulations = [F.linear(silu, *layer["modulation"]).view(2 * self._batch, 1, 6, -1) for layer in self._layers]
        scale, shift = F.linear(silu, *self._head_modulation)[:, None].chunk(2, -1)
        f_hat = self._torch.zeros(self._batch, self._tokenizer.latent_channels, side, side)
        cache: list[Any] = [None] * len(self._layers)
        x, start = self._classes[:, None], 0
        for k, p in enumerate(scales):
            x = x + self._places[:, start : start + p * p]
            start += p * p
            for i, (layer, modulation) in enumerate(zip(self._layers, modulations, strict=True)):
                x, cache[i] = self._block(layer, modulation, x, cache[i])
            scores = F.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, *self._head)
            t = self._drawing.guidance * k / (K - 1)
            index = self._choose((1 + t) * scores[: self._batch] - t * scores[self._batch :])
            h = self._codes[index].transpose(1, 2).reshape(self._batch, -1, p, p)
            h = F.interpolate(h, (side, side), mode="bicubic") if k < K - 1 else h
            phi = self._phi[phi_table(K, len(self._phi))[k]]
            f_hat = f_hat + 0.5 * h + 0.5 * F.conv2d(h, *phi, padding=1)
            if k < K - 1:
                small = F.interpolate(f_hat, (scales[k + 1],) * 2, mode="area").flatten(2).transpose(1, 2)
                x = F.linear(small, *self._word).repeat(2, 1, 1)
        return f_hat

    def _block(self, layer, modulation, x, cache) -> tuple[Any, Any]:
        F, config = self._torch.nn.functional, self._config
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = modulation.unbind(2)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_1) + shift_1
        qkv = F.linear(h, *layer["qkv"]).view(*h.shape[:2], 3, config.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = F.normalize(qkv[0], dim=-1) * layer["scale"], F.normalize(qkv[1], dim=-1), qkv[2]
        if cache is not None:
            k, v = self._torch.cat([cache[0], k], 2), self._torch.cat([cache[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).reshape(h.shape)
        x = x + gate_1 * F.linear(mixed, *layer["out"])
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_2) + shift_2
        h = F.gelu(F.linear(h, *layer["up"]), approximate="tanh")
        return x + gate_2 * F.linear(h, *layer["down"]), (k, v)

    def _choose(self, scores) -> Any:
        if self._drawing.top_k:
            least = scores.topk(self._drawing.top_k, dim=-1)[0][..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self._drawing.top_p < 1:
            values, places = scores.sort(dim=-1)
            drop = values.softmax(-1).cumsum(-1) <= 1 - self._drawing.top_p
            drop[..., -1] = False
            scores = scores.masked_fill(drop.scatter(-1, places, drop), -math.inf)
        p = scores.softmax(-1)
        return self._torch.multinomial(p.view(-1, p.shape[-1]), 1).view(p.shape[:2])


class TorchDecoder:
    """A VQ-VAE's decoder of a shape with random weights, ready to be timed."""

    def __init__(self, config: VQVAEConfig, batch: int):
        """`batch` images per sample."""
        from torch import nn

        torch, widths = _torch(), config.widths

        class Block(nn.Module):
            def __init__(self, fan_in: int, fan_out: int):
                super().__init__()
                self.norms = nn.ModuleList([nn.GroupNorm(32, width, eps=1e-6) for width in (fan_in, fan_out)])
                self.convs = nn.ModuleList([nn.Conv2d(w, fan_out, 3, padding=1) for w in (fan_in, fan_out)])
                self.shortcut = nn.Identity() if fan_in == fan_out else nn.Conv2d(fan_in, fan_out, 1)

            def forward(self, x):
                h = x
                for norm, conv in zip(self.norms, self.convs, strict=True):
                    h = conv(nn.functional.silu(norm(h)))
                return self.shortcut(x) + h

        class Attention(nn.Module):
            def __init__(self, width: int):
                super().__init__()
                self.norm, self.qkv = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, 3 * width, 1)
                self.out = nn.Conv2d(width, width, 1)

            def forward(self, x):
                q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)
                mixed = nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
                return x + self.out(mixed.transpose(1, 2).reshape(x.shape))

        E, width = config.latent_channels, widths[-1]
        parts: list[Any] = [nn.Conv2d(E, E, 3, padding=1), nn.Conv2d(E, width, 3, padding=1)]
        parts += [Block(width, width), Attention(width), Block(width, width)]
        for level in reversed(range(len(widths))):
            for _ in range(config.blocks + 1):
                parts.append(Block(width, widths[level]))
                width = widths[level]
                parts += [Attention(width)] if level == len(widths) - 1 else []
            if level:
                parts += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, width, 3, padding=1)]
        parts += [nn.GroupNorm(32, width, eps=1e-6), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1)]
        self._torch, self._decoder = torch, nn.Sequential(*parts).eval()
        f_hat = np.random.default_rng(0).standard_normal((batch, E, config.scales[-1], config.scales[-1]))
        self._f_hat = torch.tensor(f_hat, dtype=torch.float32)

    def sample(self) -> float:
        """Seconds per batch."""
        started = time.perf_counter()
        with self._torch.inference_mode():
            self._decoder(self._f_hat).clamp(-1, 1)
        return time.perf_counter() - started


def _torch() -> Any:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.manual_seed(0)
    return torch
