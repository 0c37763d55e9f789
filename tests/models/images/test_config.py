"""Shapes of image models: what follows from them, and what is refused."""

import dataclasses

import pytest

from models.errors import UserError
from models.images.config import SCHEDULES, VARConfig, VQVAEConfig, scale_starts
from models.schema import parse, resolved


def test_published_sizes() -> None:
    assert scale_starts(SCHEDULES["256"]) == (0, 1, 5, 14, 30, 55, 91, 155, 255, 424, 680)
    assert scale_starts(SCHEDULES["512"]) == (0, 1, 5, 14, 30, 66, 147, 316, 640, 1216, 2240)
    config = VQVAEConfig()
    assert (config.image_size, config.widths, config.num_scales) == (256, (160, 160, 320, 320, 640), 10)
    assert dataclasses.replace(config, scales=SCHEDULES["512"]).image_size == 512
    var = VARConfig(depth=16, width=1024, num_heads=16, num_classes=1000)
    assert (var.head_dim, var.length, var.num_scales) == (64, 680, 10)


@pytest.mark.parametrize("config", [VQVAEConfig(width=12, scales=(1, 3)), VARConfig(2, 16, 2, 5, scales=(1, 2, 4))])
def test_configs_pass_through_records(config: VQVAEConfig | VARConfig) -> None:
    record = {name: tuple(v) if isinstance(v, list) else v for name, v in resolved(config).items()}
    assert parse(type(config), record) == config


def test_a_tokenizer_without_a_var_may_begin_anywhere() -> None:
    assert VQVAEConfig(scales=(2, 3, 7)).length == 62


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VQVAEConfig(scales=(1, 2, 2)), "scales must be two or more rising sides"),
        (lambda: VQVAEConfig(scales=(4,)), "scales must be two or more rising sides"),
        (lambda: VQVAEConfig(multipliers=()), "multipliers must be one or more numbers"),
        (lambda: VQVAEConfig(phis=0), "phis must be at least 1, got 0"),
        (lambda: VARConfig(2, 30, 4, 10), r"width \(30\) must be a multiple of num_heads, got 4"),
        (lambda: VARConfig(0, 32, 4, 10), "depth must be at least 1, got 0"),
        (lambda: VARConfig(2, 32, 4, 10, scales=(2, 3, 7)), r"scales of a VAR must begin with 1, .* got \[2, 3, 7\]"),
    ],
)
def test_broken_shapes_are_refused(make, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
