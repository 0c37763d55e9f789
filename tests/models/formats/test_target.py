"""The handle on a target: the example in its documentation, checked input, and the fingerprint that drafters keep."""

import doctest
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from decoding.generate import generate
from models import Target, load_target
from models.config import TransformerConfig
from models.errors import UserError
from models.formats import target
from models.formats.hf import save_target
from models.formats.tokenizer import Tokenizer
from models.layout import Layout
from models.transformer import forward, init


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Once upon a time there was a model.\n"] * 3, 280)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("target") / "tiny"
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24
    )
    save_target(path, config, init(config, jax.random.key(0)), tokenizer)
    return path


def test_documented_example_runs(directory: Path) -> None:
    failed, tried = doctest.testmod(target, extraglobs={"DIR": directory})
    assert tried > 5 and failed == 0


def test_loads_what_was_saved(directory: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = load_target(str(directory))
    assert loaded.path == directory and isinstance(loaded.params["layers"], list)
    assert loaded.params["embed"]["embedding"].dtype == jnp.float32
    assert loaded.tokenizer is not None and loaded.tokenizer.fingerprint == tokenizer.fingerprint
    save_target(tmp_path / "mute", loaded.config, loaded.params)
    assert load_target(tmp_path / "mute").tokenizer is None


def test_apply_is_the_causal_forward(directory: Path) -> None:
    loaded = load_target(directory)
    tokens = np.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    segments = jnp.array([[1, 1, 2, 2], [1, 1, 1, 0]])
    compiled = jax.jit(forward, static_argnames=("config", "taps"))
    plain = compiled(loaded.config, loaded.params, tokens, Layout.causal(2, 4, segments), taps=("layer:1",))
    applied = loaded.apply(tokens, segments=segments, taps=["layer:1"])
    np.testing.assert_allclose(applied.logits, plain.logits, atol=1e-5)
    np.testing.assert_allclose(applied.taps["layer:1"], plain.taps["layer:1"], atol=1e-5)
    np.testing.assert_allclose(loaded.apply(tokens.tolist()).logits, loaded.apply(jnp.asarray(tokens)).logits)
    assert np.abs(loaded.apply(tokens).logits - applied.logits).max() > 1e-4


def test_bad_tokens_are_one_sentence(directory: Path) -> None:
    loaded = load_target(directory)
    vocab_size = loaded.config.vocab_size
    for tokens, complaint in (
        ([[1, 2], [3]], "equal length"),
        (np.array([1, 2]), r"\[batch, length\]"),
        ([[1, vocab_size]], f"token id {vocab_size} is outside"),
        ([[-1, 0]], "token id -1 is outside"),
    ):
        with pytest.raises(UserError, match=complaint):
            loaded.apply(tokens)


def test_fingerprint_names_the_base(directory: Path) -> None:
    loaded = load_target(directory)
    print_ = loaded.fingerprint()
    assert print_ == load_target(directory, jnp.bfloat16).fingerprint()
    assert print_["vocab_size"] == loaded.config.vocab_size and print_["tokenizer"] == loaded.tokenizer.fingerprint
    embedding = loaded.params["embed"]["embedding"].at[3, 2].add(0.1)
    changed = Target(loaded.config, {**loaded.params, "embed": {"embedding": embedding}}).fingerprint()
    assert {key for key in print_ if print_[key] != changed[key]} == {"embedding", "tokenizer"}


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    few = tokenizer.vocab_size - 3
    config = TransformerConfig(
        vocab_size=few, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24
    )
    save_target(tmp_path / "small", config, init(config, jax.random.key(0)), tokenizer)
    with pytest.raises(UserError, match=f"tokenizer has {few + 3} entries, more than the {few} embeddings"):
        load_target(tmp_path / "small")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_links_that_lead_nowhere_are_named(directory: Path, tmp_path: Path, name: str) -> None:
    """As in a cache of downloads that was cleared."""
    shutil.copytree(directory, tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    (tmp_path / "m" / name).symlink_to("../blobs/gone")
    with pytest.raises(UserError, match=rf"{name} is a link to \.\./blobs/gone, which is not there$"):
        load_target(tmp_path / "m")


def test_a_pad_token_beyond_the_embeddings_is_refused_where_it_is_used(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=24
    )
    padded = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.core.to_str()))
    padded.core.add_special_tokens(["<pad>"])
    save_target(tmp_path / "t", config, init(config, jax.random.key(0)), Tokenizer(padded.core))
    loaded = load_target(tmp_path / "t")
    assert loaded.tokenizer.vocab_size == config.vocab_size + 1
    loaded.apply([loaded.tokenizer.encode("a text")])
    with pytest.raises(UserError, match=f"token id {config.vocab_size} is outside"):
        loaded.apply([loaded.tokenizer.encode("a text<pad>")])
    with pytest.raises(UserError, match=rf"prompt 0 has token {config.vocab_size} \(<pad>\), outside"):
        generate(loaded, [loaded.tokenizer.encode("a text<pad>")])


def test_package_is_cheap_until_used() -> None:
    code = "import sys, models; assert 'jax' not in sys.modules; models.Target; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(target.__file__).parents[2])
    with pytest.raises(AttributeError, match="no attribute 'Tarket'"):
        import models

        models.Tarket  # noqa: B018
