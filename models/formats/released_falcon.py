"""Released weights of Falcon as parameters of our network; the conventions are those of `released_heads.py`."""

import json

import numpy as np

from models.errors import UserError
from models.formats.release import Release
from models.formats.released_eagle import draft_layer
from models.formats.released_heads import ROTARY, Converted, assemble, check_copy, layer_names
from models.formats.target import Target
from models.heads.falcon import FalconHeads


def falcon(release: Release, base: Target) -> Converted:
    """The draft network of Falcon (Bestpay-inc/Falcon).

    Tensors are `lstm.{weight,bias}_{ih,hh}_l{0,1}`, layers as EAGLE's, `layers.{i}.` with an `input_layernorm` from the
    second on, and perhaps a copy of the embedding. Its program gives every pair to the LSTM from a state of zeros, so
    that of the kernels of the state and the gate that forgets nothing is read: they are dropped.

    Raises:
      UserError: a tensor is missing, misshapen, unknown, or differs from the base's; or does not fit `config.json`, or
        that does not say how long blocks are.
    """
    where = f"{release.source}: config.json"
    block = release.config.get("k_mask")
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        said = "is missing" if block is None else f"= {json.dumps(block)} is no number of pairs"
        raise UserError(f"{where}: k_mask, the length of blocks, which no tensor tells, {said}")
    layers = len(release.numbers("layers.", "."))
    if not layers:
        raise UserError(f"{release.source} holds no layers, whose tensors would be named layers.0. and so on")
    bias = "layers.0.self_attn.q_proj.bias" in release
    if release.config.get("qkv_bias", bias) != bias:
        raise UserError(f"{where} says qkv_bias = {json.dumps(not bias)}, which the layers do not fit")
    # The program forgets the base of RoPE where its angles are scaled.
    fixed = {"rope_theta": 10_000.0} if release.config.get("rope_scaling") else {}
    layer, rope = draft_layer(release, base, "layers.0.", layers, fixed)
    heads = FalconHeads(block, layers, layer=layer)
    names = {
        f"layers/{i}/{path}": f"layers.{i}.{name}"
        for i in range(layers)
        for path, name in layer_names(base, layer).items()
    }
    params = assemble(release, heads, base, names, _lstm(release, base))
    compared = check_copy(release, "embed_tokens.weight", base)
    release.finish(ROTARY, "Falcon")
    return Converted(heads, params, "falcon", {"lstm": "per position", **rope}, compared)


def _lstm(release: Release, base: Target) -> dict[str, np.ndarray]:
    """Parameters of the LSTM by path: of torch's gates, in the order i, f, g, o, all but f."""
    width, given = base.config.width, {}
    because = f"a base of width {width}"
    for n, inputs in enumerate((2 * width, width)):
        read = np.delete(np.arange(4 * width), np.s_[width : 2 * width])
        kernel = release.take(f"lstm.weight_ih_l{n}", (4 * width, inputs), because)
        release.take(f"lstm.weight_hh_l{n}", (4 * width, width), because)
        biases = [release.take(f"lstm.bias_{kind}_l{n}", (4 * width,), because) for kind in ("ih", "hh")]
        summed = sum(bias.astype(np.float32) for bias in biases)
        given[f"lstm/{n}/input/kernel"] = np.ascontiguousarray(kernel[read].T)
        given[f"lstm/{n}/input/bias"] = np.asarray(summed)[read].astype(biases[0].dtype)
    return given
