"""Drafters that the package carries: whole, small, telling what they are, and for their own target alone."""

import contextlib
import dataclasses
import functools
import pathlib
import tomllib

import jax
import numpy as np
import pytest

from decoding.drafters.registry import build, load_drafter, save_drafter, trained_drafters
from decoding.drafters.token_recycling import TokenRecycling
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.scaled import read_scaled, whole_tensors
from models.formats.storage import FLOATS, leaves_by_path, open_tensors
from models.formats.target import Target
from models.formats.text_files import read_json
from models.formats.tokenizer import Tokenizer
from models.transformer import param_shapes
from tests.decoding.drafter_cases import random_target

ROOT = pathlib.Path(__file__).parents[2]
SHAPES = {
    "smollm2": TransformerConfig(
        vocab_size=49152,
        width=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        max_position=8192,
        norm_eps=1e-5,
        rope_theta=1e5,
        tied_embeddings=True,
    )
}


def test_all_are_known_and_installed() -> None:
    assert set(trained_drafters()) == set(SHAPES)
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    package = ROOT / "decoding" / "drafters"
    carried = {path for glob in setuptools["package-data"]["decoding.drafters"] for path in package.glob(glob)}
    assert carried == {path for path in (package / "trained").rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_carried(name: str) -> None:
    directory, config = trained_drafters()[name], SHAPES[name]
    assert sorted(path.name for path in directory.iterdir()) == ["README.md", "drafter.json", "model.safetensors"]
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 6_000_000
    record, told = read_json(directory / "drafter.json"), (directory / "README.md").read_text()
    drafter = build(record, name)
    drafter.check(config)
    base = {"width": config.width, "num_layers": config.num_layers, "vocab_size": config.vocab_size}
    assert record["base"].items() >= base.items() and set(record["base"]) == {*base, "embedding", "tokenizer"}
    origin = record["provenance"]
    assert origin["license"] in told and origin["device"] in told and f"{origin['tokens'] / 1e6:.1f} million" in told
    shapes = jax.eval_shape(functools.partial(drafter.init_params, config), param_shapes(config), jax.random.key(0))
    wanted = {path.replace("/", "."): leaf.shape for path, leaf in leaves_by_path(shapes).items()}
    with contextlib.ExitStack() as stack:
        files = open_tensors(directory, stack)
        tensors = {key: read_scaled(files, key, directory, (*FLOATS, "I32")) for key in whole_tensors(files)}
    assert {key: tensor.shape for key, tensor in tensors.items()} == wanted
    for key, tensor in tensors.items():
        assert np.isfinite(tensor.astype(np.float32)).all() and tensor.any(), key
    known = tensors["draft_vocab"]
    assert (np.diff(known) > 0).all() and known[0] >= 0 and known[-1] < config.vocab_size


@pytest.fixture(scope="module")
def other() -> Target:
    tokenizer = Tokenizer.train(["abc def.\n"] * 3, 270)
    return dataclasses.replace(random_target(vocab_size=12, dtype=np.float32), tokenizer=tokenizer)


@pytest.mark.parametrize("name", SHAPES)
def test_a_directory_of_the_same_name_comes_first(
    name: str, other: Target, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_drafter(tmp_path / name, TokenRecycling(), None, other.fingerprint())
    monkeypatch.chdir(tmp_path)
    assert load_drafter(name, other)[0] == TokenRecycling()


@pytest.mark.parametrize("name", SHAPES)
def test_another_target_is_refused(name: str, other: Target) -> None:
    for spec in (name, f"prompt_lookup+{name}"):
        with pytest.raises(UserError, match=rf"trained/{name} was made for another target: its base had") as caught:
            load_drafter(spec, other)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"nor one of none.*, {name}, or several"):
        load_drafter("absent", other)
