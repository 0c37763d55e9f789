"""Checkpoints and tokenizers of llama2.c (github.com/karpathy/llama2.c), read without it.

Two formats: version 0 ("legacy"), a header of 7 integers and float32 tensors; and version 2, magic number 'ak42', a
header of 256 bytes, norms in float32 and everything else in Q8_0: int8 values with one float32 scale per group.

Both are plain Llama with one difference: RoPE rotates neighbouring channels (2i, 2i+1), where ours rotates the halves
(i, i + D/2). The two agree after the rows of the q and k projections are reordered within each head.
"""

import dataclasses
import json
import math
import struct
from pathlib import Path

import jax
import numpy as np
import tokenizers

from models.config import TransformerConfig
from models.errors import UserError
from models.formats.sentencepiece import is_sentencepiece, merges
from models.formats.storage import refuse_non_finite
from models.formats.text_files import refuse_pointer
from models.formats.tokenizer import Tokenizer
from models.transformer import Params

_MAGIC = 0x616B3432
_HEADER_BYTES = {0: 28, 2: 256}
BOS_ID, EOS_ID = 1, 2
_FIRST_BYTE_ID, _FIRST_PIECE_ID = 3, 259
# What people give in the place of a checkpoint or a tokenizer, by how it begins.
_OTHERS = {
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive, as torch writes them",
    b"\x80\x02": "a pickle, as torch wrote them",
    b"{": "JSON",
}


@dataclasses.dataclass(frozen=True)
class _Header:
    """Sizes as the file states them; `group` is the number of int8 values that share a scale (version 2)."""

    version: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_position: int
    tied: bool
    group: int = 0


@dataclasses.dataclass(frozen=True)
class _Section:
    """One stretch of the file: `count` tensors of `shape` (torch order, [out, in])."""

    name: str
    count: int
    shape: tuple[int, ...]
    quantized: bool = False

    def size(self, group: int) -> int:
        """Bytes of one tensor."""
        values = math.prod(self.shape)
        return values + 4 * (values // group) if self.quantized else 4 * values


def read_llama2c(path: str | Path) -> tuple[TransformerConfig, Params]:
    """Reads a llama2.c checkpoint, version 0 or Q8_0 version 2.

    Args:
      path: the `.bin` file.

    Returns:
      The config (family llama, RoPE base 10,000, norm epsilon 1e-5) and float32 parameters with layers as a list. Like
      llama2.c itself, it takes BOS as the end of a text, beside EOS.

    Raises:
      UserError: the file is missing, of another format, or not as long as its header says, or a tensor is not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint file {path}")
    _refuse_others(path, "checkpoint")
    data = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    header = _read_header(data, path)
    sections = _sections(header)
    for section in sections:
        if section.quantized and (header.group < 1 or math.prod(section.shape) % header.group):
            raise UserError(f"{path} is not a llama2.c checkpoint: groups of {header.group} do not fit {section.shape}")
    expected = _HEADER_BYTES[header.version] + sum(s.count * s.size(header.group) for s in sections)
    if len(data) != expected:
        problem = "truncated" if len(data) < expected else "not a llama2.c checkpoint of this shape"
        raise UserError(f"{path} is {problem}: its header implies {expected} bytes, it has {len(data)}")
    config = TransformerConfig(
        vocab_size=header.vocab_size,
        width=header.width,
        num_layers=header.num_layers,
        num_heads=header.num_heads,
        num_kv_heads=header.num_kv_heads,
        head_dim=header.width // header.num_heads,
        mlp_width=header.mlp_width,
        max_position=header.max_position,
        tied_embeddings=header.tied,
        bos_id=BOS_ID,
        eos_ids=(EOS_ID, BOS_ID),
    )
    tensors = _read_sections(data, header, sections)
    for name, arrays in tensors.items():
        for number, array in enumerate(arrays):
            if name != "rope_tables":
                refuse_non_finite(array, f"{name} {number}", path)
    return config, _assemble(config, tensors)


def read_llama2c_tokenizer(path: str | Path, vocab_size: int) -> Tokenizer:
    """Reads a llama2.c `tokenizer.bin` (SentencePiece BPE) as a `tokenizers` model that encodes and decodes the same.

    The pieces keep their real spaces. Encoding prepends one space, splits into characters (bytes for those that the
    vocabulary lacks) and merges the best-scored neighbours, leftmost first; decoding drops that space again. As
    llama2.c does, `encode(text, specials=False)` reads even `<s>` as three characters.

    Args:
      path: the file: the longest piece's length, then per token its score (float32), length (int32) and bytes.
      vocab_size: tokens in the file, which does not say so itself.

    Raises:
      UserError: the file is missing, truncated or longer than `vocab_size` tokens, or is no SentencePiece vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no tokenizer file {path}")
    data = path.read_bytes()
    if is_sentencepiece(data) or path.suffix == ".json":
        kind = "Hugging Face's" if path.suffix == ".json" else "SentencePiece's"
        beside = path.with_suffix(".bin")
        instead = (
            f"give {beside}" if beside.is_file() else "give the .bin that its tokenizer.py exports, such as tok512.bin"
        )
        raise UserError(f"{path} is {kind} file of a tokenizer, not llama2.c's own: {instead}")
    _refuse_others(path, "tokenizer")
    pieces, scores = _read_pieces(data, vocab_size, path)
    if pieces[_FIRST_BYTE_ID:_FIRST_PIECE_ID] != [f"<0x{byte:02X}>" for byte in range(256)]:
        raise UserError(f"{path} is not a llama2.c tokenizer: tokens 3 to 258 are not the bytes <0x00> to <0xFF>")
    pieces[BOS_ID], pieces[EOS_ID] = "<s>", "</s>"
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) < len(pieces):
        raise UserError(f"{path} is not a llama2.c tokenizer: some of its pieces occur twice")
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": pieces[i], **special} for i in range(_FIRST_BYTE_ID)],
        "normalizer": {"type": "Prepend", "prepend": " "},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS_ID], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": pieces[0],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges(pieces, scores, _FIRST_PIECE_ID),
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": pieces[BOS_ID],
        "eos_token": pieces[EOS_ID],
        "unk_token": pieces[0],
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), config)


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the output rows (the first axis) of each head from pairs (2i, 2i+1) to pairs (i, i + D/2)."""
    out, *rest = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def _refuse_others(path: Path, what: str) -> None:
    refuse_pointer(path)
    with path.open("rb") as file:
        start = file.read(16)
    kind = next((kind for magic, kind in _OTHERS.items() if start.startswith(magic)), None)
    kind = "a safetensors file" if start[8:10] == b'{"' else kind
    if kind is not None:
        raise UserError(f"{path} is {kind}, not a {what} of llama2.c")


def _read_header(data: np.ndarray, path: Path) -> _Header:
    def bad(reason: str) -> UserError:
        return UserError(f"{path} is not a llama2.c checkpoint: {reason}")

    if len(data) < _HEADER_BYTES[0]:
        raise UserError(f"{path} is truncated: a llama2.c header takes {_HEADER_BYTES[0]} bytes, it has {len(data)}")
    version, tied, group = 0, True, 0
    if struct.unpack_from("<I", data)[0] == _MAGIC:
        version = struct.unpack_from("<i", data, 4)[0]
        if version != 2:
            raise UserError(f"{path} is llama2.c version {version}; versions 0 and 2 can be read")
        if len(data) < _HEADER_BYTES[2]:
            raise UserError(f"{path} is truncated: its header takes {_HEADER_BYTES[2]} bytes, it has {len(data)}")
        tied, group = struct.unpack_from("<?i", data, 36)
    H, F, L, N, K, V, length = struct.unpack_from("<7i", data, 8 if version == 2 else 0)
    if version == 0 and V < 0:
        # How version 0 says that the classifier has weights of its own.
        V, tied = -V, False
    if min(H, F, L, N, K, V, length) < 1:
        raise bad("it has neither the magic number ak42 nor a header of positive sizes")
    if H % N or N % K or (H // N) % 2:
        raise bad(f"width {H}, {N} heads and {K} key/value heads do not fit together")
    return _Header(
        version=version,
        width=H,
        mlp_width=F,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        vocab_size=V,
        max_position=length,
        tied=tied,
        group=group,
    )


def _sections(header: _Header) -> list[_Section]:
    """What follows the header, in file order (llama2.c export.py, `legacy_export` and `version2_export`)."""
    H, F, V, L = header.width, header.mlp_width, header.vocab_size, header.num_layers
    D = H // header.num_heads
    kv = header.num_kv_heads * D
    q8 = header.version == 2
    embedding = _Section("embedding", 1, (V, H), q8)
    attention = [_Section(name, L, (out, H), q8) for name, out in (("q", H), ("k", kv), ("v", kv), ("o", H))]
    mlp = [_Section("gate", L, (F, H), q8), _Section("down", L, (H, F), q8), _Section("up", L, (F, H), q8)]
    head = [] if header.tied else [_Section("head", 1, (V, H), q8)]
    attention_norm, mlp_norm = _Section("attention_norm", L, (H,)), _Section("mlp_norm", L, (H,))
    final_norm = _Section("final_norm", 1, (H,))
    if q8:
        return [attention_norm, mlp_norm, final_norm, embedding, *attention, *mlp, *head]
    rope_tables = _Section("rope_tables", 2, (header.max_position, D // 2))
    return [embedding, attention_norm, *attention, mlp_norm, *mlp, final_norm, rope_tables, *head]


def _read_sections(data: np.ndarray, header: _Header, sections: list[_Section]) -> dict[str, list[np.ndarray]]:
    offset = _HEADER_BYTES[header.version]
    tensors: dict[str, list[np.ndarray]] = {}
    for section in sections:
        tensors[section.name] = []
        for _ in range(section.count):
            raw = data[offset : offset + section.size(header.group)]
            tensors[section.name].append(_dequantize(raw, section, header.group))
            offset += len(raw)
    return tensors


def _dequantize(raw: np.ndarray, section: _Section, group: int) -> np.ndarray:
    if not section.quantized:
        return np.frombuffer(raw, "<f4").reshape(section.shape)
    values = math.prod(section.shape)
    scales = np.frombuffer(raw[values:], "<f4")
    return (raw[:values].view(np.int8).reshape(-1, group) * scales[:, None]).reshape(section.shape)


def _assemble(config: TransformerConfig, tensors: dict[str, list[np.ndarray]]) -> Params:
    def layer(k: int) -> Params:
        def kernel(name: str, heads: int = 0) -> dict[str, np.ndarray]:
            weight = tensors[name][k]
            return {"kernel": (halves(weight, heads) if heads else weight).T}

        return {
            "attention_norm": {"scale": tensors["attention_norm"][k]},
            "attention": {
                "q": kernel("q", config.num_heads),
                "k": kernel("k", config.num_kv_heads),
                "v": kernel("v"),
                "o": kernel("o"),
            },
            "mlp_norm": {"scale": tensors["mlp_norm"][k]},
            "mlp": {name: kernel(name) for name in ("gate", "up", "down")},
        }

    params: Params = {
        "embed": {"embedding": tensors["embedding"][0]},
        "layers": [layer(k) for k in range(config.num_layers)],
        "final_norm": {"scale": tensors["final_norm"][0]},
    }
    if not config.tied_embeddings:
        params["head"] = {"kernel": tensors["head"][0].T}
    return jax.device_put(jax.tree.map(np.ascontiguousarray, params))


def _read_pieces(data: bytes, vocab_size: int, path: Path) -> tuple[list[str], list[float]]:
    pieces: list[str] = []
    scores: list[float] = []
    offset = 4
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8
            if length < 0 or offset + length > len(data):
                raise UserError(f"{path} is truncated: it ends within token {len(pieces)} of {vocab_size}")
            pieces.append(data[offset : offset + length].decode("utf-8"))
            scores.append(score)
            offset += length
    except struct.error:
        raise UserError(f"{path} is truncated: it holds {len(pieces)} tokens of {vocab_size}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a llama2.c tokenizer: token {len(pieces)} is not UTF-8") from None
    if offset != len(data):
        raise UserError(f"{path} holds more than the {vocab_size} tokens of its checkpoint")
    return pieces, scores
