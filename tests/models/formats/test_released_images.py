"""Published image checkpoints: every tensor reaches its place, and whatever does not fit is one sentence."""

import dataclasses
import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models.errors import UserError
from models.formats import image_models as files
from models.formats.released_images import read_vae, read_var, vae_name
from models.formats.storage import leaves_by_path
from models.images.config import SCHEDULES, VARConfig, VQVAEConfig
from tests import image_reference as reference
from tests.models.formats import image_checkpoints as checkpoints
from tests.models.formats.torch_archives import write_torch

VAR = VARConfig(depth=2, width=8, num_heads=2, num_classes=5, vocab_size=20, latent_channels=4, scales=(1, 2, 4))
SHARED = dataclasses.replace(VAR, depth=3, shared_modulation=True, scales=SCHEDULES["256"])
VAE = VQVAEConfig(vocab_size=20, latent_channels=4, width=4, multipliers=(1, 1, 2), blocks=1, scales=(1, 2, 4))


def test_every_tensor_of_a_var_reaches_its_place(tmp_path: Path) -> None:
    tensors = checkpoints.var(VAR)
    path = write_torch(tmp_path / "var_d2.pth", tensors)
    made = read_var(path, (1, 2, 4))
    assert made.config == VAR and made.digests == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    p, block = made.params, "blocks.1."
    layer = p["layers"][1]
    for leaf, expected in (
        (p["word"]["kernel"], tensors["word_embed.weight"].T),
        (p["word"]["bias"], tensors["word_embed.bias"]),
        (p["classes"]["embedding"], tensors["class_emb.weight"]),
        (p["levels"]["embedding"], tensors["lvl_embed.weight"]),
        (p["positions"]["start"], tensors["pos_start"][0, 0]),
        (p["positions"]["embedding"], tensors["pos_1LC"][0]),
        (layer["attention"]["qkv"]["kernel"], tensors[f"{block}attn.mat_qkv.weight"].T),
        (layer["attention"]["q_bias"], tensors[f"{block}attn.q_bias"]),
        (layer["attention"]["v_bias"], tensors[f"{block}attn.v_bias"]),
        (layer["attention"]["log_scale"], tensors[f"{block}attn.scale_mul_1H11"][0, :, 0, 0]),
        (layer["attention"]["out"]["kernel"], tensors[f"{block}attn.proj.weight"].T),
        (layer["attention"]["out"]["bias"], tensors[f"{block}attn.proj.bias"]),
        (layer["mlp"]["up"]["kernel"], tensors[f"{block}ffn.fc1.weight"].T),
        (layer["mlp"]["up"]["bias"], tensors[f"{block}ffn.fc1.bias"]),
        (layer["mlp"]["down"]["kernel"], tensors[f"{block}ffn.fc2.weight"].T),
        (layer["mlp"]["down"]["bias"], tensors[f"{block}ffn.fc2.bias"]),
        (layer["modulation"]["kernel"], tensors[f"{block}ada_lin.1.weight"].T),
        (layer["modulation"]["bias"], tensors[f"{block}ada_lin.1.bias"]),
        (p["head"]["modulation"]["kernel"], tensors["head_nm.ada_lin.1.weight"].T),
        (p["head"]["modulation"]["bias"], tensors["head_nm.ada_lin.1.bias"]),
        (p["head"]["vocab"]["kernel"], tensors["head.weight"].T),
        (p["head"]["vocab"]["bias"], tensors["head.bias"]),
    ):
        np.testing.assert_array_equal(leaf, expected)
    assert len(leaves_by_path(p)) == 10 + 2 * 12


def test_shared_modulation_and_a_published_schedule_are_recognised(tmp_path: Path) -> None:
    tensors = checkpoints.var(SHARED, buffers=False)
    made = read_var(write_torch(tmp_path / "var_d36.pth", tensors))
    assert made.config == SHARED
    np.testing.assert_array_equal(made.params["modulation"]["kernel"], tensors["shared_ada_lin.1.weight"].T)
    offset = made.params["layers"][2]["modulation"]["offset"]
    np.testing.assert_array_equal(offset, tensors["blocks.2.ada_gss"][0, 0])
    assert jax.tree.map(np.shape, made.params) == jax.tree.map(np.shape, reference.random_var(SHARED))


def test_every_tensor_of_the_vae_reaches_its_place(tmp_path: Path) -> None:
    tensors = checkpoints.vae(VAE)
    made = read_vae(write_torch(tmp_path / "vae.pth", tensors), (1, 2, 4))
    assert made.config == VAE
    used = set()
    for path, leaf in leaves_by_path(made.params).items():
        name = vae_name(path)
        used.add(name)
        expected = tensors[name].transpose(2, 3, 1, 0) if tensors[name].ndim == 4 else tensors[name]
        np.testing.assert_array_equal(leaf, expected, err_msg=path)
    assert used == set(tensors) - {"quantize.ema_vocab_hit_SV"}
    p, at = made.params, "decoder.up.1."
    for leaf, name in (
        (p["encoder"]["level_0"]["resample"], "encoder.down.0.downsample.conv"),
        (p["encoder"]["level_2"]["block_0"]["shortcut"], "encoder.down.2.block.0.nin_shortcut"),
        (p["encoder"]["level_2"]["attention_0"]["out"], "encoder.down.2.attn.0.proj_out"),
        (p["decoder"]["level_1"]["block_1"]["conv_2"], f"{at}block.1.conv2"),
        (p["decoder"]["level_1"]["resample"], f"{at}upsample.conv"),
        (p["decoder"]["middle"]["attention"]["qkv"], "decoder.mid.attn_1.qkv"),
        (p["decoder"]["middle"]["block_1"]["conv_1"], "decoder.mid.block_2.conv1"),
        (p["quant"], "quant_conv"),
        (p["post_quant"], "post_quant_conv"),
        (p["phi"][3], "quantize.quant_resi.qresi_ls.3"),
    ):
        np.testing.assert_array_equal(leaf["kernel"], tensors[f"{name}.weight"].transpose(2, 3, 1, 0))
        np.testing.assert_array_equal(leaf["bias"], tensors[f"{name}.bias"])
    assert read_vae(tmp_path / "vae.pth").config.scales == SCHEDULES["256"]


def test_the_published_vae_has_the_published_tensors() -> None:
    config = VQVAEConfig()
    paths = leaves_by_path(files.param_shapes(config))
    named = {vae_name(path): leaf.shape for path, leaf in paths.items()}
    tiny = checkpoints.vae(dataclasses.replace(config, width=1, vocab_size=2), buffers=False)
    assert set(named) == set(tiny) and len(named) == 323
    shortcuts = {name for name in named if name.endswith("nin_shortcut.weight")}
    places = ("encoder.down.2.block.0", "encoder.down.4.block.0", "decoder.up.3.block.0", "decoder.up.1.block.0")
    assert shortcuts == {f"{place}.nin_shortcut.weight" for place in places}


def test_trainers_checkpoints_are_taken_apart(tmp_path: Path) -> None:
    parts = {"var_wo_ddp": checkpoints.var(VAR), "vae_local": checkpoints.vae(VAE), "var_opt": {"lr": 0.1}}
    path = write_torch(tmp_path / "ar-ckpt-last.pth", {"epoch": 3, "trainer": parts, "args": {"depth": 2}})
    assert read_var(path, (1, 2, 4)).config == VAR
    assert read_vae(path, (1, 2, 4)).config == VAE


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    tensors = {name: x.astype(np.float16) for name, x in checkpoints.var(VAR, buffers=False).items()}
    made = read_var(write_torch(tmp_path / "half.pth", tensors), (1, 2, 4))
    assert {leaf.dtype for leaf in jax.tree.leaves(made.params)} == {np.dtype(np.float32)}


class Runs:
    """Pickles into a call of the shell."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def without(name: str) -> Callable[[dict], dict]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def having(**new: np.ndarray) -> Callable[[dict], dict]:
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in new.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("blocks.1.attn.q_bias"), r"tensor blocks\.1\.attn\.q_bias is missing"),
        (without("blocks.0.attn.scale_mul_1H11"), r"no VAR transformer: tensor blocks\.0\.attn\.scale_mul_1H11 is mis"),
        (without("word_embed.weight"), r"holds no VAR transformer: tensor word_embed\.weight is missing"),
        (without("head.bias"), r"tensor head\.bias is missing"),
        (
            having(blocks__2__ffn__fc1__weight=np.zeros(3)),
            r"blocks\.2\.ffn\.fc1\.weight is unknown to a VAR of depth 2",
        ),
        (having(text_embed=np.zeros(3, np.float32)), "tensor text_embed is unknown to a VAR of depth 2 and width 8"),
        (having(head__bias=np.zeros(21, np.float32)), r"head\.bias has shape \[21\], a VAR .* implies \[20\]"),
        (having(pos_1LC=np.zeros((21, 8), np.float32)), r"pos_1LC has shape \[21, 8\], expected 3 axes"),
        (
            having(pos_1LC=np.zeros((1, 22, 8), np.float32)),
            r"22 positions and lvl_embed 3 scales, but the schedule 1,2",
        ),
        (having(lvl_1L=np.zeros((1, 21), np.int64)), "lvl_1L does not have the levels of the schedule 1,2,4"),
        (having(head__bias=np.zeros(20, np.int64)), r"tensor head\.bias holds int64 values, expected floating point"),
        (having(head__bias=None), "entry 'head.bias' is not a tensor but a NoneType"),
        (lambda tensors: {"trainer": {"vae_local": tensors}}, "holds no VAR transformer: expected a dict of tensors"),
        (lambda tensors: list(tensors.values()), "holds no VAR transformer: expected a dict of tensors"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Callable[[dict], Any], words: str) -> None:
    path = write_torch(tmp_path / "var.pth", change(checkpoints.var(VAR)))
    with pytest.raises(UserError, match=words):
        read_var(path, (1, 2, 4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("decoder.up.2.attn.1.norm.bias"), r"tensor decoder\.up\.2\.attn\.1\.norm\.bias is missing"),
        (having(extra=np.zeros(1, np.float32)), "tensor extra is unknown to a VQ-VAE of width 4"),
        (without("quantize.quant_resi.qresi_ls.1.weight"), r"quantize\.quant_resi\.qresi_ls\.1"),
        (having(quant_conv__weight=np.zeros((4, 4, 1, 1), np.float32)), r"quant_conv\.weight has shape \[4, 4, 1, 1\]"),
        (lambda tensors: checkpoints.var(VAR), r"holds no VQ-VAE: tensor encoder\.conv_in\.weight is missing"),
    ],
)
def test_what_does_not_fit_the_vae_is_named(tmp_path: Path, change: Callable[[dict], Any], words: str) -> None:
    path = write_torch(tmp_path / "vae.pth", change(checkpoints.vae(VAE)))
    with pytest.raises(UserError, match=words):
        read_vae(path, (1, 2, 4))


def test_an_unpublished_schedule_must_be_given(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "var.pth", checkpoints.var(VAR))
    with pytest.raises(UserError, match="21 positions and lvl_embed 3 scales, as no published schedule has"):
        read_var(path)
    with pytest.raises(UserError, match="but the schedule 1,2,3 has 14 and 3"):
        read_var(path, (1, 2, 3))


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"pos_start": Runs(f"touch {marker}")}, 2))
    for read in (read_var, read_vae):
        with pytest.raises(UserError, match="nothing in it was executed"):
            read(path)
    assert not marker.exists()
