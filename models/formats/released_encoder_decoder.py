"""Released encoder-decoders of "Return of the Encoder" (microsoft/encoder-decoder-slm) as targets.

A release is one file that torch saved: `model_state_dict`, and in what its trainer writes `model_config` beside it; the
published file may lack that, and then has the published shape. Every tensor is taken once, after its shape was checked.

Query head h of the release reads key head h mod K (its keys are tiled), ours h // (N / K): queries' columns and the
output's rows are put in our order, which changes no result. Its attention masks hide every token with the id 0, ours
what lies behind the text's end; the release's tokenizer writes no 0.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.config import TransformerConfig
from models.errors import UserError
from models.formats.release import Release, digest
from models.formats.storage import leaves_by_path
from models.formats.torch_files import read_torch_file
from models.formats.weights import as_stored
from models.transformer import Params, param_shapes

# What the published model has, in its own names; `dropout` is of training alone.
_PUBLISHED = {
    "n_encoder_layer": 20,
    "n_decoder_layer": 10,
    "n_embd": 1024,
    "qkv_embd": 384,
    "is_interleaved": False,
    "hidden_dim": 4096,
    "n_head": 6,
    "n_kv_head": 3,
    "block_size": 1024,
    "dropout": 0.1,
    "rope_theta": 10000,
    "rope_factor": 1.0,
    "pad_token_id": 0,
    "vocab_size": 32128,
}
_BOS = 1  # What its decoder begins with, whatever the tokenizer calls its first token.

_ATTENTION = {"q": "q_linear", "k": "k_linear", "v": "v_linear", "o": "out_linear"}
_MODULES = {
    "embed/embedding": "transformer.wte.weight",
    "final_norm/scale": "transformer.ln_f.weight",
    "encoder/final_norm/scale": "transformer.ln_e.weight",
}


@dataclasses.dataclass(frozen=True)
class Imported:
    """A released encoder-decoder.

    Attributes:
      config: its shape.
      params: its parameters on the host, layers as lists, every tensor in the dtype in which it was released.
      provenance: what it was made from.
    """

    config: TransformerConfig
    params: Params
    provenance: dict[str, Any]


def encoder_decoder(source: Path, eos_ids: tuple[int, ...]) -> Imported:
    """Reads a released file.

    Args:
      source: a `.pt` file as the release's trainer saves it.
      eos_ids: what ends a text, for the release's tokenizer (Phi-3.5-mini's for the published one) to say.

    Raises:
      UserError: a tensor is missing, misshapen, unknown or not finite, or the file asks for what we do not compute.
    """
    content = read_torch_file(source)
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{source} is no released encoder-decoder: it has no entry 'model_state_dict'")
    facts = _facts(content.get("model_config"), source)
    release = Release(source, as_stored(state, source), {}, {source.name: digest(source)})
    config = _config(facts, eos_ids, source)
    shapes = param_shapes(config)
    leaves = [_take(release, path, shape.shape, config, facts) for path, shape in leaves_by_path(shapes).items()]
    params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    head = release.take("lm_head.weight", (config.vocab_size, config.width), "model_config")
    if not np.array_equal(head, params["embed"]["embedding"]):
        raise UserError(f"{source}: lm_head.weight differs from transformer.wte.weight, which the release ties to it")
    release.finish("", "the release")
    provenance = {"format": "microsoft/encoder-decoder-slm", "files": release.digests, "detected": facts}
    return Imported(config, params, provenance)


def _facts(given: Any, source: Path) -> dict[str, Any]:
    if given is None:
        return dict(_PUBLISHED)
    if not isinstance(given, Mapping):
        raise UserError(f"{source}: its entry 'model_config' is no dict")
    for name, value in given.items():
        if name not in _PUBLISHED:
            raise UserError(f"{source}: model_config has the key {str(name)[:60]!r}, which the release does not know")
        kind = type(_PUBLISHED[name])
        if type(value) is not kind and not (kind in (int, float) and type(value) in (int, float)):
            raise UserError(
                f"{source}: model_config.{name} must be of type {kind.__name__}, got {json.dumps(value)[:60]}"
            )
    if missing := sorted(set(_PUBLISHED) - set(given)):
        raise UserError(f"{source}: model_config lacks the key {missing[0]!r}")
    if given["rope_factor"] > 1:
        raise UserError(
            f"{source}: model_config.rope_factor = {given['rope_factor']} stretches RoPE by the length of each text, "
            "which is not supported, only 1"
        )
    if given["n_head"] < 1 or given["qkv_embd"] % given["n_head"]:
        raise UserError(
            f"{source}: model_config.qkv_embd ({given['qkv_embd']}) must be a multiple of n_head ({given['n_head']})"
        )
    return dict(given)


def _config(facts: Mapping[str, Any], eos_ids: tuple[int, ...], source: Path) -> TransformerConfig:
    try:
        return TransformerConfig(
            vocab_size=facts["vocab_size"],
            width=facts["n_embd"],
            num_layers=facts["n_decoder_layer"],
            encoder_layers=facts["n_encoder_layer"],
            num_heads=facts["n_head"],
            num_kv_heads=facts["n_kv_head"],
            head_dim=facts["qkv_embd"] // facts["n_head"],
            mlp_width=facts["hidden_dim"],
            max_position=facts["block_size"],
            rope_theta=float(facts["rope_theta"]),
            norm_eps=1e-6,
            tied_embeddings=True,
            qkv_bias=True,
            output_bias=True,
            activation="gelu_tanh",
            gated_mlp=False,
            mlp_bias=True,
            family="mu",
            bos_id=_BOS,
            eos_ids=eos_ids,
        )
    except ValueError as error:
        raise UserError(f"{source}: model_config: {error}") from None


def _take(release: Release, path: str, shape: tuple[int, ...], config: TransformerConfig, facts) -> np.ndarray:
    """The parameter at one of our paths."""
    kernel = path.endswith("/kernel")
    name = _MODULES.get(path) or _in_layer(path)
    found = release.take(name, shape[::-1] if kernel else shape, "model_config")
    found = found.T if kernel else found
    if "attention/q/" in path and not facts["is_interleaved"]:
        return np.ascontiguousarray(found[..., grouped(config)])
    if path.endswith("attention/o/kernel") and not facts["is_interleaved"]:
        return np.ascontiguousarray(found[grouped(config)])
    return np.ascontiguousarray(found)


def _in_layer(path: str) -> str:
    """`layers/0/cross_attention/q/kernel` -> `transformer.h.0.cross_attn.q_linear.weight`."""
    encoder = path.startswith("encoder/")
    _, number, module, *rest = path.removeprefix("encoder/").split("/")
    norms = {"attention_norm": "ln1", "mlp_norm": "ln2"}
    if not encoder:
        norms = {"attention_norm": "ln1", "cross_attention_norm": "ln2", "mlp_norm": "ln3"}
    within = f"transformer.{'e' if encoder else 'h'}.{number}."
    if module in norms:
        return f"{within}{norms[module]}.weight"
    part, kind = rest
    kind = "weight" if kind == "kernel" else "bias"
    if module == "mlp":
        return f"{within}mlp.{ {'up': 'fc1', 'down': 'fc2'}[part] }.{kind}"
    attention = "attn" if encoder else {"attention": "causal_attn", "cross_attention": "cross_attn"}[module]
    return f"{within}{attention}.{_ATTENTION[part]}.{kind}"


def grouped(config: TransformerConfig) -> np.ndarray:
    """For each of our queries' channels its place in the release: head k * G + g of ours is its g * K + k."""
    heads = np.arange(config.num_heads).reshape(-1, config.num_kv_heads).T.reshape(-1)
    return (heads[:, None] * config.head_dim + np.arange(config.head_dim)).reshape(-1)
