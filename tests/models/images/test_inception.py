"""The resize against a loop, the graph's shapes and quirks.

`tests/parity/test_inception.py` compares the numbers with a torch build of the same graph.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.images import inception
from models.layers import call
from tests.models.images.inception_cases import random_params


def looped(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """TF1's bilinear resize, one pixel at a time."""
    rows, columns, channels = image.shape
    out = np.zeros((height, width, channels))
    for y in range(height):
        for x in range(width):
            v, u = y * rows / height, x * columns / width
            top, left = math.floor(v), math.floor(u)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (u - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (u - left)
            out[y, x] = upper + (lower - upper) * (v - top)
    return out


@pytest.mark.parametrize(("rows", "columns"), [(5, 8), (7, 7), (20, 3), (1, 2)])
def test_resize_is_the_first_bilinear_kernel(rows: int, columns: int) -> None:
    image = np.random.default_rng(0).uniform(0, 255, (rows, columns, 3))
    ours = np.einsum("oh,hwc,pw->opc", inception.tf1_bilinear(rows, 7), image, inception.tf1_bilinear(columns, 11))
    np.testing.assert_allclose(ours, looped(image, 7, 11), atol=1e-10)


def test_images_of_full_size_are_only_moved() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), np.uint8)
    np.testing.assert_array_equal(inception.prepare(jnp.asarray(image)), (image.astype(np.float32) - 128) / 128)


def test_smaller_images_are_resized_in_rows_and_columns() -> None:
    image = np.random.default_rng(1).integers(0, 256, (2, 16, 12, 3), np.uint8)
    expected = (looped(image[1].astype(float), inception.SIZE, inception.SIZE) - 128) / 128
    np.testing.assert_allclose(inception.prepare(jnp.asarray(image))[1], expected, atol=1e-5)


def test_shapes_are_those_of_the_metrics() -> None:
    params = inception.param_shapes()
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.uint8)
    found = jax.eval_shape(inception.features, params, images)
    assert [x.shape for x in found] == [(4, 2048), (4, 2023), (4, 1008)]
    # Without the auxiliary head: 94 convolutions with four vectors each, and the last kernel.
    assert len(jax.tree.leaves(params)) == 94 * 5 + 1
    weights = sum(leaf.size for path, leaf in jax.tree.leaves_with_path(params) if path[-1].key == "kernel")
    # Inception v3 is known to have 21,802,784 numbers below its head, of which three per channel are batch norm's.
    assert weights == 21_802_784 - 3 * 17_216 + 2048 * 1008


def test_average_pools_do_not_count_their_padding() -> None:
    np.testing.assert_allclose(inception.average_pool(jnp.ones((1, 4, 5, 2))), 1, rtol=1e-6)


@pytest.mark.parametrize("by_maximum", [False, True])
def test_the_last_block_pools_by_maximum(by_maximum: bool) -> None:
    x = np.random.default_rng(2).uniform(0, 1, (1, 3, 3, 4)).astype(np.float32)
    block = inception.BlockE(by_maximum)
    params = jax.jit(block.init)(jax.random.key(0), jnp.asarray(x))["params"]
    unit = {name: np.asarray(leaf) for name, leaf in params["branch_pool"].items()}
    got = np.asarray(jax.jit(lambda params, x: call(block, params, x))(params, jnp.asarray(x)))[0, ..., -192:]
    for row in range(3):
        for column in range(3):
            window = x[0, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].reshape(-1, 4)
            pooled = window.max(axis=0) if by_maximum else window.mean(axis=0)
            expected = np.maximum(pooled @ unit["kernel"][0, 0] / np.sqrt(1 + 1e-3), 0)
            np.testing.assert_allclose(got[row, column], expected, atol=1e-5)


def test_unit_normalises_by_stored_statistics() -> None:
    x = np.random.default_rng(3).normal(size=(1, 2, 2, 3)).astype(np.float32)
    unit = inception.Unit(2)
    params = {
        "kernel": np.random.default_rng(4).normal(size=(1, 1, 3, 2)).astype(np.float32),
        **{"scale": np.float32([0.5, 2]), "bias": np.float32([0.1, 0.2])},
        **{"mean": np.float32([0.3, -1]), "variance": np.float32([0.002, 0.5])},
    }
    raw = x @ params["kernel"][0, 0]
    normed = (raw - params["mean"]) / np.sqrt(params["variance"] + 1e-3) * params["scale"] + params["bias"]
    np.testing.assert_allclose(call(unit, params, jnp.asarray(x)), np.maximum(normed, 0), atol=1e-5)


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params()


def test_spatial_features_are_the_first_channels_of_6d(params: dict) -> None:
    """A change in 6d's 1x1 branch shows in them, one in 6e's or in the eighth channel does not."""
    params = jax.device_put(params)
    x = jax.random.normal(jax.random.key(0), (1, 75, 75, 3))
    spatial = jax.jit(lambda p: call(inception.Inception(), p, x).spatial)
    plain = spatial(params)
    # 3x3 places here, seven channels last.
    assert plain.shape == (1, 63) and float(plain.max()) > 0.1

    def with_bias(block: str, channel: int):
        unit = params[block]["branch1x1"]
        bias = np.asarray(unit["bias"]) + 3 * (np.arange(len(unit["bias"])) == channel)
        changed = {**unit, "bias": jnp.asarray(bias, jnp.float32)}
        return spatial({**params, block: {**params[block], "branch1x1": changed}})

    moved = np.asarray(with_bias("Mixed_6d", 2) - plain).reshape(9, 7)
    assert moved[:, 2].any() and not moved[:, [0, 1, 3, 4, 5, 6]].any()
    np.testing.assert_array_equal(with_bias("Mixed_6d", 7), plain)
    np.testing.assert_array_equal(with_bias("Mixed_6e", 2), plain)


def test_taps_are_what_the_graph_computes_on_its_way(params: dict) -> None:
    params = jax.device_put(params)
    x = jax.random.normal(jax.random.key(1), (2, 75, 75, 3))
    tapped = inception.InceptionMaps(("Mixed_7c", "Mixed_6d/branch1x1", "Mixed_6d"))
    whole, (last, branch, block) = jax.jit(lambda p: (call(inception.Inception(), p, x), call(tapped, p, x)))(params)
    np.testing.assert_allclose(last.mean(axis=(1, 2)), whole.pool, rtol=1e-5)
    np.testing.assert_array_equal(branch[..., :7].reshape(2, -1), whole.spatial)
    np.testing.assert_array_equal(block[..., :192], branch)  # the first of the block's branches
    assert block.shape == (2, 3, 3, 768)
