"""Released weights of EAGLE-1 to EAGLE-3.1 and of P-EAGLE as parameters of our heads, as several programs write them.

As `models/formats/released_heads.py`, whose conventions hold here; what a layer is like, `config.json` says.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from models.config import TransformerConfig
from models.errors import UserError
from models.formats.hf_config import config_from_hf
from models.formats.release import LAYER_KEYS, Release, refuse_settings
from models.formats.released_heads import ROTARY, Converted, assemble, check_copy, layer_names, same
from models.formats.target import Target
from models.heads.eagle import EAGLE_31, Eagle3Heads, EagleHeads, LayerShape, eagle3_layers
from models.heads.p_eagle import PEagleHeads
from models.linear import whole_table


def eagle(release: Release, base: Target) -> Converted:
    """The draft network of EAGLE-1 and EAGLE-2 (SafeAILab/EAGLE), which share their files.

    The one layer is of the shape that `config.json` gives it, where there is one: its RoPE and epsilon, and in some
    releases its heads, are not the base's.

    Raises:
      UserError: a tensor is missing, misshapen, unknown, or differs from the base's; or does not fit `config.json`.
    """
    layer, rope = draft_layer(release, base, "layers.0.")
    bias = "fc.bias" in release
    if release.config.get("bias", bias) != bias:
        raise UserError(f"{release.source}: config.json says bias = {json.dumps(not bias)}, which fc does not fit")
    names = {"fc/kernel": "fc.weight", "fc/bias": "fc.bias"}
    names |= {f"layer/{path}": f"layers.0.{name}" for path, name in layer_names(base, layer).items()}
    heads = EagleHeads(bias, layer)
    params = assemble(release, heads, base, names, {})
    compared = check_copy(release, "embed_tokens.weight", base)
    release.finish(ROTARY, "EAGLE")
    return Converted(heads, params, "eagle", {"fc_bias": bias, **rope}, compared)


def eagle3(release: Release, base: Target, layers: Sequence[int] | None = None) -> Converted:
    """The draft network of EAGLE-3 (SafeAILab/EAGLE).

    Args:
      release: its tensors.
      base: the target it was trained on.
      layers: the three layers of the base whose incoming residual stream it reads, low to high, if they are not those
        of the original release.

    Raises:
      UserError: a tensor is missing, misshapen, unknown, or differs from the base's; or does not fit `config.json`, or
        that names the layers it reads although `layers` does not, or has a switch of EAGLE-3.1.
    """
    said = _switches(release)
    for key in EAGLE_31:
        if said.get(key):
            raise UserError(
                f"{release.source}: config.json says {key} = true, which EAGLE-3 has not: --from eagle31 reads it"
            )
    return _eagle3(release, base, "midlayer.", layers, {}, "eagle3")


def eagle31(
    release: Release, base: Target, layers: Sequence[int] | None = None, norm_output: str | None = None
) -> Converted:
    """The draft network of EAGLE-3.1, EAGLE-3 with further norms, as speculators and SpecForge write it.

    Args:
      release: its tensors, of which those of the layer are named `midlayer` or `layers.0`.
      base: the target it was trained on.
      layers: as for `eagle3`.
      norm_output: what the switch of this name means where the release does not tell: `fed_back`, that the normed
        output goes to the head and into the next step, or `head`, that the head reads the normed output and, where the
        switch is off, the output as it is.

    Raises:
      UserError: as for `eagle3`; or switches contradict each other or the tensors, or what `norm_output` means is not
        known.
    """
    said, switches = _norms(release)
    switches |= _norm_output(release, said, norm_output)
    places = [place for place in ("midlayer.", "layers.0.") if any(name.startswith(place) for name in release.names)]
    if len(places) != 1:
        found = "both" if places else "neither"
        raise UserError(f"{release.source} must name its layer midlayer or layers.0, and has {found}")
    return _eagle3(release, base, places[0], layers, switches, "eagle3.1")


def _eagle3(
    release: Release,
    base: Target,
    place: str,
    layers: Sequence[int] | None,
    switches: Mapping[str, bool],
    kind: str,
) -> Converted:
    """A network whose layer is at `place`, with these switches."""
    layer, rope = draft_layer(release, base, place)
    low, middle, high = _read_layers(release, base, layers)
    given = _draft_vocabulary(release, base)
    heads = Eagle3Heads(low, middle, high, len(given["draft_vocab"]) if given else 0, layer, **switches)
    heads.check(base.config)
    params = assemble(release, heads, base, _names(base, place, layer), given)
    compared = check_copy(release, "embed_tokens.weight", base)
    release.finish(ROTARY, "EAGLE-3" if kind == "eagle3" else "EAGLE-3.1")
    size = heads.vocab_size or base.config.vocab_size
    detected = {"draft_vocabulary": size, "layers": [low, middle, high], **rope}
    return Converted(heads, params, kind, detected, compared)


def _names(base: Target, place: str, layer: LayerShape | None) -> dict[str, str]:
    """Paths of our parameters -> names in a release of EAGLE-3 and its descendants."""
    names = {
        "fc/kernel": "fc.weight",
        "fc_norm/scale": "input_norm.weight",
        "input_norm/scale": f"{place}input_layernorm.weight",
        "hidden_norm/scale": f"{place}hidden_norm.weight",
        "norm/scale": "norm.weight",
        "vocab/kernel": "lm_head.weight",
    }
    names |= {f"fc_norm/{i}/scale": f"fc_norm.{i}.weight" for i in range(3)}
    return names | {f"layer/{path}": f"{place}{name}" for path, name in layer_names(base, layer).items()}


def p_eagle(release: Release, base: Target, layers: Sequence[int] | None = None) -> Converted:
    """The draft network of P-EAGLE, as speculators and SpecForge write it.

    Its embedding is compared with the base's: where only the mask token's row differs, or the release has none, ours
    reads the base's.

    Args:
      release: its tensors.
      base: the target it was trained on.
      layers: as for `eagle3`.

    Raises:
      UserError: as for `eagle3`; or `config.json` names no mask token, or norms that the tensors do not fit.
    """
    said, switches = _norms(release)
    if said.get("norm_output") is False and "speculators_config" not in release.config:
        raise UserError(
            f"{release.source}: config.json says norm_output = false, which may mean a head without a norm: this is "
            "not supported"
        )
    numbers = release.numbers("layers.", ".")
    if not numbers or numbers[-1] >= len(numbers):
        raise UserError(
            f"{release.source}: layers must be named layers.0, layers.1, ..., there are {numbers or 'none'}"
        )
    layer, rope = draft_layer(release, base, "layers.0.", len(numbers))
    low, middle, high = _read_layers(release, base, layers)
    given = _draft_vocabulary(release, base)
    size = len(given["draft_vocab"]) if given else 0
    masks, compared = _masks(release, base)
    own = "embed/embedding" in masks
    heads = PEagleHeads(low, middle, high, size, layer, **switches, num_layers=len(numbers), own_embedding=own)
    heads.check(base.config)
    names, further = _names(base, "layers.0.", layer), layer_names(base, layer).items()
    for i in numbers[1:]:
        names |= {f"blocks/{i - 1}/{path}": f"layers.{i}.{name}" for path, name in further}
    params = assemble(release, heads, base, names, given | masks)
    release.finish(ROTARY, "P-EAGLE")
    detected = {
        "draft_vocabulary": size or base.config.vocab_size,
        "layers": [low, middle, high],
        "mask_token": _mask_token(release, base),
        **rope,
    }
    return Converted(heads, params, "p_eagle", detected, compared)


def _masks(release: Release, base: Target) -> tuple[dict[str, np.ndarray], bool]:
    """What masks read, the embedding where it is not the base's, and whether it was compared with that."""
    width, table = base.config.width, np.asarray(whole_table(base.params["embed"]["embedding"]))
    hidden = release.take("mask_hidden", (1, 1, 3 * width), f"a base of width {width}")
    given, token = {"mask_hidden": hidden.reshape(-1)}, _mask_token(release, base)
    if "embed_tokens.weight" not in release:
        return given | {"mask_embedding": table[token]}, False
    because = f"a base of width {width} and {base.config.vocab_size} tokens"
    own = release.take("embed_tokens.weight", table.shape, because)
    given |= {"mask_embedding": own[token]}
    others = np.arange(len(table)) != token
    if same(own[others], table[others]):
        return given, True
    return given | {"embed/embedding": own}, False


def _mask_token(release: Release, base: Target) -> int:
    """The token whose embedding masks have, which programs name in three ways."""
    said = {
        key: value
        for key in ("mask_token_id", "ptd_token_id", "pard_token")
        if (value := _said(release, key)) is not None
    }
    where = f"{release.source}: config.json"
    if not said:
        raise UserError(f"{where} must name the mask token, as mask_token_id, ptd_token_id or pard_token")
    if len(set(map(json.dumps, said.values()))) > 1:
        told = ", ".join(f"{key} = {json.dumps(value)}" for key, value in said.items())
        raise UserError(f"{where} names different mask tokens, {told}")
    key, token = next(iter(said.items()))
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < base.config.vocab_size:
        raise UserError(f"{where} says {key} = {json.dumps(token)}, expected one of the base's tokens")
    return token


def _read_layers(release: Release, base: Target, layers: Sequence[int] | None) -> Sequence[int]:
    """The three layers of the base that are read: those that were given, or the original release's."""
    asked = _said(release, "eagle_aux_hidden_state_layer_ids")
    if layers is None and asked is not None:
        # Some programs write the layers whose output is read, some those whose input is.
        raise UserError(
            f"{release.source}: config.json names the layers {json.dumps(asked)}, in a convention it does not tell: "
            "give the three layers whose input is read (--layers)"
        )
    return layers or eagle3_layers(base.config.num_layers)


def _said(release: Release, key: str) -> Any:
    """What `config.json` says under a key, at its top or in its section `eagle_config`; None where nothing."""
    section = release.config.get("eagle_config") or {}
    if not isinstance(section, dict):
        raise UserError(f"{release.source}: config.json says eagle_config = {json.dumps(section)}, expected an object")
    values = [place[key] for place in (release.config, section) if place.get(key) is not None]
    if len(values) == 2 and values[0] != values[1]:
        first, second = map(json.dumps, values)
        raise UserError(f"{release.source}: config.json says {key} = {first}, and in eagle_config {second}")
    return values[0] if values else None


def _switches(release: Release) -> dict[str, bool]:
    """The switches of EAGLE-3.1 that `config.json` has."""
    said = {key: value for key in EAGLE_31 if (value := _said(release, key)) is not None}
    for key, value in said.items():
        if not isinstance(value, bool):
            raise UserError(f"{release.source}: config.json says {key} = {json.dumps(value)}, expected true or false")
    if said.get("fc_norm") and said.get("norm_before_fc"):
        raise UserError(f"{release.source}: config.json says fc_norm and norm_before_fc, which exclude each other")
    return said


def _norms(release: Release) -> tuple[dict[str, bool], dict[str, bool]]:
    """What `config.json` says of norms, which must fit the tensors, and the switches of ours that need no telling."""
    if not release.config:
        raise UserError(f"{release.source} needs its config.json: tensors do not tell which norms are at work")
    said = _switches(release)
    for key, name in {"fc_norm": "fc_norm.0.weight", "norm_before_fc": "input_norm.weight"}.items():
        if said.get(key, False) != (name in release):
            value = json.dumps(said.get(key))
            holds = "there is a" if name in release else "there is no"
            raise UserError(f"{release.source}: config.json says {key} = {value}, but {holds} tensor {name}")
    return said, {key: bool(said.get(key)) for key in EAGLE_31[:3]}


def _norm_output(release: Release, said: Mapping[str, bool], meaning: str | None) -> dict[str, bool]:
    """The switches of ours that a release's `norm_output` stands for; absent it stands for EAGLE-3."""
    value = said.get("norm_output")
    if value is None:
        if meaning is not None:
            raise UserError(f"{release.source}: config.json has no norm_output, of which --norm_output could say more")
        return {}
    if "speculators_config" in release.config:
        if meaning == "head":
            raise UserError(f"{release.source} was written by speculators, whose norm_output is fed_back, not head")
        meaning = "fed_back"
    if meaning is None:
        raise UserError(
            f"{release.source}: config.json says norm_output = {json.dumps(value)}, which programs understand "
            "differently: give --norm_output fed_back, where the next step reads the normed output too, or head, where "
            "only the head does"
        )
    return {"norm_output": value} if meaning == "fed_back" else {"head_norm": value}


def draft_layer(
    release: Release, base: Target, place: str, count: int = 1, fixed: Mapping[str, Any] = MappingProxyType({})
) -> tuple[LayerShape | None, dict[str, Any]]:
    """The layer that `config.json` describes, None where it is the base's, and where RoPE came from.

    Args:
      release: its tensors.
      base: the target it was trained on.
      place: what names of its first layer begin with.
      count: how many layers there are, all alike.
      fixed: entries that have one value whatever `config.json` says.

    Raises:
      UserError: it does not fit the base, or is nothing that we compute.
    """
    config = base.config
    if not release.config:
        if not _is_plain(config):
            raise UserError(
                f"{release.source} needs its config.json: a base of the family {config.family} does not tell the shape "
                "of the draft layer"
            )
        return None, {"rope": "of the base; there is no config.json"}
    where = f"{release.source}: config.json"
    # speculators keeps the layer's shape in a section of its own.
    shape = release.config.get("transformer_layer_config", release.config)
    if not isinstance(shape, dict):
        raise UserError(f"{where} says transformer_layer_config = {json.dumps(shape)}, expected an object")
    for part in (release.config, shape):
        refuse_settings(part, f"{where}: ")
        _refuse_windows(part, where)
    sizes = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": count,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
    }
    said = {key: value for key, value in shape.items() if key in LAYER_KEYS}
    draft = config_from_hf({**sizes, **said, **fixed}, where)
    for field, wanted in {"width": config.width, "num_layers": count, "activation": "silu"}.items():
        if getattr(draft, field) != wanted:
            raise UserError(f"{where} implies {field} = {getattr(draft, field)}, expected {wanted} for this base")
    layer = LayerShape(
        num_heads=draft.num_heads,
        num_kv_heads=draft.num_kv_heads,
        head_dim=draft.head_dim,
        mlp_width=draft.mlp_width,
        norm_eps=draft.norm_eps,
        rope_theta=draft.rope_theta,
        rope_scaling=draft.rope_scaling,
        qkv_bias=f"{place}self_attn.q_proj.bias" in release,
    )
    return None if _is_plain(config, layer) else layer, {"rope": "as config.json says"}


def _refuse_windows(shape: Mapping[str, Any], where: str) -> None:
    """Raises UserError where attention reaches back a window's length only."""
    kinds = shape.get("layer_types")
    windowed = isinstance(kinds, list) and "sliding_attention" in kinds
    if windowed or (shape.get("use_sliding_window", True) and shape.get("sliding_window") is not None):
        key = "layer_types" if windowed else "sliding_window"
        raise UserError(f"{where} says {key} = {json.dumps(shape[key])}: draft layers have no sliding windows here")


def _is_plain(config: TransformerConfig, layer: LayerShape | None = None) -> bool:
    """Whether the layers of `config` are plain Llama layers, and of that shape."""
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(LayerShape)}
    plain = LayerShape(**own)
    computed = ("activation", "output_bias", "qk_norm", "attention_softcap", "query_scale", "post_norms")
    alike = all(getattr(plain.of(config), name) == getattr(config, name) for name in (*computed, "zero_centred_norm"))
    return alike and layer in (None, plain)


def _draft_vocabulary(release: Release, base: Target) -> dict[str, np.ndarray]:
    """Target ids of the draft tokens: released as differences `d2t` to the draft ids, and as a mask `t2d`."""
    if "d2t" not in release:
        return {}
    offsets = release.take_any("d2t")
    if offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets):
        raise UserError(
            f"{release.source}: tensor d2t must be a row of int64, got {offsets.dtype} {list(offsets.shape)}"
        )
    tokens = np.arange(len(offsets)) + offsets
    V = base.config.vocab_size
    if tokens[0] < 0 or tokens[-1] >= V or np.any(np.diff(tokens) <= 0):
        raise UserError(f"{release.source}: tensor d2t does not name ascending tokens of a vocabulary of {V}")
    if "t2d" in release:
        mask = release.take_any("t2d")
        if mask.dtype != np.bool_ or mask.shape != (V,) or not np.array_equal(np.flatnonzero(mask), tokens):
            raise UserError(f"{release.source}: tensor t2d is not the mask over {V} tokens that d2t implies")
    return {"draft_vocab": tokens.astype(np.int32)}
