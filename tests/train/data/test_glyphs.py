"""Glyphs: the same whenever they are drawn, different enough from each other, legible, in range."""

import numpy as np
import pytest

from models.errors import UserError
from train.data.glyphs import CHARACTERS, FONTS, _font, glyph


def test_images_hang_on_seed_and_number_alone() -> None:
    first = glyph(40)
    assert first.dtype == np.uint8 and first.shape == (32, 32, 3)
    glyph(7)
    np.testing.assert_array_equal(glyph(40), first)
    assert (glyph(40, seed=1) != first).any()
    # The same character again looks otherwise.
    assert (glyph(40 + len(CHARACTERS)) != first).any()
    assert glyph(3, size=48).shape == (48, 48, 3)


def ink(image: np.ndarray) -> np.ndarray:
    """Where an image differs from its corner, which is paper."""
    return np.abs(image.astype(float) - image[0, 0]).max(axis=-1) > 45


def test_ink_stands_out_from_paper_and_leaves_most_of_it() -> None:
    for index in range(2 * len(CHARACTERS)):
        drawn = ink(glyph(index))
        assert 0.03 < drawn.mean() < 0.6, index
        assert not drawn[[0, 0, -1, -1], [0, -1, 0, -1]].any(), "cut off at a corner"


def test_every_font_draws_every_character_and_no_two_alike() -> None:
    for name in FONTS:
        drawn = {bytes(_font(name).getmask(character)) for character in CHARACTERS}
        assert len(drawn) == len(CHARACTERS), name


def test_the_number_decides_the_character() -> None:
    for index in range(10):
        rows, columns = (ink(glyph(index, characters="-|")).any(axis=axis).sum() for axis in (1, 0))
        assert (rows > columns) == bool(index % 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"characters": ""}, "different ones and at least one"),
        ({"characters": "ABA"}, "different ones and at least one, got 'ABA'"),
        ({"characters": " "}, "the character ' ' leaves no ink"),
        ({"size": 7}, "at least 8 pixels wide, got 7"),
    ],
)
def test_glyphs_that_cannot_be_drawn(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        glyph(0, **options)
