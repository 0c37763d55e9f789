"""The VQ-VAE's networks against NumPy, with every tensor drawn anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.formats.storage import leaves_by_path
from models.images import convolution, vqvae
from models.images.config import VQVAEConfig
from tests import image_reference as reference

# Groups of three channels, an odd map, and a level whose width does not change.
TINY = VQVAEConfig(vocab_size=40, latent_channels=4, width=12, multipliers=(1, 1, 2), blocks=1, scales=(1, 2, 3, 4, 5))
WIDE = dataclasses.replace(TINY, multipliers=(1, 3), width=32, blocks=2, scales=(1, 3))

# Large enough for Winograd's convolution: two images of 32x32 have 2,048 places, and of 16x16 too few.
LARGE = dataclasses.replace(TINY, multipliers=(1, 2), width=6, scales=(1, 4, 16))

each_config = pytest.mark.parametrize("config", [TINY, WIDE], ids=["tiny", "wide"])


@each_config
def test_trees_have_the_same_shapes(config: VQVAEConfig) -> None:
    expected = {path: leaf.shape for path, leaf in leaves_by_path(reference.random_vqvae(config)).items()}
    shapes = leaves_by_path(vqvae.param_shapes(config, jnp.bfloat16))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in shapes.items()} == {
        path: (shape, jnp.bfloat16) for path, shape in expected.items()
    }


def test_initial_values_have_the_scale_of_their_inputs() -> None:
    config = dataclasses.replace(TINY, width=24, latent_channels=12)

    @jax.jit
    def some(key):  # the others are never computed
        made = leaves_by_path(vqvae.init(config, key))
        kernels = ("phi/0/kernel", "decoder/conv_in/kernel", "encoder/level_2/block_0/conv_2/kernel")
        return [made[name] for name in kernels], made["codebook/embedding"], made["phi/0/bias"]

    kernels, codebook, bias = some(jax.random.key(0))
    assert not bias.any() and codebook.std() == pytest.approx(12**-0.5, rel=0.1)
    for kernel in kernels:
        assert kernel.std() == pytest.approx(np.prod(kernel.shape[:-1]) ** -0.5, rel=0.1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("config", [TINY, WIDE, LARGE], ids=["tiny", "wide", "large"])
def test_networks_match_the_reference(config: VQVAEConfig) -> None:
    tree = reference.random_vqvae(config)
    params = jax.device_put(tree)
    rng = np.random.default_rng(3)
    images = rng.uniform(-1, 1, (2, config.image_size, config.image_size, 3))
    features = reference.features(config, tree, images)
    assert features.shape == (2, config.scales[-1], config.scales[-1], 4) and features.std() > 0.1
    f_hat = rng.normal(0, 0.7, features.shape)

    @jax.jit
    def run(params, images, f_hat):
        networks = vqvae.features(config, params, images), vqvae.reconstruct(config, params, f_hat)
        # What is made of the two depends on neither width nor depth.
        more = (vqvae.encode(config, params, images), vqvae.decode(config, params, f_hat)) if config is TINY else None
        return *networks, more

    found, free, more = jax.tree.map(np.asarray, run(params, images, f_hat))
    np.testing.assert_allclose(found, features, atol=1e-11)
    decoded = reference.decode(config, tree, f_hat)
    inside = np.abs(decoded) < 1
    assert 0.2 < inside.mean() < 1
    np.testing.assert_allclose(free[inside], decoded[inside], atol=1e-11)
    assert np.abs(free[~inside]).min() >= 1
    if more is not None:
        indices, clipped = more
        assert all(map(np.array_equal, indices, reference.encode(config, tree, features)[0]))
        np.testing.assert_allclose(clipped, decoded, atol=1e-11)


def loss_of_large(params, images):
    """How far what LARGE makes of images is from them."""
    f_hat = vqvae.features(LARGE, params, images)
    return jnp.mean(jnp.square(vqvae.reconstruct(LARGE, params, f_hat) - images))


def slopes_of_large(params, images):
    """Its gradient, by path."""
    return leaves_by_path(jax.grad(loss_of_large)(params, images))


@pytest.fixture
def winograds(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """The shapes that go Winograd's way: of the input, and channels of the output."""
    taken, winograd = set(), convolution.winograd

    def noted(x, kernel):
        taken.add((*x.shape, kernel.shape[-1]))
        return winograd(x, kernel)

    monkeypatch.setattr(convolution, "winograd", noted)
    return taken


def test_networks_take_winograds_way_where_it_pays(winograds) -> None:
    shapes = vqvae.param_shapes(LARGE), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    winograds.clear()
    jax.eval_shape(loss_of_large, *shapes)
    # All of full resolution: in, within a block, after doubling, into a narrower block, out.
    assert winograds == {(2, 32, 32, *widths) for widths in ((3, 6), (6, 6), (12, 12), (12, 6), (6, 3))}


@pytest.mark.slow  # That the slopes of one convolution are the same, test_convolution.py shows.
@pytest.mark.usefixtures("x64")
def test_slopes_through_networks_are_the_same_either_way(winograds, monkeypatch: pytest.MonkeyPatch) -> None:
    params = jax.device_put(reference.random_vqvae(LARGE))
    images = jnp.asarray(np.random.default_rng(5).uniform(-1, 1, (2, 32, 32, 3)))
    found = jax.jit(slopes_of_large)(params, images)
    assert winograds
    winograds.clear()
    monkeypatch.setattr(convolution, "_FEWEST_PATCHES", 10**9)
    expected = jax.jit(lambda params, images: slopes_of_large(params, images))(params, images)
    assert not winograds
    for path, slope in expected.items():
        np.testing.assert_allclose(found[path], slope, rtol=1e-9, atol=1e-11, err_msg=path)
    assert all(
        np.abs(expected[f"{half}/level_0/block_0/conv_1/kernel"]).max() > 1e-4 for half in ("encoder", "decoder")
    )


def test_narrow_networks_run_narrow_and_hand_back_float32() -> None:
    tree = reference.random_vqvae(TINY)
    params = jax.device_put(jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), tree))
    f_hat = jax.random.normal(jax.random.key(0), (1, 5, 5, 4))
    jaxpr = jax.make_jaxpr(lambda p, x: vqvae.decode(TINY, p, x))(params, f_hat)
    convolutions = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    assert len(convolutions) > 20 and all(e.invars[0].aval.dtype == jnp.bfloat16 for e in convolutions)
    decoded = jax.jit(vqvae.decode, static_argnums=0)(TINY, params, f_hat)
    assert decoded.dtype == jnp.float32
    assert np.abs(decoded - reference.decode(TINY, tree, np.asarray(f_hat, np.float64))).mean() < 0.1
    images = jax.ShapeDtypeStruct((1, 20, 20, 3), jnp.float32)
    assert jax.eval_shape(lambda p, x: vqvae.features(TINY, p, x), params, images).dtype == jnp.float32


def test_codes_are_made_at_full_precision() -> None:
    shapes = vqvae.param_shapes(TINY), jax.ShapeDtypeStruct((1, 20, 20, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda p, x: vqvae.encode(TINY, p, x))(*shapes)
    products = [e for e in jaxpr.jaxpr.eqns if e.primitive.name in ("dot_general", "conv_general_dilated")]
    highest = jax.lax.Precision.HIGHEST
    assert len(products) > 40 and {e.params["precision"] for e in products} <= {highest, (highest, highest)}
