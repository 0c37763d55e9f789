"""Damaged targets, heads and llama2.c files are refused in one sentence, whatever is wrong with them."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save

from models import transformer
from models.formats import hf, released_eagle, released_heads
from models.formats.hf import load_config
from models.formats.llama2c import read_llama2c, read_llama2c_tokenizer
from models.formats.release import read_release
from models.formats.target import check_vocabulary
from models.formats.tokenizer import Tokenizer
from scripts import convert
from tests.fuzz import FEW_OR_MANY, accepts_or_refuses, damaged, fuzz, json_values, st
from tests.models.formats import released_cases as cases
from tests.models.formats.test_llama2c import pieces_of, random_weights, write_tokenizer, write_v0, write_v2
from tests.models.formats.test_weights import INDEX, TINY, tensors
from tests.models.formats.torch_archives import write_torch

CONFIG = {
    "model_type": "llama",
    "vocab_size": TINY.vocab_size,
    "hidden_size": TINY.width,
    "intermediate_size": TINY.mlp_width,
    "num_hidden_layers": TINY.num_layers,
    "num_attention_heads": TINY.num_heads,
    "num_key_value_heads": TINY.num_kv_heads,
    "head_dim": TINY.head_dim,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
EXAMPLES = 60
VOCABULARY = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, [])).to_str().encode()


def of_torch(held: dict[str, np.ndarray]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_torch(Path(folder) / "w.bin", held).read_bytes()


@functools.cache
def files() -> dict[str, bytes]:
    weights = tensors()
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "generation_config.json": b'{"eos_token_id": [1, 2]}',
        "tokenizer.json": VOCABULARY,
        "tokenizer_config.json": b'{"bos_token": "<s>", "eos_token": {"content": "</s>"}}',
        "model.safetensors": save(weights),
        INDEX: json.dumps({"weight_map": dict.fromkeys(weights, "model.safetensors")}).encode(),
        "pytorch_model.bin": of_torch(weights),
    }


SHAPES = functools.cache(transformer.param_shapes)  # Traced once per config, which most examples share.


def load(directory: Path) -> None:
    config = load_config(directory)
    check_vocabulary(config, Tokenizer.load(directory), directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "param_shapes", SHAPES)
        hf.load_params(config, directory, jnp.float32)


@pytest.mark.parametrize("examples", FEW_OR_MANY)
def test_targets_with_a_damaged_file(examples: int, tmp_path: Path) -> None:
    """One file damaged, in a directory of safetensors or of torch's files."""

    def check(data: st.DataObject) -> None:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        (tmp_path / "m").mkdir()
        held = dict(files())
        held.pop(data.draw(st.sampled_from(["model.safetensors", "pytorch_model.bin"])))
        if "model.safetensors" not in held:
            held.pop(INDEX)
        name = data.draw(st.sampled_from(sorted(held)))
        held[name] = data.draw(damaged(held[name]))
        for path, content in held.items():
            (tmp_path / "m" / path).write_bytes(content)
        accepts_or_refuses(lambda: load(tmp_path / "m"))

    fuzz(EXAMPLES * examples, st.data(), check)


@pytest.mark.parametrize("examples", FEW_OR_MANY)
def test_targets_with_odd_values(examples: int, tmp_path: Path) -> None:
    """Valid JSON that says what nobody means, from any key."""

    def check(data: st.DataObject) -> None:
        (tmp_path / "m").mkdir(exist_ok=True)
        held = dict(files())
        name = data.draw(st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json"]))
        value = json.loads(held[name])
        key = data.draw(st.sampled_from(sorted(value)))
        odd = json_values(sorted(CONFIG), ["llama"]) | st.sampled_from(
            [-1, 0, 1, 3, 10**9, 10**30, float("nan"), float("inf"), 1e-300, True, "llama", [], {}]
        )
        value[key] = data.draw(odd)
        held[name] = json.dumps(value).encode()
        for path, content in held.items():
            (tmp_path / "m" / path).write_bytes(content)
        accepts_or_refuses(lambda: load(tmp_path / "m"))

    fuzz(EXAMPLES * examples, st.data(), check)


P_EAGLE = cases.EAGLE_CONFIG | {"num_hidden_layers": 3, "mask_token_id": 5}


@pytest.mark.parametrize("examples", FEW_OR_MANY)
def test_heads(examples: int, tmp_path: Path) -> None:
    """Medusa, Hydra and EAGLE heads, in either format, with their config."""

    def check(data: st.DataObject) -> None:
        base = _base()
        kind, held, config = data.draw(
            st.sampled_from(
                [
                    (released_heads.medusa, cases.medusa(2), None),
                    (released_heads.hydra, cases.hydra(base, 2, 2), {"hydra_num_heads": 2}),
                    (released_eagle.eagle, cases.eagle(base), cases.EAGLE_CONFIG),
                    (released_eagle.eagle3, cases.eagle3(cases.DRAFT_TOKENS), cases.EAGLE_CONFIG),
                    (released_eagle.p_eagle, cases.p_eagle(base), P_EAGLE),
                    (released_eagle.eagle31, cases.eagle31(), cases.EAGLE_CONFIG | {"fc_norm": True}),
                ]
            )
        )
        shutil.rmtree(tmp_path / "heads", ignore_errors=True)
        path = cases.write(tmp_path / "heads" / data.draw(st.sampled_from(["m.safetensors", "m.pt"])), held, config)
        victim = path if config is None else data.draw(st.sampled_from([path, path.with_name("config.json")]))
        victim.write_bytes(data.draw(damaged(victim.read_bytes())))
        accepts_or_refuses(lambda: kind(read_release(path), base))

    fuzz(EXAMPLES * examples, st.data(), check)


_BASES: list = []


def _base():
    if not _BASES:
        _BASES.append(cases.random_base())
    return _BASES[0]


@pytest.mark.parametrize("examples", FEW_OR_MANY)
def test_llama2c(examples: int, tmp_path: Path) -> None:
    """A checkpoint or a tokenizer damaged; a target is written whole or not at all."""

    def check(data: st.DataObject) -> None:
        write, tied = data.draw(st.sampled_from([(write_v0, True), (write_v0, False), (write_v2, True)]))
        words = pieces_of(["ab", "abc"])
        source, out = write(tmp_path / "m.bin", random_weights(), tied), tmp_path / "out"
        tokenizer = write_tokenizer(tmp_path / "t.bin", words)
        victim = data.draw(st.sampled_from([source, tokenizer]))
        victim.write_bytes(data.draw(damaged(victim.read_bytes())))

        def read() -> None:
            read_llama2c(source)
            read_llama2c_tokenizer(tokenizer, len(words))

        if not accepts_or_refuses(read):
            arguments = ["--from", "llama2c", "--src", source, "--tokenizer", tokenizer, "--out", out]
            try:
                convert.main([str(argument) for argument in arguments])
            except SystemExit as stopped:
                assert stopped.code == 2
            assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "t.bin"]

    fuzz(EXAMPLES * examples, st.data(), check)
