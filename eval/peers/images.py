"""VAR, CoDe and their decoder in PyTorch, for comparison: the published shapes with torch's own operations.

Transformers have our weights, so that where the filters leave one code both draw the same; the decoder's are random.
Keys and values are in a cache that grows by concatenation, with fused attention, top-k and a sorted top-p. All of it
runs on the kind of device that JAX runs on and in its dtype, on a CPU with the threads that JAX may use.
"""

import importlib.util
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from decoding.images.scales import Drawing
from models.attention import wide
from models.images.config import VARConfig, VQVAEConfig, scale_starts
from models.images.resample import phi_table
from models.transformer import Params

Sketch = tuple[Any, Any, list[Any]]  # f_hat [B, E, H, W], the prefix [B, T, E] that the next scale reads, codes.


def device() -> str | None:
    """Torch's device of the kind that JAX computes on, or None where torch is missing or was built without it.

    A processor's time is no measure of an accelerator's, so there is no falling back.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    if jax.default_backend() == "cpu":
        return "cpu"
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else None


class TorchVAR:
    """A transformer with given weights and the quantiser of its codes."""

    def __init__(self, tokenizer: VQVAEConfig, codes: Params, config: VARConfig, params: Params, where: str):
        """Copies the weights, each in its own dtype.

        Args:
          tokenizer: shape of the VQ-VAE.
          codes: the quantiser's parameters.
          config: shape of the transformer, with a modulation per layer.
          params: its parameters, layers as a list.
          where: torch's name of the device.
        """
        assert not config.shared_modulation
        self._torch, self._where = _torch(), where
        self._tokenizer, self._config, self._starts = tokenizer, config, scale_starts(config.scales)
        self._codes = self._tensor(codes["codebook"]["embedding"])
        # HWIO to OIHW.
        self._phi = [(self._tensor(phi["kernel"], (3, 2, 0, 1)), self._tensor(phi["bias"])) for phi in codes["phi"]]
        self._classes = self._tensor(params["classes"]["embedding"])
        self._start = self._tensor(params["positions"]["start"])
        levels = np.repeat(np.arange(config.num_scales), np.diff(self._starts))
        self._levels = self._torch.tensor(levels, device=where)
        level, position = (self._tensor(params[name]["embedding"]) for name in ("levels", "positions"))
        self._places = level[self._levels] + position
        self._word = self._dense(params["word"])
        self._head_modulation, self._vocab = (self._dense(params["head"][name]) for name in ("modulation", "vocab"))
        self._layers = [self._layer(layer) for layer in params["layers"]]

    def empty(self, batch: int) -> Sketch:
        """Before the first scale."""
        side, E = self._config.scales[-1], self._tokenizer.latent_channels
        options = {"dtype": self._codes.dtype, "device": self._where}
        return self._torch.zeros(batch, E, side, side, **options), self._torch.zeros(batch, 0, E, **options), []

    def run(self, drawing: Drawing, sketch: Sketch, first: int, last: int) -> Sketch:
        """Makes scales `first` to `last - 1` of classes 0, 1, ..., as `decoding.images.scales.run` does.

        The first pass reads the prefix that others left too, each scale blind to larger ones, and of that pass only
        scale `first` goes through the head; the cache is forgotten at the end.
        """
        torch, F, config = self._torch, self._torch.nn.functional, self._config
        f_hat, features, indices = sketch
        prefix, indices, batch = [features], list(indices), len(f_hat)
        labels = torch.arange(batch, device=self._where) % config.num_classes
        c = self._classes[torch.cat([labels, torch.full_like(labels, config.num_classes)])]
        silu = F.silu(c)
        modulations = [_linear(F, silu, layer["modulation"]).view(2 * batch, 1, 6, -1) for layer in self._layers]
        scale, shift = _linear(F, silu, self._head_modulation)[:, None].chunk(2, -1)
        cache: list[Any] = [None] * len(self._layers)
        for k in range(first, last):
            begin = 0 if k == first else k
            x, seen = self._inputs(c, features.repeat(2, 1, 1), begin, k + 1), self._seen(begin, k + 1)
            for i, (layer, modulation) in enumerate(zip(self._layers, modulations, strict=True)):
                x, cache[i] = self._block(layer, modulation, x, cache[i], seen)
            x = x[:, self._starts[k] - self._starts[begin] :]
            normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
            scores = _linear(F, normed * (1 + scale) + shift, self._vocab).to(x.dtype)
            t = drawing.guidance * k / (config.num_scales - 1)
            indices.append(self._choose(drawing, k, (1 + t) * scores[:batch] - t * scores[batch:]))
            f_hat, features = self._step(k, f_hat, indices[-1])
            prefix += [] if features is None else [features]
        return f_hat, torch.cat(prefix, 1), indices

    def _tensor(self, leaf: Any, axes: tuple[int, ...] | None = None) -> Any:
        """A copy on the device; through a wider type, for NumPy hands torch no bfloat16."""
        host = np.asarray(leaf, wide(leaf.dtype))
        host = np.array(host if axes is None else host.transpose(axes), order="C")
        return self._torch.from_numpy(host).to(self._where, getattr(self._torch, leaf.dtype.name))

    def _dense(self, params: Params) -> tuple[Any, Any]:
        return self._tensor(params["kernel"], (1, 0)), self._tensor(params["bias"])

    def _layer(self, params: Params) -> dict[str, Any]:
        attention, mlp = params["attention"], params["mlp"]
        q_bias, v_bias = (self._tensor(attention[name]) for name in ("q_bias", "v_bias"))
        bias = self._torch.cat([q_bias, self._torch.zeros_like(q_bias), v_bias])
        log_scale = self._tensor(attention["log_scale"])
        log_scale = log_scale.to(self._torch.promote_types(log_scale.dtype, self._torch.float32))
        return {
            "modulation": self._dense(params["modulation"]),
            "qkv": (self._tensor(attention["qkv"]["kernel"], (1, 0)), bias),
            "out": self._dense(attention["out"]),
            "up": self._dense(mlp["up"]),
            "down": self._dense(mlp["down"]),
            "scale": log_scale.clamp_max(math.log(100)).exp()[:, None, None],
        }

    def _inputs(self, c: Any, features: Any, first: int, last: int) -> Any:
        x = _linear(self._torch.nn.functional, features, self._word)
        if first == 0:
            x = self._torch.cat([(c + self._start)[:, None], x], 1)
        x = x + self._places[self._starts[first] : self._starts[last]]
        return x.to(self._torch.promote_types(x.dtype, self._torch.float32))

    def _seen(self, first: int, last: int) -> Any:
        """Which keys the rows of several scales see; a single scale sees all."""
        if last - first == 1:
            return None
        begin, end = self._starts[first], self._starts[last]
        return self._levels[begin:end, None] >= self._levels[:end]

    def _block(self, layer, modulation, x, cache, seen) -> tuple[Any, Any]:
        torch, F = self._torch, self._torch.nn.functional
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = modulation.unbind(2)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_1) + shift_1
        qkv = _linear(F, h, layer["qkv"]).view(*h.shape[:2], 3, self._config.num_heads, -1).permute(2, 0, 3, 1, 4)
        unit = F.normalize(qkv[:2].to(x.dtype), dim=-1)
        q, k, v = (unit[0] * layer["scale"]).to(qkv.dtype), unit[1].to(qkv.dtype), qkv[2]
        if cache is not None:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1.0).transpose(1, 2).reshape(h.shape)
        x = x + gate_1 * _linear(F, mixed, layer["out"])
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_2) + shift_2
        h = F.gelu(_linear(F, h, layer["up"]), approximate="tanh")
        return x + gate_2 * _linear(F, h, layer["down"]), (k, v)

    def _choose(self, drawing: Drawing, k: int, scores) -> Any:
        if 0 < drawing.top_k < scores.shape[-1]:
            least = scores.topk(drawing.top_k, dim=-1)[0][..., -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if drawing.top_p < 1:
            values, places = scores.sort(dim=-1)
            drop = values.softmax(-1).cumsum(-1) <= 1 - drawing.top_p
            drop[..., -1] = False
            scores = scores.masked_fill(drop.scatter(-1, places, drop), -math.inf)
        p = (scores / drawing.temperatures(self._config.num_scales)[k]).softmax(-1)
        return self._torch.multinomial(p.view(-1, p.shape[-1]), 1).view(p.shape[:2])

    def _step(self, k: int, f_hat, index) -> tuple[Any, Any]:
        F, scales = self._torch.nn.functional, self._config.scales
        last, side = len(scales) - 1, scales[-1]
        h = self._codes[index].transpose(1, 2).reshape(*f_hat.shape[:2], scales[k], scales[k])
        h = F.interpolate(h, (side, side), mode="bicubic") if k < last else h
        phi = self._phi[phi_table(len(scales), len(self._phi))[k]]
        f_hat = f_hat + 0.5 * h + 0.5 * F.conv2d(h, *phi, padding=1)
        if k == last:
            return f_hat, None
        return f_hat, F.interpolate(f_hat, (scales[k + 1],) * 2, mode="area").flatten(2).transpose(1, 2)


class TorchImages:
    """A batch by one transformer or by several in turn, ready to be timed (`eval.measure.timing.Timed`)."""

    def __init__(self, stages: Sequence[tuple[TorchVAR, int]], drawing: Drawing, batch: int):
        """`stages`: who makes images up to which scale, one past the last."""
        self._torch, self._stages, self._drawing, self._batch = _torch(), tuple(stages), drawing, batch

    def make(self) -> Sketch:
        """f_hat, what the transformers read, and the codes; each with and without its class."""
        with self._torch.inference_mode():
            sketch, first = self._stages[0][0].empty(self._batch), 0
            for model, last in self._stages:
                sketch, first = model.run(self._drawing, sketch, first, last), last
        return sketch

    def sample(self) -> float:
        """Seconds per batch."""
        return _seconds(self._torch, self.make)


class TorchDecoder:
    """A VQ-VAE's decoder of a shape with random weights, ready to be timed."""

    def __init__(self, config: VQVAEConfig, batch: int, where: str, dtype: str = "float32"):
        """`batch` images per sample, on torch's device `where`."""
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
        options: dict[str, Any] = {"device": where, "dtype": getattr(torch, dtype)}
        self._torch, self._decoder = torch, nn.Sequential(*parts).eval().to(**options)
        f_hat = np.random.default_rng(0).standard_normal((batch, E, config.scales[-1], config.scales[-1]))
        self._f_hat = torch.tensor(f_hat, **options)

    def sample(self) -> float:
        """Seconds per batch."""

        def decode():
            with self._torch.inference_mode():
                self._decoder(self._f_hat).clamp(-1, 1)

        return _seconds(self._torch, decode)


def _linear(F: Any, x: Any, dense: tuple[Any, Any]) -> Any:
    """In the dtype of the weights, as ours are."""
    return F.linear(x.to(dense[0].dtype), *dense)


def _seconds(torch: Any, call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _torch() -> Any:
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.manual_seed(0)
    return torch
