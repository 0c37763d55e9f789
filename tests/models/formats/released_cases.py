"""Released drafters in miniature: the key patterns and shapes of the real files, random values, torch's layout."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from models import transformer
from models.config import TransformerConfig
from models.formats.storage import leaves_by_path
from models.formats.target import Target
from tests.models.formats.torch_archives import write_torch
from tests.noise import drawn

CONFIG = TransformerConfig(
    vocab_size=40, width=16, num_layers=7, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24, rope_theta=500.0
)
V, H, F, KV = CONFIG.vocab_size, CONFIG.width, CONFIG.mlp_width, CONFIG.num_kv_heads * CONFIG.head_dim

Tensors = dict[str, np.ndarray]


def random_base(seed: int = 0, config: TransformerConfig = CONFIG) -> Target:
    """A base for the drafters here."""
    params = jax.jit(transformer.for_decoding)(drawn(transformer.param_shapes(config), 0.1, seed))
    return Target(config, params, path=Path("base"))


def embedding(base: Target, dtype=np.float16) -> np.ndarray:
    """The copy of the base's embedding that some releases carry, rounded as they are."""
    return np.asarray(base.params["embed"]["embedding"]).astype(dtype)


def draw(shapes: dict[str, tuple[int, ...]], dtype=np.float16, seed: int = 0) -> Tensors:
    """Random tensors of those shapes."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.3, shape).astype(dtype) for name, shape in shapes.items()}


def medusa(heads: int = 3, layers: int = 1, prefix: str = "", own: bool = True) -> Tensors:
    """v0.1, with `medusa_head.` v1.0, and without vocabulary maps of their own the legacy format."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(heads):
        for l in range(layers):
            shapes |= {f"{prefix}{i}.{l}.linear.weight": (H, H), f"{prefix}{i}.{l}.linear.bias": (H,)}
        shapes |= {f"{prefix}{i}.{layers}.weight": (V, H)} if own else {}
    return draw(shapes)


def llama_layer(place: str, inputs: int = H) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer but for its norms."""
    attention = {"q_proj": (H, inputs), "k_proj": (KV, inputs), "v_proj": (KV, inputs), "o_proj": (H, H)}
    mlp = {"gate_proj": (F, H), "up_proj": (F, H), "down_proj": (H, F)}
    return {f"{place}self_attn.{name}.weight": shape for name, shape in attention.items()} | {
        f"{place}mlp.{name}.weight": shape for name, shape in mlp.items()
    }


def hydra(base: Target, heads: int = 3, layers: int = 3, plus: bool = True, dropout: bool = True) -> Tensors:
    """Hydra or, with `plus`, Hydra++ as released, whose later blocks are one block under several names."""
    shapes: dict[str, tuple[int, ...]] = {}
    places = [2 * l + 1 if dropout else l for l in range(layers)]
    for i in range(heads):
        first = f"hydra_mlp.{i}.{places[0]}"
        for part in ("linear", "res_connection"):
            shapes |= {f"{first}.{part}.weight": (H, (i + 2) * H), f"{first}.{part}.bias": (H,)}
        for j in places[1:2]:
            shapes |= {f"hydra_mlp.{i}.{j}.linear.weight": (H, H), f"hydra_mlp.{i}.{j}.linear.bias": (H,)}
        vocab = f"hydra_lm_head.{i}.1" if dropout else f"hydra_lm_head.{i}"
        shapes |= {f"{vocab}.weight": (V, H), f"{vocab}.bias": (V,)}
    if plus:
        at = "prefix_embeding_layer."
        shapes |= llama_layer(f"{at}layers.0.") | {f"{at}norm.weight": (H,), f"{at}embed_tokens.weight": (V, H)}
        shapes |= {f"{at}layers.0.{name}.weight": (H,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    tensors = draw(shapes) | {"input_embed_fn.weight": embedding(base)}
    for i in range(heads):
        for j in places[2:]:
            for part in ("weight", "bias"):
                tensors[f"hydra_mlp.{i}.{j}.linear.{part}"] = tensors[f"hydra_mlp.{i}.{places[1]}.linear.{part}"]
    return tensors


def eagle(base: Target, bias: bool = True) -> Tensors:
    """EAGLE-1 and EAGLE-2."""
    shapes = {"fc.weight": (H, 2 * H), **({"fc.bias": (H,)} if bias else {}), **llama_layer("layers.0.")}
    shapes |= {"layers.0.post_attention_layernorm.weight": (H,)}
    return draw(shapes) | {"embed_tokens.weight": embedding(base)}


def eagle3(draft_tokens: list[int] | None) -> Tensors:
    """EAGLE-3; without `draft_tokens` its vocabulary is the base's."""
    shapes = {"fc.weight": (H, 3 * H), **llama_layer("midlayer.", 2 * H), "norm.weight": (H,)}
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    shapes |= {f"midlayer.{name}.weight": (H,) for name in norms}
    shapes |= {"lm_head.weight": (V if draft_tokens is None else len(draft_tokens), H)}
    if draft_tokens is None:
        return draw(shapes)
    offsets = np.array(draft_tokens, np.int64) - np.arange(len(draft_tokens))
    return draw(shapes) | {"d2t": offsets, "t2d": np.isin(np.arange(V), draft_tokens)}


def eagle31(place: str = "layers.0.", norms: str = "fc_norm") -> Tensors:
    """EAGLE-3.1, its layer named `place`, with a norm for each feature, for all of them (`norm_before_fc`) or none."""
    renamed = {name.replace("midlayer.", place): value for name, value in eagle3(DRAFT_TOKENS).items()}
    shapes = {
        "fc_norm": {f"fc_norm.{i}.weight": (H,) for i in range(3)},
        "norm_before_fc": {"input_norm.weight": (3 * H,)},
    }
    return renamed | draw(shapes.get(norms, {}))


def p_eagle(base: Target, layers: int = 3, token: int = 5, own: bool = False) -> Tensors:
    """P-EAGLE, whose embedding is the base's but for the mask token's row, or with `own` another."""
    shapes: dict[str, tuple[int, ...]] = {"mask_hidden": (1, 1, 3 * H)}
    for i in range(1, layers):
        shapes |= llama_layer(f"layers.{i}.")
        shapes |= {f"layers.{i}.{name}.weight": (H,) for name in ("input_layernorm", "post_attention_layernorm")}
    table = np.array(embedding(base))
    table[slice(None) if own else token] += np.ones((), table.dtype)
    return eagle31(norms="") | draw(shapes, seed=1) | {"embed_tokens.weight": table}


DRAFT_TOKENS = [0, 1, 3, 4, 7, 12, 13, 14, 20, 21, 30, 39]

EAGLE_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": H,
    "intermediate_size": F,
    "model_type": "llama",
    "num_attention_heads": CONFIG.num_heads,
    "num_key_value_heads": CONFIG.num_kv_heads,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500.0,
    "vocab_size": V,
}

# Entries that change what a layer computes, which no importer may skip.
UNKNOWN_SETTINGS: list[dict[str, Any]] = [
    {"partial_rotary_factor": 0.5},
    {"rope_interleaved": True},
    {"rope_local_base_freq": 10_000.0},
    {"attention_window_left": 3},
    {"attention_window_size": 4},
    {"output_multiplier": 0.5},
]


def write(path: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    """A release of one file, in the format of its suffix, and `config.json` beside it; returns the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    else:
        write_torch(path, tensors)
    if config is not None:
        path.with_name("config.json").write_text(json.dumps(config))
    return path


def write_shards(directory: Path, tensors: Tensors, stem: str = "pytorch_model", suffix: str = "bin") -> Path:
    """A release of two files with an index; returns its directory."""
    names, weight_map = list(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        name = f"{stem}-0000{number}-of-00002.{suffix}"
        write(directory / name, {key: tensors[key] for key in part})
        weight_map |= dict.fromkeys(part, name)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def bfloat16(tensors: Tensors) -> Tensors:
    """The same, rounded."""
    return {name: value.astype(jnp.bfloat16) if value.dtype == np.float16 else value for name, value in tensors.items()}


def check_places(params: transformer.Params, tensors: Tensors, names: dict[str, str], **given: np.ndarray) -> None:
    """Every parameter holds the tensor that `names` has for its path, bit for bit, transposed where it is a kernel."""
    leaves = leaves_by_path(params)
    assert set(leaves) == set(names) | set(given)
    for path, leaf in leaves.items():
        expected = given[path] if path in given else tensors[names[path]]
        expected = expected.T if path.endswith("kernel") and path in names else expected
        assert leaf.dtype == expected.dtype, path
        np.testing.assert_array_equal(leaf, expected, err_msg=path)


LAYER = {
    "attention/q/kernel": "self_attn.q_proj.weight",
    "attention/k/kernel": "self_attn.k_proj.weight",
    "attention/v/kernel": "self_attn.v_proj.weight",
    "attention/o/kernel": "self_attn.o_proj.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
}
