"""Small GGUF files, written with the library's own writer the way that llama.cpp's converter writes models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from models.config import TransformerConfig
from models.formats.hf import tensor_names
from models.formats.storage import leaves_by_path
from models.layers import rope_frequencies
from models.transformer import Params

MULTILINGUAL = (
    "The quick brown fox didn't jump; it's 2024, pi is 3.14159.\n\n\tdef f(x):\n        return x ** 2  # Größe\n"
    "Привет, мир! Ελληνικά, 東京は日本の首都です。 한국어, हिन्दी, مرحبا بالعالم. "
    "Zoë's naïve café — “quotes”\n🎉👩‍👩‍👧!   "
)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(config: TransformerConfig, params: Params) -> dict[str, np.ndarray]:
    """Tensors under the names and in the layout of GGUF, float32."""
    architecture = architecture_of(config)
    (arch,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if architecture == "llama" else {}
    found = {}
    hf_names = tensor_names(config)
    for path, leaf in leaves_by_path(params).items():
        module, _, suffix = hf_names[path].rpartition(".")
        host = np.asarray(leaf, np.float32)
        host = host.T if path.endswith("kernel") else host
        part = module.rsplit(".", 1)[-1]
        host = permuted(host, heads[part]) if part in heads else host
        host = host + 1 if config.zero_centred_norm and part.endswith("norm") else host
        name = names.get_name(module)
        assert name, module
        found[f"{name}.{suffix}"] = np.ascontiguousarray(host)
    if config.rope_scaling and config.rope_scaling.kind == "llama3":
        plain = np.asarray(rope_frequencies(config.head_dim, config.rope_theta, None))
        found["rope_freqs.weight"] = plain / rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return found


def architecture_of(config: TransformerConfig) -> str:
    return "llama" if config.family == "mistral" else config.family


def gguf_keys(config: TransformerConfig) -> dict[str, Any]:
    """The metadata of the network, without the architecture's prefix."""
    keys: dict[str, Any] = {
        "context_length": config.max_position,
        "embedding_length": config.width,
        "block_count": config.num_layers,
        "feed_forward_length": config.mlp_width,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    if any(config.windows):
        keys["attention.sliding_window"] = next(window for window in config.windows if window)
    if config.attention_softcap:
        keys |= {"attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.logit_softcap}
    if config.rope_scaling and config.rope_scaling.kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling.factor}
    return keys


def gpt2_tokenizer(vocab_size: int = 40, pre: str = "gpt-2", **more: Any) -> dict[str, Any]:
    """Metadata of a byte-level tokenizer without merges."""
    alphabet = sorted(gguf_alphabet())[: vocab_size - 3]
    pieces = ["<unk>", "<s>", "</s>", *alphabet]
    types = [2, 3, 3, *[1] * len(alphabet)]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {"model": "gpt2", "pre": pre, "tokens": pieces, "token_type": types, "merges": [], **ids, **more}


def gguf_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None = None,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    general: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a file; a tensor named in `kinds` is raw blocks of that type."""
    writer = gguf.GGUFWriter(path, architecture)
    told = {f"{architecture}.{key}": value for key, value in keys.items()}
    told |= {f"tokenizer.ggml.{key}": value for key, value in (tokenizer or gpt2_tokenizer()).items()}
    for key, value in {**told, **(general or {})}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.asarray(tensor), raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
