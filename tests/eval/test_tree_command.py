"""The walk through ranks is the loop itself; the search follows costs and accuracies; the command writes the tree."""

import dataclasses
import functools
import json
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

from decoding.calibration import recorded_drafts, sequential_temperatures
from decoding.drafters.dflash import DFlash
from decoding.drafters.dspark import DSpark
from decoding.drafters.eagle import Eagle
from decoding.drafters.registry import load_drafter, save_drafter
from decoding.generate import generate
from decoding.policies import Slots, Static
from decoding.policies.scheduled import Scheduled
from decoding.stats import Stats
from decoding.tree_search import walk
from decoding.trees import Topology, chain, from_child_counts
from eval import tree as command
from eval.measure.timing import Timing
from eval.text.prompts import BUILT_IN
from eval.tree import Choice, calibration_ranks, choose_tree, probe
from models.errors import UserError
from models.formats.target import Target, load_target
from models.heads.dflash import DFlashHeads
from models.heads.eagle import EagleHeads
from models.heads.serial import SerialHead
from tests.noise import drawn


@pytest.mark.parametrize("name", ["medusa", "hydra"])
def test_walk_predicts_the_loop(target: Target, drafter_directories, name: str) -> None:
    drafter, params = load_drafter(drafter_directories[name], target)
    tree = from_child_counts({(): 10, (0,): 3, (1,): 2, (0, 0): 2})
    prompts = [target.tokenizer.encode(text) for text in ("def f(x):", "once upon a time", "return x")]
    ranks = calibration_ranks(target, drafter, params, prompts, 100)
    assert len(ranks) == 3 and all(len(rows) == 3 for rows in ranks)
    drafter = dataclasses.replace(drafter, tree=tree)
    made = generate(target, prompts, drafter=drafter, drafter_params=params, max_new_tokens=100)
    real = sum(stats.committed for stats in made.stats) / sum(stats.steps for stats in made.stats)
    # The walk stops a few places early, where not every head has a label.
    assert walk(ranks, tree) == pytest.approx(real, abs=0.05)
    assert real > 1


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch):
    """Timings as a test sets them: milliseconds of the forward and of a head, by rows."""

    def use(forward, head, loop=0.0):
        def measure(parts, rounds, progress):
            return {name: Timing(time_of(name), time_of(name)) for name in parts}

        def time_of(name: str) -> float:
            kind, *numbers = name.split()
            if kind == "draft":
                return head * (1 + int(numbers[0]))
            return forward(int(numbers[0])) if kind == "forward" else forward(1) + loop

        monkeypatch.setattr(command, "measure", measure)

    return use


def search(target: Target, directory: pathlib.Path, ranks, monkeypatch, **options) -> Choice:
    drafter, params = load_drafter(directory, target)
    monkeypatch.setattr(command, "calibration_ranks", lambda *_: ranks)
    return choose_tree(target, drafter, params, [[1, 2, 3]], **options)


@pytest.fixture
def ranks() -> list[np.ndarray]:
    """2,000 places: the first choice is right in 70%, the second in 20%, at every depth alike."""
    return [np.random.default_rng(0).choice([0, 1, 10], p=[0.7, 0.2, 0.1], size=(3, 2000))]


def test_free_rows_give_the_largest_tree(target, drafter_directories, ranks, costs, monkeypatch) -> None:
    costs(lambda rows: 1.0, 1e-6)
    choice = search(target, drafter_directories["hydra"], ranks, monkeypatch, max_nodes=8)
    assert choice.tree.size == 8 and choice.tree.max_depth == 3
    assert choice.best.acceptance == max(candidate.acceptance for candidate in choice.table)


def test_dear_rows_give_a_small_tree(target, drafter_directories, ranks, costs, monkeypatch) -> None:
    costs(lambda rows: 1.0 + 0.65 * (rows - 1), 1e-6)
    choice = search(target, drafter_directories["hydra"], ranks, monkeypatch, max_nodes=8)
    assert choice.tree == chain(1)
    assert choice.best.tokens_per_second > choice.plain.tokens_per_second == pytest.approx(1000.0)


def test_dear_heads_give_a_shallow_tree(target, drafter_directories, ranks, costs, monkeypatch) -> None:
    costs(lambda rows: 1.0, 2.0)
    choice = search(target, drafter_directories["hydra"], ranks, monkeypatch, max_nodes=8)
    assert choice.tree.max_depth == 1 and choice.tree.size == 3
    assert choice.best.draft_ms == pytest.approx(2.0)


def test_what_the_loop_adds_is_in_every_step(target, drafter_directories, ranks, costs, monkeypatch) -> None:
    costs(lambda rows: 1.0, 0.1, loop=0.5)
    choice = search(target, drafter_directories["medusa"], ranks, monkeypatch, max_nodes=4)
    assert choice.plain.step_ms == pytest.approx(1.5)
    for candidate in choice.table:
        assert candidate.step_ms == pytest.approx(1.5 + 0.1 * candidate.tree.max_depth)


@pytest.mark.parametrize(("level", "rows"), [(0, 1), (1, 1), (1, 4), (2, 1), (3, 16)])
def test_probe_expands_as_it_says(level: int, rows: int) -> None:
    tree = probe(level, rows)
    assert tree.max_depth == level + 1
    assert [len(tree.expanded(d)) for d in range(level + 1)] == [1] * level + [rows]
    assert all(tree.rank[tree.level(d + 1)].max() >= 1 for d in range(level + 1)), "candidates are chosen, not one"


def test_heads_that_are_never_right(target, drafter_directories, costs, monkeypatch) -> None:
    costs(lambda rows: 1.0, 0.1)
    with pytest.raises(UserError, match="no head guessed"):
        search(target, drafter_directories["medusa"], [np.full((3, 50), 10)], monkeypatch)
    with pytest.raises(UserError, match="max_nodes"):
        search(target, drafter_directories["medusa"], [np.zeros((3, 50), int)], monkeypatch, max_nodes=1)


def test_command_prints_and_writes(target_directory, drafter_directories, tmp_path, capsys) -> None:
    drafter = tmp_path / "hydra"
    shutil.copytree(drafter_directories["hydra"], drafter)
    before = json.loads((drafter / "drafter.json").read_text())
    arguments = ["--target", str(target_directory), "--drafter", str(drafter)]
    command.main([*arguments, "--write", "--max_nodes", "4", "--rounds", "1", "--max_new_tokens", "40"])
    after = json.loads((drafter / "drafter.json").read_text())
    assert {**after, "tree": None} == {**before, "tree": None}
    assert 1 <= len(after["tree"]) <= 3
    out = capsys.readouterr().out
    assert "<- best" in out and "depth 3" in out


def test_command_takes_a_given_tree(target_directory, drafter_directories, tmp_path, capsys) -> None:
    drafter = tmp_path / "medusa"
    shutil.copytree(drafter_directories["medusa"], drafter)
    (tmp_path / "tree.json").write_text("[[0], [1], [0, 0]]")
    arguments = ["--target", str(target_directory), "--drafter", str(drafter), "--write", "--tree"]
    command.main([*arguments, str(tmp_path / "tree.json")])
    assert json.loads((drafter / "drafter.json").read_text())["tree"] == [[0], [1], [0, 0]]
    (tmp_path / "tree.json").write_text("[[0], [2]]")
    for tree, message in (
        (str(tmp_path / "tree.json"), "path [2] without its better-ranked sibling [1]"),
        ("chain:9", "9 deep"),
    ):
        with pytest.raises(SystemExit):
            command.main([*arguments, tree])
        assert message in capsys.readouterr().err
    assert json.loads((drafter / "drafter.json").read_text())["tree"] == [[0], [1], [0, 0]]


def test_a_tree_for_a_drafter_with_a_policy(target_directory, tmp_path, capsys) -> None:
    target = load_target(target_directory)
    drafter = Eagle(EagleHeads())
    params = jax.jit(drafter.init_params, static_argnums=0)(target.config, target.params, jax.random.key(0))
    save_drafter(tmp_path / "eagle", drafter, params, target.fingerprint())
    (tmp_path / "tree.json").write_text("[[0], [1], [0, 0]]")
    arguments = ["--target", str(target_directory), "--drafter", str(tmp_path / "eagle"), "--write", "--tree"]
    command.main([*arguments, str(tmp_path / "tree.json")])
    assert "wrote the tree of 4 rows" in capsys.readouterr().out
    written = load_drafter(tmp_path / "eagle", target)[0]
    assert written == drafter.with_tree(Topology(((0,), (1,), (0, 0))))
    (tmp_path / "tree.json").write_bytes(b"\xff\xfe")
    with pytest.raises(SystemExit):
        command.main([*arguments, str(tmp_path / "tree.json")])
    assert "tree.json is not UTF-8 text" in capsys.readouterr().err


def test_confidences_are_calibrated_on_drafts_that_were_verified(
    target, target_directory, tmp_path, capsys, monkeypatch
):
    heads = DFlashHeads((1,), 0, num_layers=1, block=2, shifted=True)
    drafter = DSpark(heads, Static(chain(2)), SerialHead(rank=4))
    shapes = jax.eval_shape(lambda: drafter.init_params(target.config, target.params, jax.random.key(0)))
    save_drafter(tmp_path / "dspark", drafter, drawn(shapes, 0.3), target.fingerprint())
    told = []
    monkeypatch.setattr(command, "recorded_drafts", lambda *args: told.append(recorded_drafts(*args)) or told[0])
    arguments = ["--target", str(target_directory), "--drafter", str(tmp_path / "dspark"), "--calibrate", "--write"]
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "--calibrate is for the policy scheduled" in capsys.readouterr().err
    options = ["--policy", "scheduled:depth=2,threshold=0.4,draws=top", "--max_new_tokens", "40"]
    command.main([*arguments, *options])
    ((logits, survived),) = told
    # A draft commits one token and what survives; the texts' last drafts are left out.
    assert logits.shape == survived.shape and logits.shape[1] == 2 and np.isfinite(logits).all()
    assert 0 < survived[:, 0].mean() < 1 and (survived[:, 1] <= survived[:, 0]).all()
    texts = len(BUILT_IN)
    assert texts * (39 - 3) <= len(logits) + survived.sum() <= texts * 39
    assert f"{len(logits)} drafts" in capsys.readouterr().out
    written = load_drafter(tmp_path / "dspark", target)[0].tree_policy
    found = sequential_temperatures(logits, survived)
    assert written == Scheduled(depth=2, threshold=0.4, draws="top", temperatures=tuple(found.tolist()))


def test_speed_is_that_of_measured_forwards(target, costs, monkeypatch) -> None:
    costs(lambda rows: {1: 1.0, 2: 2.0, 3: 1.5, 4: 4.0, 6: 8.0}[rows], 0.0)
    # A larger forward is never faster, and five rows lie between four and six.
    assert command.forward_speed(target, 40, 6, 1) == [1000.0, 500.0, 500.0, 250.0, pytest.approx(166.67), 125.0]


@pytest.fixture
def networks(target: Target, tmp_path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Networks with a static policy and with a dynamic one, of random parameters."""
    blocks = DFlashHeads((1,), 0, num_layers=1, block=4)
    for name, drafter in {
        "static": DFlash(blocks, Static(chain(3), "top")),
        "dynamic": DFlash(blocks, Slots(3, 8)),
    }.items():
        shapes = jax.eval_shape(functools.partial(drafter.init_params, target.config), target.params, jax.random.key(0))
        save_drafter(tmp_path / name, drafter, drawn(shapes, 0.3), target.fingerprint())
    return {name: tmp_path / name for name in ("static", "dynamic")}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Candidates of the trees with which prompts were decoded; the first guess was right in 60%, the second in 20%."""
    sizes: list[int] = []

    def counts(target, prompts, *, drafter, **settings):
        sizes.append(drafter.max_nodes - 1)
        steps, accepted = 100_000, np.zeros(drafter.max_nodes)
        if drafter.topology is not None:
            tree = drafter.topology
            for node in range(1, tree.size):
                above = accepted[tree.parent[node]] if tree.parent[node] else steps
                accepted[node] = above * (0.6, 0.2, 0.0)[min(tree.rank[node], 2)]
        committed = int(steps * (1 + sizes[-1] ** 0.5))
        return types.SimpleNamespace(stats=[Stats(steps, committed, np.zeros(drafter.max_depth), accepted)])

    monkeypatch.setattr(command, "generate", counts)
    return sizes


@pytest.mark.parametrize("name", ["static", "dynamic"])
def test_a_drafter_with_a_budget_gets_the_size_of_most_tokens_per_second(
    name: str, target, networks, decoded, monkeypatch
) -> None:
    def measure(parts, rounds, progress):
        rows = {part: int(part.partition(" ")[2] or 0) for part in parts}
        return {part: Timing(*[1.0 + 0.1 * count + 0.2 * part.startswith("step")] * 2) for part, count in rows.items()}

    monkeypatch.setattr(command, "measure", measure)
    drafter, params = load_drafter(networks[name], target)
    choice = command.choose_size(target, drafter, params, [[1, 2, 3]], max_nodes=16)
    assert [candidate.rows for candidate in choice.table] == [2, 4, 8, 16]
    assert choice.best == max(choice.table, key=lambda candidate: candidate.tokens_per_second)
    if name == "dynamic":
        assert choice.accuracy is None and decoded == [1, 3, 7, 15] and choice.tree == Slots(3, choice.best.rows)
        return
    # One decode with a wide tree tells all: chains of first guesses, then second ones.
    assert len(decoded) == 1 and choice.accuracy is not None
    assert choice.accuracy[0, :2].tolist() == pytest.approx([0.6, 0.2])
    assert choice.table[0].acceptance == pytest.approx(1.6)
    assert choice.table[1].acceptance == pytest.approx(1 + 0.6 + 0.36 + 0.216)
    assert choice.tree.draws == "top" and choice.tree.max_nodes == choice.best.rows


def test_command_refuses_what_has_no_size(target_directory, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--target", str(target_directory), "--drafter", "none"])
    assert stopped.value.code == 2
    assert "none cannot be fitted to a budget" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--target", str(target_directory), "--drafter", "none", "--mesh", "tensor=2"])
    assert "mesh data=1, fsdp=1, tensor=2 does not cover the 1 devices present" in capsys.readouterr().err


def test_a_mesh_ranks_the_same(target, target_directory, drafter_directories, tmp_path, run_on_devices) -> None:
    """And decodes the same text; what is timed is split as what decodes is."""
    heads, prompt = str(drafter_directories["hydra"]), target.tokenizer.encode("def f(x):")
    np.save(tmp_path / "ranks.npy", calibration_ranks(target, *load_drafter(heads, target), [prompt], 12)[0])
    run_on_devices(
        f"""
import numpy as np
from decoding.drafters.registry import load_drafter
from eval.measure.parts import Scene, rows_forward
from eval.tree import calibration_ranks
from models.formats.target import load_target
from models.sharding import parse_mesh
target = load_target({str(target_directory)!r}, mesh=parse_mesh("tensor=2"))
heads = load_drafter({heads!r}, target)
(ranks,) = calibration_ranks(target, *heads, [{prompt}], 12)
np.testing.assert_array_equal(ranks, np.load({str(tmp_path / "ranks.npy")!r}))
scene = Scene.with_room(target.config, target.params, 20, 3)
text = rows_forward(scene, 4).text()
assert f"f32[1,1,{{scene.capacity}},8]" in text and f"f32[1,2,{{scene.capacity}},8]" not in text
assert "tensor" in scene.state(*heads).cache[0]["k"].sharding.spec
""",
        devices=2,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--write"], "--write puts a tree into a drafter directory, and there is no token_recycling/drafter.json"),
        (["--speed"], "--speed and --temperature go with --calibrate"),
        (["--temperature", "1"], "--speed and --temperature go with --calibrate"),
        (["--tree", "chain:2", "--policy", "dyspec"], "--tree is in place of --policy and --calibrate"),
    ],
)
def test_command_refuses_options_before_the_work(options: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["--target", "absent", "--drafter", "token_recycling", *options])
    assert f"error: {message}" in capsys.readouterr().err
