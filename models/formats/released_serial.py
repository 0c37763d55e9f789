"""Released weights of DSpark and Domino as parameters of our heads: a network that fills blocks, and a serial head.

The network is read as DFlash's (`models/formats/released_blocks.py`), whose conventions hold here; gates and joint
projections of DSpark's heads read their inputs in our order, and torch's GRU has its gates in ours.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from jax import Array

from models.config import TransformerConfig
from models.errors import UserError
from models.formats.release import Release
from models.formats.released_blocks import block_heads, block_names
from models.formats.released_heads import ROTARY, Converted, assemble, check_copy, same, take
from models.formats.target import Target
from models.heads.dflash import DFlashHeads
from models.heads.medusa import vocab_kernel
from models.heads.serial import SerialHead
from models.transformer import Params

# Entries that DeepSpec writes beside a model's, and those that SpecForge's `dflash_config` has for Domino alone.
_OF_BLOCK = ("mask_token_id", "target_layer_ids")
_OF_DOMINO = ("projector_type", "emb_dim", "gru_hidden_dim", "pure_draft_prefix_len", "shift_label")


@dataclasses.dataclass(frozen=True)
class SerialBlock:
    """Shapes of what a release holds.

    Attributes:
      block: of the network that fills blocks.
      serial: of the head that joins their slots.
    """

    block: DFlashHeads
    serial: SerialHead

    def init(self, config: TransformerConfig, target: Params, key: Array) -> Params:
        """As the drafter's parameters are."""
        serial = self.serial.init(config, target, key, self.block.outputs(config))
        return {**self.block.init(config, target, key), "serial": serial}


def dspark(release: Release, base: Target) -> Converted:
    """DSpark (deepseek-ai/DeepSpec): DFlash's tensors, `markov_head`, `confidence_head`, and copies of the base's
    embedding and head; older files have the prefix `logit_head.` before the heads.

    Raises:
      UserError: a tensor is missing, misshapen, unknown, or differs from the base's; or `config.json` lacks something
        or asks for what our network does not compute.
    """
    said, where = dict(release.config), f"{release.source}: config.json"
    rank, kind = _number(said, "markov_rank", where, least=1), said.get("markov_head_type")
    if kind not in ("vanilla", "gated", "rnn"):
        raise UserError(f"{where}: markov_head_type must be vanilla, gated or rnn, got {json.dumps(kind)}")
    confidence = "none"
    if _flag(said, "enable_confidence_head", where):
        confidence = "both" if _flag(said, "confidence_head_with_markov", where) else "hidden"
    inner = said.get("dflash_config") or {}
    if not isinstance(inner, Mapping):
        raise UserError(f"{where}: dflash_config must be a section, got {json.dumps(inner)}")
    told = {key: said[key] for key in _OF_BLOCK if key in said}
    if twice := [key for key, value in told.items() if inner.get(key, value) != value]:
        both = f"{json.dumps(told[twice[0]])}, and in dflash_config {json.dumps(inner[twice[0]])}"
        raise UserError(f"{where} says twice what {twice[0]} is: {both}")
    release.config = {
        **{key: value for key, value in said.items() if key not in _OF_BLOCK},
        "dflash_config": {**inner, **told},
    }
    serial = SerialHead(kind, rank, confidence=cast(Any, confidence))
    prefix = "logit_head." if any(name.startswith("logit_head.") for name in release.names) else ""
    markov, sure = f"{prefix}markov_head.", f"{prefix}confidence_head.proj"
    names = {
        "embed/embedding": f"{markov}markov_w1.weight",
        "vocab/kernel": f"{markov}markov_w2.weight",
        "gate/kernel": f"{markov}gate_proj.weight",
        "gate/bias": f"{markov}gate_proj.bias",
        "joint/kernel": f"{markov}joint_proj.weight",
        "joint/bias": f"{markov}joint_proj.bias",
        "confidence/kernel": f"{sure}.weight",
        "confidence/bias": f"{sure}.bias",
    }
    return _converted(release, base, serial, names, "dspark", shifted=True)


def domino(release: Release, base: Target) -> Converted:
    """Domino (sgl-project/SpecForge): DFlash's tensors, `prefix_gru` and `embed_proj`.

    Raises:
      UserError: as `dspark`.
    """
    where, inner = f"{release.source}: config.json", release.config.get("dflash_config")
    if not isinstance(inner, Mapping) or inner.get("projector_type") != "domino":
        kind = inner.get("projector_type") if isinstance(inner, Mapping) else None
        raise UserError(f'{where}: dflash_config.projector_type must be "domino", got {json.dumps(kind)}')
    rank, state = (_number(inner, key, where, least=1) for key in ("emb_dim", "gru_hidden_dim"))
    plain = _number({"pure_draft_prefix_len": 0, **inner}, "pure_draft_prefix_len", where)
    shifted = _flag({"shift_label": False, **inner}, "shift_label", where)
    rest = {key: value for key, value in inner.items() if key not in _OF_DOMINO}
    release.config = {**release.config, "dflash_config": rest}
    serial = SerialHead("gru", rank, state, plain, confidence="none")
    names = {
        "input/kernel": "prefix_gru.weight_ih_l0",
        "state/kernel": "prefix_gru.weight_hh_l0",
        "down/kernel": "embed_proj.0.weight",
        "vocab/kernel": "embed_proj.2.weight",
    }
    return _converted(release, base, serial, names, "domino", shifted)


def _converted(
    release: Release, base: Target, serial: SerialHead, names: Mapping[str, str], kind: str, shifted: bool
) -> Converted:
    heads = SerialBlock(block_heads(release, base, shifted), serial)
    serial.check()
    every = {**block_names(heads.block), **{f"serial/{path}": name for path, name in names.items()}}
    params = assemble(release, heads, base, every, {})
    compared = [check_copy(release, "embed_tokens.weight", base), _check_head(release, base)]
    release.finish(ROTARY, {"dspark": "DSpark", "domino": "Domino"}[kind])
    detected = {"outputs_of_layers": [k - 1 for k in heads.block.target_layers]}
    return Converted(heads, params, kind, detected, any(compared))


def _check_head(release: Release, base: Target) -> bool:
    """As `check_copy`, for a copy of the base's head."""
    if "lm_head.weight" not in release:
        return False
    own = np.asarray(vocab_kernel(base.params))
    if not same(take(release, "lm_head.weight", "head/kernel", own.shape, base), own):
        raise UserError(
            f"{release.source} was made for another target: its lm_head.weight is not the head of the base {base.path}"
        )
    return True


def _number(said: Mapping[str, Any], key: str, where: str, least: int = 0) -> int:
    value = said.get(key)
    if type(value) is not int or value < least:
        raise UserError(f"{where}: {key} must be an integer of at least {least}, got {json.dumps(value)}")
    return value


def _flag(said: Mapping[str, Any], key: str, where: str) -> bool:
    value = said.get(key)
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} must be true or false, got {json.dumps(value)}")
    return value
