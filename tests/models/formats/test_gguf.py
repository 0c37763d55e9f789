"""GGUF import: every architecture and type, tokenizers, and one sentence for every file that cannot be read."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from models.config import RopeScaling, TransformerConfig
from models.errors import UserError
from models.formats.hf import load_config, load_params
from models.formats.storage import leaves_by_path
from models.transformer import param_shapes
from tests.models.formats.test_llama2c import CHARACTERS, WORDS, pieces_of, reference_encode

gguf = pytest.importorskip("gguf")

from models.formats.gguf import TYPES, read_gguf  # noqa: E402
from models.formats.gguf_tokenizer import PRE_TOKENIZERS, read_gguf_tokenizer  # noqa: E402
from tests.fuzz import accepts_or_refuses, damaged, fuzz  # noqa: E402
from tests.models.formats.gguf_files import (  # noqa: E402
    MULTILINGUAL,
    architecture_of,
    gguf_keys,
    gguf_tensors,
    gpt2_tokenizer,
    write_gguf,
)

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"
# What GGUF cannot say of the committed models.
LOST: dict[str, dict[str, Any]] = {"qwen2": {"windows": ()}, "gemma2": {"query_scale": None}}


def golden(case: str) -> tuple[TransformerConfig, dict]:
    config = dataclasses.replace(load_config(GOLDENS / case), **LOST.get(case, {}))
    return config, load_params(config, GOLDENS / case)


def write_model(path: Path, config: TransformerConfig, params, **more: Any) -> Path:
    return write_gguf(path, architecture_of(config), gguf_keys(config), gguf_tensors(config, params), **more)


@pytest.mark.parametrize("case", ["llama", "llama_linear_tied", "llama_biases", "mistral", "qwen2", "qwen3", "gemma2"])
def test_every_architecture(case: str, tmp_path: Path) -> None:
    wanted, params = golden(case)
    config, read, tokenizer = read_gguf(write_model(tmp_path / "m.gguf", wanted, params))
    assert config == wanted
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert tokenizer.vocab_size == config.vocab_size and tokenizer.eos_ids == config.eos_ids
    if case == "llama":
        narrow = read_gguf(tmp_path / "m.gguf", "bfloat16")[1]
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), narrow, params)


def test_the_rotation_of_llama_31(tmp_path: Path) -> None:
    config, params = golden("llama")
    scaled = dataclasses.replace(config, rope_theta=500_000.0, rope_scaling=RopeScaling("llama3", 8.0))
    assert read_gguf(write_model(tmp_path / "m.gguf", scaled, params))[0] == scaled
    tensors = gguf_tensors(scaled, params)
    tensors["rope_freqs.weight"] = np.ones_like(tensors["rope_freqs.weight"])
    keys = gguf_keys(scaled)
    assert read_gguf(write_gguf(tmp_path / "one.gguf", "llama", keys, tensors))[0].rope_scaling is None
    tensors["rope_freqs.weight"][1] = 3.0
    with pytest.raises(UserError, match=r"rope_freqs\.weight does not follow Llama 3\.1's formula"):
        read_gguf(write_gguf(tmp_path / "odd.gguf", "llama", keys, tensors))


def test_the_query_scale_of_gemma_27b(tmp_path: Path) -> None:
    config = TransformerConfig(
        8, 8, 46, 2, 1, 2, 2, tied_embeddings=True, embed_scale=True, attention_softcap=50.0, logit_softcap=30.0,
        post_norms=True, zero_centred_norm=True, activation="gelu_tanh", query_scale=4**-0.5, family="gemma2",
        windows=(4096, None) * 23, bos_id=1, eos_ids=(2,),
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(config))
    assert read_gguf(write_model(tmp_path / "m.gguf", config, params, tokenizer=gpt2_tokenizer(8)))[0] == config


def test_what_older_files_leave_out(tmp_path: Path) -> None:
    """Heads share the width, and Gemma 2's caps and window are the published ones."""
    config = TransformerConfig(
        40, 16, 2, 4, 2, 4, 6, tied_embeddings=True, embed_scale=True, attention_softcap=50.0, logit_softcap=30.0,
        post_norms=True, zero_centred_norm=True, activation="gelu_tanh", family="gemma2", windows=(4096, None),
        max_position=8192, bos_id=1, eos_ids=(2,),
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(config))
    left_out = ("attention.key_length", "attention.value_length", "attention.sliding_window")
    left_out += ("attn_logit_softcapping", "final_logit_softcapping")
    keys = {name: value for name, value in gguf_keys(config).items() if name not in left_out}
    assert len(keys) == len(gguf_keys(config)) - len(left_out)
    assert read_gguf(write_gguf(tmp_path / "m.gguf", "gemma2", keys, gguf_tensors(config, params)))[0] == config


@pytest.mark.parametrize(
    ("name", "kind", "ends"), [("<end_of_turn>", 3, (2, 3)), ("<|eot_id|>", 1, (2,)), ("<x>", 3, (2,))]
)
def test_a_turn_ends_where_a_control_token_says_so(tmp_path: Path, name: str, kind: int, ends: tuple[int, ...]) -> None:
    """Converters write only the token that ends a text, which Gemma's chat models do not write behind an answer."""
    config = TransformerConfig(40, 16, 1, 4, 2, 4, 6, tied_embeddings=True, family="qwen2", qkv_bias=True)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), param_shapes(config))
    told = gpt2_tokenizer(40)
    told["tokens"][3], told["token_type"][3] = name, kind
    assert read_gguf(write_model(tmp_path / "m.gguf", config, params, tokenizer=told))[0].eos_ids == ends
    more = {**told, "eom_token_id": 4}
    assert read_gguf(write_model(tmp_path / "n.gguf", config, params, tokenizer=more))[0].eos_ids == tuple(
        sorted({*ends, 4}, key=[2, 4, 3].index)
    )


WIDE = TransformerConfig(40, 256, 1, 2, 1, 128, 256, tied_embeddings=True, family="qwen3", qk_norm=True)
# Largest error of a value, in parts of the largest of its block.
COARSE = {"Q8_0": 1 / 200, "Q5_0": 1 / 15, "Q5_1": 1 / 15, "Q4_0": 1 / 7, "Q4_1": 1 / 7, "F16": 1e-3, "BF16": 1e-2}


def raw_blocks(kind: str, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random blocks of a type that the library only reads, with scales that are small finite numbers."""
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * columns // size, width), np.uint8)
    halfs = rng.uniform(0.001, 0.01, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    if kind == "Q6_K":
        blocks[:, -2:] = halfs[:, :2]
    else:
        blocks[:, :4] = halfs
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", TYPES)
def test_every_type(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), param_shapes(WIDE))
    exact = gguf_tensors(WIDE, params)
    number = gguf.GGMLQuantizationType[kind]
    stored, kinds = {}, {}
    for name, tensor in exact.items():
        if tensor.ndim > 1 and kind != "F32":
            kinds[name] = number
            stored[name] = raw_blocks(kind, rng, *tensor.shape) if kind.endswith("K") else gguf.quantize(tensor, number)
        else:
            stored[name] = tensor
    config, read, _ = read_gguf(write_gguf(tmp_path / "m.gguf", "qwen3", gguf_keys(WIDE), stored, kinds=kinds))
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(read)} == {dtype}
    for name, tensor in gguf_tensors(config, read).items():
        if name not in kinds:
            np.testing.assert_allclose(tensor, exact[name], rtol=1e-2 if dtype != "float32" else 0)
        elif kind.endswith("K"):
            np.testing.assert_array_equal(tensor, gguf.dequantize(stored[name], number), name)
            assert 0.01 < np.abs(tensor).std() < 10
        else:
            blocks, error = exact[name].reshape(-1, 32), np.abs(tensor - exact[name]).reshape(-1, 32)
            reach = blocks.max(1) - blocks.min(1) if kind.endswith("_1") else np.abs(blocks).max(1)
            assert (error <= COARSE[kind] * reach[:, None]).all()


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_gguf(path)
    told = str(caught.value)
    assert str(path) in told and "\n" not in told
    return told


def test_what_cannot_be_read(tmp_path: Path) -> None:
    config, params = golden("llama")
    keys, tensors = gguf_keys(config), gguf_tensors(config, params)
    bad = tmp_path / "bad.gguf"

    def told(architecture="llama", *, more=None, less=(), extra=None, general=None, kinds=None, tokenizer=None) -> str:
        present = {name: value for name, value in {**tensors, **(extra or {})}.items() if name not in less}
        said = {key: value for key, value in {**keys, **(more or {})}.items() if key not in less}
        return complaint(write_gguf(bad, architecture, said, present, tokenizer, kinds, general))

    assert "architecture 'phi3' is not supported, only llama, qwen2, qwen3, gemma2" in told("phi3")
    q2 = gguf.GGMLQuantizationType.Q2_K
    raw = {"blk.0.ffn_up.weight": np.zeros((1, 84), np.uint8)}
    assert "blk.0.ffn_up.weight is stored as Q2_K" in told(extra=raw, kinds={"blk.0.ffn_up.weight": q2})
    assert "tensor blk.1.attn_q.weight is missing" in told(less=["blk.1.attn_q.weight"])
    assert "blk.0.ffn_gate_inp.weight is not part of" in told(extra={"blk.0.ffn_gate_inp.weight": np.ones(3, "f")})
    assert "tensor output_norm.weight has shape [3]" in told(extra={"output_norm.weight": np.ones(3, "f")})
    assert "no finite numbers" in told(extra={"output_norm.weight": np.full(16, np.nan, "f")})
    assert "the key llama.block_count is missing" in told(less=["block_count"])
    assert "llama.block_count must be a whole number, got 3.0" in told(more={"block_count": 3.0})
    assert "must be a multiple" in told(more={"attention.head_count_kv": 3})
    assert "mixtures of experts" in told(more={"expert_count": 8})
    assert "llama.rope.dimension_count is 4" in told(more={"rope.dimension_count": 4})
    assert "scaling of type 'yarn'" in told(more={"rope.scaling.type": "yarn"})
    for window, wanted in (("abc", "number, got abc"), (2.5, "number, got 2.5"), (-3, "number of at least 0, got -3")):
        said = told(more={"attention.sliding_window": window})
        assert f"llama.attention.sliding_window must be a whole {wanted}" in said
    for name in ("rope.freq_base", "attention.layer_norm_rms_epsilon"):
        for wrong in (float("nan"), float("inf"), 0.0, -1.0):
            assert f"llama.{name} must be a finite number above 0, got {wrong}" in told(more={name: wrong})
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        assert f"llama.{name} must be a finite number above 0, got 0.0" in told(more={name: 0.0})
        both = {"rope_freqs.weight": np.ones(2, "f")}
        assert "linear rotary scaling too" in told(more={name: 2.0}, extra=both)
    assert "llama.rope.scaling.factor is missing" in told(more={"rope.scaling.type": "linear"})
    assert "llama.context_length must be a whole number of at least 0, got -1" in told(more={"context_length": -1})
    assert "eot_token_id is 999, but there are 40 tokens" in told(tokenizer=gpt2_tokenizer(eot_token_id=999))
    assert "split.count must be a whole number, got x" in told(general={"split.count": "x"})
    assert "one of 3 parts" in told(general={"split.count": 3})
    assert "pre-tokenizer 'tekken' is not supported" in told(tokenizer=gpt2_tokenizer(pre="tekken"))
    assert "tokenizer model 'bert'" in told(tokenizer=gpt2_tokenizer(model="bert"))
    assert "merges do not fit" in told(tokenizer=gpt2_tokenizer(merges=["zz yy"]))
    assert "bos_token_id is 99" in told(tokenizer=gpt2_tokenizer(bos_token_id=99))
    twice = gpt2_tokenizer()
    twice["tokens"][7] = "<s>"
    assert "'<s>' occurs twice" in told(tokenizer=twice)
    assert "there is no GGUF file" in complaint(tmp_path / "nowhere.gguf")
    bad.write_bytes(b"PK\3\4" + bytes(60))
    assert "is not a GGUF file" in complaint(bad)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tokenizers_whose_metadata_has_other_types(kind: str) -> None:
    """What a writer got wrong is named, and neither guessed nor a traceback."""
    whole = {**gpt2_tokenizer(), "model": kind, "scores": [0.0] * 40}
    entries: dict[str, tuple] = {
        "tokens": ("<s>", 3, [b"a"] * 40, [1] * 40),
        "token_type": ("x", 3, [1] * 39, ["1"] * 40, [1.5] * 40),
        "bos_token_id": ("1", 1.0, True, -1, 40),
        "eos_token_id": ("1", 1.0, -1, 40),
        "unknown_token_id": ("1", 1.0, -1, 40),
        "padding_token_id": ("1", -1, 40),
        "add_bos_token": ("no", 1),
        "model": (["gpt2"], 3),
    }
    own = {"pre": (["gpt-2"], 3), "merges": ("ab", 3, [1], [["a", "b"]])}
    if kind == "llama":
        own = {"scores": ("ab", ["0"] * 40, [0.0] * 39, [float("nan")] * 40), "add_space_prefix": ("no", 0)}
    for name, values in {**entries, **own}.items():
        for value in values:
            with pytest.raises(UserError) as caught:
                read_gguf_tokenizer(as_metadata({**whole, name: value}), Path("m.gguf"))
            said = str(caught.value)
            assert said.startswith("m.gguf: ") and f"tokenizer.ggml.{name}" in said and "\n" not in said, (name, value)
    with pytest.raises(UserError, match=r"tokenizer\.chat_template must be a string"):
        read_gguf_tokenizer(as_metadata(whole, **{"tokenizer.chat_template": ["a"]}), Path("m.gguf"))
    assert read_gguf_tokenizer(as_metadata(whole), Path("m.gguf")).vocab_size == 40


def test_linear_scaling_is_read_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    """A factor without a type is linear, older files call it otherwise, and `none` leaves it out."""
    config, params = golden("llama")
    keys, tensors = gguf_keys(config), gguf_tensors(config, params)

    def scaling(**more: Any) -> RopeScaling | None:
        told = {**keys, **{f"rope.{name.replace('__', '.')}": value for name, value in more.items()}}
        return read_gguf(write_gguf(tmp_path / "m.gguf", "llama", told, tensors))[0].rope_scaling

    assert scaling(scaling__factor=2.0) == scaling(scale_linear=2.0) == RopeScaling("linear", 2.0)
    assert scaling(scaling__type="linear", scaling__factor=2.0) == RopeScaling("linear", 2.0)
    assert scaling(scaling__factor=4.0, scale_linear=2.0) == RopeScaling("linear", 4.0)
    assert scaling(scaling__type="none", scaling__factor=2.0) is scaling(scale_linear=1.0) is scaling() is None


@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_a_window_of_unknown_layers_is_refused(case: str, tmp_path: Path) -> None:
    config, params = golden(case)
    keys, tensors = gguf_keys(config), gguf_tensors(config, params)
    path = write_gguf(tmp_path / "m.gguf", case, {**keys, "attention.sliding_window": 4}, tensors)
    assert f"{case}.attention.sliding_window is 4, and GGUF does not say of which layers" in complaint(path)
    # One that no text outgrows changes nothing.
    whole = {**keys, "attention.sliding_window": config.max_position}
    assert read_gguf(write_gguf(tmp_path / "m.gguf", case, whole, tensors))[0] == config


def test_damaged_files(tmp_path: Path) -> None:
    config, params = golden("llama")
    whole = write_model(tmp_path / "m.gguf", config, params).read_bytes()
    bad = tmp_path / "bad.gguf"
    for length in (4, 20, 100, len(whole) // 4, len(whole) // 2, len(whole) - 40):
        bad.write_bytes(whole[:length])
        assert "is truncated or corrupt" in complaint(bad)
    draw = random.Random(0)
    headers = whole.index(b"output_norm.weight")
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draw.randrange(headers)] = draw.randrange(256)
        bad.write_bytes(damaged)
        try:
            read_gguf(bad)
        except UserError as error:
            refused += "\n" not in str(error)
    assert refused > 10


@pytest.mark.slow
def test_files_with_any_damage(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "m.gguf", *golden("llama")).read_bytes()
    bad = tmp_path / "bad.gguf"

    def check(content: bytes) -> None:
        bad.write_bytes(content)
        accepts_or_refuses(lambda: read_gguf(bad))

    fuzz(400, damaged(whole), check)


def byte_level(pre: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A trained byte-level tokenizer and its metadata in GGUF."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = PRE_TOKENIZERS[pre]()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([MULTILINGUAL] * 3, trainer)
    pieces = sorted(core.get_vocab(), key=core.get_vocab().__getitem__)
    merges = [a + " " + b for a, b in json.loads(core.to_str())["model"]["merges"]]
    told = {"model": "gpt2", "pre": pre, "tokens": [*pieces, "<think>"], "merges": merges}
    types = [3, 3, 3, *[1] * (len(pieces) - 3), 4]
    return core, {**told, "token_type": types, "bos_token_id": 1, "eos_token_id": 2}


def as_metadata(told: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{key}": value for key, value in told.items()} | more


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_tokenizers(pre: str) -> None:
    core, told = byte_level(pre)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = read_gguf_tokenizer(as_metadata(told, **{"tokenizer.chat_template": template}), Path("m.gguf"))
    begins = [1] if pre == "llama-bpe" else []
    assert tokenizer.encode(MULTILINGUAL) == begins + core.encode(MULTILINGUAL).ids
    assert tokenizer.decode(tokenizer.encode(MULTILINGUAL)) == MULTILINGUAL
    assert len(tokenizer.encode(MULTILINGUAL)) < 0.9 * len(MULTILINGUAL.encode())
    chat = tokenizer.encode_chat([{"role": "user", "content": "it's<think>"}])
    assert chat[0] == 1 and chat[-2:] == [len(told["tokens"]) - 1, 2]
    assert tokenizer.decode(chat) == "user\nit's<think>", "what its user defined is text, a special is none"
    # The cuts of each kind: how digits group, whether a sign may begin a word, what ends with which line, and whether
    # capitals are shortened forms, too. The last of several spaces goes with what follows it.
    words = ["x", "Ġ(", "y", ")", "Ġq"]
    older = [*words, "#", "z", "ĠI", "'", "LLS", "Ġ", "Ġa", "ĠĊĊ", "Ġb", "!!"]
    newer = [*words, "#z", "ĠI", "'LL", "S", "Ġ", "Ġa", "ĠĊĊ", "Ġb", "!!Ċ", "Ġ"]
    expected = {
        "gpt-2": [*older, "Ċ", "Ġ12345"],
        "smollm": [*older, "ĊĠ", *"12345"],
        "llama-bpe": [*newer, "123", "45"],
        "qwen2": [*newer, *"12345"],
    }
    text = "x (y) q#z I'LLS  a \n\n b!!\n 12345"
    assert [piece for piece, _ in tokenizer.core.pre_tokenizer.pre_tokenize_str(text)] == expected[pre]


def test_what_is_done_before_words_are_cut_and_to_words_that_are_tokens() -> None:
    """Qwen composes characters, and leaves those alone that only look alike; Llama 3 takes a whole word that is a
    token, though no merges lead to it."""
    tokenizers_of = {
        pre: read_gguf_tokenizer(as_metadata(byte_level(pre)[1]), Path("m.gguf")) for pre in PRE_TOKENIZERS
    }
    for pre, tokenizer in tokenizers_of.items():
        told = tokenizer.decode(tokenizer.encode("e\u0301\ufb01"))
        assert told == ("\xe9\ufb01" if pre == "qwen2" else "e\u0301\ufb01"), pre
    for pre in ("llama-bpe", "qwen2"):
        _, told = byte_level(pre)
        told = {**told, "tokens": [*told["tokens"], "zqzq"], "token_type": [*told["token_type"], 1]}
        new = read_gguf_tokenizer(as_metadata(told), Path("m.gguf")).encode("zqzq", bos=False)
        assert (new == [len(told["tokens"]) - 1]) == (pre == "llama-bpe"), pre


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_tokenizers(prefix: bool) -> None:
    plain = pieces_of([*WORDS, *CHARACTERS])
    names = [piece.decode().strip("\n").replace(" ", "▁") for piece, _ in plain]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(names) - 259)]
    told = {
        "model": "llama",
        "tokens": [*names, "<tool>", " " * 4],
        "scores": [score for _, score in plain] + [0.0, 0.0],
        "token_type": [*types, 4, 4],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_space_prefix": prefix,
    }
    tokenizer = read_gguf_tokenizer(as_metadata(told), Path("m.gguf"))
    draw = random.Random(0)
    for text in ["the", "  the\nababa ", "é€😀 \t", *("".join(draw.choices(" abthex", k=12)) for _ in range(50))]:
        if " " * 4 in text:
            continue
        wanted = reference_encode(plain, text)
        if not prefix:
            # The reference always prepends a space: of texts that begin with one, take that one away.
            wanted = reference_encode(plain, text[1:]) if text.startswith(" ") else None
        if wanted is not None:
            assert tokenizer.encode(text) == wanted, text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("ab<tool>he</s>")
    assert len(names) in ids and ids[-1] == 2
    spaces = " " * 4
    runs = tokenizer.encode(f"a{spaces}b")
    assert len(names) + 1 in runs and tokenizer.decode(runs) == f"a{spaces}b"


def test_paths_are_complete() -> None:
    """Every parameter of every architecture has a name in GGUF."""
    from models.formats.gguf import _names

    for case in ("llama_biases", "qwen2", "qwen3", "gemma2"):
        config, _ = golden(case)
        assert set(_names(config)) == set(leaves_by_path(param_shapes(config)))
