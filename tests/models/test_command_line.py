"""Complaints are one sentence that begins with the option, help tells defaults, and old spellings are taken."""

import pathlib
import re

import pytest

from models import command_line
from models.command_line import at_least, keep_files, like, listed, numbers
from models.errors import UserError, exit_on_user_error

ROOT = pathlib.Path(__file__).resolve().parents[2]


def parser():
    made = command_line.parser("scripts.nothing", "Does nothing.\n\nAt length.")
    made.add_argument("--rows", type=at_least(1), default=32, help="decoded together")
    made.add_argument("--seed", type=int, default=0, help="of draws")
    made.add_argument("--top_p", type=float, help="mass")
    made.add_argument("--budgets", type=numbers(int), default="8,16", help="sizes")
    made.add_argument("--parts", type=listed, default="a,b", help="which")
    made.add_argument("--grid", type=like(r"(\d+)x(\d+)", "WxH, such as 2x3", lambda found: tuple(map(int, found))))
    made.add_argument("--kind", choices=["text", "code"])
    made.add_argument("--policy", "--growth", help="of trees")
    made.add_argument("--write", action="store_true", help="keep it")
    made.add_argument("--out", required=True)
    return made


def test_values_and_defaults() -> None:
    args = parser().parse_args(["--out", "x", "--grid", "2x3", "--growth", "chain", "--parts", "c, d"])
    assert (args.rows, args.budgets, args.parts, args.grid) == (32, [8, 16], ["c", "d"], (2, 3))
    assert args.policy == "chain" and args.write is False
    assert parser().parse_args(["--out", "x", "--parts", ""]).parts == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--rows", "x"], "--rows must be a whole number, got 'x'"),
        (["--seed", "1.5"], "--seed must be a whole number, got '1.5'"),
        (["--top_p", "x"], "--top_p must be a number, got 'x'"),
        (["--budgets", "4,x"], "--budgets must be numbers with commas between them, got '4,x'"),
        (["--grid", "2"], "--grid must be WxH, such as 2x3, got '2'"),
        (["--kind", "chat"], "--kind cannot be 'chat': choose from"),
        (["--out", ""], "--out must not be empty"),
        (["--policy", ""], "--policy must not be empty"),
        (["--policy"], "--policy: expected one argument"),
        (["--row_s", "1"], "there is no option --row_s (did you mean '--rows'?)"),
        ([], "give --out"),
    ],
)
def test_a_complaint_is_one_sentence(words: list[str], complaint: str) -> None:
    given = words if complaint == "give --out" else ["--out", "x", *words]
    with pytest.raises(UserError) as raised:
        parser().parse_args(given)
    assert str(raised.value).startswith(complaint) and "\n" not in str(raised.value)


def test_commands_show_it_alone(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        exit_on_user_error(lambda: parser().parse_args(["--out", "x", "--rows", "0"]))()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --rows must be at least 1, got 0\n"


def test_help_tells_defaults_that_say_something(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["--help"])
    told = capsys.readouterr().out
    assert stopped.value.code == 0 and "python -m scripts.nothing" in told and "Does nothing." in told
    for line in ("decoded together (32)", "of draws (0)", "sizes (8,16)", "mass\n", "keep it\n"):
        assert line in told


def test_files_are_replaced_only_on_request(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_text("mine")
    keep_files([tmp_path / "b", None, "/dev/null", tmp_path], overwrite=False)
    keep_files([tmp_path / "a"], overwrite=True)
    with pytest.raises(UserError, match=r"a is not a directory$"):
        keep_files([tmp_path / "a" / "b" / "c"], overwrite=True)
    with pytest.raises(UserError, match=r"a already exists: give another name, or --over to replace it$"):
        keep_files([tmp_path / "b", tmp_path / "a"], overwrite=False, option="--over")


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: pathlib.Path, monkeypatch) -> None:
    # A disk may be read-only for its owner and for root, too.
    monkeypatch.setattr("models.command_line.os.access", lambda place, mode: place != tmp_path)
    with pytest.raises(UserError, match=r"c.json: nothing may be written in .*0$"):
        keep_files([tmp_path / "new" / "c.json"], overwrite=False)


def test_every_command_takes_this_parser() -> None:
    sources = [path for room in ("eval", "scripts", "train", "models") for path in (ROOT / room).rglob("*.py")]
    own = {path.relative_to(ROOT).as_posix() for path in sources if "ArgumentParser(prog" in path.read_text()}
    made = [path for path in sources if "command_line.parser(" in path.read_text()]
    assert own <= {"models/command_line.py"} and len(made) >= 11
    # The name of before is a second spelling of the same option, where there was one.
    old = {
        path.relative_to(ROOT).as_posix() for path in made if re.search(r'"--policy",\s*"--growth"', path.read_text())
    }
    assert old == {"eval/tree.py", "scripts/convert.py"}
