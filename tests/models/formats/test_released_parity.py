"""Released drafters rebuilt as torch modules: their saved state, read without torch, computes what they compute.

The modules follow the papers' equations and are nested so that torch itself gives every tensor its released name.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import TransformerConfig
from models.formats import released_eagle
from models.formats import released_heads as released
from models.formats.release import read_release
from models.formats.target import Target
from models.layout import Layout
from tests.models.formats.released_cases import CONFIG, DRAFT_TOKENS, F, H, V, random_base

torch = pytest.importorskip("torch")
nn = torch.nn

pytestmark = pytest.mark.parity
T = 9


@pytest.fixture(scope="module")
def base() -> Target:
    return random_base()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def linear(inputs: int, outputs: int, bias: bool = False) -> Any:
    return nn.Linear(inputs, outputs, bias=bias)


class Block(nn.Module):
    """skip(x) + SiLU(A x + a)."""

    def __init__(self, inputs: int = H):
        super().__init__()
        self.linear = linear(inputs, H, bias=True)
        if inputs != H:
            self.res_connection = linear(inputs, H, bias=True)

    def forward(self, x):
        skip = self.res_connection(x) if hasattr(self, "res_connection") else x
        return skip + nn.functional.silu(self.linear(x))


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, c: TransformerConfig = CONFIG):
        super().__init__()
        self.epsilon = c.norm_eps
        self.weight = nn.Parameter(1 + 0.3 * torch.randn(H))

    def forward(self, x):
        return self.weight * x / torch.sqrt(torch.mean(x**2, -1, keepdim=True) + self.epsilon)


class Rotary(nn.Module):
    """Frequencies, in a buffer that is saved, as transformers once did."""

    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.register_buffer("inv_freq", c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim))

    def forward(self, x):
        angles = torch.arange(x.shape[0])[:, None] * self.inv_freq
        cos, sin = (torch.cat([f(angles)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    """Causal attention over a text [T, inputs] with grouped keys and values."""

    def __init__(self, inputs: int, c: TransformerConfig):
        super().__init__()
        self.c, kv = c, c.num_kv_heads * c.head_dim
        self.q_proj, self.k_proj, self.v_proj = linear(inputs, H), linear(inputs, kv), linear(inputs, kv)
        self.o_proj, self.rotary_emb = linear(H, H), Rotary(c)

    def forward(self, x):
        q, k, v = (p(x).view(len(x), -1, self.c.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        group = self.c.num_heads // self.c.num_kv_heads
        k, v = (y.repeat_interleave(group, 1) for y in (self.rotary_emb(k), v))
        scores = torch.einsum("tnd,snd->nts", self.rotary_emb(q), k) / self.c.head_dim**0.5
        scores = scores.masked_fill(~torch.ones(len(x), len(x), dtype=torch.bool).tril(), -torch.inf)
        return self.o_proj(torch.einsum("nts,snd->tnd", scores.softmax(-1), v).reshape(len(x), H))


class MLP(nn.Module):
    """The gated MLP."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(H, F), linear(H, F), linear(F, H)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A Llama layer, with what the releases change of it."""

    def __init__(self, inputs: int = H, norms: Sequence[str] = ("input_layernorm",), c: TransformerConfig = CONFIG):
        super().__init__()
        self.self_attn, self.mlp, self.post_attention_layernorm = Attention(inputs, c), MLP(), Norm(c)
        for name in norms:
            setattr(self, name, Norm(c))

    def forward(self, residual, attended):
        x = residual + self.self_attn(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


def table(base: Target) -> Any:
    """The base's embedding, as a module."""
    return nn.Embedding.from_pretrained(torch.tensor(np.asarray(base.params["embed"]["embedding"])))


def check(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=0, atol=2e-5)


def convert(read, module: Any, path: Path, base: Target, *options) -> released.Converted:
    """What comes out of the module's state, saved by torch."""
    torch.save(module.state_dict(), path)
    made = read(read_release(path), base, *options)
    return dataclasses.replace(made, params=jax.device_put(made.params))


@pytest.mark.parametrize("layers", [1, 2])
def test_medusa(base: Target, tmp_path: Path, layers: int) -> None:
    blocks = [[Block()] * layers for _ in range(3)]
    module = nn.ModuleList([nn.Sequential(*b, linear(H, V)) for b in blocks])
    made = convert(released.medusa, module, tmp_path / "medusa_lm_head.pt", base)
    assert made.detected.get("tied_blocks") is (True if layers == 2 else None)
    feature = torch.randn(T, H)
    for i, head in enumerate(module):
        hidden = made.heads.hidden(made.params, i, jnp.asarray(feature.numpy()), jnp.zeros((T, 0, H)))
        check(made.heads.vocab(made.params, i, hidden), head(feature))


class Prefix(nn.Module):
    """The prefix of Hydra++: a Llama of one layer, run on features in place of embeddings."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.layers, self.norm = nn.Embedding(V, H), nn.ModuleList([Layer()]), Norm()

    def forward(self, x):
        layer = self.layers[0]
        return self.norm(layer(x, layer.input_layernorm(x)))


class Hydra(nn.Module):
    """Hydra, and with a prefix Hydra++; blocks after the first are one module, as released."""

    def __init__(self, base: Target, heads: int, layers: int, prefix: bool, dropout: bool):
        super().__init__()
        drop = [nn.Dropout(0.2)] if dropout else []
        self.input_embed_fn = table(base)
        if prefix:
            self.prefix_embeding_layer = Prefix()
        self.hydra_mlp = nn.ModuleList(
            [
                nn.Sequential(*drop, Block((i + 2) * H), *([*drop, Block()] * (layers - 1)))  # one Block, repeated
                for i in range(heads)
            ]
        )
        maps = [linear(H, V, bias=True) for _ in range(heads)]
        self.hydra_lm_head = nn.ModuleList([nn.Sequential(*drop, m) if dropout else m for m in maps])

    def forward(self, features, tokens, i):
        """Logits of head i at every position, the i + 1 tokens after it being known."""
        f = self.prefix_embeding_layer(features) if hasattr(self, "prefix_embeding_layer") else features
        embedded = self.input_embed_fn(tokens)
        z = torch.cat([f] + [embedded[1 + j : 1 + j + len(features)] for j in range(i + 1)], -1)
        return self.hydra_lm_head[i](self.hydra_mlp[i](z))


@pytest.mark.parametrize("dropout", [False, True], ids=["blocks alone", "with dropout"])
@pytest.mark.parametrize(("layers", "prefix"), [(1, False), (4, True)], ids=["hydra", "hydra++"])
def test_hydra(base: Target, tmp_path: Path, dropout: bool, layers: int, prefix: bool) -> None:
    module = Hydra(base, 3, layers, prefix, dropout).eval()
    made = convert(released.hydra, module, tmp_path / "hydra_lm_head.pt", base)
    assert made.detected == {"dropout_layout": dropout, **({"tied_blocks": True} if layers == 4 else {})}
    features, tokens = torch.randn(T, H), torch.randint(V, (T + 4,))
    embedded = np.asarray(base.params["embed"]["embedding"])[tokens.numpy()]

    @jax.jit
    def every_head(params, features, embedded):
        f = made.heads.features(base.config, params, features[None], Layout.causal(1, T))[0]
        paths = [jnp.stack([embedded[1 + j : 1 + j + T] for j in range(i + 1)], axis=1) for i in range(3)]
        return [made.heads.vocab(params, i, made.heads.hidden(params, i, f, path)) for i, path in enumerate(paths)]

    for i, found in enumerate(every_head(made.params, jnp.asarray(features.numpy()), jnp.asarray(embedded))):
        check(found, module(features, tokens, i))


class Eagle(nn.Module):
    """EAGLE-1: no norm before attention or at the end."""

    def __init__(self, base: Target, bias: bool, c: TransformerConfig):
        super().__init__()
        self.embed_tokens, self.fc = table(base), linear(2 * H, H, bias)
        self.layers = nn.ModuleList([Layer(norms=(), c=c)])

    def forward(self, features, tokens):
        x = self.fc(torch.cat([self.embed_tokens(tokens), features], -1))
        return self.layers[0](x, x)


# A layer of the base's shape, and one that has nothing of it, as `config.json` tells.
LAYERS: dict[str, tuple[TransformerConfig, dict[str, object] | None]] = {
    "the base's layer": (CONFIG, None),
    "its own layer": (
        dataclasses.replace(CONFIG, num_heads=2, num_kv_heads=1, head_dim=8, rope_theta=10_000.0, norm_eps=1e-3),
        {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": F, "rms_norm_eps": 1e-3},
    ),
}
each_layer = pytest.mark.parametrize(("layer", "said"), LAYERS.values(), ids=LAYERS)


def write_config(directory: Path, said: dict[str, object] | None) -> None:
    if said is not None:
        (directory / "config.json").write_text(json.dumps(said))


@each_layer
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_eagle(base: Target, tmp_path: Path, bias: bool, layer: TransformerConfig, said: dict | None) -> None:
    module = Eagle(base, bias, layer)
    write_config(tmp_path, said)
    made = convert(released_eagle.eagle, module, tmp_path / "pytorch_model.bin", base)
    features, tokens = torch.randn(T, H), torch.randint(V, (T,))

    @jax.jit
    def run(params, target, features, tokens):
        feature = made.heads.fuse(base.config, params, {"post_norm": features[None]})
        embedded = target["embed"]["embedding"][tokens][None]
        out, _ = made.heads.run(base.config, params, feature, embedded, Layout.causal(1, T))
        return out, made.heads.logits(base.config, params, target, out)

    out, logits = run(made.params, base.params, jnp.asarray(features.numpy()), jnp.asarray(tokens.numpy()))
    check(out[0], module(features, tokens))
    head = torch.tensor(np.asarray(base.params["head"]["kernel"]))
    np.testing.assert_allclose(logits[0], (module(features, tokens) @ head).detach(), rtol=0, atol=2e-5)


class Eagle3(nn.Module):
    """EAGLE-3 on three features of the target; the second result is what drafting feeds back."""

    def __init__(self, tokens: list[int] | None, c: TransformerConfig):
        super().__init__()
        self.fc, self.norm = linear(3 * H, H), Norm(c)
        self.midlayer = Layer(2 * H, ("hidden_norm", "input_layernorm"), c)
        self.lm_head = linear(H, V if tokens is None else len(tokens))
        if tokens is not None:
            self.register_buffer("d2t", torch.tensor(tokens) - torch.arange(len(tokens)))
            self.register_buffer("t2d", torch.isin(torch.arange(V), torch.tensor(tokens)))

    def forward(self, features, embedded):
        f = self.fc(features) if features.shape[-1] != H else features
        g = self.midlayer(f, torch.cat([self.midlayer.input_layernorm(embedded), self.midlayer.hidden_norm(f)], -1))
        return self.lm_head(self.norm(g)), g


@each_layer
@pytest.mark.parametrize("tokens", [DRAFT_TOKENS, None], ids=["draft vocabulary", "whole vocabulary"])
def test_eagle3(
    base: Target, tmp_path: Path, tokens: list[int] | None, layer: TransformerConfig, said: dict | None
) -> None:
    module = Eagle3(tokens, layer)
    write_config(tmp_path, said)
    made = convert(released_eagle.eagle3, module, tmp_path / "pytorch_model.bin", base, (0, 2, 5))
    low, middle, high = torch.randn(3, T, H)
    embedded = table(base)(torch.randint(V, (T,)))
    taps = {f"layer:{k}": jnp.asarray(x.numpy())[None] for k, x in zip((0, 2, 5), (low, middle, high), strict=True)}
    feature = made.heads.fuse(base.config, made.params, taps)
    theirs, fed_back = module(torch.cat([low, middle, high], -1), embedded)
    for _ in range(2):
        x = jnp.asarray(embedded.numpy())[None]
        out, _ = made.heads.run(base.config, made.params, feature, x, Layout.causal(1, T))
        check(made.heads.logits(base.config, made.params, base.params, out)[0], theirs)
        # Once more, on its own output.
        feature = out
        theirs, fed_back = module(fed_back, embedded)
    known = made.heads.vocabulary(made.params)
    assert (known is None) if tokens is None else np.array_equal(known, tokens)
