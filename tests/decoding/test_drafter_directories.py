"""Drafter directories: what is saved is loaded, and everything that does not fit is one sentence."""

import dataclasses
import errno
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from decoding.drafters import registry as drafters
from decoding.drafters.early_exit import EarlyExit
from decoding.drafters.first_of import FirstOf
from decoding.drafters.plain import Plain
from decoding.drafters.prompt_lookup import PromptLookup
from decoding.drafters.registry import build, load_drafter, save_drafter, split_names, write_tree
from decoding.drafters.token_recycling import TokenRecycling
from decoding.policies import Static
from decoding.trees import chain
from models import linear, pages
from models.errors import UserError
from models.formats import beside
from models.formats.target import Target
from models.formats.tokenizer import Tokenizer
from tests.decoding.drafter_cases import CASES, LOPSIDED, random_target

WITH_PARAMETERS = [name for name in CASES if name != "none"]


@pytest.fixture(scope="module")
def target() -> Target:
    tokenizer = Tokenizer.train(["abc def.\n"] * 3, 270)
    return dataclasses.replace(random_target(vocab_size=12, dtype=np.float32), tokenizer=tokenizer)


@pytest.fixture
def saved(target: Target, tmp_path: pathlib.Path) -> pathlib.Path:
    drafter, params = CASES["hydra++"](target, jax.random.key(0))
    save_drafter(tmp_path / "heads", drafter, params, target.fingerprint())
    return tmp_path / "heads"


def test_a_tree_is_written_into_a_directory_alone() -> None:
    """Not for a bare name, such as that of a drafter which the package carries."""
    with pytest.raises(UserError, match="smollm2 is no drafter directory, so no tree can be written"):
        write_tree("smollm2", chain(3))


def edit(directory: pathlib.Path, change: Callable[[dict], object]) -> None:
    record = json.loads((directory / "drafter.json").read_text())
    change(record)
    (directory / "drafter.json").write_text(json.dumps(record))


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_round_trip(name: str, target: Target, tmp_path: pathlib.Path, monkeypatch) -> None:
    drafter, params = CASES[name](target, jax.random.key(0))
    save_drafter(tmp_path / "heads", drafter, params, target.fingerprint())
    loaded, loaded_params = load_drafter(tmp_path / "heads", target)
    assert loaded == drafter and hash(loaded) == hash(drafter)
    fused = drafter.for_decoding(params)
    assert jax.tree.structure(loaded_params) == jax.tree.structure(fused)
    jax.tree.map(np.testing.assert_array_equal, loaded_params, fused)
    files = ["drafter.json", "model.safetensors"] if jax.tree.leaves(params) else ["drafter.json"]
    assert sorted(path.name for path in (tmp_path / "heads").iterdir()) == files
    record = json.loads((tmp_path / "heads" / "drafter.json").read_text())
    assert record["base"] == target.fingerprint()
    assert build(drafter.to_record(), "here") == drafter

    # What is made for decoding stays as it is, where some kernels lie in blocks and others do not too.
    monkeypatch.setattr(linear, "BLOCK", 16)
    monkeypatch.setattr(linear, "_is_large", lambda array: True)
    monkeypatch.setattr(pages, "are_huge", lambda: True)
    once = jax.eval_shape(drafter.for_decoding, params)
    assert jax.eval_shape(drafter.for_decoding, once) == once


def test_bare_names(target: Target) -> None:
    assert load_drafter("none", target) == (Plain(), None)
    assert load_drafter("token_recycling", target) == (TokenRecycling(), None)
    assert load_drafter("early_exit:1", target) == (EarlyExit(1), None)
    assert load_drafter("prompt_lookup:2", target) == (PromptLookup(shortest=2), None)


def test_combinations(saved: pathlib.Path, target: Target) -> None:
    heads, params = load_drafter(saved, target)
    opened, _ = load_drafter(f"{saved}:auto", target)
    assert opened == heads and [size for size, _ in opened.open_sizes] == [1, 3, 7] and not heads.open_sizes
    both, both_params = load_drafter(f"prompt_lookup+{saved}", target)
    assert both == FirstOf((PromptLookup(), heads)) and both_params[0] is None
    jax.tree.map(np.testing.assert_array_equal, both_params[1], params)
    three, three_params = load_drafter("prompt_lookup+token_recycling+early_exit:2", target)
    assert three == FirstOf((PromptLookup(), TokenRecycling(), EarlyExit(2))) and three_params == [None] * 3
    for spec in (
        "prompt_lookup+",
        "prompt_lookup+absent",
        "early_exit:",
        "token_recycling:",
        "none:",
        "early_exit:two",
        "early_exit",
        "lookahead:two",
    ):
        with pytest.raises(UserError, match="is neither a drafter directory"):
            load_drafter(spec, target)
    with pytest.raises(UserError, match="lookahead:CANDIDATES must be a multiple of 4, a guess's tokens, got 2"):
        load_drafter("lookahead:2", target)


def test_a_pair_of_version_01_is_read(saved: pathlib.Path, target: Target, tmp_path: pathlib.Path) -> None:
    """Its parts were called first and second, and might be pairs themselves."""
    heads, params = load_drafter(saved, target)
    lookup, recycling = PromptLookup().to_record(), TokenRecycling().to_record()
    pair = {"method": "first_of", "first": lookup, "second": {"method": "first_of", "first": heads.to_record()}}
    pair["second"]["second"] = recycling
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "drafter.json").write_text(json.dumps({**pair, "base": target.fingerprint()}))
    tensors = {f"second.first.{name}": tensor for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(tensors, tmp_path / "pair" / "model.safetensors")
    read, (none, of_heads, nor) = load_drafter(tmp_path / "pair", target)
    assert read == FirstOf((PromptLookup(), heads, TokenRecycling())) and none is nor is None
    jax.tree.map(np.testing.assert_array_equal, of_heads, params)


def test_records_of_version_01_are_read() -> None:
    """As that version wrote them, method by method: without what came later, the policy under its old name."""
    static = {"kind": "static", "tree": [[0]], "draws": "top"}
    layer = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "mlp_width": 8, "norm_eps": 1e-5, "rope_theta": 1e4}
    layer |= {"rope_scaling": None, "qkv_bias": False}
    model = {"vocab_size": 8, "width": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
    written = {
        "none": {},
        "draft_model": {"model": {**model, "mlp_width": 8, "windows": [], "eos_ids": [1]}, "growth": static},
        "medusa": {"heads": {"num_heads": 4, "num_layers": 1}, "tree": [[0]]},
        "hydra": {"heads": {"num_heads": 4, "num_layers": 1, "prefix": False, "dropout": 0.0}, "tree": [[0]]},
        "eagle": {"heads": {"bias": True, "layer": layer}, "growth": static},
        "eagle3": {"heads": {"low": 0, "middle": 1, "high": 2, "vocab_size": 0, "layer": layer}, "growth": static},
        "early_exit": {"layers": 1, "growth": static},
        "token_recycling": {"tree": [[0]], "warm_start": False},
        "prompt_lookup": {"depth": 10, "ngram": 3, "shortest": 1},
        "lookahead": {"window": 7, "ngram": 5, "guesses": 7},
    }
    for method, entries in written.items():
        read = build({"method": method, **entries}, "drafter.json")
        assert read.name == method and build(read.to_record(), "drafter.json") == read
    early = build({"method": "early_exit", **written["early_exit"]}, "drafter.json")
    assert early == EarlyExit(1, Static(chain(1), "top"), lens=False)


def test_tree_is_replaced_alone(saved: pathlib.Path, target: Target) -> None:
    before = (saved / "model.safetensors").read_bytes()
    write_tree(saved, chain(3))
    assert load_drafter(saved, target)[0].tree == chain(3)
    assert (saved / "model.safetensors").read_bytes() == before and len(list(saved.iterdir())) == 2


def test_nothing_is_overwritten_unasked(saved: pathlib.Path, target: Target, tmp_path: pathlib.Path) -> None:
    drafter, params = CASES["hydra"](target, jax.random.key(0))
    with pytest.raises(UserError, match="already exists"):
        save_drafter(saved, drafter, params, target.fingerprint())
    save_drafter(saved, drafter, params, target.fingerprint(), overwrite=True)
    assert load_drafter(saved, target)[0].tree == LOPSIDED
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("no copy of this anywhere")
    with pytest.raises(UserError, match=r"holds no drafter\.json"):
        save_drafter(tmp_path / "thesis", drafter, params, target.fingerprint(), overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


@pytest.mark.parametrize("fails", ["save_tensors", "write_json"])
@pytest.mark.parametrize("present", [False, True], ids=["new", "replacing"])
def test_full_disk_leaves_nothing(
    fails: str, present: bool, target: Target, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (CASES[name](target, jax.random.key(0)) for name in ("medusa", "hydra"))
    if present:
        save_drafter(tmp_path / "heads", *old, target.fingerprint())

    def full(path: pathlib.Path, content) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(beside, fails, full)
    with pytest.raises(OSError, match="No space left"):
        save_drafter(tmp_path / "heads", *new, target.fingerprint(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == (["heads"] if present else [])
    if present:
        assert load_drafter(tmp_path / "heads", target)[0] == old[0]


def test_full_disk_keeps_the_old_tree(saved: pathlib.Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (saved / "drafter.json").read_text()

    def full(path: pathlib.Path, content) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(drafters, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        write_tree(saved, chain(2))
    assert (saved / "drafter.json").read_text() == before
    assert sorted(path.name for path in saved.iterdir()) == ["drafter.json", "model.safetensors"]


def test_another_base_is_refused(saved: pathlib.Path, target: Target) -> None:
    for other, complaint in (
        (random_target(vocab_size=12, seed=1, dtype=np.float32), "embedding hash"),
        (random_target(vocab_size=14, dtype=np.float32), "vocab_size 12"),
        (random_target(vocab_size=12, num_layers=3, dtype=np.float32), "num_layers 2"),
    ):
        with pytest.raises(UserError, match=f"was made for another target: its base had {complaint}"):
            load_drafter(saved, dataclasses.replace(other, tokenizer=target.tokenizer))
    tokenizer = Tokenizer.train(["something else entirely\n"] * 3, 271)
    with pytest.raises(UserError, match="its base had tokenizer hash"):
        load_drafter(saved, dataclasses.replace(target, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r.update(method="eagl"), "names the method 'eagl'; known are none, draft_model, medusa, hydra"),
        (lambda r: r.pop("method"), "names the method None"),
        (lambda r: r.update(method=["hydra"]), r"names the method \['hydra'\]"),
        (lambda r: r.pop("tree"), "has no entry 'tree'"),
        (lambda r: r.update(tre=[]), "has an unknown key tre .did you mean 'tree'"),
        (lambda r: r["heads"].update(num_heads="2"), "heads.num_heads must be int, got str '2'"),
        (lambda r: r["heads"].update(num_heads=1.5), r"num_heads must be int, got float 1\.5"),
        (lambda r: r["heads"].update(num_heads=10**9), "heads.num_heads must be from 1 to 64, got 1000000000"),
        (lambda r: r["heads"].update(num_layers=True), "num_layers must be int, got bool True"),
        (lambda r: r["heads"].update(prefix=1), "prefix must be bool, got int 1"),
        (lambda r: r.update(tree=[]), "needs at least one candidate"),
        (lambda r: r.pop("base"), r"drafter\.json does not name its base"),
        (lambda r: r.update(base="hydra"), "does not name its base"),
        (lambda r: r["base"].pop("tokenizer"), "does not name its base"),
        (lambda r: r["heads"].update(colour="red"), "unknown key heads.colour"),
        (lambda r: r.update(heads=[4]), "heads must be a section, got tuple"),
        (lambda r: r.update(tree=[[0], [1, 0]]), r"path \[1, 0\] without its parent"),
        (lambda r: r.update(tree=[[0] * d for d in range(1, 6)]), "draft tree is 5 deep, but the drafter has 4 heads"),
        (lambda r: r.update(tree=[[i] for i in range(13)]), "13 candidates, but the vocabulary has 12"),
        (lambda r: r["heads"].update(num_layers=3), r"tensor heads\.0\.blocks\.2\.\S+ is missing"),
        (lambda r: r["heads"].update(prefix=False), r"tensor prefix\.\S+ is unknown to its drafter\.json"),
    ],
)
def test_records_that_do_not_fit(saved: pathlib.Path, target: Target, change, complaint: str) -> None:
    edit(saved, change)
    with pytest.raises(UserError, match=complaint) as caught:
        load_drafter(saved, target)
    assert "\n" not in str(caught.value)


def test_damaged_directories(saved: pathlib.Path, target: Target, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"'absent' is neither a drafter directory \(.*\) nor one of none"):
        load_drafter("absent", target)
    weights = saved / "model.safetensors"
    tensors = load_file(weights)
    name = "heads.1.vocab.bias"
    save_file({key: leaf for key, leaf in tensors.items() if key != name}, weights)
    with pytest.raises(UserError, match=rf"tensor {name} is missing"):
        load_drafter(saved, target)
    save_file(tensors | {name: tensors[name][:-1]}, weights)
    with pytest.raises(UserError, match=rf"tensor {name} has shape \[11\], drafter\.json implies \[12\]"):
        load_drafter(saved, target)
    save_file(tensors | {"stray": tensors[name]}, weights)
    with pytest.raises(UserError, match="tensor stray is unknown"):
        load_drafter(saved, target)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load_drafter(saved, target)
    weights.unlink()
    with pytest.raises(UserError, match=r"there is no model\.safetensors"):
        load_drafter(saved, target)
    (saved / "drafter.json").write_text("{")
    with pytest.raises(UserError):
        load_drafter(saved, target)


def test_lists_of_drafters_whose_paths_hold_separators(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "c+d", "e,f+g,h", "plain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "drafter.json").write_text("{}")
    assert split_names("none, lookahead,plain,") == ["none", "lookahead", "plain"]
    assert split_names("none,a,b,plain") == ["none", "a,b", "plain"]
    assert split_names("a,b+plain,lookahead+a,b") == ["a,b+plain", "lookahead+a,b"]
    assert split_names("e,f+g,h,c+d,x,y") == ["e,f+g,h", "c+d", "x", "y"]
    assert split_names("lookahead+c+d+plain", "+") == ["lookahead", "c+d", "plain"]
    assert split_names(f"none,{tmp_path}/a,b,lookahead") == ["none", f"{tmp_path}/a,b", "lookahead"]
