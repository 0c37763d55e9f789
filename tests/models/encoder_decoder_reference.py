"""Return of the Encoder's network as released, in plain NumPy and float64: tensors by their released names, dense
masks, tiled key heads, positions that count from the middle of the padded source."""

import numpy as np

FACTS = {
    "n_encoder_layer": 3,
    "n_decoder_layer": 2,
    "n_embd": 16,
    "qkv_embd": 24,
    "is_interleaved": False,
    "hidden_dim": 20,
    "n_head": 6,
    "n_kv_head": 3,
    "block_size": 64,
    "dropout": 0.1,
    "rope_theta": 10000,
    "rope_factor": 1.0,
    "pad_token_id": 0,
    "vocab_size": 19,
}
Tensors = dict[str, np.ndarray]


def released(facts: dict = FACTS, seed: int = 0) -> Tensors:
    """Random tensors of a release."""
    rng = np.random.default_rng(seed)
    width, mlp = facts["n_embd"], facts["hidden_dim"]
    keys = facts["qkv_embd"] // facts["n_head"] * facts["n_kv_head"]
    made: Tensors = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        made[f"{name}.weight"] = rng.normal(size=(outputs, inputs)) / inputs**0.5
        made[f"{name}.bias"] = 0.3 * rng.normal(size=outputs)

    def block(name: str, attentions: tuple[str, ...]) -> None:
        for attention in attentions:
            linear(f"{name}.{attention}.q_linear", facts["qkv_embd"], width)
            linear(f"{name}.{attention}.k_linear", keys, width)
            linear(f"{name}.{attention}.v_linear", keys, width)
            linear(f"{name}.{attention}.out_linear", width, facts["qkv_embd"])
        linear(f"{name}.mlp.fc1", mlp, width)
        linear(f"{name}.mlp.fc2", width, mlp)
        for norm in range(1, len(attentions) + 2):
            made[f"{name}.ln{norm}.weight"] = 1 + 0.3 * rng.normal(size=width)

    for i in range(facts["n_encoder_layer"]):
        block(f"transformer.e.{i}", ("attn",))
    for i in range(facts["n_decoder_layer"]):
        block(f"transformer.h.{i}", ("causal_attn", "cross_attn"))
    for norm in ("ln_e", "ln_f"):
        made[f"transformer.{norm}.weight"] = 1 + 0.3 * rng.normal(size=width)
    made["transformer.wte.weight"] = made["lm_head.weight"] = rng.normal(size=(facts["vocab_size"], width))
    return made


def logits(state: Tensors, source: np.ndarray, text: np.ndarray, facts: dict = FACTS) -> np.ndarray:
    """Scores `[B, T, V]` of the decoder on `text` `[B, T]`; in both, 0 is padding."""
    x = state["transformer.wte.weight"][source]
    for i in range(facts["n_encoder_layer"]):
        x = _block(state, f"transformer.e.{i}", x, facts, source != 0)
    encoded = _norm(x, state["transformer.ln_e.weight"])
    x = state["transformer.wte.weight"][text]
    for i in range(facts["n_decoder_layer"]):
        x = _block(state, f"transformer.h.{i}", x, facts, text != 0, encoded, source != 0)
    return _norm(x, state["transformer.ln_f.weight"]) @ state["lm_head.weight"].T


def _norm(x, weight):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * weight


def _linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _block(state, name, x, facts, real, encoded=None, source_real=None):
    read = _norm(x, state[f"{name}.ln1.weight"])
    size = x.shape[1]
    if encoded is None:
        positions, seen, own = np.arange(size) - (size - 1) // 2, real[:, None], "attn"
    else:
        positions, seen, own = np.arange(size), real[:, None] & np.tri(size, dtype=bool), "causal_attn"
    x = x + _attention(state, f"{name}.{own}", read, read, seen, facts, positions)
    if encoded is not None:
        read = _norm(x, state[f"{name}.ln2.weight"])
        x = x + _attention(state, f"{name}.cross_attn", read, encoded, source_real[:, None], facts)
    last = 2 if encoded is None else 3
    wider = _linear(state, f"{name}.mlp.fc1", _norm(x, state[f"{name}.ln{last}.weight"]))
    wider = 0.5 * wider * (1 + np.tanh(np.sqrt(2 / np.pi) * (wider + 0.044715 * wider**3)))
    return x + _linear(state, f"{name}.mlp.fc2", wider)


def _attention(state, name, x, y, seen, facts, positions=None):
    heads, key_heads = facts["n_head"], facts["n_kv_head"]
    size = facts["qkv_embd"] // heads
    q, k, v = (
        _linear(state, f"{name}.{kind}_linear", z).reshape(*z.shape[:2], count, size).transpose(0, 2, 1, 3)
        for kind, z, count in (("q", x, heads), ("k", y, key_heads), ("v", y, key_heads))
    )
    if positions is not None:
        q, k = _rotated(q, positions, facts), _rotated(k, positions, facts)
    k, v = (np.concatenate([z] * (heads // key_heads), axis=1) for z in (k, v))
    scores = np.where(seen[:, None], q @ k.swapaxes(2, 3), np.finfo(np.float64).min) / size**0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ v
    return _linear(state, f"{name}.out_linear", mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))


def _rotated(x, positions, facts):
    size = x.shape[-1]
    angles = positions[:, None] * facts["rope_theta"] ** -(np.arange(0, size, 2) / size)
    cos, sin = (np.concatenate([f(angles)] * 2, axis=-1) for f in (np.cos, np.sin))
    left, right = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate([-right, left], axis=-1) * sin
