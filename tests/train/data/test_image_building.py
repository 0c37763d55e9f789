"""Which images of a data set are held out, and what glyphs begin with."""

import pytest

from models.errors import UserError
from train.data.image_building import draw_glyphs, hold_out


def test_more_glyphs_begin_with_the_same_ones() -> None:
    assert draw_glyphs(20).names[:8] == draw_glyphs(8).names


def test_what_is_held_out_stays_so_when_images_are_added() -> None:
    names = [f"image {i}" for i in range(400)]
    few, many = hold_out(names[:200], fraction=0.2), hold_out(names, fraction=0.2)
    assert set(few["valid"]) == {index for index in many["valid"] if index < 200} and 20 < len(few["valid"]) < 60
    exact = hold_out(names, count=7)
    assert len(exact["valid"]) == 7 and sorted(exact["train"] + exact["valid"]) == list(range(400))
    assert hold_out(names) == {"train": list(range(400))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.5, "count": 1}, "either a fraction of the images or a number"),
        ({"fraction": 1.0}, "fraction in 0..1"),
        ({"count": 3}, "cannot hold out 3 images of 3"),
        ({"fraction": 1e-9}, "split 'valid' is empty"),
    ],
)
def test_parts_that_cannot_be_held_out(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hold_out(["a", "b", "c"], **options)
