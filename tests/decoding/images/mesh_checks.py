"""What test_mesh.py runs in a process of its own, with 8 CPU devices."""

import dataclasses
import re
from unittest import mock

import jax
import numpy as np

from decoding.images import generate, scales
from decoding.images.generate import Stage, Tokenizer, code_stages, generate_images
from decoding.images.scales import Drawing
from models.images import convolution
from models.images.config import VARConfig, VQVAEConfig
from models.sharding import on_mesh, parse_mesh, place_params
from tests import image_reference as reference

jax.config.update("jax_enable_x64", True)

convolution._FEWEST_PATCHES = 1  # The decoder of small images goes Winograd's way too.

VQVAE = VQVAEConfig(vocab_size=16, latent_channels=6, width=8, multipliers=(1, 2), blocks=1, scales=(1, 2, 3))
LARGE = VARConfig(2, 16, 4, num_classes=5, vocab_size=16, latent_channels=6, scales=VQVAE.scales)
SMALL = dataclasses.replace(LARGE, depth=1, width=8, num_heads=4)
LABELS = [0, 1, 2, 3, 4, 0, 1, 5]
DRAWINGS = [Drawing(guidance=0.5 * row, top_k=3 + row, temperature=1.0 + row / 4) for row in range(8)]


def makes_the_images_of_one_device(*meshes: str) -> None:
    """Equal codes and pixels on every mesh, with one compilation per stage."""
    jax.clear_caches()  # The other check compiles some of these stages too.
    made = jax.device_put((reference.random_vqvae(VQVAE), *map(reference.random_var, (LARGE, SMALL))))

    def stages(large, small):
        return [
            [Stage(LARGE, large, 3, DRAWINGS)],
            code_stages((LARGE, large), (SMALL, small), 2, DRAWINGS, Drawing(temperature=0.0)),
        ]

    alone = [generate_images(Tokenizer(VQVAE, made[0]), turn, LABELS, seeds=3) for turn in stages(*made[1:])]
    assert len({*alone[0].indices[-1].ravel()}) > 5
    for axes in meshes:
        mesh = parse_mesh(axes)
        placed = [place_params(mesh, params) for params in made]
        tokenizer = Tokenizer(VQVAE, placed[0])
        before = scales.run._cache_size()
        for _ in range(2):
            spread = [generate_images(tokenizer, turn, LABELS, seeds=3) for turn in stages(*placed[1:])]
        assert scales.run._cache_size() == before + 3
        for mine, theirs in zip(spread, alone, strict=True):
            assert all(np.array_equal(*pair) for pair in zip(mine.indices, theirs.indices, strict=True)), axes
            assert np.array_equal(mine.pixels, theirs.pixels)


def rows_stay_on_their_devices() -> None:
    """With data parallelism alone every device makes its own images and exchanges nothing; with tensor
    parallelism sums, and each scale's scores once."""
    seen = []
    run = scales.run

    def watched(*arguments):
        seen.append((arguments, run(*arguments)))
        return seen[-1][1]

    for axes, gathers in (("data=8", 0), ("data=2,tensor=4", 3)):
        mesh = parse_mesh(axes)
        vqvae, large = (
            place_params(mesh, jax.device_put(tree))
            for tree in (reference.random_vqvae(VQVAE), reference.random_var(LARGE))
        )
        with mock.patch.object(generate, "run", watched):
            generate_images(Tokenizer(VQVAE, vqvae), [Stage(LARGE, large, 3, DRAWINGS)], LABELS, seeds=3)
        arguments, sketch = seen[-1]
        rows = {shard.data.shape[0] for shard in sketch.f_hat.addressable_shards}
        assert rows == {len(LABELS) // mesh.shape["data"]}, axes
        with on_mesh(mesh):
            text = run.lower(*arguments).compile().as_text()
        found = re.findall(r" ((?:ragged-)?all-to-all|all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
        assert set(found) == ({"all-reduce", "all-gather"} if gathers else set()), (axes, found)
        assert found.count("all-gather") == gathers, (axes, found)
