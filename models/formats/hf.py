"""Target directories in Hugging Face's format, read and written without torch.

    load_config(directory) -> TransformerConfig            (models/formats/hf_config.py)
    load_params(config, directory, dtype, shardings) -> params, layers as a list
    save_target(directory, config, params, tokenizer)      whole or not at all

One table maps our parameter paths to tensor names; a path that ends in `kernel` is stored transposed, because torch
keeps [out, in]. Tensors are read one at a time from memory-mapped files and go straight to their dtype and sharding.
"""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import TransformerConfig
from models.errors import UserError
from models.formats.hf_config import config_to_hf, eos_to_hf, load_config
from models.formats.storage import (
    leaves_by_path,
    new_directory,
    open_tensors,
    place_tensor,
    read_tensor,
    refuse_non_finite,
    save_tensors,
    write_json,
)
from models.formats.tokenizer import Tokenizer
from models.formats.weights import INDEX, Stored
from models.transformer import Params, param_shapes, split_projections, unstack_layers

__all__ = ["load_config", "load_params", "save_target", "tensor_names"]

_TENSORS = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attention_norm/scale": "input_layernorm.weight",
    "attention/q/kernel": "self_attn.q_proj.weight",
    "attention/k/kernel": "self_attn.k_proj.weight",
    "attention/v/kernel": "self_attn.v_proj.weight",
    "attention/o/kernel": "self_attn.o_proj.weight",
    "attention/q/bias": "self_attn.q_proj.bias",
    "attention/k/bias": "self_attn.k_proj.bias",
    "attention/v/bias": "self_attn.v_proj.bias",
    "attention/o/bias": "self_attn.o_proj.bias",
    "attention/q_norm/scale": "self_attn.q_norm.weight",
    "attention/k_norm/scale": "self_attn.k_norm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
    "mlp/gate/bias": "mlp.gate_proj.bias",
    "mlp/up/bias": "mlp.up_proj.bias",
    "mlp/down/bias": "mlp.down_proj.bias",
    "cross_attention_norm/scale": "cross_attention_layernorm.weight",
    **{
        f"cross_attention/{ours}/{kind}": f"cross_attn.{ours}_proj.{theirs}"
        for ours in "qkvo"
        for kind, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
}
# With norms on both sides of each half (Gemma-2) one name changes its meaning.
_POST_NORM_TENSORS = {
    "post_attention_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "post_mlp_norm/scale": "post_feedforward_layernorm.weight",
}

_EMBEDDING, _HEAD = _TENSORS["embed/embedding"], _TENSORS["head/kernel"]

# Buffers that old exports carry along; they follow from the config.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?(rotary_emb\.inv_freq|bias|masked_bias)")
# What quantised weights have in the place of `weight`, or beside it.
_QUANTISED = re.compile(r".*\.(qweight|qzeros|scales|g_idx|weight_scale(_inv)?|weight_packed|SCB|weight\.absmax)")


def tensor_names(config: TransformerConfig) -> dict[str, str]:
    """Every parameter path (`layers/0/attention/q/kernel`) and the name of its tensor, in the order of the stack."""
    per_layer = {**_LAYER_TENSORS, **(_POST_NORM_TENSORS if config.post_norms else {})}
    names = {}
    for path in leaves_by_path(param_shapes(config)):
        part = path.removeprefix("encoder/")
        within = "model." if part == path else "model.encoder."
        if part.startswith("layers/"):
            _, layer, rest = part.split("/", 2)
            names[path] = f"{within}layers.{layer}.{per_layer[rest]}"
        else:
            names[path] = _TENSORS[part].replace("model.", within)
    return names


def load_params(config: TransformerConfig, directory: str | Path, dtype=jnp.float32, shardings=None) -> Params:
    """Reads the weights of a Hugging Face directory.

    Args:
      config: the shape of the network; every tensor must fit it.
      directory: holds safetensors or torch's files, whole or in shards (`models/formats/weights.py` has their order).
      dtype: of the returned parameters, whatever the files hold.
      shardings: tree of `NamedSharding`s shaped like the parameters, or None for the default device.

    Returns:
      Parameters in the decode layout (a list of layers).

    Raises:
      UserError: a file is missing or damaged, or a tensor is unknown, missing, misshapen, not floating point, or holds
        NaN or infinity.
    """
    directory = Path(directory)
    names = tensor_names(config)
    shapes = param_shapes(config, dtype)
    places = leaves_by_path(shardings) if shardings is not None else dict.fromkeys(names)
    with contextlib.ExitStack() as stack:
        files = open_tensors(directory, stack)
        if config.tied_embeddings and _HEAD in files:
            # Some exports name what is tied after the head alone, and some store it twice.
            files.setdefault(_EMBEDDING, files[_HEAD])
            _check_tied(files, directory)
        _check_names(config, directory, set(files), set(names.values()))
        leaves = []
        for path, shape in leaves_by_path(shapes).items():
            host = read_tensor(files[names[path]], names[path], directory, transpose=path.endswith("/kernel"))
            if host.shape != shape.shape:
                found, wanted = (list(s[::-1] if path.endswith("/kernel") else s) for s in (host.shape, shape.shape))
                raise UserError(f"{directory}: tensor {names[path]} has shape {found}, config.json implies {wanted}")
            refuse_non_finite(host, names[path], directory)
            leaves.append(place_tensor(np.asarray(host, dtype=shape.dtype, order="C"), places[path]))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def save_target(
    directory: str | Path,
    config: TransformerConfig,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes a directory that `load_target` and transformers both load; reading it back is bit-equal.

    Encoder-decoders (family `mu`) are the exception: transformers has no class for them.

    Args:
      directory: to be made. It appears only when it is complete.
      config: the shape of the network; its family decides which `config.json` is written.
      params: parameters, layers as a list or stacked, all addressable from this process, stored in their own dtypes.
      tokenizer: saved beside the weights when given.
      overwrite: replace a target directory that is already there.
      max_shard_bytes: weights beyond this many bytes go to several files with an index.
      provenance: what it was made from, kept in `config.json`, where nothing reads it.

    Raises:
      UserError: the directory exists, the family cannot express the config, or `params` does not fit it.
      OSError: the disk is full or not writable; nothing is left behind.
    """
    if not isinstance(params["layers"], list):
        params = unstack_layers(params)
    params = split_projections(config, params)
    leaves = leaves_by_path(params)
    _check_params(config, leaves)
    hf_config = config_to_hf(config, str(leaves["embed/embedding"].dtype))
    generation = {"bos_token_id": config.bos_id, "eos_token_id": eos_to_hf(config.eos_ids)}
    with new_directory(directory, "config.json", overwrite) as partial:
        _write_weights(partial, tensor_names(config), leaves, max_shard_bytes)
        write_json(
            partial / "config.json", hf_config if provenance is None else {**hf_config, "provenance": provenance}
        )
        write_json(partial / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
        if tokenizer is not None:
            tokenizer.save(partial)


def _check_names(config: TransformerConfig, directory: Path, present: set[str], wanted: set[str]) -> None:
    if quantised := sorted(name for name in present - wanted if _QUANTISED.fullmatch(name)):
        raise UserError(
            f"{directory}: tensor {quantised[0]} belongs to quantised weights (GPTQ, AWQ or the like), which are not "
            "supported: take the model as it was before"
        )
    tied_head = {_HEAD} if config.tied_embeddings else set()
    unknown = sorted(name for name in present - wanted - tied_head if not _IGNORED.fullmatch(name))
    missing = sorted(wanted - present)
    for kind, names in (("is missing", missing), ("is unknown to its config.json", unknown)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            if names == missing == [_HEAD]:
                more = ": config.json says that it is not tied to the embedding (tie_word_embeddings)"
            raise UserError(f"{directory}: tensor {names[0]} {kind}{more}")


def _check_tied(files: Mapping[str, Stored], directory: Path) -> None:
    """A tied head that is stored again is harmless only if it says the same."""
    if files[_HEAD] is files[_EMBEDDING]:
        return
    head, table = (read_tensor(files[name], name, directory, transpose=False) for name in (_HEAD, _EMBEDDING))
    # NaN has a sentence of its own.
    if not np.array_equal(head, table) and not np.isnan(np.sum(head, dtype=np.float64)):
        raise UserError(f"{directory}: config.json ties the embeddings, but {_HEAD} differs from {_EMBEDDING}")


def _check_params(config: TransformerConfig, leaves: Mapping[str, Any]) -> None:
    shapes = leaves_by_path(param_shapes(config))
    if wrong := sorted(set(shapes) ^ set(leaves)):
        complaint = "is missing" if wrong[0] in shapes else "does not belong to this config"
        raise UserError(f"params: {wrong[0]} {complaint}")
    for path, shape in shapes.items():
        if leaves[path].shape != shape.shape:
            raise UserError(f"params: {path} has shape {list(leaves[path].shape)}, expected {list(shape.shape)}")


def _write_weights(directory: Path, names: dict[str, str], leaves: dict[str, Any], max_shard_bytes: int) -> None:
    shards: list[list[str]] = []
    room = 0
    for path in names:
        room -= leaves[path].nbytes
        if not shards or room < 0:
            shards.append([])
            room = max_shard_bytes - leaves[path].nbytes
        shards[-1].append(path)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for path in shard:
            host = np.asarray(leaves[path])
            tensors[names[path]] = np.ascontiguousarray(host.T if path.endswith("/kernel") else host)
        save_tensors(directory / name, tensors)
        weight_map.update(dict.fromkeys(tensors, name))
    if len(shards) > 1:
        total = sum(leaf.nbytes for leaf in leaves.values())
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
