"""The image report shows what the results hold, escapes it, needs nothing from outside, claims what was measured."""

import base64
import io
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.images.pictures import png, tiled
from eval.report.images import Pictures, champion, print_table, write_report
from models.errors import UserError
from tests.eval.report.page import Page

SCALES = 3


def run(name: str, kind: str, n: int, speedup: float, distance: float) -> dict[str, Any]:
    sizes = {"parameters": 2**20, "arguments": 2**21, "temporaries": 2**22, "outputs": 2**19, "total": 2**23}
    return {
        "name": name,
        "kind": kind,
        "draft_scales": n,
        "makers": ["drafter"] * n + ["refiner"] * (SCALES - n),
        "images_per_second": 10 * speedup,
        "images_per_second_repeats": [9 * speedup, 10 * speedup, 12 * speedup],
        "end_to_end_images_per_second": 5 * speedup,
        "speedup": speedup,
        "end_to_end_speedup": speedup * 0.9,
        "metrics": {"classifier_frechet": distance, "classifier_score": 3.25},
        "memory": {
            "batch": 4,
            "stages": [{"role": "drafter", "cache": 3 * 2**18, **sizes}],
            "decoder": sizes,
            "peak": {"parameters": 2**20, "working": 2**20 * (n + 1), "total": 2**22, "cache": 2**19},
        },
    }


def results() -> dict[str, Any]:
    return {
        "environment": {"python": "3.11.9", "device": "cpu", "date": "2025-01-01T00:00:00+00:00"},
        "command": "python -m eval.images.main --tokenizer a",
        "config": {"images": 10},
        "network": "classifier:0123",
        "tokenizer": {"path": "runs/vqvae", "parameters": 1_234_567},
        "models": {"runs/var": {"path": "runs/var", "depth": 8}},
        "data": {"path": "data/glyphs"},
        "bounds": {"held-out images": {"classifier_frechet": 0.625, "classifier_score": 3.5}},
        "notes": ["samples: few"],
        "runs": [
            run("VAR", "alone", 3, 1.0, 10.0),
            run("CoDe N=2", "training-free", 2, 1.5, 10.9),
            run("CoDe N=2 fine-tuned", "fine-tuned", 2, 1.4, 10.1),
            run("CoDe N=1", "training-free", 1, 2.5, 14.0),
            run("refiner alone", "alone", 0, 3.0, 20.0),
        ],
    }


def pictures(names: list[str]) -> Pictures:
    rng = np.random.default_rng(0)

    def images(count: int) -> np.ndarray:
        return rng.integers(0, 256, (count, 4, 4, 3), np.uint8)

    build_ups = {name: images(SCALES) for name in names}
    return Pictures(["A", "B"], {name: images(6) for name in names}, images(6), build_ups)


def write(content: dict[str, Any], tmp_path: pathlib.Path, shown: Pictures | None = None) -> str:
    write_report(content, tmp_path / "report.html", shown or pictures([run["name"] for run in content["runs"]]))
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_is_well_formed_and_self_contained(tmp_path: pathlib.Path) -> None:
    source = write(results(), tmp_path)
    page = Page(source)
    assert page.tags.count("svg") == 5  # speed, quality against speed, memory, two metrics
    assert page.tags.count("img") == 1 + 5 + 5 * SCALES
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    outside = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(value.startswith("data:image/png;base64,") for value in outside)
    assert "url(" not in source and "@import" not in source and "nan" not in re.findall(r"[\w]+", source.lower())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_numbers_reach_the_page(tmp_path: pathlib.Path) -> None:
    text = re.sub(r"\s+", " ", " ".join(Page(write(results(), tmp_path)).texts))
    claim = "CoDe N=2 makes images 1.50x as fast as VAR alone, at a classifier frechet distance of 10.90 instead of 10"
    for expected in (claim, "10.900", "2.50x", "0.625", "1,234,567", "75%", "samples: few", "classifier:0123"):
        assert expected in text
    assert "training-free, scales by the larger model, N 1: 14" in text
    assert "fine-tuned, scales by the larger model, N 2: 10.1" in text


def test_headline_is_the_fastest_of_those_as_good() -> None:
    runs = results()["runs"]
    best = champion(runs)
    assert best is not None and best["name"] == "CoDe N=2"
    for pair in runs[1:3]:
        pair["metrics"]["classifier_frechet"] += 5
    best = champion(runs)
    assert best is not None and best["name"] == "CoDe N=1"
    assert champion(runs[:1]) is None


def test_frames_tell_who_made_a_scale(tmp_path: pathlib.Path) -> None:
    source = write(results(), tmp_path)
    for name, makers in (("VAR", "ddd"), ("CoDe N=2", "ddr"), ("refiner alone", "rrr")):
        row = re.search(rf"<tr><td>{name}</td>(<td><img.*?)</tr>", source, re.DOTALL)
        assert row is not None
        assert "".join(name[0] for name in re.findall(r'<img class="(\w+)"', row.group(1))) == makers


def test_pictures_are_kept_pixel_for_pixel(tmp_path: pathlib.Path) -> None:
    shown = pictures(["VAR"])
    source = write({**results(), "runs": results()["runs"][:1]}, tmp_path, shown)
    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', source)
    with Image.open(io.BytesIO(base64.b64decode(uris[1]))) as grid:
        np.testing.assert_array_equal(np.asarray(grid), tiled(shown.grids["VAR"], 2))
    with Image.open(io.BytesIO(base64.b64decode(uris[2]))) as first:
        np.testing.assert_array_equal(np.asarray(first), shown.build_ups["VAR"][0])


def test_tiles_lie_row_by_row() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    page = tiled(images, 2, gap=1, enlarged=2)
    assert page.shape == (2 * (3 * 3 - 1), 2 * (2 * 4 - 1), 3)
    small = page[::2, ::2, 0]
    assert small[:2, :3].tolist() == [[0] * 3] * 2 and small[3:5, 4:].tolist() == [[3] * 3] * 2
    assert (small[6:, 4:] == 255).all() and (small[2] == 255).all() and (small[:, 3] == 255).all()
    with Image.open(io.BytesIO(png(page))) as read:
        np.testing.assert_array_equal(np.asarray(read), page)


def test_every_text_is_escaped(tmp_path: pathlib.Path) -> None:
    evil = "<script>alert('&\"')</script>"
    content = results()
    content["runs"][1]["name"] = evil
    content |= {"command": evil, "config": {evil: evil}, "network": evil, "notes": [evil], "data": {evil: evil}}
    shown = pictures([run["name"] for run in content["runs"]])
    page = Page(write(content, tmp_path, Pictures([evil, "B"], shown.grids, shown.real, shown.build_ups)))
    assert "script" not in page.tags
    assert "".join(page.texts).count(evil) >= 8


@pytest.mark.parametrize("key", ["environment", "command", "config", "tokenizer", "models", "data", "bounds", "notes"])
def test_top_level_keys_are_optional(key: str, tmp_path: pathlib.Path) -> None:
    content = results()
    del content[key]
    Page(write(content, tmp_path))


def test_one_run_makes_a_page(tmp_path: pathlib.Path) -> None:
    assert "VAR makes 10.0 images per second" in write({**results(), "runs": results()["runs"][:1]}, tmp_path)
    with pytest.raises(UserError, match="at least one run"):
        write({**results(), "runs": []}, tmp_path, pictures([]))


def test_table_is_aligned() -> None:
    out = io.StringIO()
    print_table(results(), file=out)
    lines = out.getvalue().splitlines()
    assert [re.split(r"\s{2,}", line)[0] for line in lines[2:]] == [
        *("VAR", "CoDe N=2", "CoDe N=2 fine-tuned", "CoDe N=1", "refiner alone", "held-out images")
    ]
    end = lines[0].index("speed-up") + len("speed-up")
    assert [line[end - 5 : end] for line in lines[2:4]] == ["1.00x", "1.50x"]
