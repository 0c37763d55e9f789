"""Released Falcon networks in miniature: every tensor reaches its place, and what does not fit is one sentence."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoding.drafters.registry import load_drafter
from decoding.policies import Confidence
from models.config import RopeScaling
from models.errors import UserError
from models.formats.hf import save_target
from models.formats.release import read_release
from models.formats.released_falcon import falcon
from models.formats.storage import leaves_by_path
from models.formats.target import Target, load_target
from models.heads.falcon import FalconHeads
from scripts.convert import main
from tests.models.formats import released_cases as cases
from tests.models.formats.released_cases import EAGLE_CONFIG, H, Tensors, write


@pytest.fixture(scope="module")
def base() -> Target:
    return cases.random_base()


def released(base: Target, layers: int = 2) -> Tensors:
    """The names and shapes that torch gives the published modules."""
    shapes: dict[str, tuple[int, ...]] = {}
    for n, inputs in enumerate((2 * H, H)):
        shapes |= {f"lstm.weight_ih_l{n}": (4 * H, inputs), f"lstm.weight_hh_l{n}": (4 * H, H)}
        shapes |= {f"lstm.bias_{kind}_l{n}": (4 * H,) for kind in ("ih", "hh")}
    for i in range(layers):
        shapes |= cases.llama_layer(f"layers.{i}.") | {f"layers.{i}.post_attention_layernorm.weight": (H,)}
        shapes |= {f"layers.{i}.input_layernorm.weight": (H,)} if i else {}
    return cases.draw(shapes) | {"embed_tokens.weight": cases.embedding(base)}


def config(layers: int = 2, **changes: Any) -> dict[str, Any]:
    return {**EAGLE_CONFIG, "num_hidden_layers": layers, "k_mask": 2, **changes}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_every_tensor_has_its_place(base: Target, tmp_path: Path, name: str) -> None:
    tensors = released(base)
    write(tmp_path / name, tensors, config(k_mask=3))
    made = falcon(read_release(tmp_path), base)
    assert made.heads == FalconHeads(3, 2, layer=made.heads.layer) and made.format == "falcon" and made.compared
    assert made.heads.layer_config(base.config).rope_theta == 500.0
    assert made.detected == {"lstm": "per position", "rope": "as config.json says"}
    leaves = leaves_by_path(made.params)
    for n in range(2):
        i, _, g, o = np.split(tensors[f"lstm.weight_ih_l{n}"], 4)
        np.testing.assert_array_equal(leaves[f"lstm/{n}/input/kernel"], np.concatenate([i, g, o]).T)
        both = (tensors[f"lstm.bias_{kind}_l{n}"].astype(np.float32) for kind in ("ih", "hh"))
        i, _, g, o = np.split(sum(both), 4)
        np.testing.assert_array_equal(leaves[f"lstm/{n}/input/bias"], np.concatenate([i, g, o]).astype(np.float16))
    for path, place in {
        "layers/0/attention/q/kernel": "layers.0.self_attn.q_proj.weight",
        "layers/1/attention_norm/scale": "layers.1.input_layernorm.weight",
        "layers/1/mlp/down/kernel": "layers.1.mlp.down_proj.weight",
    }.items():
        expected = tensors[place].T if path.endswith("kernel") else tensors[place]
        np.testing.assert_array_equal(leaves[path], expected)
    assert len(leaves) == 4 + 8 + 9 and "layers/0/attention_norm/scale" not in leaves


def test_by_command(base: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_target(tmp_path / "base", base.config, base.params)
    source = write(tmp_path / "falcon" / "model.safetensors", released(base), config()).parent
    arguments = ["--from", "falcon", "--src", source, "--base", tmp_path / "base", "--out", tmp_path / "out"]
    main([*map(str, arguments), "--policy", "confidence:top_k=3,depth=4,total=9"])
    assert "falcon for" in capsys.readouterr().out
    drafter, params = load_drafter(tmp_path / "out", load_target(tmp_path / "base"))
    assert drafter.heads.block == 2 and drafter.policy == Confidence(3, 4, 9) and set(params) >= {"lstm", "layers"}


def test_scaled_angles_begin_from_the_usual_base(base: Target, tmp_path: Path) -> None:
    said = config(1, rope_scaling={"type": "linear", "factor": 2.0})
    write(tmp_path / "model.safetensors", released(base, 1), said)
    layer = falcon(read_release(tmp_path), base).heads.layer
    assert layer is not None and layer.rope_theta == 10_000.0 and layer.rope_scaling == RopeScaling("linear", 2.0)


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said", "words"),
    [
        (None, {"k_mask": None}, "k_mask, the length of blocks, which no tensor tells, is missing"),
        (None, {"k_mask": "2"}, 'k_mask, the length of blocks, which no tensor tells, = "2" is no number of pairs'),
        (None, {"num_hidden_layers": 3}, "implies num_layers = 3, expected 2 for this base"),
        (None, {"qkv_bias": True}, "says qkv_bias = true, which the layers do not fit"),
        (None, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (lambda t: without(t, "lstm.weight_hh_l1"), {}, "tensor lstm.weight_hh_l1 is missing"),
        (lambda t: {**t, "lstm.bias_ih_l0": t["lstm.bias_ih_l1"][:8]}, {}, "lstm.bias_ih_l0 has shape"),
        (lambda t: {**t, "fc.weight": t["lstm.weight_ih_l1"]}, {}, "tensor fc.weight is unknown to Falcon"),
        (lambda t: {"fc.weight": t["lstm.weight_ih_l1"]}, {}, "holds no layers"),
    ],
)
def test_what_does_not_fit_is_one_sentence(base: Target, tmp_path: Path, change, said, words: str) -> None:
    tensors = released(base)
    write(tmp_path / "model.safetensors", change(tensors) if change else tensors, config(**said))
    with pytest.raises(UserError) as caught:
        falcon(read_release(tmp_path), base)
    assert words in str(caught.value)


@pytest.mark.parametrize("said", cases.UNKNOWN_SETTINGS, ids=lambda said: next(iter(said)))
def test_settings_that_change_a_layer_are_refused(base: Target, tmp_path: Path, said: dict[str, Any]) -> None:
    write(tmp_path / "model.safetensors", released(base), config(**said))
    with pytest.raises(UserError, match=f"{next(iter(said))} = .* is not supported"):
        falcon(read_release(tmp_path), base)
