"""What is found below a folder, and what is left out with a count."""

import collections
import os
import pathlib

from train.data import folders
from train.data.folders import files_below, printable


def found(folder: pathlib.Path, *read: pathlib.Path) -> tuple[list[str], dict[str, int]]:
    left_out: collections.Counter[str] = collections.Counter()
    return [path.as_posix() for path in files_below(folder, left_out, read)], dict(left_out)


def make(folder: pathlib.Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_links_are_followed_and_nothing_is_read_twice(tmp_path) -> None:
    make(tmp_path, "here/b/1", "here/c/2", "store/deep/3", "store/4", "alone")
    (tmp_path / "here" / "a").symlink_to("b")  # What really lies there comes first.
    (tmp_path / "here" / "d").symlink_to("../store")
    (tmp_path / "here" / "file").symlink_to("../alone")
    (tmp_path / "here" / "back").symlink_to("..")
    (tmp_path / "store" / "up").symlink_to("../here")
    (tmp_path / "here" / "nowhere").symlink_to("../gone")
    (tmp_path / "here" / "itself").symlink_to("itself")
    names, left_out = found(tmp_path / "here")
    assert names == ["b/1", "back/alone", "back/store/4", "back/store/deep/3", "c/2", "file"]
    assert left_out == {folders.DANGLING: 2, folders.REPEATED: 4}


def test_a_link_to_what_counts_as_read_is_left_out(tmp_path) -> None:
    make(tmp_path, "class/1", "other/2")
    (tmp_path / "class" / "all").symlink_to("..")
    assert found(tmp_path / "class", tmp_path) == (["1"], {folders.REPEATED: 1})


def test_hidden_and_special_files_are_counted(tmp_path) -> None:
    make(tmp_path, "1", ".DS_Store", "a/._2", ".cache/3")
    os.mkfifo(tmp_path / "pipe")
    assert found(tmp_path) == (["1"], {folders.HIDDEN: 3, folders.SPECIAL: 1})


def test_names_can_be_shown() -> None:
    assert printable("a/é ü.png") == "a/é ü.png"
    assert printable(os.fsdecode(b"caf\xe9\n.png")) == r"caf\xe9\n.png"
