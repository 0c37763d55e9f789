"""Image files as RGB pixels: what a viewer shows, in 8 bits, or one sentence on why that is not known.

Everything about a stored picture that changes what is seen of it is applied: its orientation (EXIF), its transparency,
which becomes white, its colour profile, 16 bits of grey, which are scaled. Pixels whose range is not known (32-bit and
floating-point numbers) are refused. Whoever asks gets a count of what was done.
"""

import collections
import io
import math
import warnings
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from models.errors import UserError
from models.formats.text_files import POINTER, is_pointer

# Others that Pillow knows are rare, or run programs of their own (EPS).
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# What `decoded` counts.
ON_WHITE = "transparent parts became white"
TURNED = "turned or mirrored as their EXIF data says"
SCALED = "16 bits of grey scaled to 8"
CONVERTED = "colours brought from their profile to sRGB"
UNREADABLE_PROFILE = "colour profile not usable, taken as sRGB"
FIRST_FRAME = "only the first of several frames taken"

_EIGHT_BITS = ("1", "L", "P", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "LA", "PA")
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # Tags of TIFF.
_SRGB = ImageCms.createProfile("sRGB")
_TURNS = {  # EXIF's numbers of how a picture lies.
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
warnings.filterwarnings("ignore", module=r"PIL\.")  # What matters of odd data is whether its pixels can be read.


def decoded(
    content: bytes, size: int, where: str, changes: collections.Counter[str] | None = None
) -> UInt8[np.ndarray, "S S 3"]:
    """An image file as RGB pixels of one size (`fitted`).

    Args:
      content: of the file, in one of `FORMATS`.
      size: side of the square.
      where: how messages call it.
      changes: counts, under the names above, what was done to show it.

    Raises:
      UserError: it is no image, it is damaged, or its pixels have no known range; the message names `where`.
    """
    changes = collections.Counter() if changes is None else changes
    if is_pointer(content):
        raise UserError(f"{where} {POINTER}")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return fitted(_rgb(image, changes), size)
    except UnidentifiedImageError:
        reason = f"it is in none of the formats {', '.join(FORMATS)}" if content else "the file is empty"
    except Exception as error:  # Decoders fail in as many ways as there are formats and damages.
        reason = str(error) or type(error).__name__
    raise UserError(f"{where} cannot be read as an image ({reason})")


def fitted(image: Image.Image, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """An RGB image brought to a square: its shorter side to `size` by Lanczos' filter, its middle cut out."""
    short = min(image.size)
    scaled = [max(size, round(length * size / short)) for length in image.size]
    cut = [(length - size) // 2 for length in scaled]
    if short != size:
        # Only what is kept and what the filter sees beside it: a long thin picture would otherwise become huge first.
        margin = math.ceil(3 * max(1, size / short)) + 1
        first = [max(edge - margin, 0) for edge in cut]
        last = [min(edge + size + margin, length) for edge, length in zip(cut, scaled, strict=True)]
        step = [length / new for length, new in zip(image.size, scaled, strict=True)]
        box = (first[0] * step[0], first[1] * step[1], last[0] * step[0], last[1] * step[1])
        image = image.resize((last[0] - first[0], last[1] - first[1]), Image.Resampling.LANCZOS, box)
        cut = [edge - start for edge, start in zip(cut, first, strict=True)]
    return np.asarray(image.crop((cut[0], cut[1], cut[0] + size, cut[1] + size)))


def _rgb(image: Image.Image, changes: collections.Counter[str]) -> Image.Image:
    changes[FIRST_FRAME] += bool(getattr(image, "is_animated", False))
    image.seek(0)
    image.load()
    profile, turn = image.info.get("icc_profile"), _TURNS.get(_orientation(image))
    if image.mode.startswith("I"):
        image = _scaled(image)
        changes[SCALED] += 1
    image = _middle(image)
    if image.mode == "F":
        raise UserError("its pixels are floating-point numbers, whose range is not known: save it with 8 or 16 bits")
    if image.mode not in _EIGHT_BITS:
        raise UserError(f"its pixels are of the kind {image.mode}, expected grey, palette, RGB or CMYK of 8 bits")
    if turn is not None:
        image = image.transpose(turn)
        changes[TURNED] += 1
    if image.has_transparency_data:
        image = image.convert("RGBA")
        changes[ON_WHITE] += bool((np.asarray(image.getchannel("A")) < 255).any())
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return _in_srgb(image, profile, changes) if profile else image.convert("RGB")


def _middle(image: Image.Image) -> Image.Image:
    """Without most of a very long picture, which `fitted` cuts off: some damaged headers tell of millions of rows.

    Whole squares go, so that what is kept is scaled as it would be in the whole picture, to a rounding of its length.
    """
    short = min(image.size)
    x, y = (short * max(0, (length // short - 17) // 2) for length in image.size)
    return image.crop((x, y, image.width - x, image.height - y)) if x or y else image


def _orientation(image: Image.Image) -> Any:
    """As EXIF numbers it; 1, upright, also where that data is damaged, as viewers have it."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # It is a file format of its own, and fails in as many ways.
        return 1


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of up to 16 bits as grey of 8."""
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        bits = int(tags.get(_BITS, (16,))[0])
    elif image.format == "PPM":
        bits = 16  # Which is what Pillow brings it to, whatever the file's own highest value.
    else:
        bits = 32
    if not 8 <= bits <= 16:
        raise UserError(f"its pixels are {bits}-bit numbers, whose range is not known: save it with 8 or 16 bits")
    stored, full = np.asarray(_middle(image)), 2**bits - 1
    values = np.clip(stored, 0, full).astype(np.uint16)
    values = np.uint16(full) - values if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else values
    grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))  # The high byte, as Pillow takes of colours.
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(stored == transparent, 0, 255).astype(np.uint8)))
    return grey


def _in_srgb(image: Image.Image, profile: bytes, changes: collections.Counter[str]) -> Image.Image:
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(given).lower():
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, given, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        changes[UNREADABLE_PROFILE] += 1
        return image.convert("RGB")
    changes[CONVERTED] += 1
    assert converted is not None
    return converted
