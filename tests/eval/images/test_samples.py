"""Files of images and statistics: what is written comes back, what is wrong is refused in one sentence."""

import pathlib

import numpy as np
import pytest

from eval.images import samples
from eval.images.samples import Gaussian, ImageFile, Statistics, write_images, write_statistics
from models.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), np.uint8)


def gaussian(width: int) -> Gaussian:
    rows = np.random.default_rng(width).normal(size=(20, width))
    return Gaussian(rows.mean(axis=0), np.cov(rows, rowvar=False))


def test_images_come_back_in_blocks(tmp_path: pathlib.Path) -> None:
    write_images(tmp_path / "a.npz", IMAGES)
    file = ImageFile(tmp_path / "a.npz")
    assert (file.shape, len(file), file.statistics) == ((7, 4, 5, 3), 7, None)
    blocks = list(file.blocks(3))
    assert [len(block) for block in blocks] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), IMAGES)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["arr_0"], IMAGES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_some_are_evenly_spread(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_BLOCK", 2)
    write_images(tmp_path / "a.npz", IMAGES)
    file = ImageFile(tmp_path / "a.npz")
    for count, chosen in ((1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (9, range(7))):
        np.testing.assert_array_equal(file.some(count), IMAGES[list(chosen)])


def test_compressed_files_are_read(tmp_path: pathlib.Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", IMAGES)
    np.testing.assert_array_equal(np.concatenate(list(ImageFile(tmp_path / "a.npz").blocks(4))), IMAGES)


@pytest.mark.parametrize("network", ["inception", "classifier:ab12"])
@pytest.mark.parametrize("spatial", [None, gaussian(3)])
@pytest.mark.parametrize("images", [None, IMAGES])
def test_statistics_come_back(tmp_path: pathlib.Path, network: str, spatial, images) -> None:
    written = Statistics(gaussian(4), spatial, network)
    write_statistics(tmp_path / "s.npz", written, images)
    file = ImageFile(tmp_path / "s.npz")
    assert file.statistics is not None and file.statistics.network == network
    np.testing.assert_array_equal(file.statistics.features.mu, written.features.mu)
    np.testing.assert_array_equal(file.statistics.features.sigma, written.features.sigma)
    assert (file.statistics.spatial is None) == (spatial is None)
    if spatial is not None and file.statistics.spatial is not None:
        np.testing.assert_array_equal(file.statistics.spatial.sigma, spatial.sigma)
    assert len(file) == (0 if images is None else 7)
    if images is None:
        with pytest.raises(UserError, match="holds statistics alone"):
            next(file.blocks(2))


def test_published_references_are_of_inception_and_single_precision(tmp_path: pathlib.Path) -> None:
    np.savez(tmp_path / "r.npz", IMAGES, mu=np.float32([1, 2]), sigma=np.eye(2, dtype=np.float32))
    statistics = ImageFile(tmp_path / "r.npz").statistics
    assert statistics is not None and statistics.network == "inception"
    assert statistics.features.mu.dtype == statistics.features.sigma.dtype == np.float64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": IMAGES.astype(np.float32)}, r"arr_0 is float32 \[7, 4, 5, 3\], expected uint8 \[N, H, W, 3\]"),
        ({"arr_0": IMAGES.transpose(0, 3, 1, 2)}, r"arr_0 is uint8 \[7, 3, 4, 5\]"),
        ({"arr_0": IMAGES[0]}, r"arr_0 is uint8 \[4, 5, 3\]"),
        ({"arr_0": IMAGES[:0]}, r"arr_0 is uint8 \[0, 4, 5, 3\]"),
        ({"arr_0": np.asfortranarray(IMAGES)}, "in Fortran order"),
        ({"images": IMAGES}, "holds images: expected images, arr_0, or statistics"),
        ({"mu": np.zeros(2)}, "holds only one of mu and sigma"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2)}, "holds only one of mu_s and sigma_s"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"shape \[2\] and a covariance of shape \[3, 3\] do not fit"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "not finite"),
        ({"mu": np.zeros(2, int), "sigma": np.eye(2)}, "mu is int64, expected floating point"),
        ({"mu": np.array([None, 1]), "sigma": np.eye(2)}, "mu is object, expected floating point"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "network": np.zeros(1)}, "network is float64, expected text"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: pathlib.Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        ImageFile(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value)


def test_damaged_files_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        ImageFile(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"text\.npz is damaged or not an \.npz file"):
        ImageFile(tmp_path / "text.npz")
    write_images(tmp_path / "a.npz", IMAGES)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[300] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        list(ImageFile(tmp_path / "a.npz").blocks(7))


def test_other_arrays_are_not_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"images are float64 \[7, 4, 5, 3\]"):
        write_images(tmp_path / "a.npz", IMAGES.astype(float))
    with pytest.raises(UserError, match="cannot write"):
        write_images(tmp_path / "none" / "a.npz", IMAGES)
    assert not list(tmp_path.iterdir())
