"""Released EAGLE networks of all kinds: every tensor reaches its place, and what does not fit is one sentence."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from models.config import RopeScaling
from models.errors import UserError
from models.formats import released_eagle
from models.formats.release import read_release
from models.formats.target import Target
from models.heads.eagle import Eagle3Heads, EagleHeads
from models.heads.p_eagle import PEagleHeads
from tests.models.formats import released_cases as cases
from tests.models.formats.released_cases import DRAFT_TOKENS, EAGLE_CONFIG, LAYER, H, V, check_places, write


@pytest.fixture(scope="module")
def base() -> Target:
    return cases.random_base()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_eagle(base: Target, tmp_path: Path, bias: bool, name: str) -> None:
    tensors = cases.eagle(base, bias)
    write(tmp_path / name, tensors, EAGLE_CONFIG | ({} if bias else {"bias": False}))
    made = released_eagle.eagle(read_release(tmp_path), base)
    assert made.heads == EagleHeads(bias) and made.detected == {"fc_bias": bias, "rope": "as config.json says"}
    names = {"fc/kernel": "fc.weight", **({"fc/bias": "fc.bias"} if bias else {})}
    check_places(made.params, tensors, names | {f"layer/{path}": f"layers.0.{name}" for path, name in LAYER.items()})


@pytest.mark.parametrize("tokens", [DRAFT_TOKENS, None], ids=["draft vocabulary", "whole vocabulary"])
def test_eagle3(base: Target, tmp_path: Path, tokens: list[int] | None) -> None:
    tensors = cases.eagle3(tokens)
    write(tmp_path / "pytorch_model.bin", tensors)
    made = released_eagle.eagle3(read_release(tmp_path), base)
    # Of seven layers, the original release reads what enters 2, n/2 and n - 3.
    assert made.heads == Eagle3Heads(2, 3, 4, 0 if tokens is None else len(tokens))
    assert made.detected["draft_vocabulary"] == (V if tokens is None else len(tokens))
    assert "no config.json" in made.detected["rope"]
    names = {
        "fc/kernel": "fc.weight",
        "input_norm/scale": "midlayer.input_layernorm.weight",
        "hidden_norm/scale": "midlayer.hidden_norm.weight",
        "norm/scale": "norm.weight",
        "vocab/kernel": "lm_head.weight",
    } | {f"layer/{path}": f"midlayer.{name}" for path, name in LAYER.items()}
    given = {} if tokens is None else {"draft_vocab": np.array(tokens, np.int32)}
    check_places(made.params, tensors, names, **given)


def test_eagle3_reads_other_layers_when_told(base: Target, tmp_path: Path) -> None:
    def release(**config):
        return read_release(write(tmp_path / "pytorch_model.bin", cases.eagle3(None), EAGLE_CONFIG | config))

    layers = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 5]}}
    with pytest.raises(UserError, match=r"names the layers \[1, 2, 5\], in a convention it does not tell.*--layers"):
        released_eagle.eagle3(release(**layers), base)
    assert released_eagle.eagle3(release(**layers), base, (1, 2, 6)).heads == Eagle3Heads(1, 2, 6)
    with pytest.raises(UserError, match="reads what enters layer 7"):
        released_eagle.eagle3(release(), base, (1, 2, 7))
    with pytest.raises(UserError, match="norm_before_residual = true, which EAGLE-3 has not: --from eagle31"):
        released_eagle.eagle3(release(norm_before_residual=True), base)


# speculators' config, and one that is flat as SpecForge's.
SPECULATORS = {"speculators_config": {}, "transformer_layer_config": EAGLE_CONFIG | {"layer_types": ["full_attention"]}}


@pytest.mark.parametrize(
    ("place", "norms", "config", "meaning", "switches"),
    [
        (
            "layers.0.",
            "fc_norm",
            SPECULATORS | {"fc_norm": True, "norm_before_residual": True, "norm_output": True},
            None,
            {"fc_norm": True, "norm_before_residual": True, "norm_output": True},
        ),
        ("midlayer.", "norm_before_fc", EAGLE_CONFIG | {"norm_before_fc": True}, None, {"norm_before_fc": True}),
        ("midlayer.", "", EAGLE_CONFIG | {"eagle_config": {"norm_output": True}}, "fed_back", {"norm_output": True}),
        ("midlayer.", "", EAGLE_CONFIG | {"norm_output": True}, "head", {}),
        ("midlayer.", "", EAGLE_CONFIG | {"norm_output": False}, "head", {"head_norm": False}),
        ("layers.0.", "", EAGLE_CONFIG | {"norm_output": None}, None, {}),
    ],
)
def test_eagle31(base: Target, tmp_path: Path, place, norms, config, meaning, switches) -> None:
    tensors = cases.eagle31(place, norms)
    made = released_eagle.eagle31(read_release(write(tmp_path / "m.safetensors", tensors, config)), base, None, meaning)
    assert made.heads == Eagle3Heads(2, 3, 4, len(DRAFT_TOKENS), **switches) and made.format == "eagle3.1"
    names = {
        "fc/kernel": "fc.weight",
        "input_norm/scale": f"{place}input_layernorm.weight",
        "hidden_norm/scale": f"{place}hidden_norm.weight",
        "norm/scale": "norm.weight",
        "vocab/kernel": "lm_head.weight",
    } | {f"layer/{path}": f"{place}{name}" for path, name in LAYER.items()}
    names |= {f"fc_norm/{i}/scale": f"fc_norm.{i}.weight" for i in range(3)} if norms == "fc_norm" else {}
    names |= {"fc_norm/scale": "input_norm.weight"} if norms == "norm_before_fc" else {}
    check_places(made.params, tensors, names, draft_vocab=np.array(DRAFT_TOKENS, np.int32))


@pytest.mark.parametrize(
    ("norms", "config", "meaning", "complaint"),
    [
        ("", None, None, "needs its config.json: tensors do not tell which norms"),
        ("", {"fc_norm": True}, None, "says fc_norm = true, but there is no tensor fc_norm.0.weight"),
        ("fc_norm", {}, None, "says fc_norm = null, but there is a tensor fc_norm.0.weight"),
        ("", {"fc_norm": True, "norm_before_fc": True}, None, "fc_norm and norm_before_fc, which exclude each other"),
        ("", {"norm_output": 1}, None, "norm_output = 1, expected true or false"),
        ("", {"norm_output": True}, None, "which programs understand differently: give --norm_output fed_back,"),
        ("", {}, "head", "config.json has no norm_output, of which"),
        ("", SPECULATORS | {"norm_output": True}, "head", "speculators, whose norm_output is fed_back, not head"),
        (
            "",
            {"norm_before_residual": True, "eagle_config": {"norm_before_residual": False}},
            None,
            "norm_before_residual = true, and in eagle_config false",
        ),
        ("", {"eagle_config": [1]}, None, r"eagle_config = \[1\], expected an object"),
        ("", {"sliding_window": 2048}, None, "sliding_window = 2048: draft layers have no sliding windows"),
        ("", {"layer_types": ["sliding_attention"]}, None, "layer_types = .*: draft layers have no sliding windows"),
        ("", {"transformer_layer_config": EAGLE_CONFIG | {"num_hidden_layers": 2}}, None, "num_layers = 2, expected 1"),
    ],
)
def test_eagle31_that_contradicts_itself(base: Target, tmp_path: Path, norms, config, meaning, complaint: str) -> None:
    config = None if config is None else EAGLE_CONFIG | config
    release = read_release(write(tmp_path / "m.safetensors", cases.eagle31(norms=norms), config))
    with pytest.raises(UserError, match=complaint):
        released_eagle.eagle31(release, base, None, meaning)


# speculators' names, with an embedding that was trained, and those of a program that wrote no embedding at all.
P_EAGLE = EAGLE_CONFIG | {"num_hidden_layers": 3}


@pytest.mark.parametrize("own", [False, True, None], ids=["the base's embedding", "its own", "no embedding"])
def test_p_eagle(base: Target, tmp_path: Path, own: bool | None) -> None:
    tensors, config = cases.p_eagle(base, own=bool(own)), P_EAGLE | {"ptd_token_id": 5}
    if own:
        config = {"speculators_config": {}, "transformer_layer_config": P_EAGLE, "mask_token_id": 5}
        config |= {"norm_before_residual": True, "norm_output": False}
    table = tensors["embed_tokens.weight"] if own is not None else np.asarray(base.params["embed"]["embedding"])
    if own is None:
        del tensors["embed_tokens.weight"]
    made = released_eagle.p_eagle(read_release(write(tmp_path / "m.safetensors", tensors, config)), base)
    switches = {"norm_before_residual": bool(own), "num_layers": 3, "own_embedding": bool(own)}
    assert made.heads == PEagleHeads(2, 3, 4, len(DRAFT_TOKENS), **switches)
    assert made.detected["mask_token"] == 5 and made.compared == (own is False)
    names = {
        "fc/kernel": "fc.weight",
        "input_norm/scale": "layers.0.input_layernorm.weight",
        "hidden_norm/scale": "layers.0.hidden_norm.weight",
        "norm/scale": "norm.weight",
        "vocab/kernel": "lm_head.weight",
    } | {f"layer/{path}": f"layers.0.{name}" for path, name in LAYER.items()}
    for i in (1, 2):
        further = {"attention_norm/scale": "input_layernorm.weight", **LAYER}
        names |= {f"blocks/{i - 1}/{path}": f"layers.{i}.{name}" for path, name in further.items()}
    given = {"mask_hidden": tensors["mask_hidden"].reshape(-1), "mask_embedding": table[5]}
    given |= {"embed/embedding": table} if own else {}
    check_places(made.params, tensors, names, draft_vocab=np.array(DRAFT_TOKENS, np.int32), **given)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({}, "must name the mask token, as mask_token_id, ptd_token_id or pard_token"),
        ({"mask_token_id": 5, "pard_token": 6}, "different mask tokens, mask_token_id = 5, pard_token = 6"),
        ({"mask_token_id": 40}, "mask_token_id = 40, expected one of the base's tokens"),
        ({"mask_token_id": 5, "num_hidden_layers": 4}, "num_layers = 4, expected 3"),
        ({"mask_token_id": 5, "norm_output": False}, "may mean a head without a norm"),
        ({"mask_token_id": 5, "fc_norm": True}, "there is no tensor fc_norm.0.weight"),
    ],
)
def test_p_eagle_that_does_not_fit(base: Target, tmp_path: Path, config: dict, complaint: str) -> None:
    release = read_release(write(tmp_path / "m.safetensors", cases.p_eagle(base), P_EAGLE | config))
    with pytest.raises(UserError, match=complaint):
        released_eagle.p_eagle(release, base)


@pytest.mark.parametrize(
    ("said", "field", "value"),
    [
        ({"rope_theta": 10_000.0}, "rope_theta", 10_000.0),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling", RopeScaling("linear", 2.0)),
        ({"rms_norm_eps": 1e-6}, "norm_eps", 1e-6),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}, "head_dim", 8),
    ],
)
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_the_draft_layer_is_as_its_config_says(
    base: Target, tmp_path: Path, kind: str, said: dict, field: str, value: object
) -> None:
    kinds = {
        "eagle": (released_eagle.eagle, cases.eagle),
        "eagle3": (released_eagle.eagle3, lambda base: cases.eagle3(DRAFT_TOKENS)),
    }
    convert, make = kinds[kind]
    made = convert(read_release(write(tmp_path / "pytorch_model.bin", make(base), EAGLE_CONFIG | said)), base)
    assert getattr(made.heads.layer, field) == value
    assert getattr(made.heads.layer_config(base.config), field) == value
    as_base = convert(read_release(write(tmp_path / "pytorch_model.bin", make(base), EAGLE_CONFIG)), base)
    assert as_base.heads.layer is None


def test_a_config_without_rope_means_the_default(base: Target, tmp_path: Path) -> None:
    # The published EAGLE-3 of Llama 3.1, whose own base and stretching differ, says nothing about RoPE.
    config = {key: value for key, value in EAGLE_CONFIG.items() if key != "rope_theta"}
    made = released_eagle.eagle3(read_release(write(tmp_path / "pytorch_model.bin", cases.eagle3(None), config)), base)
    assert (made.heads.layer.rope_theta, made.heads.layer.rope_scaling) == (10_000.0, None)


@pytest.mark.parametrize("said", cases.UNKNOWN_SETTINGS, ids=lambda said: next(iter(said)))
@pytest.mark.parametrize("kind", ["eagle", "eagle3", "eagle31", "p_eagle", "inside", "beside"])
def test_settings_that_change_a_layer_are_refused(base: Target, tmp_path: Path, kind: str, said: dict) -> None:
    inside = EAGLE_CONFIG | (said if kind == "inside" else {})
    convert, tensors, config = {
        "eagle": (released_eagle.eagle, cases.eagle(base), EAGLE_CONFIG | said),
        "eagle3": (released_eagle.eagle3, cases.eagle3(None), EAGLE_CONFIG | said),
        "p_eagle": (released_eagle.p_eagle, cases.p_eagle(base), P_EAGLE | {"mask_token_id": 5} | said),
        # speculators keeps the layer in a section of its own.
        "inside": (released_eagle.eagle31, cases.eagle31(norms=""), SPECULATORS | {"transformer_layer_config": inside}),
        "beside": (released_eagle.eagle31, cases.eagle31(norms=""), SPECULATORS | said),
    }.get(kind, (released_eagle.eagle31, cases.eagle31(norms=""), EAGLE_CONFIG | said))
    release = read_release(write(tmp_path / "model.safetensors", tensors, config))
    with pytest.raises(UserError, match=f"{next(iter(said))} = .* is not supported"):
        convert(release, base)


def test_llama_layers_serve_bases_of_other_families(tmp_path: Path) -> None:
    config = dataclasses.replace(cases.CONFIG, zero_centred_norm=True, qk_norm=True, qkv_bias=True, family="gemma2")
    base = cases.random_base(config=config)
    file = write(tmp_path / "pytorch_model.bin", cases.eagle3(DRAFT_TOKENS))
    with pytest.raises(UserError, match=r"needs its config\.json: a base of the family gemma2"):
        released_eagle.eagle3(read_release(file), base)
    made = released_eagle.eagle3(read_release(write(file, cases.eagle3(DRAFT_TOKENS), EAGLE_CONFIG)), base)
    layer = made.heads.layer_config(config)
    assert not (layer.zero_centred_norm or layer.qk_norm or layer.qkv_bias)


def test_biases_of_the_draft_layer(base: Target, tmp_path: Path) -> None:
    biases = {f"midlayer.self_attn.{name}_proj.bias": (cases.KV if name != "q" else H,) for name in "qkv"}
    tensors = cases.eagle3(None) | cases.draw(biases)
    made = released_eagle.eagle3(read_release(write(tmp_path / "pytorch_model.bin", tensors, EAGLE_CONFIG)), base)
    assert made.heads.layer.qkv_bias
    np.testing.assert_array_equal(
        made.params["layer"]["attention"]["q"]["bias"], tensors["midlayer.self_attn.q_proj.bias"]
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_key_value_heads": 4}, r"layers\.0\.self_attn\.k_proj\.weight has shape \[8, 16\].* implies \[16, 16\]"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "implies activation = gelu_tanh, expected silu"),
        ({"num_hidden_layers": 2}, "implies num_layers = 2, expected 1"),
        ({"hidden_size": 32}, "implies width = 32, expected 16 for this base"),
        ({"hidden_size": "16"}, "hidden_size must be an integer"),
        ({"bias": False}, "says bias = false, which fc does not fit"),
    ],
)
def test_eagle_config_must_fit(base: Target, tmp_path: Path, change: dict, complaint: str) -> None:
    release = read_release(write(tmp_path / "pytorch_model.bin", cases.eagle(base), EAGLE_CONFIG | change))
    with pytest.raises(UserError, match=complaint):
        released_eagle.eagle(release, base)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("d2t", np.zeros(12, np.int32), "d2t must be a row of int64"),
        ("d2t", np.zeros((3, 4), np.int64), "d2t must be a row of int64"),
        ("d2t", np.full(12, 29), "does not name ascending tokens of a vocabulary of 40"),
        ("d2t", np.full(12, -1), "does not name ascending tokens"),
        ("d2t", -np.arange(12), "does not name ascending tokens"),
        ("d2t", np.arange(12), "t2d is not the mask over 40 tokens"),
        ("d2t", np.arange(11), r"lm_head\.weight has shape \[12, 16\].* implies \[11, 16\]"),
        ("t2d", np.ones(40, bool), "t2d is not the mask"),
        ("t2d", np.ones(40, np.uint8), "t2d is not the mask"),
        ("lm_head.weight", np.zeros((13, H), np.float16), r"lm_head\.weight has shape \[13, 16\]"),
    ],
)
def test_draft_vocabularies_that_do_not_fit(
    base: Target, tmp_path: Path, name: str, value: np.ndarray, complaint: str
) -> None:
    tensors = cases.eagle3(DRAFT_TOKENS) | {name: value}
    if complaint.startswith("lm_head"):
        del tensors["t2d"]
    if "lm_head" in complaint and name == "d2t":
        tensors["d2t"], _ = np.arange(11), tensors.pop("t2d", None)
    with pytest.raises(UserError, match=complaint):
        released_eagle.eagle3(read_release(write(tmp_path / "pytorch_model.bin", tensors)), base)


def test_mask_without_its_map(base: Target, tmp_path: Path) -> None:
    tensors = cases.eagle3(None) | {"t2d": np.ones(V, bool)}
    with pytest.raises(UserError, match="tensor t2d is unknown to EAGLE-3"):
        released_eagle.eagle3(read_release(write(tmp_path / "pytorch_model.bin", tensors)), base)
