"""Budgets are equal, trees are the best of the counts, the table holds what the loop counted; the command writes it."""

import dataclasses
import io
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest

from decoding.drafters.draft_model import DraftModel
from decoding.drafters.lookahead import Lookahead
from decoding.drafters.plain import Plain
from decoding.drafters.prompt_lookup import PromptLookup
from decoding.drafters.registry import load_drafter
from decoding.drafters.token_recycling import TokenRecycling
from decoding.generate import generate
from decoding.policies import Static
from decoding.policies.published import PUBLISHED
from decoding.stats import Stats
from decoding.trees import Topology, chain
from eval import acceptance as command
from eval.acceptance import Method, parse_method, study
from eval.report.acceptance import print_table, write_report
from eval.report.charts import percent
from eval.text.budget import Fitter, parse_any_policy
from eval.text.prompts import Prompt
from models import transformer
from models.errors import UserError
from models.formats.target import Target
from tests.eval.report.page import Page

TEXTS = ("def f(x):", "once upon a time", "return x")


def prompts_of(target: Target, texts=TEXTS) -> list[Prompt]:
    return [Prompt(tuple(target.tokenizer.encode(text)), text) for text in texts]


def heads(target: Target, directory: pathlib.Path, label: str) -> Method:
    return Method(label, *load_drafter(directory, target), path=str(directory))


@pytest.fixture(scope="module")
def small(target: Target) -> Method:
    """The target's shape with one layer, in random weights, as a draft model."""
    config = dataclasses.replace(target.config, num_layers=1)
    init = jax.jit(lambda key: jax.tree.map(lambda leaf: 4 * leaf, transformer.init(config, key)))
    params = init(jax.random.key(5))
    return Method("small", DraftModel(config), params, "top")


def counts(tree: Topology, steps: int, accepted: dict[tuple[int, ...], int]) -> Stats:
    by_node = np.array([0, *(accepted.get(path, 0) for path in tree.paths)])
    by_depth = np.bincount(tree.depth, by_node, tree.max_depth + 1)[1:].astype(int)
    return Stats(steps, steps + int(by_node.sum()), by_depth, by_node)


@pytest.mark.parametrize("budget", [8, pytest.param(16, marks=pytest.mark.slow), 32])
def test_every_drafter_gets_exactly_its_budget(target, drafter_directories, small, budget: int) -> None:
    def decode(drafter) -> Stats:
        tree = drafter.policy.tree if isinstance(drafter, DraftModel) else drafter.tree
        shares = {path: int(1000 * np.prod([0.5 / (1 + rank) for rank in path])) for path in tree.paths}
        return counts(tree, 1000, shares)

    hydra = load_drafter(drafter_directories["hydra"], target)[0]
    plain = [(hydra, ""), (TokenRecycling(), ""), (PromptLookup(), ""), (Lookahead(), "")]
    policies = ["top", "confidence", "specinfer", "sequoia", "rsd-c", "rsd-s", "dyspec"]
    for drafter, policy in [*plain, *((small.drafter, policy) for policy in policies)]:
        fitted = Fitter(drafter, policy, decode).fit(budget)
        assert fitted.max_nodes == budget + 1, (drafter.name, policy)
        fitted.check(target.config)
    long = Fitter(small.drafter, "chain", decode).fit(budget)
    assert (long is None) == (budget > 16) and (long is None or long.max_depth == budget)
    assert Fitter(Lookahead(), "", decode).fit(3) is None, "an n-gram is a chain of four"


def test_fitter_says_what_it_needs(small: Method) -> None:
    with pytest.raises(UserError, match="which policy makes the trees of draft_model"):
        Fitter(small.drafter, "", lambda drafter: None)
    with pytest.raises(UserError, match="prompt_lookup has one way"):
        Fitter(PromptLookup(), "top", lambda drafter: None)
    assert parse_any_policy("slots:depth=7").max_depth == 7 and parse_any_policy("top") is PUBLISHED["top"]
    with pytest.raises(UserError, match="no policy 'tops'; known are top, eagle-1, confidence,"):
        parse_any_policy("tops")
    with pytest.raises(UserError, match="none cannot be fitted"):
        Fitter(Plain(), "", lambda drafter: None).fit(8)


@pytest.fixture(scope="module")
def cells(target: Target, drafter_directories, small: Method):
    methods = [small, dataclasses.replace(small, label="drawn", policy="rsd-s")]
    prompts, calibration = prompts_of(target), prompts_of(target, ("def g(y):",))
    options = dict(new_tokens=24, budgets=(4,))
    greedy = study(target, methods[:1], prompts, calibration, temperatures=(0.0,), **options)
    return methods, greedy + study(target, methods[1:], prompts, calibration, temperatures=(1.0,), **options)


def test_cells_hold_what_the_loop_counted(target: Target, cells) -> None:
    methods, table = cells
    assert [(cell["method"], cell["temperature"]) for cell in table] == [("small", 0), ("drawn", 1)]
    for cell in table:
        assert cell["candidates"] == cell["budget"] == 4
        assert cell["acceptance_length"] == cell["committed"] / cell["steps"]
        low, high = cell["acceptance_length_interval"]
        assert low <= cell["acceptance_length"] <= high
        by_depth = [cell["steps"], *cell["accepted_by_depth"]]
        given = [below / above if above else None for above, below in itertools.pairwise(by_depth)]
        assert cell["conditional_acceptance"] == pytest.approx(given)
    prompts = [prompt.tokens for prompt in prompts_of(target)]
    plain = generate(target, prompts, max_new_tokens=24).tokens
    assert table[0]["distinct_token_share"] == pytest.approx(np.mean([len(set(text)) / len(text) for text in plain]))
    tree = Topology(tuple(map(tuple, table[0]["tree"])))
    again = dataclasses.replace(methods[0].drafter, policy=Static(tree, "top"))
    made = generate(target, prompts, drafter=again, drafter_params=methods[0].params, max_new_tokens=24)
    assert sum(stats.steps for stats in made.stats) == table[0]["steps"]
    assert table[1]["tree"] is None and table[1]["depth"] == 4, "a beam has no tree of its own"


def test_texts_are_compared_with_plain_decoding(cells) -> None:
    for cell in cells[1]:
        drawn = cell["method"] == "drawn" and cell["temperature"] > 0
        assert cell["identical"] is (None if drawn else True)
        assert drawn or cell["differing_texts"] == 0


def test_another_text_is_told(target: Target, monkeypatch) -> None:
    made = command.decode

    def wrong(target, prompts, new_tokens, temperature, drafter=None, params=None):
        generation = made(target, prompts, new_tokens, temperature, drafter, params)
        return generation if drafter is None else dataclasses.replace(generation, tokens=[[1]] * len(prompts))

    monkeypatch.setattr(command, "decode", wrong)
    methods = [Method("lookup", PromptLookup())]
    options = dict(new_tokens=6, budgets=(4,), temperatures=(0.0,))
    (cell,) = study(target, methods, prompts_of(target), prompts_of(target, ("x",)), **options)
    assert cell["identical"] is False and cell["differing_texts"] == len(TEXTS)


def test_unequal_budgets_are_refused(target: Target, drafter_directories, monkeypatch) -> None:
    method = heads(target, drafter_directories["medusa"], "heads")
    monkeypatch.setattr(command.Fitter, "fit", lambda self, budget: dataclasses.replace(method.drafter, tree=chain(3)))
    with pytest.raises(UserError, match="heads proposes 3 candidates where the budget is 4"):
        study(target, [method], prompts_of(target), prompts_of(target, ("x",)), new_tokens=4, budgets=(4,))


def test_study_says_what_is_wrong(target: Target, small: Method) -> None:
    prompts, others = prompts_of(target), prompts_of(target, ("x",))
    for arguments, message in (
        (([small], [], others), "no prompt"),
        (([small, small], prompts, others), "two methods are called 'small'"),
        (([small], prompts, prompts[:1]), "must be disjoint"),
    ):
        with pytest.raises(UserError, match=message):
            study(target, *arguments)
    with pytest.raises(UserError, match="at least 1, got 0"):
        study(target, [small], prompts, others, budgets=(0,))
    decoded: list[str] = []
    beside = Method("b", PromptLookup(), policy="top")
    with pytest.raises(UserError, match="prompt_lookup has one way"):
        study(target, [small, beside], prompts, others, budgets=(4,), progress=decoded.append)
    assert not decoded, "a method that cannot be is refused before those in front of it take their time"


def test_a_document_that_begins_as_a_measured_one_does_not_calibrate(target: Target, small: Method) -> None:
    prompts, others = prompts_of(target), prompts_of(target, ("x", "y"))
    calibration = command.apart([others[0], dataclasses.replace(prompts[1], question="elsewhere"), others[1]], prompts)
    assert calibration == others
    (cell,) = study(target, [small], prompts, calibration, new_tokens=2, budgets=(2,), temperatures=(0.0,))
    assert cell["identical"]
    with pytest.raises(UserError, match="none to choose trees by"):
        study(target, [small], prompts, command.apart(prompts, prompts))


@pytest.mark.parametrize(
    ("text", "message"),
    [("hydra", "LABEL=DRAFTER"), ("=none", "LABEL=DRAFTER"), ("a=none@up", "policy 'up'"), ("a=nowhere", "nowhere")],
)
def test_methods_that_cannot_be_read(target: Target, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_method(text, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "x", "--chat"], "--chat is for questions: give --prompts, not --data"),
        (["--data", "x", "--temperatures", "0,-1"], "temperature must be 0, or from 1e-6 to 1e6, got -1"),
    ],
)
def test_options_are_refused_before_anything_is_loaded(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.main.__wrapped__([*options, "--target", "absent", "--out", "absent", "--methods", "a=none"])


def test_report_shows_every_method_and_what_differed(cells, tmp_path) -> None:
    methods, table = cells
    results = {
        "environment": {"cpu": "abacus"},
        "config": {},
        "target": {"layers": 2},
        "methods": [
            {"label": m.label, "drafter": m.drafter.name, "policy": m.policy, "path": None, "parameters": 9}
            for m in methods
        ],
        "cells": [{**cell, "identical": False} if cell["method"] == "small" else cell for cell in table],
    }
    write_report(results, tmp_path / "report.html")
    text = " ".join(Page((tmp_path / "report.html").read_text()).texts)
    best = max((cell for cell in table if cell["temperature"] == 0), key=lambda cell: cell["acceptance_length"])
    assert f"{best['method']} commits {best['acceptance_length']:.2f} tokens" in text
    assert "in distribution" in text and "abacus" in text and " no " in text
    out = io.StringIO()
    print_table(results, out)
    head, first, *_ = out.getvalue().splitlines()
    assert "T=0 n=4" in head and "T=1 n=4" in head
    length, distinct = table[0]["acceptance_length"], table[0]["distinct_token_share"]
    assert first.split() == ["small", f"{length:.2f}", percent(distinct), "no", "-", "-", "-"]


def test_command_writes_results_and_report(
    target_directory, drafter_directories, target, tmp_path, capsys, run_on_devices
) -> None:
    from train.data.text_building import build
    from train.data.text_sources import RawDocument

    def documents(words):
        return [RawDocument(word, f"{word} = 1\nonce upon a time there was {word}" * 2) for word in words]

    build({"train": documents("abc"), "valid": documents("xyz")}, target.tokenizer, tmp_path / "data")
    arguments = ["--target", str(target_directory), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    arguments += ["--methods", f"heads={drafter_directories['medusa']}", "lookup=prompt_lookup"]
    options = ["--num_prompts", "2", "--prompt_tokens", "8", "--max_new_tokens", "8", "--budgets", "4"]
    command.main([*arguments, *options, "--temperatures", "0"])
    split = [*arguments, *options, "--temperatures", "0", "--mesh", "tensor=2", "--out", str(tmp_path / "split")]
    run_on_devices(f"from eval import acceptance\nacceptance.main({split!r})", devices=2)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["method"] for cell in results["cells"]] == ["heads", "lookup"]
    assert all(cell["identical"] for cell in results["cells"]) and results["environment"]["jax"]
    assert json.loads((tmp_path / "split" / "results.json").read_text())["cells"] == results["cells"], "on two devices"
    assert results["methods"][1]["parameters"] == 0 < results["methods"][0]["parameters"]
    Page((tmp_path / "out" / "report.html").read_text())
    assert "acceptance length" in capsys.readouterr().out
    for wrong, message in (
        (["--budgets", "4,x"], "--budgets must be numbers"),
        (["--num_prompts", "0"], "at least 1"),
        (["--overwrite", "--mesh", "model=2"], "mesh 'model=2' is not a list of sizes of data, fsdp, tensor"),
    ):
        with pytest.raises(SystemExit):
            command.main([*arguments, *wrong])
        assert message in capsys.readouterr().err


def test_questions_measure_and_calibrate_in_turn(target: Target, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"turns": [f"q{i}", "and then?"]}) + "\n" for i in range(12)))
    prompts, calibration = command.question_prompts(str(path), target, 3, chat=False)
    assert [prompt.text for prompt in prompts] == ["q0", "q4", "q8"]
    assert [prompt.text for prompt in calibration] == ["q2", "q6", "q10"]
    path.write_text('{"prompt": "alone"}\n')
    with pytest.raises(UserError, match="holds one question"):
        command.question_prompts(str(path), target, 3, chat=False)
