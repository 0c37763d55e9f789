"""A packed drafter is the drafter that it was, a little off."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from decoding.drafters.registry import load_drafter, save_drafter
from models.errors import UserError
from models.formats.storage import leaves_by_path
from models.formats.target import Target
from models.formats.tokenizer import Tokenizer
from scripts import pack_drafter
from tests.decoding.drafter_cases import CASES, random_target


@pytest.fixture(scope="module")
def target() -> Target:
    tokenizer = Tokenizer.train(["abc def.\n"] * 3, 270)
    return dataclasses.replace(random_target(vocab_size=12, dtype=np.float32), tokenizer=tokenizer)


@pytest.fixture
def saved(target: Target, tmp_path: pathlib.Path) -> pathlib.Path:
    drafter, params = CASES["eagle3"](target, jax.random.key(0))
    save_drafter(tmp_path / "heads", drafter, params, target.fingerprint(), provenance={"device": "a sundial"})
    return tmp_path / "heads"


@pytest.mark.parametrize(("bits", "off"), [(8, 0.01), (4, 0.12)])
def test_packed(bits: int, off: float, saved: pathlib.Path, target: Target, tmp_path: pathlib.Path) -> None:
    pack_drafter.main.__wrapped__(
        ["--src", str(saved), "--out", str(tmp_path / "small"), "--bits", str(bits), "--group", "4"]
    )
    assert (tmp_path / "small" / "drafter.json").read_text() == (saved / "drafter.json").read_text()
    (drafter, params), (same, near) = load_drafter(saved, target), load_drafter(tmp_path / "small", target)
    assert drafter == same and jax.tree.structure(params) == jax.tree.structure(near)
    for (path, leaf), other in zip(leaves_by_path(params).items(), jax.tree.leaves(near), strict=True):
        assert leaf.dtype == other.dtype and np.linalg.norm(leaf - other) <= off * np.linalg.norm(leaf), path
    with pytest.raises(UserError, match="already exists"):
        pack_drafter.main.__wrapped__(["--src", str(saved), "--out", str(tmp_path / "small"), "--group", "4"])


def test_another_tree(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    options = ["--src", str(saved), "--out", str(tmp_path / "small"), "--group", "4"]
    pack_drafter.main.__wrapped__([*options, "--policy", "confidence:top_k=2,depth=2,total=5"])
    record = json.loads((tmp_path / "small" / "drafter.json").read_text())
    assert record["policy"] == {"kind": "confidence", "top_k": 2, "depth": 2, "total": 5}
    assert record["provenance"] == {"device": "a sundial"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--group", "3"], "--group must be even, got 3"),
        (["--group", "1024"], r"--group must divide the \d+ rows of \S+, got 1024"),
        (["--group", "4", "--policy", "confidence:colour=2"], "colour"),
    ],
)
def test_what_cannot_be(options: list[str], complaint: str, saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=complaint):
        pack_drafter.main.__wrapped__(["--src", str(saved), "--out", str(tmp_path / "small"), *options])
    assert not (tmp_path / "small").exists()
