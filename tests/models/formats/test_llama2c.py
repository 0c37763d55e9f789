"""llama2.c import: both versions against a NumPy forward in its convention, its tokenizer, its published text."""

import dataclasses
import itertools
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from models.errors import UserError
from models.formats.llama2c import read_llama2c, read_llama2c_tokenizer
from models.formats.target import Target

H, F, L, N, K, V, S = 16, 24, 2, 4, 2, 300, 32
D, GROUP = H // N, 8
HEADER = (H, F, L, N, K, V, S)
ORDER = ("embedding", "attention_norm", "q", "k", "v", "o", "mlp_norm", "gate", "down", "up", "final_norm")
NORMS = ("attention_norm", "mlp_norm", "final_norm")


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights in llama2.c's own layout: layers stacked, matrices [out, in]."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embedding": (1, V, H),
        "attention_norm": (L, H),
        "q": (L, H, H),
        "k": (L, K * D, H),
        "v": (L, K * D, H),
        "o": (L, H, H),
        "mlp_norm": (L, H),
        "gate": (L, F, H),
        "down": (L, H, F),
        "up": (L, F, H),
        "final_norm": (1, H),
        "head": (1, V, H),
    }
    return {
        name: (rng.normal(size=shape) * (0.3 if name not in NORMS else 0.1) + (name in NORMS)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_v0(path: Path, weights: dict[str, np.ndarray], tied: bool) -> Path:
    sizes = (*HEADER[:5], V if tied else -V, S)
    tables = np.zeros(2 * S * D // 2, np.float32).tobytes()
    parts = [weights[name].tobytes() for name in ORDER] + [tables] + ([] if tied else [weights["head"].tobytes()])
    path.write_bytes(struct.pack("<7i", *sizes) + b"".join(parts))
    return path


def quantized(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    groups = matrix.reshape(-1, GROUP)
    scales = (np.abs(groups).max(axis=1) / 127).astype(np.float32)
    return np.round(groups / scales[:, None]).astype(np.int8), scales


def write_v2(path: Path, weights: dict[str, np.ndarray], tied: bool) -> Path:
    header = struct.pack("<Ii7iBi", 0x616B3432, 2, *HEADER, tied, GROUP).ljust(256, b"\0")
    parts = [weights[name].tobytes() for name in NORMS]
    for name in ("embedding", "q", "k", "v", "o", "gate", "down", "up", *(() if tied else ("head",))):
        for matrix in weights[name]:
            parts += [part.tobytes() for part in quantized(matrix)]
    path.write_bytes(header + b"".join(parts))
    return path


def reference_logits(weights: dict[str, np.ndarray], tokens: list[int], tied: bool) -> np.ndarray:
    """A forward over one text [T] in float64, with RoPE on neighbouring channels as llama2.c has it."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale

    angles = np.arange(len(tokens))[:, None] * 10_000.0 ** (-np.arange(0, D, 2) / D)
    turn = np.exp(1j * angles)[:, None, :]

    def rope(x):
        pairs = x.reshape(len(tokens), -1, D // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(len(tokens), -1, D)

    x = w["embedding"][0][tokens]
    for l in range(L):
        y = norm(x, w["attention_norm"][l])
        q, k = rope(y @ w["q"][l].T), rope(y @ w["k"][l].T)
        v = (y @ w["v"][l].T).reshape(len(tokens), K, D)
        k, v = np.repeat(k, N // K, axis=1), np.repeat(v, N // K, axis=1)
        scores = np.einsum("tnd,snd->nts", q, k) / np.sqrt(D)
        scores[:, ~np.tri(len(tokens), dtype=bool)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("nts,snd->tnd", p / p.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(len(tokens), H) @ w["o"][l].T
        y = norm(x, w["mlp_norm"][l])
        gate = y @ w["gate"][l].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"][l].T)) @ w["down"][l].T
    return norm(x, w["final_norm"][0]) @ w["embedding" if tied else "head"][0].T


TEXT = [1, 20, 31, 7, 7, 250, 299, 3, 0, 64]


@pytest.mark.parametrize("tied", [True, False])
def test_version_0(tmp_path: Path, tied: bool) -> None:
    weights = random_weights()
    config, params = read_llama2c(write_v0(tmp_path / "m.bin", weights, tied))
    assert (config.width, config.mlp_width, config.num_layers, config.vocab_size) == (H, F, L, V)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.max_position) == (N, K, D, S)
    assert (config.tied_embeddings, config.bos_id, config.eos_ids[0]) == (tied, 1, 2)
    logits = Target(config, params).apply([TEXT]).logits[0]
    np.testing.assert_allclose(logits, reference_logits(weights, TEXT, tied), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_version_2(tmp_path: Path, tied: bool) -> None:
    weights = random_weights()
    config, params = read_llama2c(write_v2(tmp_path / "m.bin", weights, tied))
    restored = {
        name: value
        if name in NORMS
        else np.stack([(q * s[:, None]).reshape(value.shape[1:]) for q, s in map(quantized, value)])
        for name, value in weights.items()
    }
    assert config.tied_embeddings == tied
    logits = Target(config, params).apply([TEXT]).logits[0]
    np.testing.assert_allclose(logits, reference_logits(restored, TEXT, tied), rtol=0, atol=1e-4)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    def complaint(content: bytes) -> str:
        (tmp_path / "bad.bin").write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_llama2c(tmp_path / "bad.bin")
        return str(caught.value)

    v0 = write_v0(tmp_path / "v0.bin", random_weights(), True).read_bytes()
    v2 = write_v2(tmp_path / "v2.bin", random_weights(), True).read_bytes()
    assert f"truncated: its header implies {len(v0)} bytes, it has {len(v0) - 1}" in complaint(v0[:-1])
    assert "truncated" in complaint(v2[:-1]) and "truncated" in complaint(v2[:200])
    assert "truncated" in complaint(b"") and "truncated" in complaint(v0[:20])
    assert "not a llama2.c checkpoint" in complaint(v0 + b"\0")
    assert "is a GGUF file, not a checkpoint of llama2.c" in complaint(b"GGUF" + b"\xff" * 60)
    assert "not a llama2.c checkpoint" in complaint(struct.pack("<7i", 16, 24, 2, 3, 1, V, S) + v0[28:])
    assert "version 1" in complaint(v2[:4] + struct.pack("<i", 1) + v2[8:])
    assert "groups of 7" in complaint(v2[:37] + struct.pack("<i", 7) + v2[41:])
    with pytest.raises(UserError, match="no checkpoint file"):
        read_llama2c(tmp_path / "nowhere.bin")


# Tokenizer


def pieces_of(words: list[str]) -> list[tuple[bytes, float]]:
    """A SentencePiece vocabulary as llama2.c exports it; `words` from best to worst."""
    special = [b"<unk>", b"\n<s>\n", b"\n</s>\n"]
    plain = [*special, *(f"<0x{b:02X}>".encode() for b in range(256)), *(w.encode() for w in words)]
    return [(piece, -float(max(i - 258, 0))) for i, piece in enumerate(plain)]


def write_tokenizer(path: Path, pieces: list[tuple[bytes, float]]) -> Path:
    body = b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces)
    path.write_bytes(struct.pack("<i", max(len(piece) for piece, _ in pieces)) + body)
    return path


def read_pieces(path: Path, count: int) -> list[tuple[bytes, float]]:
    data, offset, pieces = path.read_bytes(), 4, []
    for _ in range(count):
        score, length = struct.unpack_from("<fi", data, offset)
        pieces.append((data[offset + 8 : offset + 8 + length], score))
        offset += 8 + length
    return pieces


def reference_encode(pieces: list[tuple[bytes, float]], text: str) -> list[int]:
    """llama2.c's `encode`: characters or their bytes, then merge the best-scored pair, leftmost first, while any is."""
    index = {piece: i for i, (piece, _) in enumerate(pieces)}
    ids = [index[b" "]] if text else []
    for character in text:
        code = character.encode()
        ids += [index[code]] if code in index else [byte + 3 for byte in code]
    while True:
        pairs = [(index.get(pieces[a][0] + pieces[b][0]), at) for at, (a, b) in enumerate(itertools.pairwise(ids))]
        known = [(-pieces[merged][1], at, merged) for merged, at in pairs if merged is not None]
        if not known:
            return [1, *ids]
        _, at, merged = min(known)
        ids[at : at + 2] = [merged]


WORDS = ["ab", "aa", " a", "aba", "aaa", "abab", " the", " t", "he", "th", "ababa", "  ", "   ", "ba", "aaaa"]
CHARACTERS = [*" abthe", "é"]


def test_tokenizer_encodes_and_decodes_like_llama2c(tmp_path: Path) -> None:
    pieces = pieces_of([*WORDS, *CHARACTERS])
    tokenizer = read_llama2c_tokenizer(write_tokenizer(tmp_path / "t.bin", pieces), len(pieces))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), len(pieces))
    draw = random.Random(0)
    texts = ["", " ", "the", "  the\nababa ", "é€😀 \t", "<0x41>", "</s>", "▁a"]
    texts += ["".join(draw.choices(" abthex", [2, 6, 4, 1, 1, 1, 1], k=draw.randint(1, 30))) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text, specials=False)
        assert ids == reference_encode(pieces, text), text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a", bos=False) == reference_encode(pieces, "a")[1:]


def test_damaged_tokenizers(tmp_path: Path) -> None:
    pieces = pieces_of([*WORDS, *CHARACTERS])
    path = write_tokenizer(tmp_path / "t.bin", pieces)
    whole = path.read_bytes()

    def complaint(content: bytes, count: int = len(pieces)) -> str:
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_llama2c_tokenizer(path, count)
        return str(caught.value)

    assert "truncated" in complaint(whole[:-1]) and "truncated" in complaint(whole, len(pieces) + 1)
    assert "more than the" in complaint(whole, len(pieces) - 1)
    assert "not UTF-8" in complaint(whole.replace(b"ababa", b"\xff\xff\xff\xff\xff"))
    assert "not the bytes" in complaint(whole.replace(b"<0x0A>", b"<0x0a>"))
    assert "occur twice" in complaint(whole.replace(b" the", b"abab"))
    with pytest.raises(UserError, match="no tokenizer file"):
        read_llama2c_tokenizer(tmp_path / "nowhere.bin", 3)


# The real thing


@pytest.fixture
def stories(shared_data: Path) -> Path:
    folder = shared_data / "weights" / "stories260K"
    if not (folder / "stories260K.bin").exists():
        pytest.skip("needs weights/stories260K in the shared data folder")
    return folder


def greedy(target: Target, steps: int) -> list[int]:
    """BOS and what follows it, each token from a full forward, until the next text begins."""
    tokens = np.zeros((1, steps + 1), np.int32)
    tokens[0, 0] = 1
    for position in range(steps):
        tokens[0, position + 1] = int(np.argmax(target.apply(tokens[:, :steps]).logits[0, position]))
        if tokens[0, position + 1] == 1:
            return tokens[0, : position + 1].tolist()
    return tokens[0].tolist()


def test_stories260k_writes_the_published_text(stories: Path, shared_data: Path) -> None:
    config, params = read_llama2c(stories / "stories260K.bin")
    tokenizer = read_llama2c_tokenizer(stories / "tok512.bin", config.vocab_size)
    text = tokenizer.decode(greedy(Target(config, params, tokenizer), 200))
    assert text.encode() == (shared_data / "fixtures" / "stories260K_greedy_200.txt").read_bytes()


def test_stories260k_q8_is_the_same_model_rounded(stories: Path) -> None:
    config, exact = read_llama2c(stories / "stories260K.bin")
    rounded_config, rounded = read_llama2c(stories / "stories260K-q8.bin")
    assert dataclasses.replace(rounded_config, max_position=config.max_position) == config
    for name in ("q", "k", "v", "o"):
        a, b = (np.asarray(p["layers"][2]["attention"][name]["kernel"]) for p in (exact, rounded))
        assert 0 < np.abs(a - b).max() <= 0.5001 * np.abs(a).max() / 127
    np.testing.assert_array_equal(exact["final_norm"]["scale"], rounded["final_norm"]["scale"])


def test_tok512_encodes_like_llama2c(stories: Path) -> None:
    pieces = read_pieces(stories / "tok512.bin", 512)
    tokenizer = read_llama2c_tokenizer(stories / "tok512.bin", 512)
    story = 'Once upon a time, there was a little girl named Lily.\nShe said: "I\'m 3 years old — café 😀!"  \n\n'
    words = story.split(" ")
    draw = random.Random(1)
    for text in [story, *(" ".join(draw.choices(words, k=12)) for _ in range(50))]:
        ids = tokenizer.encode(text)
        assert ids == reference_encode(pieces, text)
        assert tokenizer.decode(ids) == text
