"""Images from the command line: what is written, what an edit keeps, and errors of one sentence."""

import pathlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from decoding.images.generate import Stage, Tokenizer, keep
from decoding.images.generate import generate_images as generate
from decoding.images.scales import Drawing
from eval.images.flags import drawings
from models.errors import UserError
from models.formats import image_models as files
from models.images.config import VARConfig, VQVAEConfig
from scripts import generate_images
from tests.eval.images import tiny


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.write(tmp_path_factory.mktemp("images"))


def words(folder: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    return ["--tokenizer", str(folder / "tokenizer"), "--var", str(folder / "large"), "--out", str(out), *more]


def read(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_grid_has_a_column_per_class(directories, tmp_path, capsys) -> None:
    generate_images.main(words(directories, tmp_path / "a.png", "--classes", "2,0-1", "--rows", "2", "--seed", "3"))
    assert "6 images" in capsys.readouterr().out
    pixels = read(tmp_path / "a.png")
    # Images of 8 pixels and gaps of 2, each pixel enlarged to 12 x 12.
    assert pixels.shape == (12 * 18, 12 * 28, 3)
    assert (pixels[:, 12 * 8 : 12 * 10] == 255).all()
    # The second image of the first class is the fourth of all: class 2, seed 3 + 3.
    generate_images.main(words(directories, tmp_path / "b.png", "--classes", "2,0-1", "--rows", "2", "--seed", "6"))
    np.testing.assert_array_equal(read(tmp_path / "b.png")[: 12 * 8, : 12 * 8], pixels[12 * 10 :, : 12 * 8])


def test_a_refiner_makes_the_last_scales(directories, tmp_path) -> None:
    pictures = []
    refined = ["--refiner", str(directories / "small"), "--draft_scales", "2"]
    for more in ([], refined, [*refined, "--refiner_temperature", "0,0,3"]):
        generate_images.main(
            words(directories, tmp_path / "a.png", "--classes", "1", "--temperature", "0", *more, "--overwrite")
        )
        pictures.append(read(tmp_path / "a.png"))
    assert not np.array_equal(*pictures[:2]) and not np.array_equal(*pictures[1:])


def test_a_picture_is_replaced_only_on_request(directories, tmp_path, capsys) -> None:
    (tmp_path / "a.png").write_text("mine")
    with pytest.raises(SystemExit):
        generate_images.main(words(directories, tmp_path / "a.png", "--classes", "1"))
    assert "a.png already exists: give another name, or --overwrite to replace it" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_text() == "mine"


def test_a_picture_to_edit_is_seen_as_viewers_show_it(tmp_path, capsys) -> None:
    exif, ramp = Image.Exif(), np.arange(64, dtype=np.uint8).reshape(8, 8)
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(ramp).save(tmp_path / "phone.png", exif=exif)
    np.testing.assert_array_equal(generate_images._read(tmp_path / "phone.png", 8)[..., 0], np.rot90(ramp, -1))
    assert "phone.png: turned or mirrored as their EXIF data says\n" in capsys.readouterr().err


def test_the_refiners_settings_are_the_first_models_unless_given(directories) -> None:
    given = ["--refiner", "x", "--classes", "1", "--top_k", "5", "--refiner_top_k", "7", "--temperature", "1.1,1,1"]
    args = generate_images._parser().parse_args(words(directories, pathlib.Path("a.png"), *given))
    first, refiner = drawings(args)
    assert first == Drawing(4.0, 5, 0.95, (1.1, 1.0, 1.0)) and refiner == Drawing(4.0, 7, 0.95, (1.1, 1.0, 1.0))


@pytest.mark.parametrize("flag", ["--mask", "--keep"])
def test_an_edit_makes_what_its_box_holds(flag: str, directories, tmp_path) -> None:
    given = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(given).save(tmp_path / "given.png")
    edit = ["--edit", str(tmp_path / "given.png"), flag, "0,2,4,8", "--classes", "2", "--seed", "4"]
    generate_images.main(words(directories, tmp_path / "a.png", *edit, "--temperature", "0", "--guidance", "1"))
    tokenizer = Tokenizer(*files.load(directories / "tokenizer", VQVAEConfig))
    mask = np.zeros((8, 8), bool)
    mask[2:8, 0:4] = True
    mask = mask if flag == "--mask" else ~mask
    stage = Stage(*files.load(directories / "large", VARConfig), 3, Drawing(1.0, temperature=0.0))
    made = generate(tokenizer, [stage], [2], seeds=4, kept=keep(tokenizer, given[None], mask))
    np.testing.assert_array_equal(read(tmp_path / "a.png")[::12, ::12], made.pixels[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--classes", "a"], "--classes must be numbers and ranges"),
        (["--classes", "5-3"], "--classes must be numbers and ranges"),
        (["--classes", "9"], "class 9 is not one of model 1's 0 to 2"),
        (["--classes", "1", "--draft_scales", "2"], "belong together"),
        (["--classes", "1", "--edit", "x.png"], "belong together"),
        (["--classes", "1", "--edit", "x.png", "--mask", "0,0,2,2"], "there is no image x.png"),
        (["--classes", "1", "--refiner_top_k", "5"], "there is no --refiner"),
        (["--classes", "1", "--temperature", "1,1"], "temperature has 2 entries for 3 scales"),
        (["--classes", "1", "--rows", "0"], "--rows must be at least 1"),
    ],
)
def test_what_does_not_fit_is_one_sentence(more, message, directories, tmp_path) -> None:
    with pytest.raises(UserError, match=message):
        generate_images.make(generate_images._parser().parse_args(words(directories, tmp_path / "a.png", *more)))


def test_a_temperature_is_a_number_or_several() -> None:
    with pytest.raises(UserError, match=r"--temperature must be .* one per scale separated by commas, got '1\.2\.3'"):
        generate_images._parser().parse_args(["--temperature", "1.2.3"])


def test_a_box_too_small_to_keep_anything_is_refused(directories, tmp_path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "given.png")
    edit = ["--edit", str(tmp_path / "given.png"), "--keep", "1,1,2,2", "--classes", "2"]
    args = generate_images._parser().parse_args(words(directories, tmp_path / "a.png", *edit))
    with pytest.raises(UserError, match="nothing of the image stays"):
        generate_images.make(args)


@pytest.mark.parametrize("text", ["1,2,3", "0,0,9,8", "4,0,4,8", "-1,0,4,4"])
def test_boxes_lie_within_the_image(text: str) -> None:
    with pytest.raises(UserError, match="box"):
        generate_images.box(text, 8)


def test_nowhere_to_write_is_told_before_anything_is_made(directories, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        generate_images.main(words(directories, tmp_path / "no" / "a.png", "--classes", "1"))
    assert "there is no directory" in capsys.readouterr().err
