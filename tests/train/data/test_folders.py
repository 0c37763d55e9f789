"""Folders: links are followed once, hidden files are told apart, patterns are pathlib's."""

import os
from pathlib import Path

import pytest

from models.errors import UserError
from train.data.folders import Glob, files, is_hidden


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_links_are_followed_once(tmp_path):
    write(tmp_path, "src/b/one.py", "store/lib/two.py", "store/lib/deep/three.py")
    src = tmp_path / "src"
    (src / "a").symlink_to(tmp_path / "store" / "lib")
    (src / "again").symlink_to(tmp_path / "store" / "lib" / "deep")
    (src / "b" / "up").symlink_to(src)
    (src / "file.py").symlink_to(tmp_path / "store" / "lib" / "two.py")
    (src / "nowhere").symlink_to("gone")
    (src / "self").symlink_to("self")
    (tmp_path / "store" / "lib" / "back").symlink_to(src)
    os.mkfifo(src / "pipe")
    found = files(src)
    assert [one.path for one in found] == sorted(one.path for one in found)
    read = [one.path.as_posix() for one in found if not one.left_out]
    assert sorted(read) == ["a/deep/three.py", "a/two.py", "b/one.py", "file.py"]
    left = {one.path.as_posix(): one.left_out for one in found if one.left_out}
    circle = "links to folders that are read already"
    assert left == {
        "again": circle,
        "b/up": circle,
        "a/back": circle,
        "nowhere": "links that lead nowhere",
        "self": "links that lead nowhere",
        "pipe": "things that are no files",
    }


@pytest.mark.parametrize(
    "pattern", ["**/*", "**/*.py", "*.py", "a/**/*.py", "**/a/*", "**/**/*.py", "*/*.[pt]*", "./*"]
)
def test_patterns_are_pathlibs(tmp_path, pattern):
    write(tmp_path, "x.py", "a/x.py", "a/b/x.py", "a/b/c/x.txt", "b/a/y.PY", "a/a/a/x.py")
    found = {one.path for one in files(tmp_path) if Glob(pattern).matches(one.path)}
    assert found == {path.relative_to(tmp_path) for path in tmp_path.glob(pattern) if path.is_file()}


def test_patterns_that_cannot_be():
    for pattern in ("", "/**/*.py", "../*", "a/../b"):
        with pytest.raises(UserError, match="must be relative"):
            Glob(pattern)
    assert Glob(".github/**/*").names_hidden() and not Glob("**/*.py").names_hidden()
    assert Glob("a/**").matches(Path("a/b/c"))
    assert is_hidden(Path(".git/config")) and is_hidden(Path("a/._x")) and not is_hidden(Path("a/b.c"))
