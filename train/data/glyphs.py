"""Images that need no download: single characters, drawn with the fonts that matplotlib carries.

The class is the character; typeface, size, place, slant, ink and paper vary. Image i of a seed is the same whatever
other images are drawn, so a set can be drawn in any order and made larger later.
"""

import functools
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from models.errors import UserError

# Without O and I, which in many typefaces are 0 and 1.
CHARACTERS = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)
_OVERSAMPLING = 4
_HEIGHT = (0.5, 0.8)  # of the character, as a share of the image
_DEGREES = 25.0
_PAPER = (215.0, 255.0)  # of each channel; were it any colour, a network would spend its first minutes on the paper
_CONTRAST = 90.0  # least difference of luminance between ink and paper, of 255


def glyph(index: int, seed: int = 0, size: int = 32, characters: str = CHARACTERS) -> UInt8[np.ndarray, "S S 3"]:
    """Image `index` of the endless set of a seed; its class is `index % len(characters)`.

    Args:
      index: which image.
      seed: of all that varies.
      size: side in pixels.
      characters: the classes.

    Raises:
      UserError: there are no characters, one appears twice or leaves no ink, or an image is smaller than 8 pixels.
    """
    check(size, characters)
    rng = np.random.default_rng((seed, index))
    ink, paper = _colours(rng)
    side = size * _OVERSAMPLING
    font = _font(FONTS[rng.integers(len(FONTS))])
    character = characters[index % len(characters)]
    # The box of the ink, which for a character without descender is smaller than the font's line.
    left, top, right, bottom = (round(edge) for edge in font.getbbox(character))
    if left >= right or top >= bottom:
        raise UserError(f"the character {character!r} leaves no ink")
    scale = min(rng.uniform(*_HEIGHT) * side / (bottom - top), 0.85 * side / (right - left))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), character, fill=255, font=font)
    mask = mask.resize(
        (max(1, round(mask.width * scale)), max(1, round(mask.height * scale))), Image.Resampling.BICUBIC
    )
    canvas = Image.new("L", (side, side))
    room = [(side - length) / 2 for length in mask.size]
    left, top = (round(length * rng.uniform(0.3, 1.7)) for length in room)
    canvas.paste(mask, (left, top))
    canvas = canvas.rotate(rng.uniform(-_DEGREES, _DEGREES), Image.Resampling.BICUBIC)
    cover = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float64)[..., None] / 255
    return np.round(paper + cover * (ink - paper)).astype(np.uint8)


def check(size: int, characters: str) -> None:
    """Raises `UserError` for what cannot be drawn: no characters, one that appears twice, fewer than 8 pixels."""
    if not characters or len(set(characters)) != len(characters):
        raise UserError(f"characters must be different ones and at least one, got {characters!r}")
    if size < 8:
        raise UserError(f"glyphs must be at least 8 pixels wide, got {size}")


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ink of any colour that stands out, and light paper, float64 [3] of 0..255."""
    paper = rng.uniform(*_PAPER, 3)
    while True:
        ink = rng.uniform(0, 255, 3)
        if (paper - ink) @ (0.299, 0.587, 0.114) >= _CONTRAST:
            return ink, paper


@functools.cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", 128)
