"""Targets in GGUF, the single-file format of llama.cpp: config, weights and tokenizer, read with the `gguf` library.

    config, params, tokenizer = read_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")

A GGUF file of the architecture `llama` (Mistral's models call themselves so too) holds the rows of its q and k
projections in the order in which llama.cpp rotates them, neighbouring channels together; they are put back. Gemma's
norms are stored as 1 + w. The scaled rotary frequencies of Llama 3.1 and later come as a tensor of divisors, from which
the published formula is recognised.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from models.config import RopeScaling, TransformerConfig
from models.errors import UserError
from models.formats.gguf_metadata import Metadata
from models.formats.gguf_tokenizer import CONTROL, PREFIX, read_gguf_tokenizer
from models.formats.llama2c import halves
from models.formats.storage import leaves_by_path
from models.formats.text_files import refuse_pointer
from models.formats.tokenizer import Tokenizer
from models.layers import rope_frequencies
from models.transformer import Params, param_shapes

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2")
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")

_TENSORS = {
    "embed/embedding": "token_embd.weight",
    "final_norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}
_LAYER_TENSORS = {
    "attention_norm/scale": "attn_norm.weight",
    "attention/q/kernel": "attn_q.weight",
    "attention/k/kernel": "attn_k.weight",
    "attention/v/kernel": "attn_v.weight",
    "attention/o/kernel": "attn_output.weight",
    "attention/q/bias": "attn_q.bias",
    "attention/k/bias": "attn_k.bias",
    "attention/v/bias": "attn_v.bias",
    "attention/o/bias": "attn_output.bias",
    "attention/q_norm/scale": "attn_q_norm.weight",
    "attention/k_norm/scale": "attn_k_norm.weight",
    "post_attention_norm/scale": "post_attention_norm.weight",
    "mlp_norm/scale": "ffn_norm.weight",
    "mlp/gate/kernel": "ffn_gate.weight",
    "mlp/up/kernel": "ffn_up.weight",
    "mlp/down/kernel": "ffn_down.weight",
    "post_mlp_norm/scale": "post_ffw_norm.weight",
}
_ROPE_DIVISORS = "rope_freqs.weight"
_GEMMA2_27B_LAYERS = 46  # The one size whose queries are scaled by width / heads; GGUF does not say so otherwise.


@dataclasses.dataclass(frozen=True)
class _File(Metadata):
    """What a GGUF file holds.

    Attributes:
      tensors: name -> tensor of the `gguf` library, data memory-mapped.
    """

    tensors: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        return self.text("general.architecture")

    def has(self, name: str) -> bool:
        return self._own(name) in self.metadata

    def integer(self, name: str, default: int | None = None) -> int:
        return self.whole(self._own(name), default)

    def number(self, name: str, default: float | None = None) -> float:
        return self.positive(self._own(name), default)

    def _own(self, name: str) -> str:
        return f"{self.architecture}.{name}"


def read_gguf(path: str | Path, dtype: str | None = None) -> tuple[TransformerConfig, Params, Tokenizer]:
    """Reads a GGUF file.

    Args:
      path: the file.
      dtype: of the parameters, by NumPy's name; None is the file's own.

    Returns:
      The config, the parameters with layers as a list, and the tokenizer with its chat template. A file's own dtype is
      that of its matrices if they are float16 or bfloat16 throughout, else float32: quantised ones are expanded.

    Raises:
      UserError: the file is missing, truncated or corrupt; or its architecture, a tensor's type, the tokenizer or a
        feature of the network is not among those that are read; or the `gguf` library is not installed.
    """
    file = _open(Path(path))
    config = _config(file)
    params = _params(file, config, _dtype(file) if dtype is None else np.dtype(dtype))
    return config, params, read_gguf_tokenizer(file.metadata, file.path)


def _open(path: Path) -> _File:
    if not path.is_file():
        raise UserError(f"there is no GGUF file {path}")
    try:
        import gguf
    except ImportError:
        raise UserError("reading GGUF needs the package gguf: python -m pip install gguf") from None
    refuse_pointer(path)
    with path.open("rb") as opened:
        if (found := opened.read(4)) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file: it begins with {found!r}, not b'GGUF'")

    class Reader(gguf.GGUFReader):
        # The library takes what lies beyond the end for empty, and may then read on for as long as a count says.
        def _get(self, offset, dtype, count=1, override_order=None):
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise EOFError(f"it has {len(self.data)} bytes, and at least {end} were announced")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Reader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except EOFError as error:
        raise UserError(f"{path} is truncated or corrupt: {error}") from None
    except Exception as error:  # The library trusts the file, so that damage shows as any exception.
        raise UserError(f"{path} is corrupt or of a newer kind of GGUF: {error}") from None
    file = _File(path, metadata, {tensor.name: tensor for tensor in reader.tensors})
    if reader.byte_order != "I":
        file.refuse("its numbers are in the byte order of another kind of machine, which is not supported")
    if (parts := file.whole("split.count", 1)) > 1:
        file.refuse(f"it is one of {parts} parts: join them first, with llama-gguf-split --merge")
    if file.architecture not in ARCHITECTURES:
        file.refuse(f"the architecture {file.architecture!r} is not supported, only {', '.join(ARCHITECTURES)}")
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in TYPES:
            file.refuse(f"{tensor.name} is stored as {tensor.tensor_type.name}, not as one of {', '.join(TYPES)}")
    return file


def _config(file: _File) -> TransformerConfig:
    family = file.architecture
    if file.integer("expert_count", 0):
        file.refuse("mixtures of experts are not supported")
    num_layers, width = file.integer("block_count"), file.integer("embedding_length")
    num_heads = file.integer("attention.head_count")
    head_dim = file.integer("attention.key_length", width // num_heads if num_heads else 1)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (found := file.integer(name, head_dim)) != head_dim:
            file.refuse(f"{family}.{name} is {found}, but only heads of one size, {head_dim} here, are supported")
    theta = file.number("rope.freq_base", 10_000.0)
    context = file.integer("context_length")
    window = file.integer("attention.sliding_window", 0)  # 0 is none.
    extra: dict[str, Any] = {}
    if family == "gemma2":
        scaled = head_dim if num_layers != _GEMMA2_27B_LAYERS else width // num_heads
        extra = dict(
            embed_scale=True,
            post_norms=True,
            zero_centred_norm=True,
            activation="gelu_tanh",
            attention_softcap=file.number("attn_logit_softcapping", 50.0),
            logit_softcap=file.number("final_logit_softcapping", 30.0),
            query_scale=None if scaled == head_dim else scaled**-0.5,
            windows=tuple(window or 4096 if k % 2 == 0 else None for k in range(num_layers)),
        )
    elif family == "llama" and window:
        extra = dict(family="mistral", windows=(window,) * num_layers)
    elif 0 < window < context:
        file.refuse(f"{family}.attention.sliding_window is {window}, and GGUF does not say of which layers")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        file.refuse("tensor token_embd.weight is missing")
    vocab_size = int(embedding.shape[-1])
    ends = [*(file.token_id(name, vocab_size) for name in ("eos", "eot", "eom")), *_turn_ends(file)]
    try:
        return TransformerConfig(
            **{
                "family": family,
                "vocab_size": vocab_size,
                "width": width,
                "num_layers": num_layers,
                "num_heads": num_heads,
                "num_kv_heads": file.integer("attention.head_count_kv", num_heads),
                "head_dim": head_dim,
                "mlp_width": file.integer("feed_forward_length"),
                "max_position": context,
                "rope_theta": theta,
                "rope_scaling": _rope_scaling(file, head_dim, theta),
                "norm_eps": file.number("attention.layer_norm_rms_epsilon"),
                "tied_embeddings": "output.weight" not in file.tensors,
                "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
                "output_bias": "blk.0.attn_output.bias" in file.tensors,
                "qk_norm": family == "qwen3",
                "bos_id": file.token_id("bos", vocab_size),
                "eos_ids": tuple(dict.fromkeys(end for end in ends if end is not None)),
                **extra,
            }
        )
    except UserError:
        raise
    except ValueError as error:
        file.refuse(str(error))


def _turn_ends(file: _File) -> list[int]:
    """Control tokens that end a turn by their name: many files of chat models, Gemma-2's too, give no id of it."""
    pieces = file.list_of(str, f"{PREFIX}tokens", [])
    kinds = file.list_of(int, f"{PREFIX}token_type", [])
    return [
        i for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=False)) if piece in TURN_ENDS and kind == CONTROL
    ]


def _rope_scaling(file: _File, head_dim: int, theta: float) -> RopeScaling | None:
    scaling = _linear_scaling(file)
    if _ROPE_DIVISORS not in file.tensors:
        return scaling
    if scaling is not None:
        file.refuse(f"it has {_ROPE_DIVISORS} and linear rotary scaling too, and both together are not supported")
    divisors = _expanded(file, _ROPE_DIVISORS)
    plain = np.asarray(rope_frequencies(head_dim, theta, None), np.float64)
    if divisors.shape != plain.shape:
        file.refuse(f"{_ROPE_DIVISORS} has shape {list(divisors.shape)}, expected {list(plain.shape)}")
    if (divisors == 1).all():
        return None
    published = RopeScaling("llama3", float(divisors.max()), 1.0, 4.0, 8192)
    wanted = plain / np.asarray(rope_frequencies(head_dim, theta, published), np.float64)
    if not np.allclose(divisors, wanted, rtol=1e-4):
        file.refuse(f"{_ROPE_DIVISORS} does not follow Llama 3.1's formula, the only one that is supported")
    return published


def _linear_scaling(file: _File) -> RopeScaling | None:
    """As llama.cpp reads it: a factor without a type is linear, and older files call it `rope.scale_linear`."""
    factor = next((name for name in ("rope.scaling.factor", "rope.scale_linear") if file.has(name)), None)
    kind = file.text(f"{file.architecture}.rope.scaling.type", "none" if factor is None else "linear")
    if kind == "none":
        return None
    if kind != "linear":
        file.refuse(f"rotary scaling of type {kind!r} is not supported, only linear and Llama 3.1's")
    by = file.number(factor or "rope.scaling.factor")
    return None if by == 1 else RopeScaling("linear", by)


def _names(config: TransformerConfig) -> dict[str, str]:
    """Every parameter path and the name of its tensor."""
    names = {}
    for path in leaves_by_path(param_shapes(config)):
        if path.startswith("layers/"):
            _, layer, rest = path.split("/", 2)
            names[path] = f"blk.{layer}.{_LAYER_TENSORS[rest]}"
        else:
            names[path] = _TENSORS[path]
    return names


def _params(file: _File, config: TransformerConfig, dtype: np.dtype) -> Params:
    names = _names(config)
    wanted, present = set(names.values()), set(file.tensors) - {_ROPE_DIVISORS}
    for problem, wrong in (("is missing", wanted - present), ("is not part of this architecture", present - wanted)):
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            file.refuse(f"tensor {min(wrong)} {problem}{more}")
    # llama.cpp rotates neighbouring channels in this architecture alone.
    heads = {"q": config.num_heads, "k": config.num_kv_heads} if file.architecture == "llama" else {}
    leaves = []
    shapes = param_shapes(config)
    for path, shape in leaves_by_path(shapes).items():
        host = _expanded(file, names[path])
        expected = shape.shape[::-1] if path.endswith("/kernel") else shape.shape
        if host.shape != expected:
            file.refuse(f"tensor {names[path]} has shape {list(host.shape)}, expected {list(expected)}")
        part = path.split("/")[-2]
        if part in heads:
            host = halves(host, heads[part])
        if config.zero_centred_norm and path.endswith("norm/scale"):
            host = host - 1
        leaves.append(jnp.asarray(np.ascontiguousarray(host.T if path.endswith("/kernel") else host), dtype))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _dtype(file: _File) -> np.dtype:
    kinds = {tensor.tensor_type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    exact = {("F16",): np.dtype(np.float16), ("BF16",): np.dtype(ml_dtypes.bfloat16)}
    return exact.get(tuple(kinds), np.dtype(np.float32))


def _expanded(file: _File, name: str) -> np.ndarray:
    """One tensor in float32, in torch's order: [out, in]."""
    from gguf.quants import dequantize

    tensor = file.tensors[name]
    host = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    if not math.isfinite(float(np.sum(host, dtype=np.float64))):
        file.refuse(f"tensor {name} holds values that are no finite numbers, so the file is corrupt")
    return host.reshape(tuple(int(size) for size in reversed(tensor.shape.tolist())))
