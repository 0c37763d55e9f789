"""Which of a directory's files are its weights, in what formats, and what is said of those that cannot be."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.config import TransformerConfig
from models.errors import UserError
from models.formats.hf import load_params, tensor_names
from models.formats.storage import leaves_by_path, refuse_non_finite, write_json
from models.formats.weights import INDEX
from models.transformer import param_shapes
from tests.models.formats.released_cases import write_shards
from tests.models.formats.torch_archives import write_torch

TINY = TransformerConfig(vocab_size=12, width=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=12)
TIED = dataclasses.replace(TINY, tied_embeddings=True)
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 134\n"


def tensors(config: TransformerConfig = TINY, value: float = 1.0) -> dict[str, np.ndarray]:
    """Weights as Hugging Face has them, all of them `value`."""
    names, shapes = tensor_names(config), leaves_by_path(param_shapes(config))
    return {
        name: np.full(shapes[path].shape[::-1] if path.endswith("kernel") else shapes[path].shape, value, np.float16)
        for path, name in names.items()
    }


def directory(folder: Path, held: dict[str, np.ndarray], name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    if name.endswith(".bin"):
        write_torch(folder / name, held)
    else:
        save_file(held, folder / name)
    return folder


def value_of(folder: Path, config: TransformerConfig = TINY) -> float:
    values = {float(np.asarray(leaf).flat[0]) for leaf in jax.tree.leaves(load_params(config, folder))}
    assert len(values) == 1
    return values.pop()


def complaint(folder: Path, config: TransformerConfig = TINY) -> str:
    with pytest.raises(UserError) as caught:
        load_params(config, folder)
    return str(caught.value)


def test_of_several_weights_those_are_taken_that_transformers_takes(tmp_path: Path) -> None:
    folder = directory(tmp_path / "m", tensors(value=1), "model.safetensors")
    write_shards(folder, tensors(value=2), "model", "safetensors")
    directory(folder, tensors(value=3), "pytorch_model.bin")
    write_shards(folder, tensors(value=4))
    for expected, name in enumerate(("model.safetensors", INDEX, "pytorch_model.bin"), 1):
        assert value_of(folder) == expected
        (folder / name).unlink()
    assert value_of(folder) == 4
    # An index that was left behind alone names what is gone.
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    assert "there is no pytorch_model-00001-of-00002.bin" in complaint(folder)
    directory(folder, tensors(value=5))
    assert value_of(folder) == 5


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_weights_of_torch_are_read_like_safetensors(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    held = {name: rng.normal(size=x.shape).astype(getattr(ml_dtypes, kind, kind)) for name, x in tensors().items()}
    one = directory(tmp_path / "safe", held)
    other = directory(tmp_path / "torch", held, "pytorch_model.bin")
    jax.tree.map(np.testing.assert_array_equal, load_params(TINY, one), load_params(TINY, other))
    shards = write_shards(tmp_path / "shards", held)
    jax.tree.map(np.testing.assert_array_equal, load_params(TINY, one), load_params(TINY, shards))


def test_tied_weights_under_either_name(tmp_path: Path) -> None:
    held = tensors(TIED, 2)
    assert HEAD not in held
    under_head = {HEAD if name == EMBEDDING else name: value for name, value in held.items()}
    assert value_of(directory(tmp_path / "embedding", held), TIED) == 2
    assert value_of(directory(tmp_path / "head", under_head), TIED) == 2
    assert value_of(directory(tmp_path / "torch", under_head, "pytorch_model.bin"), TIED) == 2
    assert value_of(directory(tmp_path / "both", held | under_head), TIED) == 2
    message = complaint(directory(tmp_path / "differ", held | under_head | {HEAD: held[EMBEDDING] + 1}), TIED)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    message = complaint(directory(tmp_path / "untied", held))
    assert "lm_head.weight is missing: config.json says that it is not tied" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16"])
def test_tensors_that_are_not_finite_are_named(tmp_path: Path, kind: str, bad: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    held = {key: value.astype(getattr(ml_dtypes, kind, kind)) for key, value in tensors().items()}
    held[name][3, 2] = bad
    assert f"tensor {name} holds NaN or infinite values" in complaint(directory(tmp_path / "m", held))
    largest = np.full((700, 700), ml_dtypes.finfo(held[name].dtype).max, held[name].dtype)
    refuse_non_finite(largest.T, "w", "here")
    largest[699, 698] = bad
    with pytest.raises(UserError, match=r"here: tensor w holds .* at \[698, 699\]"):
        refuse_non_finite(largest.T, "w", "here")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("flax_model.msgpack", "weights of Flax"),
        ("tf_model.h5", "weights of TensorFlow or Keras"),
        ("model.onnx", "an ONNX graph"),
        ("consolidated.00.pth", "weights in Meta's own format"),
        ("adapter_model.safetensors", "an adapter"),
    ],
)
def test_formats_that_are_known_and_not_read_are_called_so(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_bytes(b"content")
    message = complaint(tmp_path)
    assert "there is no model.safetensors" in message and f"it holds {name}, {what}" in message


def test_quantised_weights_are_called_so(tmp_path: Path) -> None:
    held = tensors()
    name = "model.layers.0.mlp.up_proj"
    del held[f"{name}.weight"]
    held |= {f"{name}.qweight": np.zeros((3, 3), np.int32), f"{name}.scales": np.zeros(3, np.float16)}
    assert f"tensor {name}.qweight belongs to quantised weights" in complaint(directory(tmp_path / "m", held))


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "pytorch_model.bin"])
def test_pointers_are_called_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    assert complaint(tmp_path).endswith("is a Git LFS pointer, not the file itself: fetch it with git lfs pull")


def test_a_shard_that_is_a_pointer_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", tensors(), "model", "safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(POINTER)
    assert "model-00002-of-00002.safetensors is a Git LFS pointer" in complaint(folder)


def test_indexes_and_files_that_do_not_fit_each_other(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", tensors(), "model", "safetensors")
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    shards = sorted(set(index.values()))
    for changed in ({**index, NORM: next(s for s in shards if s != index[NORM])}, {**index, "more": shards[0]}):
        write_json(folder / INDEX, {"weight_map": changed})
        assert "disagree about where tensor" in complaint(folder)
    for changed, said in (({}, "has no weight_map"), ({NORM: "../x"}, "not a file beside it"), ({NORM: 3}, "names 3")):
        write_json(folder / INDEX, {"weight_map": changed})
        assert said in complaint(folder)
