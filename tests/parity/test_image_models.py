"""Published image checkpoints, run by torch under their own names and by us after conversion; every tensor random."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.formats.released_images import read_vae, read_var
from models.images import quantiser, vqvae
from models.images.config import SCHEDULES, VARConfig, VQVAEConfig
from tests import image_reference as reference
from tests.models.formats import image_checkpoints as checkpoints

torch = pytest.importorskip("torch")
F = torch.nn.functional

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("x64")]

# Widths that 32 groups divide, as torch demands of them.
VAE = VQVAEConfig(vocab_size=50, latent_channels=4, width=32, multipliers=(1, 2), blocks=1, scales=(1, 2, 3, 5))
VAR = VARConfig(depth=2, width=24, num_heads=3, num_classes=5, vocab_size=50, latent_channels=4, scales=(1, 2, 3, 5))


class Peer:
    """Torch's own operations on the tensors of a file, in float64."""

    def __init__(self, path: Path):
        self.t = {name: x.double() for name, x in torch.load(path, weights_only=True).items()}

    def conv(self, x, name: str, **options):
        weight = self.t[f"{name}.weight"]
        return F.conv2d(x, weight, self.t[f"{name}.bias"], **{"padding": weight.shape[-1] // 2, **options})

    def norm(self, x, name: str):
        return F.group_norm(x, 32, self.t[f"{name}.weight"], self.t[f"{name}.bias"], eps=1e-6)

    def linear(self, x, name: str):
        return F.linear(x, self.t[f"{name}.weight"], self.t[f"{name}.bias"])

    def block(self, x, name: str):
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.t else x)

    def attention(self, x, name: str):
        q, k, v = self.conv(self.norm(x, f"{name}.norm"), f"{name}.qkv").flatten(2).transpose(1, 2).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.conv(mixed.transpose(1, 2).reshape(x.shape), f"{name}.proj_out")

    def level(self, x, name: str, count: int):
        for j in range(count):
            x = self.block(x, f"{name}.block.{j}")
            x = self.attention(x, f"{name}.attn.{j}") if f"{name}.attn.{j}.norm.weight" in self.t else x
        return x

    def middle(self, x, name: str):
        return self.block(self.attention(self.block(x, f"{name}.block_1"), f"{name}.attn_1"), f"{name}.block_2")

    def features(self, x):
        x = self.level(self.conv(x, "encoder.conv_in"), "encoder.down.0", 1)
        x = self.conv(F.pad(x, (0, 1, 0, 1)), "encoder.down.0.downsample.conv", stride=2, padding=0)
        x = self.middle(self.level(x, "encoder.down.1", 1), "encoder.mid")
        return self.conv(self.conv(F.silu(self.norm(x, "encoder.norm_out")), "encoder.conv_out"), "quant_conv")

    def decode(self, f_hat):
        x = self.middle(self.conv(self.conv(f_hat, "post_quant_conv"), "decoder.conv_in"), "decoder.mid")
        x = F.interpolate(self.level(x, "decoder.up.1", 2), scale_factor=2, mode="nearest")
        x = self.level(self.conv(x, "decoder.up.1.upsample.conv"), "decoder.up.0", 2)
        return self.conv(F.silu(self.norm(x, "decoder.norm_out")), "decoder.conv_out").clamp(-1, 1)

    def encode(self, f, scales, table):
        codes, residual, indices = self.t["quantize.embedding.weight"], f, []
        for k, p in enumerate(scales):
            last = k == len(scales) - 1
            z = (residual if last else F.interpolate(residual, (p, p), mode="area")).permute(0, 2, 3, 1)
            indices.append(torch.cdist(z.reshape(-1, z.shape[-1]), codes).argmin(-1).reshape(len(z), -1))
            h = codes[indices[-1]].reshape(z.shape).permute(0, 3, 1, 2)
            h = h if last else F.interpolate(h, f.shape[2:], mode="bicubic")
            residual = residual - (0.5 * h + 0.5 * self.conv(h, f"quantize.quant_resi.qresi_ls.{table[k]}"))
        return indices, f - residual

    def logits(self, config: VARConfig, labels, inputs):
        C, H = config.width, config.num_heads
        level = torch.repeat_interleave(torch.arange(len(config.scales)), torch.tensor([p * p for p in config.scales]))
        c = self.t["class_emb.weight"][labels]
        x = torch.cat([c[:, None] + self.t["pos_start"], self.linear(inputs, "word_embed")], 1)
        x = x + self.t["lvl_embed.weight"][level] + self.t["pos_1LC"]
        seen = level[:, None] >= level
        for i in range(config.depth):
            b = f"blocks.{i}."
            if config.shared_modulation:
                m = self.linear(F.silu(c), "shared_ada_lin.1").view(-1, 1, 6, C) + self.t[f"{b}ada_gss"]
            else:
                m = self.linear(F.silu(c), f"{b}ada_lin.1").view(-1, 1, 6, C)
            gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = m.unbind(2)
            h = F.layer_norm(x, (C,), eps=1e-6) * (1 + scale_1) + shift_1
            bias = torch.cat([self.t[f"{b}attn.q_bias"], torch.zeros(C).double(), self.t[f"{b}attn.v_bias"]])
            qkv = F.linear(h, self.t[f"{b}attn.mat_qkv.weight"], bias).view(*h.shape[:2], 3, H, C // H)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q = F.normalize(q, dim=-1) * self.t[f"{b}attn.scale_mul_1H11"].clamp_max(np.log(100)).exp()
            mixed = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, attn_mask=seen, scale=1.0)
            x = x + gate_1 * self.linear(mixed.transpose(1, 2).reshape(h.shape), f"{b}attn.proj")
            h = self.linear(F.layer_norm(x, (C,), eps=1e-6) * (1 + scale_2) + shift_2, f"{b}ffn.fc1")
            x = x + gate_2 * self.linear(F.gelu(h, approximate="tanh"), f"{b}ffn.fc2")
        scale, shift = self.linear(F.silu(c), "head_nm.ada_lin.1").view(-1, 1, 2, C).unbind(2)
        return self.linear(F.layer_norm(x, (C,), eps=1e-6) * (1 + scale) + shift, "head")


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The tensors as torch itself writes them, with attention scales on both sides of the clamp."""
    rng = np.random.default_rng(1)
    scales = {n: rng.uniform(2.5, 5.5, x.shape).astype(np.float32) for n, x in tensors.items() if "scale_mul" in n}
    torch.save({name: torch.from_numpy(x) for name, x in (tensors | scales).items()}, path)
    return path


def wide(tree: dict) -> dict:
    return jax.device_put(jax.tree.map(lambda x: np.asarray(x, np.float64), tree))


@jax.jit
def through_vae(params, images, indices):
    """Features, codes, what the peer's codes sum up to, and the image of that."""
    summed = quantiser.accumulate(VAE, params, indices)
    made = vqvae.features(VAE, params, images), vqvae.encode(VAE, params, images)
    return *made, summed, vqvae.decode(VAE, params, summed)


def test_tokenizer(tmp_path: Path) -> None:
    path = save(tmp_path / "vae.pth", checkpoints.vae(VAE))
    params, peer = wide(read_vae(path, VAE.scales).params), Peer(path)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 10, 10, 3))
    features = peer.features(torch.from_numpy(images).permute(0, 3, 1, 2))
    scale = float(features.std())
    indices, f_hat = peer.encode(features, VAE.scales, (0, 1, 2, 3))
    given = jnp.asarray(images), [jnp.asarray(x.numpy()) for x in indices]
    mine, codes, summed, image = through_vae(params, *given)
    np.testing.assert_allclose(mine, features.permute(0, 2, 3, 1), atol=1e-10 * scale)
    for found, expected in zip(codes, indices, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(summed, f_hat.permute(0, 2, 3, 1), atol=1e-10 * scale)
    decoded = peer.decode(f_hat).permute(0, 2, 3, 1)
    assert 0.05 < (decoded.abs() < 1).double().mean() < 1
    np.testing.assert_allclose(image, decoded, atol=1e-9)


@pytest.mark.parametrize("shared", [False, True])
def test_transformer(tmp_path: Path, shared: bool) -> None:
    config = VARConfig(**{**vars(VAR), "shared_modulation": shared})
    path = save(tmp_path / "var.pth", checkpoints.var(config, buffers=False))
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), read_var(path, config.scales).params)
    inputs = np.random.default_rng(0).normal(size=(2, config.length - 1, 4))
    labels = np.array([3, 5])
    expected = Peer(path).logits(config, torch.from_numpy(labels), torch.from_numpy(inputs))
    assert expected.std() > 0.1
    np.testing.assert_allclose(reference.logits(config, params, labels, inputs), expected, atol=1e-11)


def test_ten_scales(tmp_path: Path) -> None:
    config = VQVAEConfig(vocab_size=50, latent_channels=4, width=32, multipliers=(1,), blocks=1)
    path = save(tmp_path / "vae.pth", checkpoints.vae(config))
    params, peer = wide(read_vae(path).params), Peer(path)
    f = np.random.default_rng(0).normal(size=(2, 16, 16, 4))
    table = (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    indices, f_hat = peer.encode(torch.from_numpy(f).permute(0, 3, 1, 2), SCHEDULES["256"], table)
    f_hats, found = jax.jit(quantiser.quantise, static_argnums=0)(config, params, jnp.asarray(f))
    assert all(map(np.array_equal, found, indices))
    np.testing.assert_allclose(f_hats[-1], f_hat.permute(0, 2, 3, 1), atol=1e-11)
