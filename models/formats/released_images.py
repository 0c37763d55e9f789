"""Published checkpoints of VAR, of its tokenizer and of CoDe, strictly: every tensor is used, none may be left over.

One table per model maps our parameter paths to the names in the file (FoundationVision/VAR; czg1225/CoDe, whose
drafters and refiners have VAR's layout). Linear maps are stored as [out, in], convolutions as OIHW. Sizes are read off
shapes. Of the schedule of scales a file has no more than the number of positions and the level of each: the schedule
that is given, or the published one of that length, is checked against them.

A file is a flat dict of tensors, or a trainer's checkpoint that nests such dicts under `trainer`.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from models.errors import UserError
from models.formats.image_models import param_shapes
from models.formats.release import Release, digest
from models.formats.storage import leaves_by_path
from models.formats.torch_files import read_torch_file
from models.formats.weights import as_stored
from models.images.config import SCHEDULES, VARConfig, VQVAEConfig, scale_starts
from models.transformer import Params

_VAR_NAMES = (
    ("word/", "word_embed."),
    ("classes/embedding", "class_emb.weight"),
    ("levels/embedding", "lvl_embed.weight"),
    ("positions/start", "pos_start"),
    ("positions/embedding", "pos_1LC"),
    (r"layers/(\d+)/attention/qkv/", r"blocks.\1.attn.mat_qkv."),
    (r"layers/(\d+)/attention/(q_bias|v_bias)", r"blocks.\1.attn.\2"),
    (r"layers/(\d+)/attention/log_scale", r"blocks.\1.attn.scale_mul_1H11"),
    (r"layers/(\d+)/attention/out/", r"blocks.\1.attn.proj."),
    (r"layers/(\d+)/mlp/up/", r"blocks.\1.ffn.fc1."),
    (r"layers/(\d+)/mlp/down/", r"blocks.\1.ffn.fc2."),
    (r"layers/(\d+)/modulation/offset", r"blocks.\1.ada_gss"),
    (r"layers/(\d+)/modulation/", r"blocks.\1.ada_lin.1."),
    ("modulation/", "shared_ada_lin.1."),
    ("head/modulation/", "head_nm.ada_lin.1."),
    ("head/vocab/", "head."),
)
_VAE_NAMES = (
    (r"encoder/level_(\d+)/", r"encoder.down.\1."),
    (r"decoder/level_(\d+)/", r"decoder.up.\1."),
    ("(en|de)coder/middle/block_0/", r"\1coder.mid.block_1."),
    ("(en|de)coder/middle/attention/", r"\1coder.mid.attn_1."),
    ("(en|de)coder/middle/block_1/", r"\1coder.mid.block_2."),
    ("(en|de)coder/", r"\1coder."),
    ("quant/", "quant_conv."),
    ("post_quant/", "post_quant_conv."),
    ("codebook/embedding", "quantize.embedding.weight"),
    (r"phi/(\d+)/", r"quantize.quant_resi.qresi_ls.\1."),
)
# What follows the level or the middle.
_VAE_PARTS = (
    (r"block_(\d+)/", r"block.\1."),
    (r"attention_(\d+)/", r"attn.\1."),
    ("(norm|conv)_([12])/", r"\1\2."),
    ("shortcut/", "nin_shortcut."),
    (r"\bout/", "proj_out."),
    (r"(encoder\..*)resample/", r"\1downsample.conv."),
    (r"(decoder\..*)resample/", r"\1upsample.conv."),
)
# Buffers that follow from the sizes, and counts of how often codes were used.
_VAR_IGNORED = r"attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias"
_VAE_IGNORED = r"quantize\.ema_vocab_hit_SV"


@dataclasses.dataclass(frozen=True)
class Converted:
    """A model made of a published file, and the SHA-256 of that file by its name.

    `assumed` says that its scales were neither given nor follow from the file.
    """

    config: VARConfig | VQVAEConfig
    params: Params
    digests: dict[str, str]
    assumed: bool = False


def read_var(path: str | Path, scales: Sequence[int] | None = None) -> Converted:
    """A VAR transformer (`var_d*.pth`), or a drafter or refiner of CoDe (`drafter_*.pth`, `refiner_*.pth`).

    Args:
      path: the file, or a trainer's checkpoint, of which the transformer is taken.
      scales: the schedule; None is the published one with as many positions as the file.

    Returns:
      Its config and float32 parameters, layers as a list.

    Raises:
      UserError: the file is damaged or asks for more than tensors, a tensor is missing, unknown or misshapen, or the
        schedule does not fit.
    """
    file = _Checkpoint(Path(path), "var_wo_ddp", "VAR transformer")
    C, latent_channels = file.shape("word_embed.weight", 2)
    K, L = file.shape("lvl_embed.weight", 2)[0], file.shape("pos_1LC", 3)[1]
    config = VARConfig(
        depth=len(file.numbers("blocks.", ".attn.mat_qkv.weight")),
        width=C,
        num_heads=file.shape("blocks.0.attn.scale_mul_1H11", 4)[1],
        num_classes=file.shape("class_emb.weight", 2)[0] - 1,
        vocab_size=file.shape("head.weight", 2)[0],
        latent_channels=latent_channels,
        scales=_schedule(file, scales, K, L),
        shared_modulation="shared_ada_lin.1.weight" in file,
        mlp_ratio=file.shape("blocks.0.ffn.fc1.weight", 2)[0] // C,
    )
    kind = f"a VAR of depth {config.depth} and width {C}"
    params = _assemble(file, config, var_name, kind)
    file.finish(_VAR_IGNORED, kind)
    return Converted(config, params, file.digests)


def read_vae(path: str | Path, scales: Sequence[int] | None = None) -> Converted:
    """The multi-scale VQ-VAE (`vae_ch160v4096z32.pth`).

    Args:
      path: the file, or a trainer's checkpoint, of which the tokenizer is taken.
      scales: the schedule, on which no weight depends; None is that for 256 pixels.

    Returns:
      Its config and float32 parameters.

    Raises:
      UserError: the file is damaged or asks for more than tensors, or a tensor is missing, unknown or misshapen.
    """
    file = _Checkpoint(Path(path), "vae_local", "VQ-VAE")
    width = file.shape("encoder.conv_in.weight", 4)[0]
    levels = range(len(file.numbers("encoder.down.", ".block.0.conv1.weight")))
    V, latent_channels = file.shape("quantize.embedding.weight", 2)
    config = VQVAEConfig(
        vocab_size=V,
        latent_channels=latent_channels,
        width=width,
        multipliers=tuple(file.shape(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] // width for i in levels),
        blocks=len(file.numbers("encoder.down.0.block.", ".conv1.weight")),
        scales=SCHEDULES["256"] if scales is None else tuple(scales),
        phis=len(file.numbers("quantize.quant_resi.qresi_ls.", ".weight")),
    )
    kind = f"a VQ-VAE of width {width}"
    params = _assemble(file, config, vae_name, kind)
    file.finish(_VAE_IGNORED, kind)
    return Converted(config, params, file.digests, assumed=scales is None)


def var_name(path: str) -> str:
    """What the published files call the VAR parameter at `path`."""
    return _leaf_name(_renamed(_VAR_NAMES, path))


def vae_name(path: str) -> str:
    """What the published file calls the VQ-VAE parameter at `path`."""
    name = _renamed(_VAE_NAMES, path)
    for pattern, replacement in _VAE_PARTS:
        name = re.sub(pattern, replacement, name)
    return _leaf_name(name)


def _renamed(table: Sequence[tuple[str, str]], path: str) -> str:
    pattern, replacement = next(row for row in table if re.match(row[0], path))
    return re.sub(pattern, replacement, path, count=1)


def _leaf_name(name: str) -> str:
    return re.sub(r"\b(kernel|scale)$", "weight", name).replace("/", ".")


class _Checkpoint(Release):
    """The tensors of one model in a file, each to be taken once, and their shapes before that."""

    def __init__(self, path: Path, part: str, what: str):
        content = read_torch_file(path)
        if isinstance(content, dict) and isinstance(content.get("trainer"), dict):
            content = content["trainer"].get(part)
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no {what}: expected a dict of tensors, or a trainer with {part} in it")
        super().__init__(path, as_stored(content, path), {}, {path.name: digest(path)})
        self._shapes = {name: array.shape for name, array in content.items()}
        self._what = what

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor that has `rank` axes, none of them empty."""
        if name not in self._shapes:
            raise UserError(f"{self.source} holds no {self._what}: tensor {name} is missing")
        shape = self._shapes[name]
        if len(shape) != rank or 0 in shape:
            raise UserError(f"{self.source}: tensor {name} has shape {list(shape)}, expected {rank} axes")
        return shape


def _schedule(file: _Checkpoint, scales: Sequence[int] | None, K: int, L: int) -> tuple[int, ...]:
    """The schedule of a transformer with K scales and L positions."""
    choices = list(SCHEDULES.values()) if scales is None else [tuple(scales)]
    fitting = [choice for choice in choices if (len(choice), scale_starts(choice)[-1]) == (K, L)]
    if not fitting:
        has = f"{file.source}: pos_1LC has {L} positions and lvl_embed {K} scales"
        if scales is None:
            raise UserError(f"{has}, as no published schedule has: give the sides of its scales (--schedule)")
        raise UserError(f"{has}, but the schedule {_listed(scales)} has {scale_starts(scales)[-1]} and {len(scales)}")
    if "lvl_1L" in file:
        levels = np.repeat(np.arange(K), [p * p for p in fitting[0]])
        if not np.array_equal(file.take_any("lvl_1L"), levels[None]):
            raise UserError(f"{file.source}: lvl_1L does not have the levels of the schedule {_listed(fitting[0])}")
    return fitting[0]


def _listed(scales: Sequence[int]) -> str:
    return ",".join(map(str, scales))


def _assemble(file: _Checkpoint, config: VARConfig | VQVAEConfig, name_of: Callable[[str], str], kind: str) -> Params:
    """Every parameter from the tensor of its name, in our layout."""
    shapes = param_shapes(config)
    leaves = []
    for path, leaf in leaves_by_path(shapes).items():
        stored, axes = _stored(path, leaf.shape)
        array = file.take(name_of(path), stored, kind).astype(np.float32)
        leaves.append(array.transpose(axes).reshape(leaf.shape))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _stored(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of a parameter's tensor in the file, and the order of its axes here."""
    if path.endswith("kernel"):
        axes = (1, 0) if len(shape) == 2 else (2, 3, 1, 0)
        stored = [0] * len(shape)
        for place, axis in enumerate(axes):
            stored[axis] = shape[place]
        return tuple(stored), axes
    if path == "positions/start" or path.endswith("offset"):
        shape = (1, 1, *shape)
    elif path == "positions/embedding":
        shape = (1, *shape)
    elif path.endswith("log_scale"):
        shape = (1, *shape, 1, 1)
    return shape, tuple(range(len(shape)))
