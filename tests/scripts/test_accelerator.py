"""Parts run side by side within their limits, what fails stops nothing else, what comes back is small and whole."""

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from decoding.policies import parse_policy
from decoding.stats import Counters, Stats
from eval.text.budget import parse_any_policy
from models.config import TransformerConfig
from models.formats.scaled import read_scaled, whole_tensors
from models.formats.storage import FLOATS, open_tensors
from scripts.accelerator import __main__ as everything
from scripts.accelerator import coprocessor, correctness, kernels, steps, unpack
from scripts.accelerator import smollm2 as accelerator
from scripts.accelerator.chat_heads import HEADS
from scripts.accelerator.job import QUICK, Job, Part
from scripts.accelerator.parts import BESIDES, PARTS, Sizes
from tests.conftest import ROOT
from tests.scripts.test_quickstart import check_command
from train.objectives import pieces


@pytest.fixture
def sleepers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules that end well, end badly, and do not end."""
    (tmp_path / "good.py").write_text("import os\nprint('flags', os.environ.get('XLA_FLAGS', '-'))\n")
    (tmp_path / "bad.py").write_text("print('working')\nraise SystemExit(3)\n")
    (tmp_path / "endless.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return tmp_path


def test_parts_end_by_themselves_by_their_limit_or_when_they_are_asked_to(sleepers: Path) -> None:
    job = Job(sleepers, 1.0, sleepers / "cache")
    begun = sleepers / "early.log"
    parts = [
        Part("good", ["good"]),
        Part("timed", ["good"], quick=False),
        Part("bad", ["bad"]),
        Part("late", ["endless"]),
        Part("early", ["endless"], done=lambda: "begun" in begun.read_text()),
        Part("missing", ["good"], needs=sleepers / "nowhere"),
    ]
    job.run(parts, 3.0)
    told = json.loads((sleepers / "parts.json").read_text())
    states = {name: part["state"] for name, part in told.items()}
    assert states == {
        "good": "ok",
        "timed": "ok",
        "bad": "failed (3)",
        "late": "out of time",
        "early": "ok, ended early",
        "missing": "skipped",
    }
    assert QUICK in told["good"]["last_line"] and told["timed"]["last_line"] == "flags -"
    assert told["bad"]["last_line"] == "working" and (sleepers / "good.log").read_text().startswith("python -m good")


def test_no_more_parts_run_side_by_side_than_are_asked_for(sleepers: Path) -> None:
    (sleepers / "counted.py").write_text(
        "import os, pathlib, time\n"
        "place = pathlib.Path(os.environ['PYTHONPATH']) / 'now'\n"
        "place.mkdir(exist_ok=True)\n"
        "mine = place / str(os.getpid())\n"
        "mine.touch()\ntime.sleep(0.5)\nprint(len(list(place.iterdir())))\nmine.unlink()\n"
    )
    ended: list[None] = []
    job = Job(sleepers, 1.0, sleepers / "cache", lambda: ended.append(None))
    job.run([Part(str(number), ["counted"]) for number in range(4)], 30.0, at_once=2)
    assert max(int(part["last_line"]) for part in job.parts.values()) == 2 and len(ended) == len(job.parts) == 4
    job.run([Part("limited", ["endless"], seconds=0.5), Part("next", ["good"])], 30.0, at_once=1)
    assert job.parts["limited"]["state"] == "out of time" and job.parts["next"]["state"] == "ok"


def arguments(out: Path, *more: str) -> argparse.Namespace:
    args = accelerator._parser().parse_args(["--out", str(out), "--target", "target", *more])
    args.cache, args.back = out / "cache", out / "back"
    return args


def steps_of(part: Part) -> int:
    return next(int(option.partition("=")[2]) for option in part.command if option.startswith("--config.steps="))


def test_steps_fit_the_time_where_it_is_known(tmp_path: Path) -> None:
    args = arguments(tmp_path, "--steps", "1000", "--train_seconds", "100")
    measured = {"eagle3": 0.05, "hydra_pp": 0.12, "medusa": 0.5}
    parts = {part.name: steps_of(part) for part in accelerator.training(args, Path("t"), Path("d"), measured)}
    assert parts == {"eagle3": 1000, "hydra_pp": 1000, "medusa": 200}
    (rehearsed,) = accelerator.training(args, Path("t"), Path("d"), {}, ["medusa"])
    assert rehearsed.name == "rehearse_medusa" and steps_of(rehearsed) == 1000 and not rehearsed.done()
    metrics = tmp_path / "rehearsal" / "medusa" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"step": 30, "step_seconds": 0.25}\n{"step": 30, "loss_1": 2.0}\n')
    assert rehearsed.done()
    assert accelerator.note_timings(args) == {"medusa": 0.25}
    assert json.loads((args.cache / "step_seconds.json").read_text()) == {"medusa": 0.25}


def test_what_comes_back_is_small_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "BIGGEST_FILE", 3000)
    monkeypatch.setattr(accelerator, "BIGGEST_HEAD", 6000)
    args = arguments(tmp_path)
    rng = np.random.default_rng(0)
    made = {}
    for name, tokens in (("eagle3", 600), ("medusa", 10_000)):
        (drafter := tmp_path / name / "drafter").mkdir(parents=True)
        made[name] = {
            "fc.kernel": rng.standard_normal((64, 32), np.float32),
            "table": rng.standard_normal(tokens, np.float32),
            "ids": np.arange(5, dtype=np.int32),
        }
        save_file(made[name], drafter / "model.safetensors")
        (drafter / "drafter.json").write_text("{}")
    (tmp_path / "eagle3.log").write_text("trained\n")
    accelerator.pack(args)
    names = sorted(path.name for path in args.back.iterdir())
    assert names == ["heads-0.safetensors", "results.tar.gz"], "what is large stays"
    with tarfile.open(args.back / "results.tar.gz") as archive:
        assert {"eagle3.log", "eagle3/drafter/drafter.json"} <= set(archive.getnames())

    unpack.main(["--back", str(args.back), "--out", str(tmp_path / "heads")])
    with open_drafter(tmp_path / "heads" / "eagle3") as found:
        assert found.keys() == made["eagle3"].keys()
        for key, tensor in made["eagle3"].items():
            tolerance = {"fc.kernel": 0.5, "table": 0.02, "ids": 0.0}[key]
            np.testing.assert_allclose(found[key].astype(np.float32), tensor, atol=tolerance)
    with pytest.raises(SystemExit):
        unpack.main(["--back", str(tmp_path), "--out", str(tmp_path / "more")])


@contextlib.contextmanager
def open_drafter(directory: Path) -> Iterator[dict[str, np.ndarray]]:
    """Its parameters as they are read."""
    with contextlib.ExitStack() as stack:
        files = open_tensors(directory, stack)
        yield {name: np.asarray(read_scaled(files, name, directory, (*FLOATS, "I32"))) for name in whole_tensors(files)}


def test_every_head_is_measured_with_every_tree_of_its_own(tmp_path: Path) -> None:
    for head in HEADS.values():
        assert (Path("configs") / head.config.partition(":")[0]).exists()
        for policy in filter(None, head.trees.values()):
            parse_any_policy(policy)
        if head.timed:
            assert parse_policy(head.timed).max_nodes == 17
    args = arguments(tmp_path, "--heads", "dflash,medusa", "--sampled_budgets", "7")
    parts = accelerator.acceptance(args, Path("t"))
    assert [part.name for part in parts] == [
        f"acceptance_{name}_{temperature}"
        for temperature in ("0", "0.7")
        for name in ("dflash_chain", "dflash_tree", "medusa")
    ]
    assert f"dflash_tree={tmp_path}/dflash/drafter@slots:depth=7" in parts[1].command
    assert [part.command[part.command.index("--budgets") + 1] for part in parts[2:4]] == ["8,16,32", "7"]


def test_every_head_that_was_trained_is_timed_with_one_tree(tmp_path: Path) -> None:
    args = arguments(tmp_path, "--heads", "dflash,medusa,falcon_4")
    for name in ("dflash", "medusa"):
        (tmp_path / name / "drafter").mkdir(parents=True)
        (tmp_path / name / "drafter" / "drafter.json").write_text("{}")
    trees = {part.name: part.command for part in accelerator.timed_trees(args, Path("t"))}
    # Heads that have a policy; Medusa's tree comes with it.
    assert list(trees) == ["tree_dflash", "tree_falcon_4"]
    assert trees["tree_dflash"][5:] == ["--policy", "slots:depth=7,total=17", "--write"]
    parts = accelerator.decode(args, Path("t"))
    assert [part.name for part in parts] == ["decode", "decode_sampled"] and not any(part.quick for part in parts)
    for part, temperature in zip(parts, ("0.0", "0.7"), strict=True):
        assert f"--config.sampling.temperature={temperature}" in part.command
        assert f"--config.drafters=none,{tmp_path}/dflash/drafter,{tmp_path}/medusa/drafter" in part.command


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give --target"),
        (["--target", "nowhere"], "there is no nowhere"),
        (["--rehearse"], "is not empty"),
        (["--rehearse", "--heads", "medusa,hydra_ppp"], "there is no head 'hydra_ppp', only eagle3, "),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, capsys, more: list[str], message: str) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(SystemExit):
        accelerator.main(["--out", str(tmp_path), *more])
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_every_part_has_its_processes_and_the_last_what_time_is_left(tmp_path: Path) -> None:
    args = everything._parser().parse_args(["--out", str(tmp_path), "--target", "target"])
    args.cache, args.back = tmp_path / "cache", tmp_path / "back"
    names: list[str] = []
    for sizes in (Sizes.of("llama3-8b", False, 5), Sizes.of("llama3-8b", True, 5)):
        groups = [group for part in args.parts for group in PARTS[part](args, sizes, 100.0)]
        parts = [part for beside, seconds in groups for part in beside if seconds > 0]
        names = [part.name for part in parts]
        assert len(set(names)) == len(names)
        for part in parts:
            assert importlib.util.find_spec(part.command[0]), part.command
        assert "--minutes 1.42" in " ".join(parts[-1].command) and parts[-1].packages
        timed = {part.name for part in parts if not part.quick}
        taught = {f"coprocessor_{name}" for name in ("chats", "lora", "soft", "pause")}
        untimed = {"smollm2", "kernels", *taught}
        checks = ("chi_square_", "greedy_")
        assert timed == {name for name in names if name not in untimed and not name.startswith(checks)}
    assert "training_hydra" in names and "growth_1" in names


def test_what_is_lacking_is_said_and_time_that_is_over_too(tmp_path: Path, capsys) -> None:
    part = Part("lacking", ["good"], packages=("json", "no_such_package"))
    Job(tmp_path, 1.0, tmp_path / "cache").run([part], 1.0)
    Job(tmp_path, 0.0, tmp_path / "cache").run([Part("late", ["good"])], 1.0)
    told = capsys.readouterr().out
    assert "lacking: skipped after 0 s: not installed: no_such_package; give a folder with their --wheels" in told
    assert "late: skipped after 0 s: no time was left for it" in told


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--parts", "plain,speed"], "there is no part 'speed', only correctness, plain"),
        (["--target", "nowhere"], "there is no nowhere"),
        (["--shape", "llama9"], "there is no shape 'llama9', only"),
        (["--minutes", "nan"], "--minutes must be above 0, got nan"),
        (["--minutes", "soon"], "--minutes must be a number, got 'soon'"),
        ([], "is not empty"),
    ],
)
def test_mistakes_of_the_whole_are_one_sentence(tmp_path: Path, capsys, more: list[str], message: str) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(SystemExit):
        everything.main(["--out", str(tmp_path), *more])
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1


def test_results_are_packed_without_what_is_large(tmp_path: Path) -> None:
    for name in ("plain.json", "smollm2/decode/results.json", "cache/step_seconds.json", "plain.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    everything.pack(tmp_path, tmp_path / "back")
    with tarfile.open(tmp_path / "back" / "everything.tar.gz") as archive:
        assert set(archive.getnames()) == {"plain.json", "smollm2/decode/results.json"}


def test_texts_are_judged_by_what_their_dtype_can_promise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = correctness.tiny_target(12)
    texts = [[1, 2, 3]] * 4
    made = types.SimpleNamespace(tokens=texts, stats=[Stats.of(Counters.zeros(1, 1, 2), 0)])
    monkeypatch.setattr(correctness, "generate", lambda target, prompts, **_: made if len(prompts) > 1 else alone)
    alone = types.SimpleNamespace(tokens=[[1, 2, 3]])
    found = correctness.greedy(target, None, None, texts)
    assert found["ok"] and not found["partings"] and not found["judged"], "no draft was accepted"
    alone.tokens = [[1, 5, 3]]
    found = correctness.greedy(target, None, None, texts)
    (parting,) = found["partings"]
    assert parting["new_token"] == 1 and parting["margin"] > 0
    assert not found["ok"], "in float32 these two are no tie"

    def judged(second: float, dtype) -> bool:
        """Of a text that parts where the two best scores are 8 and `second`."""
        scores = np.zeros((1, 3, 12))
        scores[0, -1, :2] = 8.0, second
        stub = types.SimpleNamespace(
            apply=lambda tokens: types.SimpleNamespace(logits=scores),
            params={"embed": {"embedding": np.zeros((2, 2), dtype)}},
        )
        return correctness.greedy(stub, None, None, texts)["ok"]

    assert judged(7.9, jnp.bfloat16) and not judged(7.8, jnp.bfloat16), "an eighth is what rounding makes of 8"
    assert not judged(8.0, np.float64), "nothing excuses a parting there"


def test_bare_names_are_timed_alone_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = accelerator.decode_sized(arguments(tmp_path, "--questions", "q.jsonl"), Path("t"))
    assert [part.name for part in parts] == ["sized_1", "sized_4", "sized_16"] and not any(part.quick for part in parts)
    for part, batch, prompts in zip(parts, (1, 4, 16), (12, 12, 16), strict=True):
        assert f"--config.batch={batch}" in part.command and f"--config.num_prompts={prompts}" in part.command
        assert "--config.drafters=none,smollm2,token_recycling" in part.command
        check_command(["python", "-m", *part.command], monkeypatch)


@pytest.mark.parametrize(
    "name", ["hydra", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eagle3", "medusa"))]
)
def test_a_step_of_heads_takes_less_than_one_copy_of_all_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small what docs/results.md says of the Llama-3-8B shape: nothing grows with tokens times vocabulary."""
    rows, length, vocab_size = 64, 32, 4096
    shape = TransformerConfig(
        vocab_size=vocab_size, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=224
    )
    job = steps.JOBS[name]
    fewer = {"steps": 2} if name == "eagle3" else {"heads": {"num_heads": 2}}
    job = job._replace(objective={**job.objective, **fewer})

    def temporaries() -> float:
        return steps.sizes_of(job, shape, rows, length, {"data": 1})["temporaries_gb"] * 1e9

    scores = 4 * rows * length * vocab_size
    monkeypatch.setattr(pieces, "SCORES", rows * vocab_size)
    assert temporaries() < scores
    if name == "medusa":  # Where nothing is cut there are several copies.
        monkeypatch.undo()
        assert temporaries() > 2 * scores


def test_devices_that_share_parameters_share_rows_too(run_on_devices) -> None:
    """In small what docs/results.md says of a 70B target on 16 devices: none of them computes the whole batch."""
    step = """
from models.config import TransformerConfig
from scripts.accelerator import steps
sizes = dict(vocab_size=512, width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=224)
job = steps.JOBS["medusa"]
job = job._replace(objective={**job.objective, "heads": {"num_heads": 2}})
print("took", steps.sizes_of(job, TransformerConfig(**sizes), 64, 64, MESH)["temporaries_gb"])
"""
    alone, shared = (
        float(run_on_devices(step.replace("MESH", str(mesh)), devices=count).split("took")[-1])
        for count, mesh in ((1, {"data": 1}), (4, {"data": 1, "fsdp": 4}))
    )
    assert shared < 0.4 * alone


def test_a_coprocessors_step_is_told_beside_an_ordinary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"vocab_size": 264, "width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 32}
    shapes = {"small": TransformerConfig(head_dim=8, max_position=64, **tiny)}
    monkeypatch.setattr(coprocessor, "_SHAPES", shapes)
    command = "--kinds pause --latents 2 --places 3 --ahead 4 --batch_size 2 --length 32 --rounds 2 --out"
    coprocessor.main([*command.split(), str(tmp_path / "steps.json")])
    told = json.loads((tmp_path / "steps.json").read_text())["steps"]
    ordinary, pause = told["language model"], told["pause"]
    # Forward: 32 tokens of the text, and behind 3 places 2 latents and 4 tokens but the last, forward and backward.
    assert ordinary["tokens"] == 3 * 32 and pause["tokens"] == 32 + 2 * 3 * (2 + 3)
    for name, of in {"step": "seconds", "scratch": "scratch_gib", "counted": "tokens"}.items():
        assert ordinary[of] > 0 and ordinary[name] == 1.0
        assert pause[name] == pytest.approx(pause[of] / ordinary[of]) and pause[name] > 0
    with pytest.raises(SystemExit):
        coprocessor.main(["--kinds", "latent", "--out", str(tmp_path / "none.json")])
    assert not (tmp_path / "none.json").exists()


WITHOUT = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")

sys.meta_path.insert(0, Missing())
for name in {modules!r}:
    importlib.import_module(name)
"""


def test_what_needs_no_data_starts_where_nothing_that_reads_them_is_installed(tmp_path: Path) -> None:
    """Such as on a machine that cannot fetch anything."""
    missing = {*BESIDES, "dm_tree", "tree", "tensorflow"}
    args = everything._parser().parse_args(["--out", str(tmp_path)])
    args.cache = args.back = tmp_path
    groups = [group for make in PARTS.values() for group, _ in make(args, Sizes.of("tiny", True, 1), 60.0)]
    alone = sorted({part.command[0] for group in groups for part in group if not part.packages})
    assert {"eval.speed", "scripts.accelerator.correctness", "scripts.accelerator.steps"} < set(alone)
    program = WITHOUT.format(missing=missing, modules=["scripts.accelerator.__main__", *alone])
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_paths_are_meant_from_where_the_command_is_given(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").touch()
    (tmp_path / "python").write_text('#!/usr/bin/env bash\n[ "$1" = -c ] || echo "$@"\n')
    (tmp_path / "python").chmod(0o755)
    command = ["bash", str(ROOT / "scripts" / "accelerator.sh")]
    for given, told in (
        (["--out", "a", "--questions=b", "--cache", "/c"], f"--out {tmp_path}/a --questions {tmp_path}/b --cache /c"),
        (["smollm2", "--chats", "d", "--shape", "tiny"], f"--chats {tmp_path}/d --shape tiny"),
        (["--shape", "shape", "--tiny", "--out"], f"--shape {tmp_path}/shape --tiny --out"),
    ):
        environ = {**os.environ, "TANDEM_PYTHON": str(tmp_path / "python")}
        done = subprocess.run([*command, *given], env=environ, capture_output=True, text=True, cwd=tmp_path)
        module = "scripts.accelerator.smollm2" if "smollm2" in given else "scripts.accelerator"
        assert done.stdout == f"-m {module} {told}\n" and not done.stderr


def test_a_folder_of_wheels_is_installed_for_the_job_alone(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    about = "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n"
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    inside = {
        "brought.py": "",
        "sitecustomize.py": "print('brought along')\n",
        "brought-1.0.dist-info/METADATA": about,
        "brought-1.0.dist-info/WHEEL": tag,
    }
    with zipfile.ZipFile(tmp_path / "wheels" / "brought-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in inside.items():
            wheel.writestr(name, text)
        wheel.writestr("brought-1.0.dist-info/RECORD", "".join(f"{name},,\n" for name in inside))
    command = ["bash", str(ROOT / "scripts" / "accelerator.sh"), "--wheels", str(tmp_path / "wheels")]
    command += ["--out", str(tmp_path / "out"), "--parts", "nothing"]
    environ = {**os.environ, "TANDEM_PYTHON": sys.executable}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no part 'nothing'" in done.stderr and "brought along" in done.stdout
    assert importlib.util.find_spec("brought") is None
    command[2:] = ["--wheels=nowhere"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == f"error: --wheels needs a folder, and {tmp_path}/nowhere is none\n"


@pytest.mark.slow
def test_a_kernel_that_is_wrong_for_some_heads_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.attend

    def attend(q, rows, sources, layout, *, scale):
        worse = 1.05 if layout.attention == "fused" and q.shape[-1] == 128 else 1.0
        return right(q, rows, sources, layout, scale=scale) * worse

    monkeypatch.setattr(kernels, "attend", attend)
    with pytest.raises(SystemExit, match="1"):
        kernels.main(["--length", "12", "--out", str(tmp_path / "kernels.json")])
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["wrong"] == ["whole 128", "packed 128"]
    packed = found["off"]["packed 64"]
    assert packed["kernel"] == "library"
    assert all(0 < off < kernels.ROUNDING for path in ("fused", "dense") for off in packed[path].values())
