"""Our forward against transformers: every family, whole texts and cached steps, their files and ours, real sizes."""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import load_target
from models.formats.hf import load_config, load_params, save_target, tensor_names
from models.formats.hf_config import ARCHITECTURES, config_from_hf
from models.formats.tokenizer import Tokenizer
from models.transformer import init, param_shapes
from tests.parity.goldens import BARE, CASES, reference_logits, reference_model, tokens_for
from tests.parity.stepwise import stepwise_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
PREFILL = 6
BOOKKEEPING = {"architectures", "dtype", "_name_or_path", "transformers_version"}
each_case = pytest.mark.parametrize("case", CASES)


def reference_steps(model, tokens: np.ndarray) -> np.ndarray:
    """Logits of transformers' own cached decoding of the same tokens."""
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        out = model(ids[:, :PREFILL], use_cache=True)
        logits = [out.logits]
        for t in range(PREFILL, ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, dim=1).numpy()


@each_case
def test_their_files_in_our_forward(case: str, tmp_path: Path) -> None:
    model = reference_model(CASES[case])
    model.save_pretrained(tmp_path)
    target = load_target(tmp_path, jnp.float32)
    tokens = tokens_for(target.config.vocab_size)
    whole = reference_logits(model, tokens)
    assert np.abs(whole).max() > 1, "logits this small would hide a mistake"
    np.testing.assert_allclose(target.apply(tokens).logits, whole, rtol=0, atol=TOLERANCE)
    ours = stepwise_logits(target.config, target.params, tokens, PREFILL)
    np.testing.assert_allclose(ours, reference_steps(model, tokens), rtol=0, atol=TOLERANCE)


@each_case
def test_our_files_in_their_forward(case: str, tmp_path: Path) -> None:
    config = config_from_hf(CASES[case])
    # Larger than `init` makes them, so that logits are of order one.
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, init(config, jax.random.key(0)))
    save_target(tmp_path / "ours", config, params, max_shard_bytes=10_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert model.dtype == torch.float32
    tokens = tokens_for(config.vocab_size)
    ours = load_target(tmp_path / "ours").apply(tokens).logits
    np.testing.assert_allclose(ours, reference_logits(model, tokens), rtol=0, atol=TOLERANCE)
    # What they save of it is what we wrote.
    model.save_pretrained(tmp_path / "theirs")
    assert load_config(tmp_path / "theirs") == config
    again = load_params(config, tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, again, params)


@each_case
def test_saved_config_means_the_same_to_them(case: str, tmp_path: Path) -> None:
    theirs = reference_model(CASES[case]).config
    config = config_from_hf(theirs.to_dict())
    save_target(tmp_path / "ours", config, init(config, jax.random.key(0)))
    back = transformers.AutoConfig.from_pretrained(tmp_path / "ours").to_dict()
    # The old name of `rope_type` is carried along for old versions; it does nothing here.
    back["rope_parameters"].pop("type", None)
    unused = set() if config.windows else {"sliding_window", "max_window_layers"}
    for key in theirs.to_dict().keys() - BOOKKEEPING - unused:
        assert back.get(key) == theirs.to_dict()[key], key


@pytest.mark.parametrize("family", [family for family in ARCHITECTURES if family != "mu"])
def test_absent_keys_mean_the_same_to_them(family: str) -> None:
    bare = {"model_type": family, **BARE}
    assert config_from_hf(bare) == config_from_hf(transformers.AutoConfig.for_model(**bare).to_dict())


def test_their_tokenizer_reads_ours(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["def f(x):\n    return x + 1\n" * 4], 270)
    config = dataclasses.replace(config_from_hf(CASES["llama"]), vocab_size=tokenizer.vocab_size)
    save_target(tmp_path / "t", config, init(config, jax.random.key(0)), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    text = "return f(x) + ünïcode\n"
    assert theirs(text).input_ids == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text), skip_special_tokens=True) == text


# Files as published with these models, less what says nothing about the network.
_LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
PUBLISHED = {
    "Llama-2-7B": {
        **_LLAMA_7B,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
    },
    "Vicuna-7B-v1.3": {**_LLAMA_7B, "max_position_embeddings": 2048, "rms_norm_eps": 1e-06},
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "Qwen2-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Gemma-2-9B": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "torch_dtype": "float32",
        "vocab_size": 256000,
    },
}
each_published = pytest.mark.parametrize("name", PUBLISHED)
# Llama 2's network with another epsilon, and Llama 3.1's with another base: their windows are longer than the text.
ALIKE = {"Vicuna-7B-v1.3", "Mistral-7B-v0.1"}
each_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in PUBLISHED]
)


def write(directory: Path, **content) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content))
    return directory


@each_published
def test_full_size_tensors(name: str, tmp_path: Path) -> None:
    directory = write(tmp_path, **{**PUBLISHED[name], "num_hidden_layers": 1})
    config = load_config(directory)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config.tied_embeddings:
        del theirs["lm_head.weight"]
    flat, _ = jax.tree.flatten_with_path(param_shapes(config))
    ours = {
        tensor: leaf.shape[::-1] if path.endswith("/kernel") else leaf.shape
        for (path, tensor), (_, leaf) in zip(tensor_names(config).items(), flat, strict=True)
    }
    assert ours == theirs


@each_network
def test_full_size_attention(name: str, tmp_path: Path) -> None:
    """One layer with its real heads, width, RoPE, epsilon and scales; vocabulary and MLP are cut to spare memory."""
    small = {**PUBLISHED[name], "num_hidden_layers": 1, "vocab_size": 512, "intermediate_size": 256}
    small |= {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}
    published = transformers.AutoConfig.from_pretrained(write(tmp_path / "published", **small))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(published, attn_implementation="eager", dtype=torch.float32)
    model.eval().save_pretrained(tmp_path / "model")
    target = load_target(tmp_path / "model", jnp.float32)
    assert target.config == load_config(tmp_path / "published")
    tokens = np.random.default_rng(1).integers(0, 512, (1, 64))
    theirs = reference_logits(model, tokens)
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(target.apply(tokens).logits, theirs, rtol=0, atol=TOLERANCE)
    (tmp_path / "model" / "model.safetensors").unlink()
