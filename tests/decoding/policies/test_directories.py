"""Draft models as directories: made from a smaller target, given another policy, decoded with; policies as written."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from decoding.drafters.registry import load_drafter, write_tree
from decoding.generate import generate
from decoding.policies import Confidence, DySpec, Static, StochasticBeam, TreePolicy, parse_policy, read_policy
from decoding.trees import chain
from eval.tree import main as tree_main
from models import load_target, transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.hf import save_target
from models.formats.tokenizer import Tokenizer
from scripts.convert import main as convert_main
from tests.noise import drawn

CONFIG = TransformerConfig(
    vocab_size=270, width=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=64, eos_ids=(1,)
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer.train(["a small text to make a tokenizer of\n"] * 3, 270)
    small = dataclasses.replace(CONFIG, width=16, num_layers=1, head_dim=8, mlp_width=32)
    for name, config in (("large", CONFIG), ("small", small)):
        save_target(folder / name, config, drawn(transformer.param_shapes(config), 0.1, len(name)), tokenizer)
    other = Tokenizer.train(["another tokenizer entirely, of the same size\n"] * 3, 270)
    save_target(folder / "foreign", small, drawn(transformer.param_shapes(small), 0.1), other)
    fewer = dataclasses.replace(small, vocab_size=269)
    save_target(folder / "fewer", fewer, drawn(transformer.param_shapes(fewer), 0.1), None)
    return folder


def convert(models: Path, source: str, out: Path, *more: str) -> None:
    convert_main(
        ["--from", "model", "--src", str(models / source), "--base", str(models / "large"), "--out", str(out), *more]
    )


def test_round_trip_and_another_policy(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "draft"
    convert(models, "small", out, "--policy", "static:tree=chain:3,draws=top")
    target = load_target(models / "large")
    drafter, params = load_drafter(out, target)
    assert drafter.policy == Static(chain(3), "top")
    small = load_target(models / "small")
    assert drafter.model == small.config
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(small.params)))
    prompts = [[5, 6, 7], [9]]
    plain = generate(target, prompts, max_new_tokens=20)
    assert generate(target, prompts, drafter=drafter, drafter_params=params, max_new_tokens=20).tokens == plain.tokens

    command = ["--target", str(models / "large"), "--drafter", str(out), "--policy", "dyspec:budget=6,depth=3,width=2"]
    tree_main(command)
    assert load_drafter(out, target)[0].policy == Static(chain(3), "top"), "without --write nothing changes"
    tree_main([*command, "--write"])
    assert load_drafter(out, target)[0].policy == DySpec(budget=6, depth=3, width=2)
    assert json.loads((out / "drafter.json").read_text())["policy"]["kind"] == "dyspec"


def test_a_record_that_says_growth_for_policy_is_read(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "draft"
    convert(models, "small", out, "--policy", "dyspec:budget=6,depth=3,width=2")
    record = json.loads((out / "drafter.json").read_text())
    record["growth"] = record.pop("policy")
    (out / "drafter.json").write_text(json.dumps(record))
    assert load_drafter(out, load_target(models / "large"))[0].policy == DySpec(budget=6, depth=3, width=2)
    write_tree(out, Static(chain(3), "top"))
    assert "growth" not in json.loads((out / "drafter.json").read_text())
    assert load_drafter(out, load_target(models / "large"))[0].policy == Static(chain(3), "top")


@pytest.mark.parametrize(
    ("source", "more", "complaint"),
    [
        ("foreign", (), "has another tokenizer"),
        ("fewer", (), "the draft model has a vocabulary of 269, the target one of 270"),
        ("small", ("--policy", "oak"), "kind must be one of static"),
        ("small", ("--policy", "confidence:top_k=300,total=9"), "asks for the 300 best of 270 tokens"),
        ("absent", (), "absent"),
    ],
)
def test_models_that_do_not_fit(
    models: Path, tmp_path: Path, source: str, more: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        convert(models, source, tmp_path / "draft", *more)
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("static:tree=chain:3,draws=top", Static(chain(3), "top")),
        ("static", Static()),
        ("stochastic_beam:width=6,depth=2", StochasticBeam(6, 2)),
        ("dyspec:budget=8,threshold=0.25", DySpec(budget=8, threshold=0.25)),
        ("confidence:top_k=4,depth=3,total=20", Confidence(4, 3, 20)),
    ],
)
def test_policies_on_a_command_line_and_in_json(text: str, policy: TreePolicy) -> None:
    assert parse_policy(text) == policy
    assert read_policy(policy.to_record(), "policy", "here") == policy


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "oak",
            "kind must be one of static, stochastic_beam, dyspec, confidence, scheduled, slots, accum_logp, got 'oak'",
        ),
        ("dyspec:budgt=3", "unknown key policy.budgt .did you mean 'budget'"),
        ("dyspec:budget=3.5", "policy.budget must be int, got float 3.5"),
        ("static:draws=some", "draws must be one of 'top', 'without', 'with', got 'some'"),
        ("static:tree", "expected name=value, got 'tree'"),
        ("confidence:total=1", "total must lie in 2"),
        ("confidence:top_k=3000,total=9000000", "at most 4096 candidates and as many levels, got 8999999"),
        ("dyspec:budget=9000000", "a draft tree has at most 4096 candidates and as many levels, got 9000000"),
        ("dyspec:width=5000", "DySpec needs width of at most 4096, got 5000"),
        ("dyspec:threshold=1", r"threshold must lie in \[0, 1\), got 1"),
        ("stochastic_beam:width=0", "width and depth of at least 1, got 0 and 4"),
    ],
)
def test_policies_that_do_not_fit(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_policy(text)
