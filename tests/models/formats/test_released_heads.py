"""Released drafters: every tensor reaches its place, and whatever is missing, misshapen or unknown is one sentence."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import RopeScaling
from models.errors import UserError
from models.formats import released_eagle
from models.formats import released_heads as released
from models.formats.hf import tensor_names
from models.formats.release import read_release
from models.formats.storage import leaves_by_path
from models.formats.target import Target
from models.heads.eagle import Eagle3Heads, EagleHeads
from models.heads.hydra import HydraHeads
from models.heads.medusa import MedusaHeads, vocab_kernel
from models.heads.p_eagle import PEagleHeads
from tests.models.formats import released_cases as cases
from tests.models.formats.released_cases import DRAFT_TOKENS, EAGLE_CONFIG, H, Tensors, V, write, write_shards
from tests.models.formats.torch_archives import write_torch


@pytest.fixture(scope="module")
def base() -> Target:
    return cases.random_base()


def check_places(params: transformer.Params, tensors: Tensors, names: dict[str, str], **given: np.ndarray) -> None:
    """Every parameter holds the tensor that `names` has for its path, bit for bit, transposed where it is a kernel."""
    leaves = leaves_by_path(params)
    assert set(leaves) == set(names) | set(given)
    for path, leaf in leaves.items():
        expected = given[path] if path in given else tensors[names[path]]
        expected = expected.T if path.endswith("kernel") and path in names else expected
        assert leaf.dtype == expected.dtype, path
        np.testing.assert_array_equal(leaf, expected, err_msg=path)


LAYER = {
    "attention/q/kernel": "self_attn.q_proj.weight",
    "attention/k/kernel": "self_attn.k_proj.weight",
    "attention/v/kernel": "self_attn.v_proj.weight",
    "attention/o/kernel": "self_attn.o_proj.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "mlp/gate/kernel": "mlp.gate_proj.weight",
    "mlp/up/kernel": "mlp.up_proj.weight",
    "mlp/down/kernel": "mlp.down_proj.weight",
}


# Medusa


def medusa_places(heads: int, layers: int, prefix: str) -> dict[str, str]:
    blocks = {
        f"heads/{i}/blocks/{l}/linear/{ours}": f"{prefix}{i}.{l}.linear.{theirs}"
        for i in range(heads)
        for l in range(layers)
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    }
    return blocks | {f"heads/{i}/vocab/kernel": f"{prefix}{i}.{layers}.weight" for i in range(heads)}


@pytest.mark.parametrize("name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
@pytest.mark.parametrize("layers", [1, 2])
def test_medusa_v0(base: Target, tmp_path: Path, name: str, layers: int) -> None:
    tensors = cases.medusa(heads=5, layers=layers)
    # The loader of this release counts five heads whatever its config says.
    write(tmp_path / name, tensors, {"medusa_num_heads": 2, "medusa_num_layers": 1})
    made = released.medusa(read_release(tmp_path, ["medusa_lm_head.safetensors", "medusa_lm_head.pt"]), base)
    assert made.heads == MedusaHeads(5, layers) and made.format == "medusa v0.1"
    check_places(made.params, tensors, medusa_places(5, layers, ""))
    tied = {} if layers == 1 else {"tied_blocks": False}
    assert made.detected == {"vocabulary_maps": "of the heads", **tied}


def test_medusa_v1_heads_alone(base: Target, tmp_path: Path) -> None:
    tensors = cases.bfloat16(cases.medusa(prefix="medusa_head."))
    made = released.medusa(read_release(write(tmp_path / "heads.bin", tensors)), base)
    assert made.format == "medusa v1.0"
    check_places(made.params, tensors, medusa_places(3, 1, "medusa_head."))


def whole_model(base: Target) -> Tensors:
    leaves = leaves_by_path(transformer.split_projections(base.config, base.params))
    target = {
        name: np.asarray(leaves[path].T if path.endswith("kernel") else leaves[path]).astype(jnp.bfloat16)
        for path, name in tensor_names(base.config).items()
    }
    buffer = {"model.layers.3.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    return target | buffer | cases.medusa(prefix="medusa_head.")


@pytest.mark.parametrize(("stem", "suffix"), [("pytorch_model", "bin"), ("model", "safetensors")])
def test_medusa_v1_whole_model_in_shards(base: Target, tmp_path: Path, stem: str, suffix: str) -> None:
    tensors = whole_model(base)
    release = read_release(write_shards(tmp_path / "model", tensors, stem, suffix))
    made = released.medusa(release, base)
    check_places(made.params, tensors, medusa_places(3, 1, "medusa_head."))
    assert len(release.digests) == 3


def test_medusa_v1_of_another_target(base: Target, tmp_path: Path) -> None:
    tensors = whole_model(base)
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors["model.layers.3.mlp.up_proj.weight"] * 2
    release = read_release(write(tmp_path / "model.bin", tensors))
    with pytest.raises(
        UserError, match=r"whose own model\.layers\.3\.mlp\.up_proj\.weight differs from that of the base"
    ):
        released.medusa(release, base)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_medusa_legacy_maps_as_the_target_does(tmp_path: Path, tied: bool) -> None:
    base = cases.random_base(config=dataclasses.replace(cases.CONFIG, tied_embeddings=tied))
    tensors = cases.medusa(layers=2, own=False)
    made = released.medusa(read_release(write(tmp_path / "medusa_lm_head.safetensors", tensors)), base)
    assert made.heads == MedusaHeads(3, 2) and made.format == "medusa legacy"
    names = {path: name for path, name in medusa_places(3, 2, "").items() if "vocab" not in path}
    kernel = np.asarray(vocab_kernel(base.params))
    check_places(made.params, tensors, names, **{f"heads/{i}/vocab/kernel": kernel for i in range(3)})
    assert made.detected == {"vocabulary_maps": "of the base", "tied_blocks": False}


# Hydra


@pytest.mark.parametrize(("said", "rate"), [(None, 0.2), (0.1, 0.1), (0, 0.0), ("much", None), (1.5, None)])
def test_dropout_of_hydra_is_kept(base: Target, tmp_path: Path, said, rate: float | None) -> None:
    write(tmp_path / "m.pt", cases.hydra(base), None if said is None else {"dropout_rate": said})
    if rate is None:
        with pytest.raises(UserError, match=r"config\.json says dropout_rate = "):
            released.hydra(read_release(tmp_path / "m.pt"), base)
    else:
        assert released.hydra(read_release(tmp_path / "m.pt"), base).heads.dropout == rate


@pytest.mark.parametrize("plus", [False, True], ids=["hydra", "hydra++"])
@pytest.mark.parametrize("dropout", [False, True], ids=["blocks alone", "with dropout"])
def test_hydra(base: Target, tmp_path: Path, plus: bool, dropout: bool) -> None:
    layers = 3 if plus else 1
    tensors = cases.hydra(base, layers=layers, plus=plus, dropout=dropout)
    config = {"hydra_head_arch": "prefix-mlp" if plus else "mlp", "hydra_num_heads": 3, "hydra_num_layers": layers}
    config |= {"grounded_heads": True, "hidden_state_offset": 0, "base_model_name_or_path": "somebody/model"}
    write(tmp_path / "hydra_lm_head.pt", tensors, config)
    made = released.hydra(read_release(tmp_path, ["hydra_lm_head.pt"]), base)
    rate = 0.2 if plus and dropout else 0.0
    assert (
        made.heads == HydraHeads(3, layers, plus, rate)
        and made.compared
        and made.format == ("hydra++" if plus else "hydra")
    )
    assert made.detected == {"dropout_layout": dropout, **({"tied_blocks": True} if plus else {})}
    names: dict[str, str] = {}
    for i in range(3):
        for l in range(layers):
            j = 2 * l + 1 if dropout else l
            for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
                names[f"heads/{i}/blocks/{l}/linear/{ours}"] = f"hydra_mlp.{i}.{j}.linear.{theirs}"
                if l == 0:
                    names[f"heads/{i}/blocks/0/residual/{ours}"] = f"hydra_mlp.{i}.{j}.res_connection.{theirs}"
                vocab = f"hydra_lm_head.{i}.1.{theirs}" if dropout else f"hydra_lm_head.{i}.{theirs}"
                names[f"heads/{i}/vocab/{ours}"] = vocab
    if plus:
        layer = LAYER | {"attention_norm/scale": "input_layernorm.weight"}
        names |= {f"prefix/block/{path}": f"prefix_embeding_layer.layers.0.{name}" for path, name in layer.items()}
        names["prefix/norm/scale"] = "prefix_embeding_layer.norm.weight"
    check_places(made.params, tensors, names)


def test_untied_blocks_are_seen(base: Target, tmp_path: Path) -> None:
    tensors = cases.hydra(base)
    tensors["hydra_mlp.2.5.linear.bias"] = tensors["hydra_mlp.2.5.linear.bias"] + 1
    made = released.hydra(read_release(write(tmp_path / "h.pt", tensors)), base)
    assert made.detected["tied_blocks"] is False


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hydra_head_arch", "cross-attn"),
        ("hydra_num_heads", 4),
        ("hydra_num_layers", 4),
        ("grounded_heads", False),
        ("hidden_state_offset", 1),
    ],
)
def test_hydra_config_must_fit(base: Target, tmp_path: Path, key: str, value: object) -> None:
    release = read_release(write(tmp_path / "h.pt", cases.hydra(base), {key: value}))
    with pytest.raises(UserError, match=f"config.json says {key} = "):
        released.hydra(release, base)


# EAGLE


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
    convert, make = ALL[kind]
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


# What does not fit

ALL: dict[str, tuple[Callable, Callable[[Target], Tensors]]] = {
    "medusa v0.1": (released.medusa, lambda base: cases.medusa(layers=2)),
    "medusa v1.0": (released.medusa, lambda base: cases.medusa(prefix="medusa_head.")),
    "medusa legacy": (released.medusa, lambda base: cases.medusa(layers=2, own=False)),
    "hydra": (released.hydra, lambda base: cases.hydra(base, layers=1, plus=False)),
    "hydra++": (released.hydra, lambda base: cases.hydra(base, heads=2)),
    "eagle": (released_eagle.eagle, cases.eagle),
    "eagle3": (released_eagle.eagle3, lambda base: cases.eagle3(DRAFT_TOKENS)),
}
# Tensors that a file may do without, because they say nothing or say it again.
DISPENSABLE = {
    "input_embed_fn.weight",
    "embed_tokens.weight",
    "prefix_embeding_layer.embed_tokens.weight",
    "prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq",
    "t2d",
    "fc.bias",
}
each_release = pytest.mark.parametrize(("convert", "make"), ALL.values(), ids=ALL)


@each_release
def test_every_tensor_counts(base: Target, tmp_path: Path, convert, make) -> None:
    tensors = make(base)
    path = tmp_path / "release.bin"
    for name in tensors:
        write(path, {key: value for key, value in tensors.items() if key != name})
        if name in DISPENSABLE:
            convert(read_release(path), base)
        else:
            with pytest.raises(UserError) as caught:
                convert(read_release(path), base)
            assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@each_release
def test_wrong_shapes_kinds_and_names(base: Target, tmp_path: Path, convert, make) -> None:
    tensors = make(base)
    name = next(key for key, value in tensors.items() if value.ndim == 2)
    path = tmp_path / "release.bin"

    def complaint(changed: Tensors) -> str:
        with pytest.raises(UserError) as caught:
            convert(read_release(write(path, changed)), base)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    narrow = complaint(tensors | {name: tensors[name][:, 1:]})
    assert f"tensor {name} has shape" in narrow and "a base of width 16 and 40 tokens implies" in narrow
    assert f"tensor {name} holds int64 values" in complaint(tensors | {name: tensors[name].astype(np.int64)})
    assert "tensor stray is unknown to" in complaint(tensors | {"stray": tensors[name]})
    with pytest.raises(UserError, match="a base of width 8"):
        small = dataclasses.replace(cases.CONFIG, width=8, head_dim=2)
        convert(read_release(write(path, tensors)), cases.random_base(config=small))


@each_release
def test_other_releases_are_told_apart(base: Target, tmp_path: Path, convert, make) -> None:
    for other_convert, other_make in ALL.values():
        if other_convert is not convert:
            release = read_release(write(tmp_path / "release.bin", other_make(base)))
            with pytest.raises(UserError):
                convert(release, base)


@pytest.mark.parametrize("name", ["hydra", "eagle"])
def test_embedding_of_another_target(base: Target, tmp_path: Path, name: str) -> None:
    convert, make = ALL[name]
    release = read_release(write(tmp_path / "release.bin", make(cases.random_base(seed=1))))
    with pytest.raises(UserError, match=r"made for another target: its .*weight is not the embedding of the base base"):
        convert(release, base)


def test_numbered_heads_have_no_gaps(base: Target, tmp_path: Path) -> None:
    tensors = {key: value for key, value in cases.medusa(heads=4).items() if not key.startswith("1.")}
    with pytest.raises(UserError, match="Medusa head 1 is missing, although there is one numbered 3"):
        released.medusa(read_release(write(tmp_path / "m.pt", tensors)), base)
    tensors = {re.sub(r"mlp\.(.)\.1", r"mlp.\1.2", k): v for k, v in cases.hydra(base, layers=1, plus=False).items()}
    with pytest.raises(UserError, match=r"blocks of hydra_mlp\.0 stand at \[2\], expected them at \[1\]"):
        released.hydra(read_release(write(tmp_path / "h.pt", tensors)), base)


# Files


def test_digests_name_every_file(tmp_path: Path) -> None:
    file = write(tmp_path / "medusa_lm_head.pt", cases.medusa(), {"medusa_num_heads": 5})
    (tmp_path / "README.md").write_text("not read")
    digests = read_release(tmp_path, ["medusa_lm_head.pt"]).digests
    assert digests == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (file, tmp_path / "config.json")
    }


def test_where_tensors_are_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "pytorch_model.bin", {"a": np.zeros(1)})
    write(tmp_path / "special.pt", {"b": np.zeros(1)})
    assert read_release(tmp_path).names == ["a"] and read_release(tmp_path, ["special.pt"]).names == ["b"]
    assert read_release(tmp_path / "special.pt").names == ["b"]
    with pytest.raises(UserError, match=r"there is no released file .*nowhere\.pt"):
        read_release(tmp_path / "nowhere.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no released file, special\.pt or model\.safetensors .*empty"):
        read_release(tmp_path / "empty", ["special.pt"])


def test_indexes_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "s", cases.medusa())
    index = folder / "pytorch_model.bin.index.json"
    good = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(good.values()))

    def complaint(content: object) -> str:
        index.write_text(json.dumps(content))
        with pytest.raises(UserError) as caught:
            read_release(folder)
        return str(caught.value)

    assert "has no weight_map" in complaint({})
    assert "which is not a file beside it" in complaint({"weight_map": {"0.1.weight": "../x.bin"}})
    assert "there is no gone.bin" in complaint({"weight_map": {**good, "more": "gone.bin"}})
    assert "disagree about where tensor" in complaint({"weight_map": dict.fromkeys(good, shards[0])})
    assert "disagree about where tensor more is" in complaint({"weight_map": {**good, "more": shards[0]}})


def test_files_that_hold_other_things(tmp_path: Path) -> None:
    for content, complaint in (
        ([1, 2], "holds a list, expected a dict of tensors"),
        ({"state_dict": {"w": np.zeros(1)}}, "entry 'state_dict' is not a tensor but a dict"),
        ({3: np.zeros(1)}, "one of its tensors goes by a int, expected a string"),
    ):
        with pytest.raises(UserError, match=complaint):
            read_release(write_torch(tmp_path / "m.pt", content))
    (tmp_path / "m.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        read_release(tmp_path / "m.safetensors")
