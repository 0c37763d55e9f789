"""GGUF import against transformers' own: logits, dequantised blocks, token ids of a multilingual text."""

import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from decoding.generate import generate
from models.config import TransformerConfig
from models.formats.storage import leaves_by_path
from models.formats.target import Target
from models.formats.tokenizer import Tokenizer
from models.transformer import param_shapes
from tests.parity.goldens import reference_logits, tokens_for

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="without it transformers reads no GGUF")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)

from models.formats.gguf import read_gguf  # noqa: E402
from models.formats.gguf_tokenizer import read_gguf_tokenizer  # noqa: E402
from tests.models.formats.gguf_files import MULTILINGUAL, gguf_keys, gguf_tensors, write_gguf  # noqa: E402
from tests.models.formats.test_gguf import WIDE, as_metadata, byte_level, golden, raw_blocks, write_model  # noqa: E402

pytestmark = pytest.mark.parity


def reference(path: Path, windows: tuple = ()):
    """The model that transformers makes of the file; it overlooks the window of Mistral's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    if windows:
        shape = {**model.config.to_dict(), "sliding_window": windows[0], "attn_implementation": "eager"}
        weights, model = model.state_dict(), transformers.MistralForCausalLM(transformers.MistralConfig(**shape))
        model.load_state_dict(weights)
    return model.eval()


# Within what transformers reads: heads of width / N where it takes no head size from the file, and Gemma's own caps.
COMMON: dict[str, Any] = {"bos_id": 1, "eos_ids": (2,), "max_position": 64}
CONFIGS = {
    "llama": TransformerConfig(40, 16, 3, 4, 2, 4, 24, norm_eps=1e-6, **COMMON),
    "llama_tied": TransformerConfig(40, 32, 2, 4, 1, 8, 24, tied_embeddings=True, rope_theta=500.0, **COMMON),
    "mistral": TransformerConfig(
        40, 16, 3, 4, 2, 4, 24, norm_eps=1e-6, family="mistral", windows=(3,) * 3, **COMMON
    ),
    "qwen2": TransformerConfig(40, 16, 3, 4, 2, 4, 24, qkv_bias=True, family="qwen2", **COMMON),
    "qwen3": TransformerConfig(40, 32, 2, 2, 1, 128, 24, qk_norm=True, family="qwen3", **COMMON),
    "gemma2": TransformerConfig(
        40, 32, 3, 2, 1, 256, 24, tied_embeddings=True, embed_scale=True, attention_softcap=50.0, logit_softcap=30.0,
        post_norms=True, zero_centred_norm=True, activation="gelu_tanh", family="gemma2", windows=(4096, None, 4096),
        **COMMON,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_logits(case: str, tmp_path: Path) -> None:
    wanted = CONFIGS[case]
    rng = np.random.default_rng(0)

    def random_leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.normal(size=shape).astype(np.float32)
        if "norm" in path:
            return 0.3 * noise + (0 if wanted.zero_centred_norm else 1)
        return noise * 1.5 / shape[0] ** 0.5 if path.endswith("kernel") else noise

    leaves = leaves_by_path(param_shapes(wanted))
    params = jax.tree.unflatten(
        jax.tree.structure(param_shapes(wanted)), [random_leaf(path, leaf.shape) for path, leaf in leaves.items()]
    )
    path = write_model(tmp_path / "m.gguf", wanted, params)
    config, read, _ = read_gguf(path)
    assert config == wanted
    tokens = tokens_for(config.vocab_size)
    theirs = reference_logits(reference(path, config.windows if config.family == "mistral" else ()), tokens)
    assert np.abs(theirs).max() > 1, "logits this small would hide a mistake"
    np.testing.assert_allclose(Target(config, read).apply(tokens).logits, theirs, rtol=0, atol=1e-4)


def five_bits(raw: np.ndarray, kind: str) -> np.ndarray:
    """Blocks of Q5_0 and Q5_1, which transformers does not read, by the formula of ggml's dequantize_row_q5_*."""
    blocks = raw.reshape(-1, {"Q5_0": 22, "Q5_1": 24}[kind])
    scale, *least = blocks[:, :-20].copy().view(np.float16).astype(np.float32).T[:, :, None]
    high = blocks[:, -20:-16].copy().view(np.uint32) >> np.arange(32, dtype=np.uint32) & 1
    low = np.concatenate([blocks[:, -16:] & 15, blocks[:, -16:] >> 4], axis=1)
    numbers = (low | (high << 4)).astype(np.float32)
    return numbers * scale + least[0] if least else (numbers - 16) * scale


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks(kind: str, tmp_path: Path) -> None:
    from transformers.integrations.gguf import dequant

    number = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(WIDE))
    blank = gguf_tensors(WIDE, zeros)
    embedding = blank["token_embd.weight"]
    if kind.endswith("K"):
        raw = raw_blocks(kind, rng, *embedding.shape)
    else:
        raw = gguf.quantize(rng.normal(size=embedding.shape).astype(np.float32), number)
    tensors = {**blank, "token_embd.weight": raw}
    path = write_gguf(tmp_path / "m.gguf", "qwen3", gguf_keys(WIDE), tensors, kinds={"token_embd.weight": number})
    _, read, _ = read_gguf(path)
    if kind in ("Q5_0", "Q5_1"):
        theirs = five_bits(raw, kind).reshape(-1)
    else:
        theirs = dequant.dequantize(torch.from_numpy(raw.reshape(-1).copy()), int(number)).numpy()
    np.testing.assert_allclose(np.asarray(read["embed"]["embedding"]).reshape(-1), theirs, rtol=0, atol=1e-6)


def their_ids(told: dict, path: Path) -> list[int]:
    config, params = golden("llama")
    write_model(path, config, params, tokenizer=told)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return tokenizer(MULTILINGUAL, add_special_tokens=False).input_ids


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_ids(pre: str, tmp_path: Path) -> None:
    _, told = byte_level(pre)
    ours: Tokenizer = read_gguf_tokenizer(as_metadata(told), tmp_path / "m.gguf")
    assert ours.encode(MULTILINGUAL, bos=False) == their_ids(told, tmp_path / "m.gguf")


def test_sentence_piece_ids(tmp_path: Path) -> None:
    """Pieces are the parts of words by length, longer ones worse, as training would rank them."""
    words = {"▁" + word for word in MULTILINGUAL.split()}
    parts = sorted({w[a:b] for w in words for a in range(len(w)) for b in range(a + 1, len(w) + 1)})
    parts = sorted(parts, key=lambda part: (len(part), part))[:900]
    single = [part for part in parts if len(part) == 1]
    merged = [part for part in parts if len(part) > 1]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *merged, *single]
    told = {
        "model": "llama",
        "tokens": pieces,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(merged) + len(single))],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    ours: Tokenizer = read_gguf_tokenizer(as_metadata(told), tmp_path / "m.gguf")
    theirs = their_ids(told, tmp_path / "m.gguf")
    assert ours.encode(MULTILINGUAL, bos=False) == theirs
    assert ours.decode(theirs) == MULTILINGUAL


@pytest.mark.skipif("TANDEM_GGUF" not in os.environ, reason="TANDEM_GGUF names no file of SmolLM2-135M-Instruct")
def test_smollm2_as_it_comes() -> None:
    """The real file: ids, logits, and what it says of France."""
    path = Path(os.environ["TANDEM_GGUF"])
    config, params, tokenizer = read_gguf(path)
    target = Target(config, params, tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer.encode(MULTILINGUAL, bos=False)
    assert ids == theirs(MULTILINGUAL, add_special_tokens=False).input_ids
    tokens = np.asarray([ids[:96]], np.int32)
    model = reference(path)
    logits = reference_logits(model, tokens)
    apart = float(np.abs(np.asarray(target.apply(tokens).logits) - logits).max())
    print(f"{tokens.size} tokens, logits up to {np.abs(logits).max():.1f}, at most {apart:.1e} apart")
    assert apart < 1e-5 * np.abs(logits).max(), "what float32 rounds in thirty layers"
    prompt = tokenizer.encode("The capital of France is")
    ours = generate(target, [prompt], max_new_tokens=24)
    told = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    assert ours.tokens[0] == told and ours.texts[0].startswith(" Paris."), ours.texts[0]
    with jax.enable_x64(True):
        wide = Target(config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params))
        exact = np.asarray(wide.apply(tokens).logits)
    apart = float(np.abs(exact - reference_logits(model.double(), tokens)).max())
    print(f"in float64 at most {apart:.1e} apart")
    assert apart < 1e-4
