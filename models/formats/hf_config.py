"""`config.json` of Hugging Face <-> `TransformerConfig`.

Reading takes the keys of transformers 4 (`rope_theta`, `rope_scaling`) and of transformers 5 (`rope_parameters`,
`layer_types`), fills in what each family assumes for keys that are absent, and refuses what our forward would compute
differently. Writing uses the keys that every version reads, and proves itself by reading the result back.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import RopeScaling, TransformerConfig
from models.errors import UserError
from models.formats.text_files import read_json, refuse_dangling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "mu": "MuForConditionalGeneration",  # Ours: transformers has none.
}

_LARGEST, _MOST = 2**31 - 1, 10_000  # of a size, and of things that are counted one by one

# What transformers assumes for an absent key. None, there as here, means: derive it, or do without.
_COMMON: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_ABSENT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"max_position_embeddings": 32_768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128},
    "gemma2": {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    "mu": {"hidden_act": "gelu_pytorch_tanh", "attention_bias": True, "mlp_bias": True, "gated_mlp": False},
}

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_HF_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}

# Keys that change the network in a way we do not compute, and the values with which they do not.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1),
    "use_bidirectional_attention": (None, False),
}


def load_config(directory: str | Path) -> TransformerConfig:
    """The config of a Hugging Face directory.

    What ends a text is, as in transformers, for `generation_config.json` to say where there is one, and for
    `config.json` elsewhere; what a family assumes counts only where neither says anything.

    Raises:
      UserError: a file is missing or broken, or asks for something that our forward does not compute.
    """
    path = Path(directory) / "config.json"
    config = config_from_hf(read_json(path), str(path))
    generation = path.with_name("generation_config.json")
    refuse_dangling(generation)
    if generation.exists():
        ends = _ids(read_json(generation).get("eos_token_id"), "eos_token_id", str(generation))
        config = dataclasses.replace(config, eos_ids=ends)
    return config


def config_from_hf(raw: Mapping[str, Any], where: str = "config.json") -> TransformerConfig:
    """The record for one parsed `config.json`.

    Args:
      raw: the JSON object.
      where: the name of the file, for messages.

    Raises:
      UserError: an unknown family, a missing or wrongly typed key, or a feature that our forward does not compute.
    """
    family = _family(raw, where)
    if (quantised := raw.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
        how = f" by {method}" if isinstance(method, str) else ""
        raise UserError(
            f"{where}: its weights are quantised{how} (quantization_config), which is not supported: take the model as "
            "it was before"
        )
    for key, harmless in _HARMLESS.items():
        if raw.get(key) not in harmless and key not in _ABSENT[family]:
            raise UserError(f"{where}: {key} = {json.dumps(raw[key])} is not supported")
    keys = _Keys({**_COMMON, **_ABSENT[family], **raw}, where)
    num_heads, num_layers = (
        keys.integer("num_attention_heads", most=_MOST),
        keys.integer("num_hidden_layers", most=_MOST),
    )
    if num_heads < 1:
        raise UserError(f"{where}: num_attention_heads must be at least 1, got {num_heads}")
    width = keys.integer("hidden_size")
    head_dim = keys.integer("head_dim", optional=True) or width // num_heads
    bias = keys.boolean("attention_bias")
    if bias and family == "mistral":
        raise UserError(f"{where}: attention_bias = true is not supported for mistral")
    if family == "gemma2":
        extra = dict(
            embed_scale=True,
            post_norms=True,
            zero_centred_norm=True,
            attention_softcap=keys.number("attn_logit_softcapping", optional=True),
            logit_softcap=keys.number("final_logit_softcapping", optional=True),
            query_scale=_query_scale(keys.number("query_pre_attn_scalar"), head_dim),
        )
    elif family == "mu":
        extra = dict(
            encoder_layers=keys.integer("num_encoder_layers", most=_MOST),
            gated_mlp=keys.boolean("gated_mlp"),
            mlp_bias=keys.boolean("mlp_bias"),
        )
    else:
        extra = dict(qk_norm=family == "qwen3")
    theta, scaling = _rope(raw, keys, where)
    try:
        return TransformerConfig(
            vocab_size=keys.integer("vocab_size"),
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=keys.integer("num_key_value_heads", optional=True) or num_heads,
            head_dim=head_dim,
            mlp_width=keys.integer("intermediate_size"),
            max_position=keys.integer("max_position_embeddings"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=keys.number("rms_norm_eps"),
            tied_embeddings=keys.boolean("tie_word_embeddings"),
            qkv_bias=bias or family == "qwen2",
            output_bias=bias and family != "qwen2",
            windows=_windows(family, keys, where),
            activation=_activation(keys.get("hidden_activation" if family == "gemma2" else "hidden_act"), where),
            family=family,
            bos_id=keys.integer("bos_token_id", optional=True),
            eos_ids=_ids(keys.get("eos_token_id"), "eos_token_id", where),
            **extra,
        )
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def config_to_hf(config: TransformerConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` object of a config, in keys that transformers 4 and 5 both read.

    Args:
      config: the shape of the network.
      dtype: name of the dtype its weights are stored in.

    Raises:
      UserError: the family's `config.json` has no way to say what `config` says; the message names the fields.
    """
    scaling = config.rope_scaling
    rope = None
    if scaling is not None:
        # Before transformers 4.43 the kind was called `type`.
        rope = {"rope_type": scaling.kind, "type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": _HF_ACTIVATIONS[config.activation],
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_to_hf(config.eos_ids),
        "pad_token_id": None,
        "attention_dropout": 0.0,
        "use_cache": True,
        **_family_keys(config),
    }
    read_back, wanted = _canonical(config_from_hf(out, "config.json")), _canonical(config)
    lost = [f.name for f in dataclasses.fields(config) if getattr(read_back, f.name) != getattr(wanted, f.name)]
    if lost:
        raise UserError(f"a {config.family} config.json cannot express the model's {', '.join(lost)}")
    return out


def eos_to_hf(eos_ids: tuple[int, ...]) -> int | list[int] | None:
    """`eos_token_id` as Hugging Face writes it: nothing, a number, or a list."""
    return eos_ids[0] if len(eos_ids) == 1 else list(eos_ids) or None


class _Keys:
    """Typed access to a config object; every complaint names the key and the file."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values, self._where = values, where

    def get(self, key: str) -> Any:
        if key not in self._values:
            raise UserError(f"{self._where}: the key {key} is missing")
        return self._values[key]

    def _typed(self, key: str, kinds: tuple[type, ...], noun: str, optional: bool = False) -> Any:
        value = self.get(key)
        if (value is None and optional) or type(value) in kinds:
            return value
        raise UserError(f"{self._where}: {key} must be {noun}, got {json.dumps(value)}")

    def integer(self, key: str, optional: bool = False, most: int = _LARGEST) -> Any:
        value = self._typed(key, (int,), "an integer", optional)
        if value is not None and not -most <= value <= most:
            raise UserError(f"{self._where}: {key} = {str(value)[:40]} is beyond any model (at most {most})")
        return value

    def number(self, key: str, optional: bool = False) -> Any:
        value = self._typed(key, (int, float), "a number", optional)
        if value is not None and not abs(value) <= 1e30:
            raise UserError(f"{self._where}: {key} must be a number, got {str(value)[:40]}")
        return value if value is None else float(value)

    def boolean(self, key: str) -> bool:
        return self._typed(key, (bool,), "true or false")


def _family(raw: Mapping[str, Any], where: str) -> str:
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise UserError(f"{where}: model_type {json.dumps(family)} is not one of {', '.join(ARCHITECTURES)}")
    names = raw.get("architectures") or []
    for name in names if isinstance(names, list) else [names]:
        # The earliest Llama conversions wrote LLaMAForCausalLM.
        if str(name).lower() != ARCHITECTURES[family].lower():
            raise UserError(f"{where}: architectures must be [{ARCHITECTURES[family]!r}], got {name!r}")
    return family


_ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor", "factor", "low_freq_factor"} | {
    "high_freq_factor",
    "original_max_position_embeddings",
}


def _rope(raw: Mapping[str, Any], keys: _Keys, where: str) -> tuple[float, RopeScaling | None]:
    name = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    rope = raw.get(name) or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(f"{where}: {name} must be one flat object for all layers, got {json.dumps(rope)}")
    parts = _Keys({"rope_theta": keys.get("rope_theta"), **rope}, f"{where}: {name}")
    theta = parts.number("rope_theta")
    if rope.get("partial_rotary_factor", 1) not in (None, 1):
        raise UserError(f"{where}: {name}.partial_rotary_factor = {rope['partial_rotary_factor']} is not supported")
    if unknown := [key for key, value in rope.items() if key not in _ROPE_KEYS and value is not None]:
        raise UserError(f"{where}: {name}.{unknown[0]} = {json.dumps(rope[unknown[0]])} is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", parts.number("factor"))
    if kind == "llama3":
        low, high = parts.number("low_freq_factor"), parts.number("high_freq_factor")
        original = "original_max_position_embeddings"
        longest = parts.integer(original) if original in rope else keys.integer("max_position_embeddings")
        return theta, RopeScaling("llama3", parts.number("factor"), low, high, longest)
    raise UserError(f"{where}: {name} of type {json.dumps(kind)} is not supported, only default, linear and llama3")


def _windows(family: str, keys: _Keys, where: str) -> tuple[int | None, ...]:
    layers = range(keys.integer("num_hidden_layers"))
    if family in ("llama", "mu") or (family in ("qwen2", "qwen3") and not keys.boolean("use_sliding_window")):
        window = None
    else:
        window = keys.integer("sliding_window", optional=True)
    if window is not None and window < 1:
        raise UserError(f"{where}: sliding_window must be at least 1, or null, got {window}")
    if family == "gemma2":
        sliding = [k % 2 == 0 for k in layers]
    elif family in ("qwen2", "qwen3") and window is not None:
        sliding = [k >= keys.integer("max_window_layers") for k in layers]
    else:
        sliding = [True for _ in layers]
    types = keys.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != len(layers):
            raise UserError(f"{where}: layer_types must list {len(layers)} layers, got {json.dumps(types)}")
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                raise UserError(f"{where}: layer_types: {json.dumps(kind)} is not supported")
        sliding, assumed = [kind == "sliding_attention" for kind in types], sliding
        if family in ("llama", "mistral") and window is not None and sliding != assumed:
            raise UserError(f"{where}: layer_types of mixed kinds are not supported for {family}")
        if window is None and any(sliding):
            raise UserError(f"{where}: layer_types asks for sliding_attention but there is no sliding_window in force")
    if window is None or not any(sliding):
        return ()
    return tuple(window if slides else None for slides in sliding)


def _activation(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UserError(f"{where}: activation {json.dumps(name)} is not supported, only {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _query_scale(scalar: float, head_dim: int) -> float | None:
    return None if scalar == head_dim else scalar**-0.5


def _ids(value: Any, key: str, where: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in ids):
        raise UserError(f"{where}: {key} must be an integer or a list of integers, got {json.dumps(value)}")
    return tuple(dict.fromkeys(ids))


def _family_keys(config: TransformerConfig) -> dict[str, Any]:
    """The keys that only some families know."""
    out: dict[str, Any] = {}
    window = next((w for w in config.windows if w is not None), None)
    if config.family in ("llama", "qwen3", "gemma2", "mu"):
        out["attention_bias"] = config.qkv_bias
    if config.family == "mu":
        out |= {"is_encoder_decoder": True, "num_encoder_layers": config.encoder_layers}
        out |= {"gated_mlp": config.gated_mlp, "mlp_bias": config.mlp_bias}
    elif config.family == "llama":
        out["mlp_bias"] = False
    else:
        out["sliding_window"] = window
    if config.family in ("qwen2", "qwen3"):
        out["use_sliding_window"] = window is not None
        out["max_window_layers"] = next((k for k, w in enumerate(config.windows) if w), config.num_layers)
    if config.family in ("qwen2", "qwen3", "gemma2"):
        kinds = {True: "sliding_attention", False: "full_attention"}
        out["layer_types"] = [kinds[config.window(k) is not None] for k in range(config.num_layers)]
    if config.family == "gemma2":
        scalar = config.head_dim if config.query_scale is None else config.query_scale**-2
        # transformers declares an integer; a scale that came from one returns to it exactly.
        out["query_pre_attn_scalar"] = round(scalar)
        out["hidden_activation"] = _HF_ACTIVATIONS[config.activation]
        out["attn_logit_softcapping"] = config.attention_softcap
        out["final_logit_softcapping"] = config.logit_softcap
    return out


def _canonical(config: TransformerConfig) -> TransformerConfig:
    """One spelling for what can be said in two."""
    return dataclasses.replace(
        config,
        windows=config.windows if any(config.windows) else (),
        query_scale=None if config.query_scale == config.head_dim**-0.5 else config.query_scale,
    )
