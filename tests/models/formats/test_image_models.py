"""Directories of image models: bit-equal round trips, and one sentence for whatever does not fit."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.errors import UserError
from models.formats import image_models as files
from models.images.config import VARConfig, VQVAEConfig
from models.transformer import stack_layers
from tests import image_reference as reference

VAR = VARConfig(depth=2, width=8, num_heads=2, num_classes=5, vocab_size=20, latent_channels=4, scales=(1, 2, 4))
VAE = VQVAEConfig(vocab_size=20, latent_channels=4, width=4, multipliers=(1, 2), blocks=1, scales=(1, 2, 4))

each_config = pytest.mark.parametrize("config", [VAR, VAE], ids=["var", "vqvae"])


def drawn(config: VARConfig | VQVAEConfig, dtype=jnp.float32) -> dict:
    tree = reference.random_var(config) if isinstance(config, VARConfig) else reference.random_vqvae(config)
    return jax.device_put(jax.tree.map(lambda x: np.asarray(x, dtype), tree))


@each_config
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reads_what_was_written(config: VARConfig | VQVAEConfig, dtype, tmp_path: Path) -> None:
    params = drawn(config, dtype)
    files.save(tmp_path / "model", config, params, provenance={"steps": 7})
    found, read = files.load(tmp_path / "model", type(config), dtype)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype(dtype)}
    wider = files.load(tmp_path / "model", type(config))[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(wider)} == {jnp.dtype(jnp.float32)}
    record = json.loads((tmp_path / "model" / "config.json").read_text())
    assert record["kind"] == ("var" if config is VAR else "vqvae") and record["provenance"] == {"steps": 7}
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_stacked_layers_are_written_one_by_one(tmp_path: Path) -> None:
    params = drawn(VAR)
    files.save(tmp_path / "model", VAR, stack_layers(params))
    jax.tree.map(np.testing.assert_array_equal, files.load(tmp_path / "model", VARConfig)[1], params)
    assert "layers.1.attention.qkv.kernel" in load_file(tmp_path / "model" / "model.safetensors")


def test_a_directory_is_replaced_only_on_request(tmp_path: Path) -> None:
    files.save(tmp_path / "model", VAE, drawn(VAE))
    with pytest.raises(UserError, match="already exists"):
        files.save(tmp_path / "model", VAR, drawn(VAR))
    files.save(tmp_path / "model", VAR, drawn(VAR), overwrite=True)
    assert files.read_config(tmp_path / "model", VARConfig) == VAR


def test_parameters_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    params = drawn(VAE)
    phi = params["phi"]
    for wrong, words in (
        ({**params, "phi": phi[:3]}, r"params: parameter phi/3/bias is missing \(and 1 more\)"),
        ({**params, "ema": phi[0]}, r"params: parameter ema/bias is unknown to this model \(and 1 more\)"),
        ({**params, "quant": {**phi[0], "bias": jnp.zeros(5)}}, r"params: quant/bias has shape \[5\], expected \[4\]"),
    ):
        with pytest.raises(UserError, match=words):
            files.save(tmp_path / "model", VAE, wrong)
    assert not list(tmp_path.iterdir())


def test_damaged_directories_are_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    files.save(model, VAE, drawn(VAE))
    tensors, record = load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())

    def complaint(tensors: dict = tensors, record: dict = record, kind: type = VQVAEConfig) -> str:
        save_file(tensors, model / "model.safetensors")
        (model / "config.json").write_text(json.dumps(record))
        with pytest.raises(UserError) as caught:
            files.load(model, kind)
        return str(caught.value)

    name = "phi.2.bias"
    fewer = {key: value for key, value in tensors.items() if key != name}
    assert complaint(fewer) == f"{model}: tensor {name} is missing"
    assert complaint(tensors | {"extra": np.zeros(3)}) == f"{model}: tensor extra is unknown to this model"
    misshapen = complaint(tensors | {name: np.zeros(3, np.float32)})
    assert misshapen == f"{model}: tensor {name} has shape [3], config.json implies [4]"
    assert f"tensor {name} is stored as I32" in complaint(tensors | {name: np.zeros(4, np.int32)})
    assert f"tensor {name} holds NaN or infinite values" in complaint(tensors | {name: np.full(4, np.nan, np.float32)})
    assert "has kind 'vqvae', expected 'var'" in complaint(kind=VARConfig)
    assert "has kind None" in complaint(record={})
    assert "has an unknown key width_ (did you mean 'width'?)" in complaint(record=record | {"width_": 4})
    assert "scales[1] must be int, got str '2'" in complaint(record=record | {"scales": [1, "2"]})
    assert "scales must be two or more rising sides" in complaint(record=record | {"scales": [2, 1]})
    (model / "config.json").write_text(json.dumps(record))
    (model / "model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        files.load(model, VQVAEConfig)
    with pytest.raises(UserError, match=r"config\.json"):
        files.load(tmp_path / "nowhere", VQVAEConfig)
