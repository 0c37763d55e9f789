"""From folders, `.npz` files and glyphs to data sets, through the command; what is refused."""

import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from models.errors import UserError
from scripts import build_dataset
from train.data.building import check_out
from train.data.glyphs import glyph
from train.data.image_building import class_order, read_folder
from train.data.images import Images, open_images

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 0, 1], np.uint8)


def run(*arguments) -> None:
    build_dataset.main([str(argument) for argument in arguments])


def fails(capsys, *arguments) -> str:
    """Runs a command that must fail, and returns its one line on stderr."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def contents(images: Images) -> list[tuple[int, int]]:
    """Brightness and class of each image."""
    return [(int(images[i]["image"].mean()), int(images[i]["label"])) for i in range(len(images))]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    colours = {"cats/b.png": 10, "cats/deep/a.PNG": 20, "dogs/c.jpg": 200, "lonely.png": 90, "dogs/notes.txt": None}
    for name, colour in colours.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if colour is None:
            path.write_text("no image")
        else:
            Image.new("RGB", (12, 9), (colour,) * 3).save(path)
    (tmp_path / "src" / "empty").mkdir()
    return tmp_path / "src"


def test_folder(folder, tmp_path, capsys) -> None:
    run("--images", folder, "--size", 8, "--out", tmp_path / "out")
    images = open_images(tmp_path / "out", "train")
    assert (images.size, images.classes) == (8, ("cats", "dogs"))
    assert contents(images) == [(10, 0), (20, 0), (200, 1)]
    assert images.manifest == {
        "kind": "images",
        "source": {"images": str(folder)},
        "size": 8,
        "classes": ["cats", "dogs"],
        "splits": {"train": {"images": 3, "per_class": [2, 1]}},
        "left_out": {
            "files that are no images (.txt)": 1,
            "class folders without an image": 1,
            "images beside the class folders": 1,
        },
        "changes": {},
    }
    said = capsys.readouterr().out
    assert "out: train 3 images of 8x8, 2 classes\nclasses: 0 cats, 1 dogs\nleft out: " in said
    assert "files that are no images (.txt) (1), images beside the class folders (1), class" in said


def test_what_is_changed_or_left_out_is_counted_and_told(folder, tmp_path, capsys) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(folder / "cats" / "clear.png")
    Image.fromarray(np.full((8, 8), 30 * 257, np.uint16)).save(folder / "cats" / "deep.png")
    run("--images", folder, "--size", 8, "--max_documents", 4, "--out", tmp_path / "out")
    images = open_images(tmp_path / "out", "train")
    assert contents(images) == [(10, 0), (255, 0), (20, 0), (30, 0)]
    assert images.manifest["left_out"]["beyond --max_documents"] == 1
    assert images.manifest["changes"] == {"transparent parts became white": 1, "16 bits of grey scaled to 8": 1}
    assert "beyond --max_documents (1)\nchanged: transparent parts became white (1), 16 bits" in capsys.readouterr().out


def test_classes_that_are_numbers_are_in_their_order(tmp_path, capsys) -> None:
    for name in ("10", "9", "2"):
        (tmp_path / "src" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (int(name),) * 3).save(tmp_path / "src" / name / "a.png")
    run("--images", tmp_path / "src", "--size", 8, "--out", tmp_path / "out")
    images = open_images(tmp_path / "out", "train")
    assert images.classes == ("2", "9", "10") and contents(images) == [(10, 2), (2, 0), (9, 1)]
    assert "classes: 0 2, 1 9, 2 10\n" in capsys.readouterr().out
    assert class_order(["1.5", "-2", "1e3"]) == ["-2", "1.5", "1e3"] and class_order(["1.5", "-2"]) == ["-2", "1.5"]


def test_names_that_are_no_text_are_escaped(tmp_path) -> None:
    (tmp_path / "src" / "a\nb").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(os.fsencode(tmp_path / "src" / "a\nb") + b"/caf\xe9.png")
    run("--images", tmp_path / "src", "--size", 8, "--out", tmp_path / "out")
    assert open_images(tmp_path / "out", "train").classes == (r"a\nb",)
    assert read_folder(tmp_path / "src", 8).names == [r"a\nb/caf\xe9.png"]
    with pytest.raises(UserError, match=r"xe9 is no name that is UTF-8: give one that is"):
        check_out(pathlib.Path(os.fsdecode(b"caf\xe9")), overwrite=False)


def test_folder_with_a_broken_image(folder, tmp_path, capsys) -> None:
    (folder / "dogs" / "d.png").write_bytes(b"no image")
    line = fails(capsys, "--images", folder, "--size", 8, "--out", tmp_path / "out")
    assert f"{folder}/dogs/d.png cannot be read as an image" in line
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_npz(tmp_path) -> None:
    source = tmp_path / "a.npz"
    np.savez(source, images=PIXELS, group=LABELS, group_names=["x", "y z", "ü", "unused"])
    run("--images", source, "--label", "group", "--valid_documents", 2, "--out", tmp_path / "out")
    train, valid = (open_images(tmp_path / "out", split) for split in ("train", "valid"))
    assert (len(train), len(valid), train.size) == (7, 2, 8) and train.classes == ("x", "y z", "ü", "unused")
    stored = [images[i] for images in (train, valid) for i in range(len(images))]
    found = {image["image"].tobytes(): int(image["label"]) for image in stored}
    assert found == {image.tobytes(): int(label) for image, label in zip(PIXELS, LABELS, strict=True)}
    assert sum(train.manifest["splits"]["train"]["per_class"]) == 7
    run("--images", source, "--label", "group", "--size", 4, "--out", tmp_path / "small")
    assert open_images(tmp_path / "small", "train")[0]["image"].shape == (4, 4, 3)


def test_glyphs(tmp_path) -> None:
    run("--images", "glyphs", "--max_documents", 8, "--characters", "AB7", "--seed", 5, "--out", tmp_path / "out")
    images = open_images(tmp_path / "out", "train")
    assert len(images) == 8 and images.classes == ("A", "B", "7")
    for index in (0, 4, 7):
        np.testing.assert_array_equal(images[index]["image"], glyph(index, 5, 32, "AB7"))
        assert images[index]["label"] == index % 3
    assert images.manifest["source"] == {"images": "glyphs", "seed": 5, "characters": "AB7", "max_documents": 8}


def test_a_set_is_replaced_only_on_request(tmp_path, capsys) -> None:
    command = ["--images", "glyphs", "--out", tmp_path / "out", "--max_documents"]
    run(*command, 3)
    assert "already holds a data set" in fails(capsys, *command, 4)
    run(*command, 4, "--overwrite")
    assert len(open_images(tmp_path / "out", "train")) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": PIXELS}, "has no array 'labels'; it holds images"),
        (
            {"images": PIXELS, "labels": LABELS + np.int64(10**12)},
            "labels goes up to 10000000000.., but",
        ),
        ({"pictures": PIXELS, "labels": LABELS}, "has no array 'images'"),
        (
            {"images": PIXELS / 255, "labels": LABELS},
            r"images is float64 \[9, 8, 8, 3\], expected uint8 \[N, H, W, 3\]",
        ),
        ({"images": PIXELS[..., 0], "labels": LABELS}, r"images is uint8 \[9, 8, 8\]"),
        ({"images": PIXELS, "labels": LABELS[:4]}, r"labels is uint8 \[4\], expected 9 whole numbers"),
        ({"images": PIXELS, "labels": LABELS / 2}, r"labels is float64 \[9\], expected 9 whole numbers"),
        ({"images": PIXELS, "labels": LABELS, "labels_names": ["a", "b"]}, "holds 2 names, labels goes up to 2"),
        ({"images": PIXELS, "labels": LABELS, "labels_names": ["a", "b", "a"]}, "holds a name twice"),
    ],
)
def test_bad_npz(tmp_path, capsys, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    line = fails(capsys, "--images", tmp_path / "a.npz", "--out", tmp_path / "out")
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --kind and --src for text, or --images for images"),
        (["--kind", "text"], "give --kind and --src for text, or --images for images"),
        (["--images", "glyphs", "--kind", "text"], "--kind, --src and --valid_src have no meaning"),
        (
            ["--images", "nowhere", "--size", 8],
            "nowhere does not exist: expected a folder with a folder of images per class",
        ),
        (["--images", "nowhere"], "--size is needed for a folder"),
        (["--images", "nowhere.npz"], "no file nowhere.npz"),
        (["--images", "glyphs", "--size", 0], "--size must be from 1 to 8192, got 0"),
        (["--images", "glyphs", "--size", 4], "at least 8 pixels"),
        (["--images", "glyphs", "--characters", "AA"], "different ones"),
        (["--images", "glyphs", "--max_documents", 0], "max_documents must be at least 1"),
    ],
)
def test_bad_options(tmp_path, capsys, arguments: list, message: str) -> None:
    assert message in fails(capsys, *arguments, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_damaged_and_empty_sources(tmp_path, capsys) -> None:
    (tmp_path / "a.npz").write_text("no archive")
    (tmp_path / "src").mkdir()
    out = ["--size", 8, "--out", tmp_path / "out"]
    assert "is damaged or not an .npz file" in fails(capsys, "--images", tmp_path / "a.npz", *out)
    (tmp_path / "a.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "a.npz is a Git LFS pointer" in fails(capsys, "--images", tmp_path / "a.npz", *out)
    np.savez_compressed(tmp_path / "whole.npz", images=PIXELS, labels=LABELS)
    whole = (tmp_path / "whole.npz").read_bytes()
    for content in (whole[:900], whole[:200] + b"x" * 30 + whole[230:], whole[:-8], b""):
        (tmp_path / "a.npz").write_bytes(content)
        assert "is damaged or not an .npz file" in fails(capsys, "--images", tmp_path / "a.npz", *out)
    assert "expected one folder per class" in fails(capsys, "--images", tmp_path / "src", *out)
