"""Released DSpark and Domino drafters, in miniature: every tensor in its place, and what their files may not say."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from decoding.drafters.registry import load_drafter
from decoding.policies import Scheduled, Static
from decoding.trees import chain
from models.errors import UserError
from models.formats.released_serial import SerialBlock, domino, dspark
from models.formats.target import Target
from models.heads.dflash import DFlashHeads
from models.heads.medusa import vocab_kernel
from models.heads.serial import SerialHead
from scripts.convert import main
from tests.models.formats.released_cases import H, Tensors, V, draw, write
from tests.models.formats.test_released_blocks import LAYER, LAYERS, SAID, base, held, said, shapes

__all__ = ["base"]  # A fixture.

R, S, BLOCK = 5, 6, 8
MARKOV: dict[str, Any] = {
    "markov_rank": R,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "mask_token_id": 39,
    "target_layer_ids": [1, 3, 5],
    "num_anchors": 512,
}
DOMINO = {
    "projector_type": "domino",
    "emb_dim": R,
    "gru_hidden_dim": S,
    "pure_draft_prefix_len": 1,
    "shift_label": True,
}


def config(**changes: Any) -> dict[str, Any]:
    """DSpark's `config.json`, which has no section for blocks; None takes an entry away."""
    changed = {**{key: value for key, value in SAID.items() if key != "dflash_config"}, **MARKOV, **changes}
    return {key: value for key, value in changed.items() if value is not None}


def dspark_tensors(target: Target, kind: str = "vanilla", inputs: int = H + R, prefix: str = "") -> Tensors:
    """DeepSpec's, with copies of the base's embedding and head."""
    heads = {"markov_w1.weight": (V, R), "markov_w2.weight": (V, R)}
    if kind == "gated":
        heads |= {"gate_proj.weight": (R, H + R), "gate_proj.bias": (R,)}
    if kind == "rnn":
        heads |= {"joint_proj.weight": (3 * R, 2 * R + H), "joint_proj.bias": (3 * R,)}
    found = {**shapes(), **{f"{prefix}markov_head.{name}": shape for name, shape in heads.items()}}
    if inputs:
        found |= {f"{prefix}confidence_head.proj.weight": (1, inputs), f"{prefix}confidence_head.proj.bias": (1,)}
    copies = {
        "embed_tokens.weight": target.params["embed"]["embedding"],
        "lm_head.weight": vocab_kernel(target.params).T,
    }
    return draw(found) | {name: np.asarray(values) for name, values in copies.items()}


def domino_tensors() -> Tensors:
    """SpecForge's."""
    gru = {"prefix_gru.weight_ih_l0": (3 * S, H), "prefix_gru.weight_hh_l0": (3 * S, S)}
    return draw({**shapes(), **gru, "embed_proj.0.weight": (R, H + S), "embed_proj.2.weight": (V, R)})


def network(shifted: bool = True) -> DFlashHeads:
    return DFlashHeads((2, 4, 6), 39, LAYERS, BLOCK, shifted=shifted, layer=LAYER)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("prefix", ["", "logit_head."], ids=["present", "old"])
def test_dspark_in_its_place(base: Target, kind: str, prefix: str) -> None:
    tensors = dspark_tensors(base, kind, prefix=prefix)
    made = dspark(held(tensors, config(markov_head_type=kind)), base)
    assert made.heads == SerialBlock(network(), SerialHead(kind, R))
    assert made.format == "dspark" and made.compared and made.detected == {"outputs_of_layers": [1, 3, 5]}
    serial, markov = made.params["serial"], f"{prefix}markov_head."
    assert np.array_equal(serial["embed"]["embedding"], tensors[f"{markov}markov_w1.weight"])
    assert np.array_equal(serial["vocab"]["kernel"], tensors[f"{markov}markov_w2.weight"].T)
    for part, name in {"gated": ("gate", "gate_proj"), "rnn": ("joint", "joint_proj")}.items():
        if kind == part:
            assert np.array_equal(serial[name[0]]["kernel"], tensors[f"{markov}{name[1]}.weight"].T)
            assert np.array_equal(serial[name[0]]["bias"], tensors[f"{markov}{name[1]}.bias"])
    assert np.array_equal(serial["confidence"]["kernel"], tensors[f"{prefix}confidence_head.proj.weight"].T)
    assert np.array_equal(made.params["fc"]["kernel"], tensors["fc.weight"].T)
    count = sum(leaf.size for leaf in jax.tree.leaves(made.params))
    assert count == sum(x.size for name, x in tensors.items() if name not in ("embed_tokens.weight", "lm_head.weight"))


@pytest.mark.parametrize(
    ("says", "inputs", "confidence"),
    [({"confidence_head_with_markov": False}, H, "hidden"), ({"enable_confidence_head": False}, 0, "none")],
)
def test_confidence_heads_read_what_the_config_says(base: Target, says: dict, inputs: int, confidence: str) -> None:
    made = dspark(held(dspark_tensors(base, inputs=inputs), config(**says)), base)
    assert made.heads.serial.confidence == confidence


@pytest.mark.parametrize("shifted", [True, False])
def test_domino_in_its_place(base: Target, shifted: bool) -> None:
    tensors = domino_tensors()
    made = domino(held(tensors, said({**DOMINO, "shift_label": shifted})), base)
    assert made.heads == SerialBlock(network(shifted), SerialHead("gru", R, S, 1, "none"))
    assert made.format == "domino" and not made.compared
    serial = made.params["serial"]
    names = {"input": "prefix_gru.weight_ih_l0", "state": "prefix_gru.weight_hh_l0", "down": "embed_proj.0.weight"}
    for part, name in {**names, "vocab": "embed_proj.2.weight"}.items():
        assert np.array_equal(serial[part]["kernel"], tensors[name].T)


def test_both_by_command(base: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    releases = {"dspark": (dspark_tensors(base), config()), "domino": (domino_tensors(), said(DOMINO))}
    policies = {"dspark": ["--policy", "scheduled:depth=3,threshold=0.5"], "domino": []}
    for kind, (tensors, told) in releases.items():
        source, out = write(tmp_path / kind / "model.safetensors", tensors, told).parent, tmp_path / f"{kind}-out"
        main(["--from", kind, "--src", str(source), "--base", str(base.path), "--out", str(out), *policies[kind]])
        assert f"{kind} for" in capsys.readouterr().out
        drafter, params = load_drafter(out, base)
        assert drafter.policy == (Scheduled(3, threshold=0.5) if kind == "dspark" else Static(chain(BLOCK)))
        assert drafter.heads == network() and set(params) >= {"fc", "layers", "serial"}


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"markov_rank": 0}, "markov_rank must be an integer of at least 1, got 0"),
        ({"markov_head_type": "lstm"}, 'markov_head_type must be vanilla, gated or rnn, got "lstm"'),
        ({"markov_head_type": "gated"}, "tensor markov_head.gate_proj.bias is missing"),
        ({"confidence_head_with_markov": None}, "confidence_head_with_markov must be true or false, got null"),
        ({"enable_confidence_head": False}, "tensor confidence_head.proj.bias is unknown to DSpark"),
        ({"markov_rank": R + 1}, "confidence_head.proj.weight has shape [1, 21]"),
        ({"mask_token_id": None}, "mask_token_id must be an integer"),
        ({"dflash_config": 3}, "dflash_config must be a section, got 3"),
        ({"mask_token_id": 1, "dflash_config": {"mask_token_id": 2}}, "says twice what mask_token_id is: 1, and in"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
    ],
)
def test_what_dspark_may_not_say(base: Target, says: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        dspark(held(dspark_tensors(base), config(**says)), base)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"projector_type": "spiral"}, 'dflash_config.projector_type must be "domino", got "spiral"'),
        ({"gru_hidden_dim": None}, "gru_hidden_dim must be an integer of at least 1, got null"),
        ({"shift_label": 1}, "shift_label must be true or false, got 1"),
        ({"video_adapter": {}}, "dflash_config.video_adapter = {} is not supported"),
    ],
)
def test_what_domino_may_not_say(base: Target, says: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        domino(held(domino_tensors(), said({**DOMINO, **says})), base)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight"])
def test_copies_of_another_target(base: Target, name: str) -> None:
    tensors = dspark_tensors(base)
    tensors[name] = tensors[name] + 1
    with pytest.raises(UserError, match="was made for another target"):
        dspark(held(tensors, config()), base)
