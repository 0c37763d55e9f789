"""Tiny models of every family, and the committed files that stand in for transformers where it is not installed.

    python -m tests.parity.goldens

writes `tests/goldens/<case>/`: a Hugging Face directory with random bfloat16 weights as transformers saves it, and
`golden.safetensors` with tokens and the float32 logits that transformers computes for them.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).resolve().parents[1] / "goldens"
BATCH, LENGTH = 2, 14

_TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So short that of the four frequencies of a head one is kept, one interpolated and two are divided.
    "original_max_position_embeddings": 40,
}

# Case -> config.json, each with what its family adds switched on and windows shorter than the sequence.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_TINY},
    "llama_linear_tied": {
        "model_type": "llama",
        **_TINY,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "llama3": {"model_type": "llama", **_TINY, "rope_theta": 500.0, "rope_scaling": _LLAMA3},
    "llama_biases": {"model_type": "llama", **_TINY, "attention_bias": True},
    "mistral": {"model_type": "mistral", **_TINY, "sliding_window": 5},
    "qwen2": {
        "model_type": "qwen2",
        **_TINY,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "rms_norm_eps": 1e-5,
    },
    "qwen3": {"model_type": "qwen3", **_TINY, "tie_word_embeddings": True, "rope_theta": 1e6},
    "gemma2": {
        "model_type": "gemma2",
        **_TINY,
        "sliding_window": 5,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 15.0,
    },
}

# The least that a config.json says, of any family: all else has defaults. Windows are on where that is a switch.
BARE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "use_sliding_window": True,
}


def tokens_for(vocab_size: int) -> np.ndarray:
    """Fixed random token ids `[BATCH, LENGTH]`, int64."""
    return np.random.default_rng(7).integers(0, vocab_size, (BATCH, LENGTH))


def reference_model(case: dict[str, Any]):
    """The transformers model of one case, with weights that keep every term large and are exact in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {k: v for k, v in case.items() if k != "model_type"}
    config = AutoConfig.for_model(case["model_type"], **keys)
    # Only the eager implementation applies Gemma-2's caps to attention scores.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                noise = 0.3 * noise + (0.0 if case["model_type"] == "gemma2" else 1.0)
            elif parameter.ndim == 2 and "embed" not in name:
                noise = noise * 1.5 / parameter.shape[1] ** 0.5
            parameter.copy_(noise.bfloat16().float())
    return model


def reference_logits(model, tokens: np.ndarray) -> np.ndarray:
    """Logits `[B, T, V]` of a transformers model in one forward."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def main() -> None:
    """Writes every golden directory anew."""
    import torch

    for name, case in CASES.items():
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        model = reference_model(case)
        tokens = tokens_for(case["vocab_size"])
        logits = reference_logits(model, tokens)
        model.to(torch.bfloat16).save_pretrained(folder)
        save_file({"tokens": tokens.astype(np.int32), "logits": logits}, folder / "golden.safetensors")
        for path in folder.iterdir():
            path.chmod(0o644)
        kilobytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e3
        print(f"{name}: {kilobytes:.0f} kB, logits up to {abs(logits).max():.1f}")


if __name__ == "__main__":
    main()
