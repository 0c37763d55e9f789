"""Files of images and of their statistics, as ADM's evaluation suite exchanges them (Dhariwal & Nichol 2021).

An `.npz` may hold images, `arr_0` (uint8 [N, H, W, 3]), statistics of their Inception features, `mu` and `sigma` of
`pool_3`, `mu_s` and `sigma_s` of the spatial ones, or both: the published references hold statistics of a whole
training set beside 10,000 of its images. 50,000 images of 256x256 are 10 GB, so images are read in blocks.

Statistics of another network than Inception carry its name in `network`, which keeps anybody from mixing the two up.
"""

import contextlib
import dataclasses
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from models import processes
from models.errors import UserError

INCEPTION = "inception"  # What statistics that name no network come from.
_IMAGES = "arr_0"
_BLOCK = 256  # Images read at a time.
_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


def evenly(count: int, total: int) -> list[int]:
    """`count` of the numbers 0 to `total - 1`, evenly spread, or all if there are fewer."""
    return np.linspace(0, total, min(count, total), endpoint=False).astype(int).tolist()


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean and unbiased covariance of features, float64.

    Raises `UserError` if the shapes do not fit together or a number is not finite.
    """

    mu: Float[np.ndarray, "F"]
    sigma: Float[np.ndarray, "F F"]

    def __post_init__(self):
        if self.mu.ndim != 1 or self.sigma.shape != self.mu.shape * 2:
            raise UserError(
                f"a mean of shape {list(self.mu.shape)} and a covariance of shape {list(self.sigma.shape)} do not fit "
                "together: expected [F] and [F, F]"
            )
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise UserError("a mean or covariance holds numbers that are not finite")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the Fréchet distances compare.

    Attributes:
      features: of the features of whole images.
      spatial: of the spatial features; None where the network has none, or the file does not tell.
      network: which network's, `INCEPTION` or a name that tells its weights too.
    """

    features: Gaussian
    spatial: Gaussian | None
    network: str


class ImageFile:
    """Images and statistics of one `.npz`; the file is opened only to be read.

    Attributes:
      path: where it lies.
      shape: of its images, (N, H, W, 3), or None if it holds statistics alone.
      statistics: or None if it holds images alone.
    """

    def __init__(self, path: str | Path):
        """Raises `UserError` if there is no such file, or what it holds is not as above."""
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"there is no file {path}")
        with self._archive() as archive:
            members = {name.removesuffix(".npy") for name in archive.namelist()}
            if not members & {_IMAGES, "mu"}:
                found = ", ".join(sorted(members)) or "nothing"
                raise UserError(f"{path} holds {found}: expected images, {_IMAGES}, or statistics, mu and sigma")
            self.shape = self._image_shape(archive) if _IMAGES in members else None
            self.statistics = self._statistics(archive, members) if "mu" in members else None

    def __len__(self) -> int:
        """The number of images."""
        return self.shape[0] if self.shape else 0

    def blocks(self, size: int) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        """The images in their order, `size` at a time; the last block may be smaller."""
        if self.shape is None:
            raise UserError(f"{self.path} holds statistics alone: expected images, {_IMAGES}")
        with self._archive() as archive, archive.open(f"{_IMAGES}.npy") as file:
            _header(file)
            pixels = int(np.prod(self.shape[1:]))
            for start in range(0, len(self), size):
                count = min(size, len(self) - start)
                content = file.read(count * pixels)
                if len(content) != count * pixels:
                    raise UserError(f"{self.path} is damaged: {_IMAGES} ends early")
                yield np.frombuffer(content, np.uint8).reshape(count, *self.shape[1:])

    def some(self, count: int) -> UInt8[np.ndarray, "N H W 3"]:
        """`count` of the images, evenly spread, or all if there are fewer."""
        chosen, parts, start = np.array(evenly(count, len(self)), int), [], 0
        for block in self.blocks(_BLOCK):
            parts.append(block[chosen[(start <= chosen) & (chosen < start + len(block))] - start])
            start += len(block)
        return np.concatenate(parts)

    @contextlib.contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self.path} is damaged or not an .npz file: {error}") from None

    def _image_shape(self, archive: zipfile.ZipFile) -> tuple[int, int, int, int]:
        with archive.open(f"{_IMAGES}.npy") as file:
            shape, fortran, dtype = self._checked_header(file, _IMAGES)
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3 or 0 in shape:
            order = " in Fortran order" if fortran else ""
            raise UserError(
                f"{self.path}: {_IMAGES} is {dtype} {list(shape)}{order}, expected uint8 [N, H, W, 3] with values of "
                "0 to 255"
            )
        return shape

    def _statistics(self, archive: zipfile.ZipFile, members: set[str]) -> Statistics:
        arrays = {name: self._array(archive, name) for name in _STATISTICS if name in members}
        for mean, covariance in (_STATISTICS[:2], _STATISTICS[2:]):
            if (mean in arrays) != (covariance in arrays):
                raise UserError(f"{self.path} holds only one of {mean} and {covariance}")
        network = str(self._array(archive, "network", text=True)) if "network" in members else INCEPTION
        try:
            spatial = Gaussian(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None
            return Statistics(Gaussian(arrays["mu"], arrays["sigma"]), spatial, network)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    def _array(self, archive: zipfile.ZipFile, name: str, text: bool = False) -> np.ndarray:
        with archive.open(f"{name}.npy") as file:
            _, _, dtype = self._checked_header(file, name)
        if dtype.kind != ("U" if text else "f"):
            raise UserError(f"{self.path}: {name} is {dtype}, expected {'text' if text else 'floating point'}")
        with archive.open(f"{name}.npy") as file:
            try:
                array = np.lib.format.read_array(file, allow_pickle=False)
            except ValueError as error:
                raise UserError(f"{self.path} is damaged: {name}: {error}") from None
        return array if text else array.astype(np.float64)

    def _checked_header(self, file, name: str) -> tuple:
        try:
            return _header(file)
        except ValueError as error:
            raise UserError(f"{self.path} is damaged: {name}: {error}") from None


def _header(file) -> tuple:
    """Shape, whether in Fortran order, and dtype of an `.npy` member; the file stands at its numbers afterwards."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def write_images(path: str | Path, images: UInt8[np.ndarray, "N H W 3"]) -> None:
    """Writes images as `arr_0`, whole or not at all.

    Raises:
      UserError: the array is of another kind or shape, or the path cannot be written.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise UserError(f"images are {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, 3]")
    _write(Path(path), {_IMAGES: images})


def write_statistics(
    path: str | Path, statistics: Statistics, images: UInt8[np.ndarray, "N H W 3"] | None = None
) -> None:
    """Writes statistics, and perhaps images beside them, whole or not at all: what an evaluation takes as reference.

    Raises:
      UserError: the path cannot be written.
    """
    arrays = {"mu": statistics.features.mu, "sigma": statistics.features.sigma}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mu, "sigma_s": statistics.spatial.sigma}
    if statistics.network != INCEPTION:
        arrays["network"] = np.array(statistics.network)
    _write(Path(path), arrays | ({} if images is None else {_IMAGES: images}))


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    if not processes.is_first():
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:  # By a name alone, NumPy would add another ending.
            np.savez(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)
    except (IsADirectoryError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(NotADirectoryError):
            partial.unlink(missing_ok=True)
