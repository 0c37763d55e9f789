"""A row's image is a function of its own class, key and settings, at a width where sums are long enough to differ.

At one compiled shape that holds bit by bit in float32, whoever the neighbours are; across batch sizes XLA may add in
another order (codes are equal in float64: test_generate.py).
"""

import dataclasses

import jax
import numpy as np
import pytest

from decoding.images.generate import Stage, Tokenizer, code_stages, generate_images
from decoding.images.scales import Drawing
from models.images import convolution
from models.images.config import VARConfig, VQVAEConfig
from tests import image_reference as reference

VQVAE = VQVAEConfig(vocab_size=64, latent_channels=16, width=32, multipliers=(1, 2), blocks=1, scales=(1, 2, 4))
LARGE = VARConfig(2, 256, 8, num_classes=7, vocab_size=64, latent_channels=16, scales=VQVAE.scales)
SMALL = dataclasses.replace(LARGE, depth=1, width=128, num_heads=4)
# (class, settings, seed)
ROWS = [
    (0, Drawing(2.0, 40, 0.95, 1.3), 5),
    (6, Drawing(0.0, 0, 1.0, 1.0), 6),
    (3, Drawing(1.5, temperature=0.0), 7),
    (0, Drawing(4.0, 12, 0.8, 1.1), 8),
    (5, Drawing(1.0, 64, 0.5, (2.0, 1.0, 0.0)), 9),
    (2, Drawing(3.0, 30, 1.0, 1.5), 10),
]


@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_are_bitwise_independent_of_their_neighbours(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_FEWEST_PATCHES", 1)  # The decoder of small images goes Winograd's way too.
    trees = (reference.random_vqvae(VQVAE), reference.random_var(LARGE), reference.random_var(SMALL))
    vqvae, large, small = (jax.tree.map(lambda leaf: leaf.astype(np.float32), tree) for tree in trees)

    def made(rows, n):
        labels, drawings, seeds = zip(*rows, strict=True)
        alone = [Stage(LARGE, large, 3, drawings)]
        stages = code_stages((LARGE, large), (SMALL, small), n, drawings, drawings) if n < 3 else alone
        return generate_images(Tokenizer(VQVAE, vqvae), stages, labels, seeds=seeds)

    order = [3, 0, 5, 1, 4, 2]
    strangers = [(row % 7, Drawing(0.5 * row, 3 + row, 0.9, 1.0 + row), 90 + row) for row in range(4)]
    whole = made(ROWS, n)
    shuffled = made([ROWS[row] for row in order], n)
    mixed = made([strangers[0], ROWS[1], *strangers[1:], ROWS[3]], n)
    assert not np.array_equal(mixed.f_hat[0], whole.f_hat[0])
    places = [(shuffled, row, order.index(row)) for row in range(6)] + [(mixed, 1, 1), (mixed, 3, 5)]
    for other, row, place in places:
        assert all(np.array_equal(a[row], b[place]) for a, b in zip(whole.indices, other.indices, strict=True))
        assert whole.f_hat.dtype == np.float32 and np.array_equal(whole.f_hat[row], other.f_hat[place]), row
        assert np.array_equal(whole.pixels[row], other.pixels[place])
