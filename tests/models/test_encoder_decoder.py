"""Encoder-decoders against a dense reference, which reads the released tensors as they are."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import TransformerConfig
from models.encoder_decoder import beside, encode
from models.errors import UserError
from models.formats.hf import load_config, load_params, save_target
from models.formats.released_encoder_decoder import encoder_decoder
from models.formats.storage import leaves_by_path
from models.formats.tokenizer import Tokenizer
from models.layout import Layout
from scripts.convert import main
from tests.models.encoder_decoder_reference import FACTS, logits, released
from tests.models.formats.torch_archives import write_torch

LENGTHS, ROWS, LENGTH = (9, 5), 12, 7


@functools.cache
def texts() -> tuple[np.ndarray, np.ndarray]:
    """Sources of two lengths, padded with 0, and the decoder's texts."""
    rng = np.random.default_rng(1)
    source = rng.integers(1, FACTS["vocab_size"], (2, ROWS)) * (np.arange(ROWS) < np.array(LENGTHS)[:, None])
    return source, rng.integers(1, FACTS["vocab_size"], (2, LENGTH))


@functools.partial(jax.jit, static_argnames=("config", "form"))
def scores(config, params, source, lengths, text, form):
    params = form(params)
    memory = encode(config, params, source, lengths)
    return transformer.forward(config, params, text, *beside(memory, Layout.causal(*text.shape))).logits


def as_it_is(params):
    return params


def scored(config: TransformerConfig, params, source: np.ndarray, text: np.ndarray, form=as_it_is) -> np.ndarray:
    inputs = (jnp.asarray(x, jnp.int32) for x in (source, np.array(LENGTHS), text))
    return np.asarray(scores(config, jax.device_put(params), *inputs, form))


def write(folder: Path, **changes) -> Path:
    write_torch(folder / "model.pt", {"model_state_dict": released(), "model_config": FACTS} | changes)
    return folder / "model.pt"


@pytest.mark.usefixtures("x64")
def test_released_model_is_the_dense_reference(tmp_path: Path) -> None:
    """Tiled keys, centred positions, biases, norms; padding and the layout of parameters change nothing."""
    made = encoder_decoder(write(tmp_path), (2,))
    source, text = texts()
    # Angles of RoPE are float32.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    score = functools.partial(scored, made.config, made.params)
    ours = score(source, text)
    close(ours, logits(released(), source[:, : max(LENGTHS)], text))
    other = np.where(source == 0, 7, source)
    assert np.array_equal(score(other, text), ours)
    for form in (transformer.for_decoding, transformer.stack_layers):
        close(score(source, text, form=form), ours)
    # The encoder looks ahead, the decoder does not.
    last = source.copy()
    last[0, LENGTHS[0] - 1] += 1
    behind = text.copy()
    behind[0, 4] += 1
    assert np.all(np.abs(score(last % FACTS["vocab_size"], text) - ours)[0].max(-1) > 1e-3)
    moved = np.abs(score(source, behind % FACTS["vocab_size"]) - ours)[0].max(-1)
    assert np.all(moved[:4] == 0) and np.all(moved[4:] > 1e-3)


def test_every_row_of_the_encoder_sees_all_of_its_text_and_no_padding() -> None:
    layout = Layout.encoder(jnp.array([3, 4], jnp.int32), 4)
    assert layout.positions.tolist() == [[-1, 0, 1, 2], [-1, 0, 1, 2]]
    seen = np.asarray(layout.sees_rows(None))
    assert np.array_equal(seen[0], np.pad(np.ones((3, 3), bool), (0, 1)) | np.diag([False] * 3 + [True]))
    assert seen[1].all()


def test_directories_keep_every_bit(tmp_path: Path) -> None:
    made = encoder_decoder(write(tmp_path), (2,))
    save_target(tmp_path / "target", made.config, made.params, provenance=made.provenance)
    assert load_config(tmp_path / "target") == made.config
    read = leaves_by_path(load_params(made.config, tmp_path / "target", jnp.float32))
    for path, leaf in leaves_by_path(made.params).items():
        assert np.array_equal(read[path], leaf.astype(np.float32)), path
    kept = json.loads((tmp_path / "target" / "config.json").read_text())
    assert kept["provenance"]["detected"] == FACTS and kept["model_type"] == "mu" and kept["num_encoder_layers"] == 3


def test_convert_writes_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer").mkdir()
    Tokenizer.train(["a b c"], 258).save(tmp_path / "tokenizer")
    facts = {**FACTS, "vocab_size": 260}
    source = write(tmp_path, model_state_dict=released(facts), model_config=facts)
    arguments = ["--from", "mu", "--src", str(source), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "--from mu needs --tokenizer" in capsys.readouterr().err
    main([*arguments, "--tokenizer", str(tmp_path / "tokenizer")])
    assert "mu, 3 and 2 layers, width 16, vocabulary 260" in capsys.readouterr().out
    config = load_config(tmp_path / "out")
    assert config.bos_id == 1 and config.eos_ids == Tokenizer.load(tmp_path / "out").eos_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_state_dict": 3}, "no entry 'model_state_dict'"),
        ({"model_config": {**FACTS, "rope_factor": 2.0}}, "model_config.rope_factor = 2.0"),
        ({"model_config": {**FACTS, "n_layer": 2}}, "the key 'n_layer', which the release does not know"),
        ({"model_config": {**FACTS, "n_embd": "16"}}, "model_config.n_embd must be of type int"),
        ({"model_config": {k: v for k, v in FACTS.items() if k != "n_head"}}, "lacks the key 'n_head'"),
        ({"model_config": {**FACTS, "n_kv_head": 4}}, r"num_heads \(6\) must be a multiple"),
        ({"model_config": {**FACTS, "n_head": 5}}, r"qkv_embd \(24\) must be a multiple of n_head \(5\)"),
        ({"model_config": {**FACTS, "hidden_dim": 24}}, r"fc2.weight has shape \[16, 20\], model_config implies"),
        ({"model_config": {**FACTS, "n_decoder_layer": 1}}, "tensor transformer.h.1.* is unknown to the release"),
        ({"model_state_dict": {**released(), "lm_head.weight": released(seed=1)["lm_head.weight"]}}, "differs from"),
    ],
)
def test_importer_refuses(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoder_decoder(write(tmp_path, **changes), (2,))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("family", "llama", "encoder_layers must be at least 1 where model.family is 'mu', and 0 elsewhere"),
        ("encoder_layers", 0, "encoder_layers must be at least 1"),
        ("qk_norm", True, "model.qk_norm is not for an encoder-decoder"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(field: str, value, message: str) -> None:
    shape = dict(vocab_size=5, width=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, mlp_width=4)
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(shape | dict(family="mu", encoder_layers=1) | {field: value}))


def test_a_decoder_without_its_memory_is_refused() -> None:
    config = TransformerConfig(5, 4, 1, 1, 1, 2, 4, family="mu", encoder_layers=1)
    with pytest.raises(ValueError, match="reads a memory"):
        transformer.forward(config, {}, jnp.zeros((1, 2), jnp.int32), Layout.causal(1, 2))
