"""The residual quantiser against its definition in NumPy, its gradients, and its precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.images import quantiser
from models.images.config import SCHEDULES, VQVAEConfig
from tests import image_reference as reference

SMALL = VQVAEConfig(vocab_size=64, latent_channels=6, width=4, multipliers=(1,), scales=(1, 2, 3, 4, 5))
# Ten scales, two of which take the convolution that rounding decides on.
TEN = VQVAEConfig(vocab_size=50, latent_channels=4, width=4, multipliers=(1,), scales=SCHEDULES["256"])
PAIRED = VQVAEConfig(vocab_size=64, latent_channels=6, width=4, multipliers=(1,), scales=(2, 3, 7), phis=1)

pytestmark = pytest.mark.usefixtures("x64")
each_config = pytest.mark.parametrize("config", [SMALL, TEN, PAIRED], ids=["5 scales", "10 scales", "one phi"])


def drawn(config: VQVAEConfig, batch: int = 2) -> tuple[dict, dict, np.ndarray]:
    """Parameters twice, for the reference and for JAX, and features of the size that codes have."""
    tree = {name: leaf for name, leaf in reference.random_vqvae(config).items() if name in ("codebook", "phi")}
    size = config.scales[-1]
    features = np.random.default_rng(7).normal(0, 0.8, (batch, size, size, config.latent_channels))
    return tree, jax.device_put(tree), features


@each_config
def test_encoding_matches_the_reference(config: VQVAEConfig) -> None:
    tree, params, features = drawn(config)
    indices, f_hats = reference.encode(config, tree, features)
    found_f_hats, found = jax.jit(quantiser.quantise, static_argnums=0)(config, params, features)
    assert [x.shape for x in found] == [(2, p * p) for p in config.scales]
    assert all(x.dtype == jnp.int32 for x in found)
    for k, (mine, theirs) in enumerate(zip(found, indices, strict=True)):
        np.testing.assert_array_equal(mine, theirs, err_msg=f"scale {k}")
        np.testing.assert_allclose(found_f_hats[k], f_hats[k], atol=1e-12)
    assert len(np.unique(np.concatenate(indices, axis=1))) > 10
    alone = jax.jit(quantiser.encode, static_argnums=0)(config, params, features)
    assert all(map(np.array_equal, alone, found))


@each_config
def test_teacher_inputs_and_steps_match_the_reference(config: VQVAEConfig) -> None:
    tree, params, features = drawn(config)
    indices, f_hats = reference.encode(config, tree, features)

    @jax.jit
    def run(params, indices):
        """The inputs from all codes and from all but the last; f_hat step by step and summed; the inputs by steps."""
        f_hat, stepped, summed, fed = quantiser.first_f_hat(config, 2, jnp.float64), [], [], []
        for k, index in enumerate(indices):
            codes = index if k % 2 else quantiser.embed(params, index)  # vectors in place of codes serve as well
            f_hat, following = quantiser.step(config, params, k, f_hat, codes)
            stepped, fed = [*stepped, f_hat], [*fed, following]
            summed.append(quantiser.accumulate(config, params, indices[: k + 1]))
        assert fed.pop() is None
        inputs = [quantiser.teacher_inputs(config, params, known) for known in (indices, indices[:-1])]
        return *inputs, stepped, summed, jnp.concatenate(fed, axis=1)

    inputs, without_last, stepped, summed, fed = run(params, [index.astype(np.int32) for index in indices])
    expected = reference.teacher_inputs(config, tree, indices)
    assert inputs.shape == (2, config.length - config.scales[0] ** 2, config.latent_channels)
    for found in (inputs, without_last, fed):
        np.testing.assert_allclose(found, expected, atol=1e-12)
    for found in (stepped, summed):
        np.testing.assert_allclose(found, f_hats, atol=1e-12)


def test_the_first_of_equal_codes_is_taken() -> None:
    codebook = jnp.array([[5.0, 0.0], [1.0, 1.0], [1.0, 1.0], [-1.0, 1.0]])
    z = jnp.array([[[0.9, 1.2]], [[-7.0, 3.0]], [[0.0, 1.0]]])
    assert quantiser.nearest(codebook, z).tolist() == [[1], [3], [1]]


def test_loss_and_gradients_are_those_of_the_definition() -> None:
    tree, params, features = drawn(SMALL, batch=3)
    _, f_hats = reference.encode(SMALL, tree, features)
    errors = np.stack([((f_hat - features) ** 2).mean((1, 2, 3)) for f_hat in f_hats])

    def loss(params, features, commitment=0.25):
        return quantiser.quantiser_loss(features, quantiser.quantise(SMALL, params, features)[0], commitment)

    np.testing.assert_allclose(jax.jit(loss)(params, features), 1.25 * errors.mean(0), rtol=1e-12)
    slopes = jax.jit(jax.grad(lambda p, f, c: loss(p, f, c).sum(), argnums=(0, 1)))
    # Features feel the commitment alone: 0.25 * 2 (f - f_hat_k) / size, averaged over scales.
    (by_params, by_features), (others, _) = (slopes(params, features, commitment) for commitment in (0.25, 9.0))
    pull = sum(features - f_hat for f_hat in f_hats) / len(f_hats)
    np.testing.assert_allclose(by_features, 0.5 * pull / features[0].size, atol=1e-12)
    # Codes and convolutions feel the other term alone.
    jax.tree.map(np.testing.assert_array_equal, by_params, others)
    direction = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape), params)

    @jax.jit
    def moved(t):
        new = jax.tree.map(lambda x, d: x + t * d, params, direction)
        indices = quantiser.encode(SMALL, params, jnp.asarray(features))
        sums = [quantiser.accumulate(SMALL, new, indices[: k + 1]) for k in range(5)]
        return quantiser.quantiser_loss(jnp.asarray(features), sums, 0.0).sum()

    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), by_params, direction)))
    np.testing.assert_allclose(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-6)


def test_straight_through_hands_the_gradient_to_the_features() -> None:
    f, f_hat, weight = (jax.random.normal(jax.random.key(i), (2, 3)) for i in range(3))

    def weighed(f, f_hat):
        return jnp.sum(weight * quantiser.straight_through(f, f_hat))

    np.testing.assert_allclose(quantiser.straight_through(f, f_hat), f_hat, atol=1e-12)
    by_f, by_f_hat = jax.grad(weighed, (0, 1))(f, f_hat)
    assert np.array_equal(by_f, weight) and not by_f_hat.any()


def test_usage_counts_codes_by_scale() -> None:
    indices = [jnp.array([[3], [3]]), jnp.array([[0, 1, 1, 63], [3, 3, 3, 3]])]
    counts = quantiser.usage(SMALL, indices)
    assert counts.shape == (2, 64) and counts.dtype == jnp.int32
    assert {k: int(v) for k, v in enumerate(counts[1]) if v} == {0: 1, 1: 2, 3: 4, 63: 1}
    assert counts[0, 3] == 2 and counts[0].sum() == 2
    np.testing.assert_array_equal(
        quantiser.usage(SMALL, indices, jnp.array([True, False])),
        quantiser.usage(SMALL, [index[:1] for index in indices]),
    )


def test_nothing_runs_below_float32_or_at_less_than_full_precision() -> None:
    _, params, features = drawn(SMALL)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def everything(params, features):
        f_hats, indices = quantiser.quantise(SMALL, params, features)
        f_hat, fed = quantiser.first_f_hat(SMALL, 2, jnp.bfloat16), []
        for k, index in enumerate(indices):
            vectors = params["codebook"]["embedding"][index]  # bfloat16, as a sampler may hand them in
            f_hat, following = quantiser.step(SMALL, params, k, f_hat, vectors)
            fed += [f_hat, following]
        added = [
            quantiser.contribution(SMALL, params, k, params["codebook"]["embedding"][i]) for k, i in enumerate(indices)
        ]
        return f_hats, quantiser.teacher_inputs(SMALL, params, indices), fed[:-1], added

    assert quantiser.first_f_hat(SMALL, 2, jnp.bfloat16).dtype == jnp.float32
    jaxpr = jax.make_jaxpr(everything)(narrow, jnp.asarray(features, jnp.bfloat16))
    products = [e for e in jaxpr.jaxpr.eqns if e.primitive.name in ("dot_general", "conv_general_dilated")]
    assert len(products) > 50
    for product in products:
        highest = jax.lax.Precision.HIGHEST
        assert product.params["precision"] in (highest, (highest, highest))
        assert all(v.aval.dtype == jnp.float32 for v in product.invars)
    assert all(v.dtype == jnp.float32 for v in jaxpr.out_avals)
