"""Hugging Face directories: configs of every family, strict weights, bit-equal round trips, all-or-nothing writing."""

import dataclasses
import errno
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from models import load_target
from models.config import RopeScaling, TransformerConfig
from models.errors import UserError
from models.formats import storage
from models.formats.hf import load_config, load_params, save_target
from models.formats.hf_config import config_from_hf, config_to_hf
from models.transformer import init, split_projections, stack_layers
from tests.parity.goldens import BARE, CASES, FOLDER
from tests.parity.stepwise import stepwise_logits

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY = config_from_hf(LLAMA)


def family(name: str, **keys) -> TransformerConfig:
    return config_from_hf({**LLAMA, "model_type": name, **keys})


def write_target(directory: Path, config: TransformerConfig = TINY, **options) -> dict:
    params = init(config, jax.random.key(0))
    save_target(directory, config, params, **options)
    return params


def edit(directory: Path, **tensors) -> None:
    """Replaces tensors of a saved model; None removes one."""
    held = load_file(directory / "model.safetensors") | tensors
    save_file({k: v for k, v in held.items() if v is not None}, directory / "model.safetensors")


def assert_trees_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Golden files of transformers: config.json and weights as it writes them, logits as it computes them.


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(case: str) -> None:
    target = load_target(FOLDER / case, jnp.float32)
    golden = load_file(FOLDER / case / "golden.safetensors")
    np.testing.assert_allclose(target.apply(golden["tokens"]).logits, golden["logits"], rtol=0, atol=1e-4)
    steps = stepwise_logits(target.config, target.params, golden["tokens"], prefill=6)
    np.testing.assert_allclose(steps, golden["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_golden_config_means_the_same_in_old_keys(case: str) -> None:
    """CASES are in transformers 4 keys, the files in transformers 5 keys."""
    assert load_config(FOLDER / case) == config_from_hf(CASES[case])


# config.json


# All that a config.json of these keys alone means; tests/parity/test_transformers.py asks transformers for the same.
_SHARED = {"rope_theta": 10_000.0, "norm_eps": 1e-6, "vocab_size": 32, "width": 64, "mlp_width": 24, "num_heads": 32}
_QWEN = {"max_position": 32_768, "num_kv_heads": 32, "windows": (*[None] * 28, 4096, 4096)}
DEFAULTS: dict[str, dict] = {
    "llama": dict(max_position=2048, num_kv_heads=32, head_dim=2, bos_id=1, eos_ids=(2,)),
    "mistral": dict(max_position=131_072, num_kv_heads=8, head_dim=2, windows=(4096,) * 30, bos_id=1, eos_ids=(2,)),
    "qwen2": dict(**_QWEN, head_dim=2, qkv_bias=True),
    "qwen3": dict(**_QWEN, head_dim=128, qk_norm=True),
    "gemma2": dict(
        max_position=8192,
        num_kv_heads=4,
        head_dim=256,
        windows=(4096, None) * 15,
        tied_embeddings=True,
        embed_scale=True,
        post_norms=True,
        zero_centred_norm=True,
        activation="gelu_tanh",
        attention_softcap=50.0,
        logit_softcap=30.0,
        bos_id=2,
        eos_ids=(1,),
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_absent_keys_take_the_familys_defaults(name: str) -> None:
    expected = TransformerConfig(**_SHARED, **DEFAULTS[name], num_layers=30, family=name)
    assert config_from_hf({"model_type": name, **BARE}) == expected


def test_what_keys_derive_from_each_other() -> None:
    assert (TINY.num_kv_heads, TINY.head_dim, TINY.windows, TINY.tied_embeddings) == (4, 4, (), False)
    assert family("mistral", num_key_value_heads=None, sliding_window=None).windows == ()
    assert family("gemma2", query_pre_attn_scalar=144).query_scale == 1 / 12


def test_windows_of_qwen() -> None:
    window = {"num_key_value_heads": 2, "sliding_window": 8, "num_hidden_layers": 3}
    assert family("qwen2", **window, max_window_layers=1).windows == ()
    assert family("qwen2", **window, max_window_layers=1, use_sliding_window=True).windows == (None, 8, 8)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert family("qwen3", **window, layer_types=kinds, use_sliding_window=True).windows == (8, None, 8)


def test_rope_in_old_and_new_keys() -> None:
    linear = RopeScaling("linear", 2.0)
    for keys in (
        {"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_theta": 500, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}},
    ):
        config = config_from_hf({**LLAMA, **keys})
        assert (config.rope_theta, config.rope_scaling) == (500.0, linear)
    llama3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    scaling = config_from_hf({**LLAMA, "rope_scaling": llama3, "max_position_embeddings": 77}).rope_scaling
    assert scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 77)


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": [5, 7, 5]}, (5, 7)),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": 5}, {"eos_token_id": None}, ()),
        ({"eos_token_id": 5}, {"bos_token_id": 1}, ()),
        ({"eos_token_id": [5, 6]}, None, (5, 6)),
        ({}, {"eos_token_id": 7}, (7,)),
        ({}, None, (2,)),
    ],
)
def test_end_of_text_is_where_transformers_puts_it(tmp_path: Path, config, generation, ends) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load_config(tmp_path).eos_ids == ends


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}}, "rope_scaling.mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "relu"}, "relu"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
    ],
)
def test_what_cannot_be_honoured_is_named(keys: dict, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **keys}))
    with pytest.raises(UserError, match=named) as caught:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_missing_key_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size is missing"):
        config_from_hf({k: v for k, v in LLAMA.items() if k != "vocab_size"})
    with pytest.raises(UserError, match=r"no config\.json"):
        load_config(tmp_path / "nowhere")
    for content, complaint in ((b"{", "not valid JSON"), (b"[]", "JSON object"), (b"\xff", "not UTF-8 text")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=complaint):
            load_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*config\.json: Is a directory"):
        load_config(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"cannot read .*config\.json: Permission denied"):
        load_config(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_config_survives_the_round_trip(case: str) -> None:
    config = config_from_hf(CASES[case])
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_any_order_of_windows_survives_the_round_trip() -> None:
    for name in ("qwen2", "qwen3", "gemma2"):
        for windows in ((8, None), (None, 8), (8, 8), ()):
            config = dataclasses.replace(family(name, num_key_value_heads=2), windows=windows)
            assert config_from_hf(config_to_hf(config)) == config


def test_inexpressible_config_is_refused() -> None:
    for change in ({"logit_softcap": 30.0}, {"windows": (8, None)}, {"qk_norm": True}, {"query_scale": 0.3}):
        with pytest.raises(UserError, match=next(iter(change))):
            config_to_hf(dataclasses.replace(TINY, **change))
    # Other spellings of what the family does anyway are fine.
    config_to_hf(dataclasses.replace(TINY, windows=(None, None), query_scale=TINY.head_dim**-0.5))


# Weights


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_round_trip_is_bit_equal(tmp_path: Path, dtype) -> None:
    params = init(TINY, jax.random.key(1), dtype)
    save_target(tmp_path / "t", TINY, params)
    back = load_target(tmp_path / "t", dtype)
    assert back.config == TINY and jax.tree.leaves(back.params)[0].dtype == dtype
    assert_trees_equal(split_projections(back.config, back.params), params)
    assert json.loads((tmp_path / "t" / "config.json").read_text())["torch_dtype"] == jnp.dtype(dtype).name


def test_weights_are_cast_on_the_way_in(tmp_path: Path) -> None:
    params = write_target(tmp_path / "t")
    loaded = load_params(TINY, tmp_path / "t", jnp.bfloat16)
    assert_trees_equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    edit(tmp_path / "t", **{"model.norm.weight": np.full(16, 1.5, ml_dtypes.bfloat16)})
    assert load_params(TINY, tmp_path / "t")["final_norm"]["scale"].dtype == jnp.float32


def test_kernels_are_stored_transposed(tmp_path: Path) -> None:
    params = write_target(tmp_path / "t")
    stored = load_file(tmp_path / "t" / "model.safetensors")
    down = params["layers"][1]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(stored["model.layers.1.mlp.down_proj.weight"], down.T)
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], params["embed"]["embedding"])


def test_shards_and_stacked_layers(tmp_path: Path) -> None:
    params = init(TINY, jax.random.key(0))
    save_target(tmp_path / "t", TINY, stack_layers(params), max_shard_bytes=6000)
    shards = sorted(p.name for p in (tmp_path / "t").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert all((tmp_path / "t" / name).stat().st_size < 8000 for name in shards)
    index = json.loads((tmp_path / "t" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert_trees_equal(load_params(TINY, tmp_path / "t"), params)
    (tmp_path / "t" / shards[1]).unlink()
    with pytest.raises(UserError, match=shards[1]):
        load_params(TINY, tmp_path / "t")


def test_bad_tensors_are_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    for number, (change, complaint) in enumerate(
        [
            ({name: None}, f"{name} is missing"),
            ({name: None, "lm_head.weight": None}, r"lm_head.weight is missing \(and 1 more\)"),
            (
                {"model.layers.2.mlp.up_proj.weight": np.zeros(3, np.float32)},
                "model.layers.2.mlp.up_proj.weight is unkn",
            ),
            ({name: np.zeros((24, 15), np.float32)}, rf"{name} has shape \[24, 15\], config.json implies \[24, 16\]"),
            ({"model.norm.weight": np.zeros(1, np.float32)}, r"model.norm.weight has shape \[1\]"),
            ({name: np.zeros((24, 16), np.int8)}, f"{name} is stored as I8"),
        ]
    ):
        directory = tmp_path / str(number)
        write_target(directory)
        edit(directory, **change)
        with pytest.raises(UserError, match=complaint) as caught:
            load_params(TINY, directory)
        assert str(directory) in str(caught.value)


def test_damaged_or_absent_weights(tmp_path: Path) -> None:
    write_target(tmp_path / "t")
    weights = tmp_path / "t" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged"):
        load_params(TINY, tmp_path / "t")
    weights.rename(tmp_path / "t" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a safetensors file by another name"):
        load_params(TINY, tmp_path / "t")
    (tmp_path / "t" / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"there is no model\.safetensors in"):
        load_params(TINY, tmp_path / "t")


def test_harmless_extra_tensors(tmp_path: Path) -> None:
    tied = dataclasses.replace(TINY, tied_embeddings=True)
    params = write_target(tmp_path / "t", tied)
    embedding = np.asarray(params["embed"]["embedding"])
    edit(
        tmp_path / "t",
        **{"lm_head.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)},
    )
    assert_trees_equal(load_params(tied, tmp_path / "t"), params)
    edit(tmp_path / "t", **{"lm_head.weight": embedding + 1})
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        load_params(tied, tmp_path / "t")


def test_params_that_do_not_fit_are_not_saved(tmp_path: Path) -> None:
    params = init(TINY, jax.random.key(0))
    for config, complaint in (
        (dataclasses.replace(TINY, vocab_size=33), r"embed/embedding has shape \[32, 16\], expected \[33, 16\]"),
        (dataclasses.replace(TINY, tied_embeddings=True), "head/kernel does not belong"),
        (dataclasses.replace(TINY, qk_norm=True), "layers/0/attention/k_norm/scale is missing"),
    ):
        with pytest.raises(UserError, match=complaint):
            save_target(tmp_path / "t", config, params)
    assert not list(tmp_path.iterdir())


def test_weights_go_straight_to_their_shards(run_python, tmp_path: Path) -> None:
    write_target(tmp_path / "t")
    code = f"""
import jax, numpy as np
from models import load_target
from models.sharding import make_mesh
from models.transformer import split_projections
plain = load_target({str(tmp_path / "t")!r})
spread = load_target({str(tmp_path / "t")!r}, mesh=make_mesh(data=1, fsdp=2, tensor=2))
q = spread.params['layers'][0]['attention']['q']['kernel']
assert q.shape == (16, 16) and {{s.data.shape for s in q.addressable_shards}} == {{(8, 8)}}, q.sharding
jax.tree.map(np.testing.assert_array_equal, split_projections(plain.config, plain.params), spread.params)
np.testing.assert_allclose(plain.apply([[1, 2, 3]]).logits, spread.apply([[1, 2, 3]]).logits, atol=1e-5)
print('done')
"""
    assert run_python(code, devices=4).strip() == "done"


# Whole or not at all


def test_existing_directory_is_kept_unless_told(tmp_path: Path) -> None:
    first = write_target(tmp_path / "t")
    with pytest.raises(UserError, match="already exists"):
        write_target(tmp_path / "t")
    (tmp_path / "t" / "stale.txt").write_text("old")
    write_target(tmp_path / "t", overwrite=True)
    assert not (tmp_path / "t" / "stale.txt").exists()
    assert_trees_equal(load_params(TINY, tmp_path / "t"), first)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match=r"no config\.json"):
        write_target(tmp_path / "home", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "t"]
    with pytest.raises(UserError, match="cannot write"):
        write_target(tmp_path / "home" / "diary.txt" / "t")


@pytest.mark.parametrize(
    "failure",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise failure

    old = write_target(tmp_path / "t")
    monkeypatch.setattr(storage, "save_file", fail)
    for name, overwrite in (("new", False), ("t", True)):
        with pytest.raises(OSError) as caught:
            write_target(tmp_path / name, overwrite=overwrite)
        assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert_trees_equal(load_params(TINY, tmp_path / "t"), old)


def test_interrupted_replacement_restores_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_target(tmp_path / "t")
    rename = Path.rename

    def fail_into_place(self, target):
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(OSError, match="broken"), storage.new_directory(tmp_path / "t", "config.json", True) as partial:
        (partial / "config.json").write_text("{}")
    assert [p.name for p in tmp_path.iterdir()] == ["t"] and load_config(tmp_path / "t") == TINY
