"""What ends a command in one sentence, what ends it silently, and what keeps its traceback."""

import errno
import os
import pathlib
import sys

import pytest

from models.errors import UserError, exit_on_user_error


def ended(error: BaseException) -> int | str | None:
    """Exit status of a command that raises `error`."""

    @exit_on_user_error
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        command()
    return stopped.value.code


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("no shape 'x'"), "no shape 'x'"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full: could not write the output"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), "the disk is full: could not write a"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "cannot read or write a: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "cannot read or write a: Read-only file system"),
        (FileExistsError(errno.EEXIST, "File exists", "a"), "cannot read or write a: File exists"),
    ],
)
def test_what_a_person_can_put_right_is_one_sentence(error: BaseException, sentence: str, capsys) -> None:
    assert ended(error) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_real_files_in_the_way(tmp_path: pathlib.Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    for act, reason in (
        (tmp_path.read_text, "Is a directory"),
        ((tmp_path / "file" / "below").read_text, "Not a directory"),
        ((tmp_path / "file").mkdir, "File exists"),
    ):
        with pytest.raises(SystemExit):
            exit_on_user_error(act)()
        err = capsys.readouterr().err
        assert err.startswith(f"error: cannot read or write {tmp_path}") and err.endswith(f": {reason}\n")


@pytest.mark.parametrize(
    "error", [ValueError("ours"), OSError(errno.EIO, "Input/output error", "a"), PermissionError("of no file")]
)
def test_defects_keep_their_traceback(error: Exception) -> None:
    @exit_on_user_error
    def command() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        command()
    assert raised.value is error


def test_an_interrupt_is_said(capsys) -> None:
    assert ended(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\nstopped\n"


@pytest.mark.parametrize("flush", [True, False], ids=["while writing", "at the end"])
def test_a_reader_that_left_is_no_error(flush: bool, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))

    @exit_on_user_error
    def command() -> None:
        print("a line", flush=flush)

    with pytest.raises(SystemExit) as stopped:
        command()
    assert stopped.value.code == 141 and sys.stdout.closed
    assert capsys.readouterr().err == ""


def test_results_are_passed_on() -> None:
    assert exit_on_user_error(lambda x: x + 1)(2) == 3
