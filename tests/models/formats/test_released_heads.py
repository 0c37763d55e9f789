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
from models.errors import UserError
from models.formats import released_eagle
from models.formats import released_heads as released
from models.formats.hf import tensor_names
from models.formats.release import read_release
from models.formats.storage import leaves_by_path
from models.formats.target import Target
from models.heads.hydra import HydraHeads
from models.heads.medusa import MedusaHeads, vocab_kernel
from tests.models.formats import released_cases as cases
from tests.models.formats.released_cases import DRAFT_TOKENS, LAYER, Tensors, check_places, write, write_shards
from tests.models.formats.torch_archives import write_torch


@pytest.fixture(scope="module")
def base() -> Target:
    return cases.random_base()


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
