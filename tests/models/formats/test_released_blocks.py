"""Released networks that fill blocks, in miniature: every tensor in its place, and what `config.json` may not say."""

import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.registry import load_drafter
from decoding.policies import Expanding
from models import transformer
from models.errors import UserError
from models.formats.hf import save_target
from models.formats.release import Release
from models.formats.released_blocks import dflash, jetspec
from models.formats.target import Target
from models.formats.weights import Stored
from models.heads.dflash import DFlashHeads, Selector
from models.heads.eagle import LayerShape
from scripts.convert import main
from tests.models.formats.released_cases import CONFIG, H, V, draw, write
from tests.noise import drawn

LAYERS, HEADS, KEYS, SIZE, F, RANK = 2, 4, 2, 6, 20, 5
SAID: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "block_size": 8,
    "dflash_config": {"mask_token_id": 39, "target_layer_ids": [1, 3, 5]},
    "head_dim": SIZE,
    "hidden_act": "silu",
    "hidden_size": H,
    "intermediate_size": F,
    "layer_types": ["full_attention"] * LAYERS,
    "max_position_embeddings": 40960,
    "max_window_layers": LAYERS,
    "model_type": "qwen3",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KEYS,
    "num_target_layers": 7,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": V,
}
INNER: dict[str, Any] = SAID["dflash_config"]
SLIDING = {"layer_types": ["sliding_attention"] * LAYERS, "sliding_window": 12}
LAYER = LayerShape(HEADS, KEYS, SIZE, F, 1e-6, 1_000_000.0)


def shapes(second: bool = False) -> dict[str, tuple[int, ...]]:
    """DFlash's tensors, or DFlash2's."""
    found: dict[str, tuple[int, ...]] = {"fc.weight": (H, 3 * H), "hidden_norm.weight": (H,), "norm.weight": (H,)}
    for i in range(LAYERS):
        at = f"layers.{i}."
        found |= {f"{at}{name}.weight": (H,) for name in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{at}self_attn.{p}_proj.weight": (n * SIZE, H) for p, n in (("q", HEADS), ("k", KEYS), ("v", KEYS))}
        found |= {f"{at}self_attn.o_proj.weight": (H, HEADS * SIZE)}
        found |= {f"{at}self_attn.{p}_norm.weight": (SIZE,) for p in ("q", "k")}
        found |= {f"{at}mlp.{p}_proj.weight": (H, F) if p == "down" else (F, H) for p in ("gate", "up", "down")}
        for half in ("attention", "mlp") if second else ():
            found[f"{at}{half}_conv.base_kernel"] = (2, 2, H)
            found[f"{at}{half}_conv.kernel_projection.weight"] = (4 * H // 16, H)
    if second:
        found |= {f"candidate_selector.{p}_codebook": (V, RANK) for p in ("predecessor", "successor")}
        found |= {"candidate_selector.hidden_projection.weight": (RANK, H)}
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Target:
    params = drawn(transformer.param_shapes(CONFIG, jnp.float32), 0.3)
    directory = tmp_path_factory.mktemp("base") / "target"
    save_target(directory, CONFIG, params)
    return Target(CONFIG, params, path=directory)


def said(inner: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A `config.json`; None takes an entry away."""
    changed = {**SAID, **changes, "dflash_config": {**INNER, **(inner or {})}}
    changed["dflash_config"] = {key: value for key, value in changed["dflash_config"].items() if value is not None}
    return {key: value for key, value in changed.items() if value is not None}


def held(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Release:
    """A release in memory."""
    stored = {name: Stored("F16", functools.partial(np.array, array)) for name, array in tensors.items()}
    return Release(Path("here"), stored, config, {})


def test_dflash_in_its_place(base: Target) -> None:
    tensors = draw(shapes())
    made = dflash(held(tensors, SAID), base)
    assert made.heads == DFlashHeads((2, 4, 6), 39, LAYERS, 8, layer=LAYER)
    assert made.format == "dflash" and made.detected == {"outputs_of_layers": [1, 3, 5]} and not made.compared
    params, layer = made.params, made.params["layers"][1]
    assert np.array_equal(params["fc"]["kernel"], tensors["fc.weight"].T)
    assert np.array_equal(layer["attention"]["k"]["kernel"], tensors["layers.1.self_attn.k_proj.weight"].T)
    assert np.array_equal(layer["attention"]["q_norm"]["scale"], tensors["layers.1.self_attn.q_norm.weight"])
    assert np.array_equal(layer["mlp_norm"]["scale"], tensors["layers.1.post_attention_layernorm.weight"])
    assert sum(leaf.size for leaf in _leaves(params)) == sum(x.size for x in tensors.values())


def _leaves(tree):
    if isinstance(tree, dict | list):
        return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in _leaves(part)]
    return [tree]


def test_dflash2_in_its_place(base: Target) -> None:
    inner = {"block_size": 8, "selector_rank": RANK, "selector_top_k": 3, "conv_kernel_size": 2, "conv_group_size": 16}
    tensors, config = draw(shapes(second=True)), said(inner, **SLIDING, is_causal=False)
    made = dflash(held(tensors, config), base)
    expected = DFlashHeads((2, 4, 6), 39, LAYERS, 8, 12, False, False, True, Selector(RANK, 3), LAYER)
    assert made.heads == expected and made.format == "dflash2"
    conv, selector = made.params["layers"][0]["mlp_conv"], made.params["selector"]
    assert np.array_equal(conv["base"], tensors["layers.0.mlp_conv.base_kernel"])
    assert np.array_equal(conv["projection"]["kernel"], tensors["layers.0.mlp_conv.kernel_projection.weight"].T)
    assert np.array_equal(selector["successor"], tensors["candidate_selector.successor_codebook"])
    assert np.array_equal(selector["hidden"]["kernel"], tensors["candidate_selector.hidden_projection.weight"].T)


def test_jetspec_by_command(base: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "jet" / "model.safetensors", draw(shapes()), said({"causal_head": True})).parent
    out = tmp_path / "out"
    main(["--from", "jetspec", "--src", str(source), "--base", str(base.path), "--out", str(out)])
    assert "jetspec for" in capsys.readouterr().out
    drafter, _ = load_drafter(out, base)
    assert drafter.heads == DFlashHeads((2, 4, 6), 39, LAYERS, 8, causal=True, layer=LAYER)
    assert drafter.policy == Expanding(7)
    with pytest.raises(UserError, match="does not say that blocks are causal"):
        jetspec(held(draw(shapes()), SAID), base)


def test_whether_blocks_are_causal_has_three_names_and_a_default(base: Target) -> None:
    def causal(config: dict[str, Any]) -> bool:
        return dflash(held(draw(shapes()), config), base).heads.causal

    for inner, outer in (({"causal": True}, {}), ({"causal_head": True}, {}), ({}, {"is_causal": True})):
        assert causal(said(inner, **outer)) and not causal(said())
    assert causal(said(**SLIDING)) and not causal(said(**SLIDING, is_causal=False))
    assert causal(said({"causal": True}, is_causal=True))
    with pytest.raises(UserError, match=r"contradicts itself: dflash_config\.causal = true and is_causal = false"):
        causal(said({"causal": True}, is_causal=False))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (said({"lilicorr_rank": 4}), "dflash_config.lilicorr_rank = 4 is not supported"),
        (said({"conv_kernel_size": 3}), "dflash_config.conv_kernel_size = 3 is not supported"),
        (said(output_multiplier=0.5), "output_multiplier = 0.5 is not supported"),
        (said(rope_interleaved=True), "rope_interleaved = true is not supported"),
        (said(attention_window_left=3), "attention_window_left = 3 is not supported"),
        (said(rope_scaling={"rope_type": "yarn", "factor": 4.0}), 'rope_scaling of type "yarn" is not supported'),
        (said(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5 is not supported"),
        (said(layer_types=["full_attention", "sliding_attention"], sliding_window=12), "of mixed kinds"),
        (said(layer_types=["sliding_attention"] * 2), "but there is no sliding_window"),
        (said(layer_types=None, use_sliding_window=None, sliding_window=9), "sliding_window = 9, but has no layer_"),
        (said({"block_size": 4}), "block_size must be said once, or the same twice, got [8, 4]"),
        (said(block_size=None), "block_size must be said once, or the same twice, got []"),
        (said({"target_layer_ids": None}), "target_layer_ids must list layers, got null"),
        (said({"target_layer_ids": [-1, 3]}), "target_layer_ids must list layers, got [-1, 3]"),
        (
            said({"selector_rank": 4}),
            "selector_rank = 4, but there is no tensor candidate_selector.",
        ),
        (said({"target_layer_ids": [1, 3, 6]}), "reads what enters layer 7, but the target has layers 0 to 6"),
        (said({"mask_token_id": None}), "mask_token_id must be an integer of at least 0, got null"),
        (said({"mask_token_id": 40}), "fills blocks with token 40"),
        (said({"causal": 1}), "dflash_config.causal must be true or false, got 1"),
        (said(num_target_layers=36), "num_target_layers = 36, but the base"),
        (said(num_hidden_layers=3, layer_types=None), "says num_hidden_layers = 3, but"),
        (said(hidden_size=8), "implies width = 8, expected 16 for this base"),
        (said(attention_bias=True), "implies qkv_bias = True, expected False"),
        ({**SAID, "dflash_config": 3}, "dflash_config must be an object, got 3"),
        ({}, "needs its config.json"),
    ],
)
def test_what_would_be_computed_differently_is_refused(config: dict, words: str, base: Target) -> None:
    with pytest.raises(UserError) as caught:
        dflash(held(draw(shapes()), config), base)
    assert words in str(caught.value)


def test_every_tensor_has_a_place(base: Target) -> None:
    for change, words in (
        ({"embed.weight": (2,)}, "tensor embed.weight is unknown to DFlash"),
        ({"fc.weight": (H, 2 * H)}, "tensor fc.weight has shape [16, 32]"),
    ):
        with pytest.raises(UserError) as caught:
            dflash(held(draw({**shapes(), **change}), SAID), base)
        assert words in str(caught.value)
    short = {name: shape for name, shape in shapes().items() if name != "layers.1.self_attn.q_norm.weight"}
    with pytest.raises(UserError, match=r"tensor layers\.1\.self_attn\.q_norm\.weight is missing"):
        dflash(held(draw(short), SAID), base)
