"""Released weights of networks that fill blocks, as parameters of our heads: DFlash, DFlash2 and JetSpec.

Conventions are those of `models/formats/released_heads.py`. What tensors do not tell, `config.json` does, in its main
part and in `dflash_config`; what it says that our network would compute differently is refused by name. Releases number
the layers of the target whose *output* is read, from 0; ours the layers that this enters, which are one more.
"""

import json
from collections.abc import Mapping
from typing import Any

from models.config import TransformerConfig
from models.errors import UserError
from models.formats.hf_config import config_from_hf
from models.formats.release import LAYER_KEYS, WINDOW_KEYS, Release, refuse_settings
from models.formats.released_heads import ROTARY, Converted, assemble, check_copy
from models.formats.target import Target
from models.heads.dflash import DFlashHeads, Selector
from models.heads.eagle import LayerShape

# Entries of `config.json` that shape a layer; and those of `dflash_config` that this network has a place for.
_LAYER_KEYS = ("attention_bias", "mlp_bias", *LAYER_KEYS, *WINDOW_KEYS)
_BLOCK_KEYS = (
    "block_size",
    "mask_token_id",
    "target_layer_ids",
    "causal",
    "causal_head",
    "selector_rank",
    "selector_top_k",
    "conv_kernel_size",
    "conv_group_size",
)
# What a config says of parts, by a tensor that these have.
_WITH_TENSORS = {
    "selector_rank": "candidate_selector.predecessor_codebook",
    "conv_kernel_size": "layers.0.attention_conv.base_kernel",
}
_CAUSAL = ("dflash_config.causal_head", "dflash_config.causal", "is_causal")


def dflash(release: Release, base: Target) -> Converted:
    """DFlash and DFlash2 (z-lab/dflash): `fc`, `hidden_norm`, `norm` and layers of Qwen3's kind.

    Raises:
      UserError: a tensor is missing, misshapen or unknown; or `config.json` lacks something, contradicts itself or
        asks for what our network does not compute.
    """
    heads = block_heads(release, base)
    params = assemble(release, heads, base, block_names(heads), {})
    compared = check_copy(release, "embed_tokens.weight", base)
    release.finish(ROTARY, "DFlash")
    kind = "dflash2" if heads.convolution or heads.selector else "dflash"
    return Converted(heads, params, kind, {"outputs_of_layers": [k - 1 for k in heads.target_layers]}, compared)


def jetspec(release: Release, base: Target) -> Converted:
    """JetSpec (hao-ai-lab/JetSpec): DFlash's files, with a flag that says that blocks are causal.

    Raises:
      UserError: as `dflash`; or the flag is not set.
    """
    made = dflash(release, base)
    if not made.heads.causal:
        raise UserError(
            f"{release.source}: config.json does not say that blocks are causal ({', '.join(_CAUSAL)}), as JetSpec's "
            "are: --from dflash reads others"
        )
    return Converted(made.heads, made.params, "jetspec", made.detected, made.compared)


def block_heads(release: Release, base: Target, shifted: bool = False) -> DFlashHeads:
    """The shape of the network that fills blocks, from names of tensors and from `config.json`.

    Raises:
      UserError: see `dflash`.
    """
    where, (said, inner) = f"{release.source}: config.json", _said(release)
    draft = _layers(release, base, where, said)
    window = draft.windows[0] if draft.windows else None
    if any(each != window for each in draft.windows):
        raise UserError(f"{where}: layer_types of mixed kinds are not supported, got {json.dumps(said['layer_types'])}")
    sizes = [value for value in (said.get("block_size"), inner.get("block_size")) if value is not None]
    if len(set(map(json.dumps, sizes))) != 1:
        raise UserError(f"{where}: block_size must be said once, or the same twice, got {json.dumps(sizes)}")
    layers = inner.get("target_layer_ids")
    if not isinstance(layers, list) or not layers or any(type(k) is not int or k < 0 for k in layers):
        raise UserError(f"{where}: dflash_config.target_layer_ids must list layers, got {json.dumps(layers)}")
    if said.get("num_target_layers", base.config.num_layers) != base.config.num_layers:
        raise UserError(
            f"{where} says num_target_layers = {json.dumps(said['num_target_layers'])}, but the base {base.path} has "
            f"{base.config.num_layers} layers"
        )
    selector = None
    for key, tensor in _WITH_TENSORS.items():
        if inner.get(key) and tensor not in release:
            raise UserError(f"{where}: dflash_config.{key} = {json.dumps(inner[key])}, but there is no tensor {tensor}")
    if "candidate_selector.predecessor_codebook" in release:
        selector = Selector(_integer(inner, "selector_rank", where), _integer(inner, "selector_top_k", where))
    heads = DFlashHeads(
        target_layers=tuple(k + 1 for k in layers),
        mask_token=_integer(inner, "mask_token_id", where),
        num_layers=draft.num_layers,
        block=_integer({"block_size": sizes[0]}, "block_size", where),
        window=window,
        causal=_causal(said, inner, window, where),
        shifted=shifted,
        convolution="layers.0.attention_conv.base_kernel" in release,
        selector=selector,
        layer=LayerShape(
            num_heads=draft.num_heads,
            num_kv_heads=draft.num_kv_heads,
            head_dim=draft.head_dim,
            mlp_width=draft.mlp_width,
            norm_eps=draft.norm_eps,
            rope_theta=draft.rope_theta,
            rope_scaling=draft.rope_scaling,
        ),
    )
    heads.check(base.config)
    return heads


def block_names(heads: DFlashHeads) -> dict[str, str]:
    """Paths of the network's parameters -> names in a release."""
    names = {"fc/kernel": "fc.weight", "hidden_norm/scale": "hidden_norm.weight", "norm/scale": "norm.weight"}
    for i in range(heads.num_layers):
        ours, theirs = f"layers/{i}", f"layers.{i}"
        names |= {f"{ours}/attention/{p}/kernel": f"{theirs}.self_attn.{p}_proj.weight" for p in ("q", "k", "v", "o")}
        names |= {f"{ours}/attention/{p}_norm/scale": f"{theirs}.self_attn.{p}_norm.weight" for p in ("q", "k")}
        names |= {f"{ours}/mlp/{p}/kernel": f"{theirs}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
        names[f"{ours}/attention_norm/scale"] = f"{theirs}.input_layernorm.weight"
        names[f"{ours}/mlp_norm/scale"] = f"{theirs}.post_attention_layernorm.weight"
        for half in ("attention", "mlp"):
            names[f"{ours}/{half}_conv/base"] = f"{theirs}.{half}_conv.base_kernel"
            names[f"{ours}/{half}_conv/projection/kernel"] = f"{theirs}.{half}_conv.kernel_projection.weight"
    for part in ("predecessor", "successor"):
        names[f"selector/{part}"] = f"candidate_selector.{part}_codebook"
    return {**names, "selector/hidden/kernel": "candidate_selector.hidden_projection.weight"}


def _said(release: Release) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """`config.json` and its `dflash_config`, once nothing in them is known to be computed differently."""
    said, where = release.config, f"{release.source}: config.json"
    if not said:
        raise UserError(f"{release.source} needs its config.json, which says what a block is")
    inner = said.get("dflash_config")
    if not isinstance(inner, Mapping):
        raise UserError(f"{where}: dflash_config must be an object, got {json.dumps(inner)}")
    for key in inner:
        if key not in _BLOCK_KEYS:
            raise UserError(f"{where}: dflash_config.{key} = {json.dumps(inner[key])} is not supported")
    for place, part in (("", said), ("dflash_config.", inner)):
        refuse_settings(part, f"{where}: {place}")
    return said, inner


def _layers(release: Release, base: Target, where: str, said: Mapping[str, Any]) -> TransformerConfig:
    """The layers, as those of a transformer of Qwen3's kind."""
    types, window = said.get("layer_types"), said.get("sliding_window")
    if types is None and (said.get("use_sliding_window") or (window and "use_sliding_window" not in said)):
        raise UserError(
            f"{where} says sliding_window = {json.dumps(window)}, but has no layer_types, which would tell where it is "
            "in force"
        )
    sliding = isinstance(types, list) and "sliding_attention" in types
    if sliding and window is None:
        raise UserError(f"{where}: layer_types asks for sliding_attention, but there is no sliding_window")
    config = base.config
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.width}
    shaping = {key: value for key, value in said.items() if key in _LAYER_KEYS}
    draft = config_from_hf({**sizes, **shaping, "model_type": "qwen3", "use_sliding_window": sliding}, where)
    wanted = {"width": config.width, "vocab_size": config.vocab_size, "activation": "silu", "qkv_bias": False}
    for field, value in wanted.items():
        if getattr(draft, field) != value:
            raise UserError(f"{where} implies {field} = {getattr(draft, field)}, expected {value} for this base")
    count = len(release.numbers("layers.", ".input_layernorm."))
    if count != draft.num_layers:
        raise UserError(f"{where} says num_hidden_layers = {draft.num_layers}, but {release.source} holds {count}")
    return draft


def _causal(said: Mapping[str, Any], inner: Mapping[str, Any], window: int | None, where: str) -> bool:
    """Whether blocks are causal: by any of three names, and where none says it, if there is a window."""
    found = {name: inner.get(name.removeprefix("dflash_config.")) for name in _CAUSAL[:2]}
    found = {name: flag for name, flag in {**found, _CAUSAL[2]: said.get(_CAUSAL[2])}.items() if flag is not None}
    for name, flag in found.items():
        if not isinstance(flag, bool):
            raise UserError(f"{where}: {name} must be true or false, got {json.dumps(flag)}")
    if len(set(found.values())) > 1:
        told = " and ".join(f"{name} = {json.dumps(flag)}" for name, flag in found.items())
        raise UserError(f"{where} contradicts itself: {told}")
    return bool(next(iter(found.values()), window is not None))


def _integer(said: Mapping[str, Any], key: str, where: str) -> int:
    value = said.get(key)
    if type(value) is not int or value < 0:
        raise UserError(f"{where}: {key} must be an integer of at least 0, got {json.dumps(value)}")
    return value
