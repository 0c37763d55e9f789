"""scripts.generate streams the text that decoding gives, marks who wrote it, and says clearly what is wrong."""

import io
import json
import pathlib
import re
import shutil

import pytest

from decoding.generate import generate
from models.formats.continuation import Continuation
from models.formats.target import load_target
from models.formats.tokenizer import Tokenizer
from scripts import generate as command
from scripts.generate import RESET, TextStream
from tests.eval import tiny

PROMPT = "def f(x):"
STATISTICS = re.compile(
    r"\d+ tokens in \d+ target forwards, acceptance length \d+\.\d\d.*, [\d.]+ tokens/s, prefill .* ms"
)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("generate")
    target = tiny.write_target(folder / "target")
    return {"target": target, **tiny.write_drafters(folder, target)}


def output(capsys, *arguments: object) -> list[str]:
    command.main([str(argument) for argument in arguments])
    out = capsys.readouterr().out
    text, _, last = out.rstrip("\n").rpartition("\n")
    return [text, last]


def error(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        command.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def expected_text(directory: pathlib.Path, new_tokens: int) -> str:
    target = load_target(directory)
    made = generate(target, [target.tokenizer.encode(PROMPT)], max_new_tokens=new_tokens)
    return PROMPT + target.tokenizer.decode(made.tokens[0])


def test_streams_the_text_of_plain_decoding(directories, capsys) -> None:
    arguments = ("--target", directories["target"], "--drafter", directories["hydra"], "--max_new_tokens", 30)
    text, last = output(capsys, *arguments, "--no-color", "--prompt", PROMPT)
    assert text == expected_text(directories["target"], 30)
    assert STATISTICS.fullmatch(last)


def test_several_drafters_are_compared_with_the_first(directories, capsys) -> None:
    names = f"none,{directories['medusa']}"
    arguments = ("--target", directories["target"], "--max_new_tokens", 30, "--no-color", "--prompt", PROMPT)
    command.main([str(argument) for argument in (*arguments, "--drafter", names)])
    first, second = capsys.readouterr().out.split("\n\n" + str(directories["medusa"]))
    text = expected_text(directories["target"], 30)
    head, _, line = first.rpartition("\n")
    assert head == "none:\n" + text and STATISTICS.fullmatch(line)
    head, _, line = second.rstrip("\n").rpartition("\n")
    assert head == ":\n" + text and STATISTICS.fullmatch(line.partition(": ")[0])
    assert re.fullmatch(r"[\d.]+x as fast as none, the same text", line.partition(": ")[2])
    # Nothing is written before all of them are known.
    assert "neither a drafter directory" in error(capsys, *arguments, "--drafter", "none,nowhere")
    assert "--drafter must name at least one" in error(capsys, *arguments, "--drafter", ",")


def test_a_mesh_is_where_it_all_runs(directories, capsys) -> None:
    arguments = ("--target", directories["target"], "--drafter", directories["hydra"], "--max_new_tokens", 30)
    text, _ = output(capsys, *arguments, "--no-color", "--prompt", PROMPT, "--mesh", "tensor=1")
    assert text == expected_text(directories["target"], 30)


def test_prompt_file_and_sampling_seed(directories, capsys, tmp_path: pathlib.Path) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    arguments = ["--target", directories["target"], "--prompt_file", tmp_path / "prompt.txt", "--temperature", 1]
    first = output(capsys, *arguments, "--max_new_tokens", 12, "--seed", 1)
    assert first[0].startswith(PROMPT)
    assert output(capsys, *arguments, "--max_new_tokens", 12, "--seed", 1)[0] == first[0]
    assert output(capsys, *arguments, "--max_new_tokens", 12, "--seed", 2)[0] != first[0]


def test_typical_acceptance_is_called_lossy(directories, capsys) -> None:
    arguments = ("--target", directories["target"], "--drafter", directories["medusa"], "--typical")
    assert output(capsys, *arguments, "--prompt", PROMPT, "--max_new_tokens", 8)[1].endswith(
        "lossy (typical acceptance)"
    )


def test_stop_ends_the_text(directories, capsys) -> None:
    text = expected_text(directories["target"], 30)
    tokenizer = Tokenizer.load(directories["target"])
    target = load_target(directories["target"])
    made = generate(target, [tokenizer.encode(PROMPT)], max_new_tokens=30).tokens[0]
    stop = next(tokenizer.decode([t]) for t in made if tokenizer.encode(tokenizer.decode([t]), bos=False) == [t])
    arguments = ("--target", directories["target"], "--prompt", PROMPT, "--max_new_tokens", 30, "--stop", stop)
    shorter = output(capsys, *arguments)[0]
    assert shorter.endswith(stop) and text.startswith(shorter) and len(shorter) < len(text)


def test_colours_tell_drafts_from_the_target() -> None:
    tokenizer = Tokenizer.train(["hello world\n"] * 9, 300)
    tokens = tokenizer.encode("hello world\nhello", bos=False)
    plain, coloured = io.StringIO(), io.StringIO()
    for out, color in ((plain, False), (coloured, True)):
        stream = TextStream(Continuation(tokenizer), out, color, opening="> ")
        stream(0, tokens[:1], [0])
        stream(0, tokens[1:], list(range(1, len(tokens))))
        stream.finish()
    assert plain.getvalue() == "> hello world\nhello\n"
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured.getvalue()) == plain.getvalue()
    assert coloured.getvalue().count(RESET) >= 1
    head = coloured.getvalue().split("\x1b")[0]
    assert head.startswith("> ") and tokenizer.decode(tokens[:1]) in head
    assert "\x1b[38" not in plain.getvalue()


def test_characters_of_several_tokens_come_whole() -> None:
    tokenizer = Tokenizer.train(["abc"], 258)
    out = io.StringIO()
    stream = TextStream(Continuation(tokenizer), out, color=False)
    for token in tokenizer.encode("é€", bos=False):
        stream(0, [token], [0])
        assert "\ufffd" not in out.getvalue()
    stream.finish()
    assert out.getvalue() == "é€\n"


def test_errors(directories, capsys, tmp_path: pathlib.Path) -> None:
    target = ("--target", directories["target"])
    prompt = ("--prompt", PROMPT)
    assert "there is no config.json" in error(capsys, "--target", tmp_path / "nowhere", *prompt)
    assert "neither a drafter directory" in error(capsys, *target, *prompt, "--drafter", tmp_path / "nowhere")
    assert "--prompt must not be empty" in error(capsys, *target, "--prompt", "")
    assert "there is no nowhere.txt in" in error(capsys, *target, "--prompt_file", tmp_path / "nowhere.txt")
    assert "top_p must be" in error(capsys, *target, *prompt, "--top_p", 2)
    assert "--max_new_tokens must be" in error(capsys, *target, *prompt, "--max_new_tokens", 0)
    assert "context of 512" in error(capsys, *target, *prompt, "--max_new_tokens", 600)
    assert "--stop must not be empty" in error(capsys, *target, *prompt, "--stop", "")
    assert "no chat template" in error(capsys, *target, *prompt, "--chat")
    bare = tmp_path / "bare"
    shutil.copytree(directories["target"], bare)
    (bare / "tokenizer.json").unlink()
    assert "has no tokenizer" in error(capsys, "--target", bare, *prompt)


def test_heads_of_another_base_are_refused(directories, capsys, tmp_path: pathlib.Path) -> None:
    other = tiny.write_target(tmp_path / "other", seed=1)
    message = error(capsys, "--target", other, "--prompt", PROMPT, "--drafter", directories["hydra"])
    assert "was made for another target" in message and "embedding hash" in message
    wrong = tmp_path / "wrong"
    shutil.copytree(directories["hydra"], wrong)
    record = json.loads((wrong / "drafter.json").read_text())
    record["base"]["tokenizer"] = "0" * 16
    (wrong / "drafter.json").write_text(json.dumps(record))
    message = error(capsys, "--target", directories["target"], "--prompt", PROMPT, "--drafter", wrong)
    assert "tokenizer hash" in message
