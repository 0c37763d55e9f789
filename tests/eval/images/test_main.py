"""The image benchmark from end to end: files, numbers that can be recomputed, and errors of one sentence."""

import html.parser
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from decoding.images.generate import code_stages, generate_images
from decoding.images.scales import Drawing
from eval.images import main
from eval.images.contenders import Model, load_tokenizer
from eval.images.features import load_classifier
from eval.images.metrics import describe, frechet_distance, open_images
from eval.images.samples import ImageFile, write_images
from models.errors import UserError
from scripts import build_dataset
from train.data.images import open_images as open_split

pytestmark = pytest.mark.usefixtures("structs_may_hold_shapes")


def arguments(folder: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    names = {"tokenizer": "tokenizer", "var": "large", "data": "data", "features": "classifier"}
    given = [word for flag, name in names.items() for word in (f"--{flag}", str(folder / name))]
    sizes = ["--images", "10", "--batch_size", "4", "--top_k", "6", "--grid", "2x3"]
    return [*given, *sizes, "--out", str(out), *more]


@pytest.fixture(scope="module")
def out(image_directories, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("out") / "results"
    small, tuned = (str(image_directories / name) for name in ("small", "tuned"))
    pairs = ["--refiner", small, "--draft_scales", "2", "--refiners", f"2={tuned}"]
    main.main(arguments(image_directories, folder, *pairs, "--seed", "5"))
    return folder


@pytest.fixture(scope="module")
def results(out) -> dict:
    return json.loads((out / "results.json").read_text())


def test_everybody_takes_part_in_order(results, out) -> None:
    told = [(run["name"], run["kind"], run["draft_scales"], run["makers"]) for run in results["runs"]]
    d, r = "drafter", "refiner"
    assert told == [
        ("VAR", "alone", 3, [d, d, d]),
        ("CoDe N=2", "training-free", 2, [d, d, r]),
        ("CoDe N=2 fine-tuned", "fine-tuned", 2, [d, d, r]),
        ("refiner alone", "alone", 0, [r, r, r]),
    ]
    names = {"results.json", "report.html", "samples.png", "samples"}
    assert {path.name for path in out.iterdir()} == names
    assert len(list((out / "samples").iterdir())) == 4
    assert results["command"] and results["environment"]["jax"] and results["config"]["seed"] == 5


def test_samples_are_what_generation_makes(results, out, image_directories) -> None:
    """The last batch is a full one of which two images count; image i has class i mod 3 and seed 5 + i."""
    tokenizer = load_tokenizer(image_directories / "tokenizer")
    large, tuned = (Model.load(image_directories / name) for name in ("large", "tuned"))
    drawing = Drawing(1.5, 6, 0.96, 1.0)
    stages = code_stages((large.config, large.params), (tuned.config, tuned.params), 2, drawing, drawing)
    wanted = generate_images(tokenizer, stages, [i % 3 for i in range(10)], seeds=5).pixels
    (found,) = ImageFile(out / "samples" / "code-n2-fine-tuned.npz").blocks(10)
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    with Image.open(out / "samples.png") as picture:
        # Two classes by three images: the data's own and those of four contenders.
        assert picture.size == (2 * 8 + 2, 5 * 3 * 10 - 2)


def test_metrics_are_those_of_the_files(results, out, image_directories, tmp_path) -> None:
    extractor = load_classifier(image_directories / "classifier")
    train = open_split(image_directories / "data", "train")
    write_images(tmp_path / "train.npz", np.stack([train[i]["image"] for i in range(len(train))]))
    reference = describe(open_images(tmp_path / "train.npz", extractor), extractor, 8)
    for run, name in zip(results["runs"][:2], ("var", "code-n2"), strict=True):
        samples = describe(open_images(out / "samples" / f"{name}.npz", extractor), extractor, 8)
        distance = frechet_distance(samples.statistics.features, reference.statistics.features)
        assert run["metrics"]["classifier_frechet"] == pytest.approx(distance, rel=1e-3)
        assert samples.extracted is not None
        agreement = np.mean(samples.extracted.probabilities.argmax(1) == np.arange(10) % 3)
        assert run["metrics"]["classifier_agreement"] == pytest.approx(agreement)
    assert results["network"] == extractor.network and "fid" not in json.dumps(results).lower()
    assert list(results["bounds"]) == ["held-out images", "reconstructions"]
    assert all("classifier_frechet" in metrics for metrics in results["bounds"].values())


def test_speed_and_memory_hold_together(results) -> None:
    alone = results["runs"][0]
    assert alone["speedup"] == 1 and alone["end_to_end_speedup"] == 1
    for run in results["runs"]:
        assert len(run["images_per_second_repeats"]) == 3
        assert run["images_per_second"] == pytest.approx(np.median(run["images_per_second_repeats"]))
        assert run["end_to_end_images_per_second"] < run["images_per_second"]
        memory = run["memory"]
        assert len(memory["stages"]) == len(set(run["makers"])) == len(run["stage_seconds"])
        assert memory["peak"]["total"] == memory["peak"]["parameters"] + memory["peak"]["working"]
        for stage in memory["stages"]:
            assert stage["total"] == stage["arguments"] + stage["temporaries"] + stage["outputs"]
            assert stage["temporaries"] >= stage["cache"] > 0 and stage["arguments"] >= stage["parameters"] > 0
    # Two branches, four images, 4 bytes for keys and for values.
    wanted = {"VAR": [2 * 21 * 16], "CoDe N=2": [2 * 5 * 16, 21 * 8], "refiner alone": [21 * 8]}
    for run in results["runs"]:
        if run["name"] in wanted:
            assert [stage["cache"] for stage in run["memory"]["stages"]] == [64 * n for n in wanted[run["name"]]]


def test_page_holds_the_numbers_and_nothing_from_outside(results, out) -> None:
    source = (out / "report.html").read_text()
    sources: list[str] = []

    class Page(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "link", "iframe")
            sources.extend(value or "" for name, value in attrs if name in ("src", "href"))

    Page().feed(source)
    assert sources and all(value.startswith("data:image/png;base64,") for value in sources)
    for run in results["runs"]:
        assert f"{run['metrics']['classifier_frechet']:.3f}" in source and f"{run['speedup']:.2f}x" in source


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--draft_scales", "1"], "which model shall refine after 1 scales"),
        (["--refiner", "SMALL", "--draft_scales", "3"], "draft_scales must be 1 to 2 of 3 scales, got 3"),
        (["--refiner", "tokenizer"], "kind 'vqvae', expected 'var'"),
        (["--split", "nothing"], "nothing"),
        (["--reference_images", "1"], "at least 2 images"),
    ],
)
def test_what_does_not_fit_is_one_sentence(more, message, image_directories, tmp_path) -> None:
    places = {"SMALL": str(image_directories / "small"), "tokenizer": str(image_directories / "tokenizer")}
    given = arguments(image_directories, tmp_path / "out", *(places.get(word, word) for word in more))
    with pytest.raises(UserError, match=message):
        main.run(main._parser().parse_args(given))


@pytest.mark.parametrize("flag", [["--grid", "2"], ["--refiners", "small"], ["--draft_scales", "a"], ["--images", "0"]])
def test_flags_tell_what_they_expect(flag, image_directories, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main.main(arguments(image_directories, tmp_path, *flag))
    assert capsys.readouterr().err.startswith(f"error: {flag[0]} must be ")


def test_classes_of_models_and_data_agree(image_directories, tmp_path) -> None:
    glyphs = ["--images", "glyphs", "--size", "8", "--characters", "AB", "--max_documents", "8"]
    build_dataset.main([*glyphs, "--valid_documents", "2", "--out", str(tmp_path / "two")])
    words = [*arguments(image_directories, tmp_path / "out"), "--data", str(tmp_path / "two")]
    with pytest.raises(UserError, match="makes 3 classes, the data set has 2"):
        main.run(main._parser().parse_args(words))
