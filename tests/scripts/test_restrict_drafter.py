"""A restricted drafter says of its tokens what it said of them among all."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.dflash import DFlash
from decoding.drafters.dspark import DSpark
from decoding.drafters.registry import load_drafter, save_drafter
from decoding.policies import Static
from decoding.trees import chain
from models.errors import UserError
from models.formats.hf import save_target
from models.formats.target import Target, load_target
from models.formats.tokenizer import Tokenizer
from models.heads.dflash import DFlashHeads
from models.heads.serial import SerialHead
from scripts import restrict_drafter
from scripts.pack_drafter import packed
from tests.decoding.drafter_cases import random_target
from tests.noise import drawn
from train.data.text_building import write_dataset

HEADS = DFlashHeads((1,), 0, num_layers=1, block=3, shifted=True)
POLICY = Static(chain(2), "top")
DRAFTERS = {"dflash": DFlash(HEADS, POLICY), "dspark": DSpark(HEADS, POLICY, SerialHead("gated", 4, confidence="none"))}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, pathlib.Path]:
    """A target, and a folder with its directory, a data set, and a drafter of each kind that scores all tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("restricted"), Tokenizer.train(["abc def.\n"] * 3, 270)
    config = random_target(vocab_size=tokenizer.vocab_size, dtype=np.float32).config
    target = random_target(vocab_size=tokenizer.vocab_size, dtype=np.float32)
    save_target(folder / "target", config, target.params, tokenizer)
    tokens = np.array([7, 9, 9, 30, 30, 30, 200, 2], np.int32)
    documents = [{"name": "0", "tokens": tokens, "mask": np.array([1, 1, 1, 1, 1, 1, 1, 0], np.uint8)}]
    write_dataset(folder / "data", tokenizer, {"train": lambda: iter(documents)}, lambda: {"kind": "text"})
    target = load_target(folder / "target")
    for name, drafter in DRAFTERS.items():
        shapes = jax.eval_shape(lambda d=drafter: d.init_params(target.config, target.params, jax.random.key(0)))
        save_drafter(folder / name, drafter, drawn(shapes, 0.5), target.fingerprint())
    return target, folder


def restrict(folder: pathlib.Path, source: pathlib.Path, out: pathlib.Path, size: int = 3, data: str = "data") -> None:
    where = ["--src", str(source), "--target", str(folder / "target"), "--data", str(folder / data)]
    restrict_drafter.main.__wrapped__([*where, "--size", str(size), "--out", str(out)])


@pytest.mark.parametrize("name", DRAFTERS)
def test_scores_are_those_of_all_tokens(name: str, base: tuple[Target, pathlib.Path], tmp_path: pathlib.Path) -> None:
    target, folder = base
    restrict(folder, folder / name, tmp_path / "few")
    (whole, before), (few, after) = load_drafter(folder / name, target), load_drafter(tmp_path / "few", target)
    assert few == dataclasses.replace(whole, heads=dataclasses.replace(HEADS, vocab_size=3))
    known = [7, 9, 30]
    assert after["draft_vocab"].tolist() == known, "of equal counts the lower one"
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(5, target.config.width)), jnp.float32)
    scores = [d.heads.logits(target.config, p, target.params, hidden) for d, p in ((whole, before), (few, after))]
    np.testing.assert_allclose(scores[1], np.asarray(scores[0])[:, known], rtol=1e-4, atol=1e-4)
    if name == "dspark":
        assert np.array_equal(
            after["serial"]["vocab"]["kernel"], np.asarray(before["serial"]["vocab"]["kernel"])[:, known]
        )
        assert np.array_equal(after["serial"]["embed"]["embedding"], before["serial"]["embed"]["embedding"])
    assert packed(tmp_path / "few", 4, 4)["vocab.kernel"].shape[-1] == 3


def test_what_cannot_be_restricted_is_refused(base: tuple[Target, pathlib.Path], tmp_path: pathlib.Path) -> None:
    target, folder = base
    restrict(folder, folder / "dflash", tmp_path / "few")
    with pytest.raises(UserError, match="dflash has a draft vocabulary already"):
        restrict(folder, tmp_path / "few", tmp_path / "fewer")
    with pytest.raises(UserError, match="--size must be less than the"):
        restrict(folder, folder / "dflash", tmp_path / "all", size=target.config.vocab_size)
    with pytest.raises(UserError, match="few already exists"):
        restrict(folder, folder / "dflash", tmp_path / "few", data="nowhere")
    other = Tokenizer.train(["xyz xyz.\n"] * 3, 262)
    document = {"name": "0", "tokens": np.array([7, 2], np.int32), "mask": np.array([1, 1], np.uint8)}
    write_dataset(folder / "other", other, {"train": lambda: iter([document])}, lambda: {"kind": "text"})
    with pytest.raises(UserError, match="tokenizer"):
        restrict(folder, folder / "dflash", tmp_path / "fewer", data="other")
    assert not (tmp_path / "fewer").exists() and not (tmp_path / "all").exists()
