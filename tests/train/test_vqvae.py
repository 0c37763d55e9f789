"""The VQ-VAE's losses and whom their gradients reach, the reset of codes, and whole jobs."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import UserError
from models.formats import image_models as files
from models.formats.storage import leaves_by_path
from models.images import inception, quantiser, vqvae
from models.images.config import VQVAEConfig
from models.layers import call
from tests import image_reference as reference
from tests.train.conftest import VQVAE
from tests.train.test_trainer import ROOT, lines, weights
from train import trainer
from train.objectives.adversary import Discriminator, adaptive_weight, hinge
from train.objectives.perceptual import FEATURE_NETS, InceptionTaps, perceptual_distance
from train.objectives.vqvae import PerceptualConfig

GAN = {"weight": 0.5, "start_fraction": 0.5, "width": 4, "layers": 2}


def widened(tree):
    """float64 copies, made by NumPy."""

    def wide(leaf):
        return jnp.asarray(np.asarray(leaf, np.float64)) if leaf.dtype.kind == "f" else leaf

    return jax.tree.map(wide, tree)


@jax.jit
def rebuilt(params, images):
    """What the decoder reads, and what it makes of that."""
    f_hat = quantiser.quantise(VQVAE, params, vqvae.features(VQVAE, params, images))[0][-1]
    return f_hat, vqvae.reconstruct(VQVAE, params, f_hat)


@jax.jit
def _pulled(params, f_hat, slope):
    """The gradient at the decoder and at what it reads, from the slope of a loss at what it makes."""

    def run(decoder, f_hat):
        return vqvae.reconstruct(VQVAE, {**params, "decoder": decoder}, f_hat)

    return jax.vjp(run, params["decoder"], f_hat)[1](slope)


def pulled(params, f_hat, slope):
    """The same in NumPy."""
    return jax.device_get(_pulled(params, f_hat, slope))


class ToyNet:
    """A feature net of two maps: a curved mix of channels, and means of 2x2 places of another."""

    loaded: ClassVar[list[str]] = []

    def __init__(self, weights):
        self.weights = weights

    def shapes(self):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), self.drawn())

    def load(self):
        self.loaded.append(self.weights)
        return jax.device_put(jax.tree.map(np.float32, self.drawn()))

    def features(self, params, images):
        curved = jnp.tanh(images @ params["first"])
        B, H, W, _ = images.shape
        return [curved, (images @ params["second"]).reshape(B, H // 2, 2, W // 2, 2, -1).mean(axis=(2, 4))]

    @staticmethod
    def drawn():
        rng = np.random.default_rng(11)
        return {"first": rng.normal(size=(3, 5)), "second": rng.normal(size=(3, 4))}


PERCEPTUAL = {"net": "toy", "weights": "toy.pth", "weight": 0.6}


@pytest.fixture
def toy_net(monkeypatch):
    """The toy net by its name in configs; the paths that were loaded."""
    monkeypatch.setitem(FEATURE_NETS, "toy", ToyNet)
    monkeypatch.setattr(ToyNet, "loaded", [])
    return ToyNet.loaded


def toy_distance(xp, net, images, decoded):
    """The perceptual distance per image by its definition, in NumPy or, to be differentiated, in JAX."""

    def unit(f):
        return f / xp.sqrt((f**2).sum(axis=-1, keepdims=True) + 1e-10)

    def means(x):
        y = x @ net["second"]
        return (y[:, ::2, ::2] + y[:, 1::2, ::2] + y[:, ::2, 1::2] + y[:, 1::2, 1::2]) / 4

    maps = [[xp.tanh(x @ net["first"]), means(x)] for x in (images, decoded)]
    return sum(((unit(a) - unit(b)) ** 2).sum(axis=-1).mean(axis=(1, 2)) for a, b in zip(*maps, strict=True))


# The loss by what a job has (a feature net, a discriminator), each compiled once whatever the weights and the progress.
COMPILED = {}
WEIGHTS = ("l1", "l2", "quantiser", "commitment")


def measured(objective, params, batch, progress=0.0, frozen=None, **others):
    """(sum, weight, parts) of the loss, and the slopes of its mean by path; weights may be others."""
    config = objective._config

    def mean(params, frozen, batch, progress, weights):
        weights = {**weights, "perceptual": types.SimpleNamespace(weight=weights["perceptual"])}
        objective._config = types.SimpleNamespace(**{**vars(config), **weights})
        try:
            (total, weight), parts = objective.loss(params, frozen, batch, jax.random.key(0), progress)
        finally:
            objective._config = config
        return total / weight, (total, weight, parts)

    kind = (config.perceptual.net, config.gan)
    run = COMPILED.setdefault(kind, jax.jit(jax.value_and_grad(mean, has_aux=True)))
    weights = {name: getattr(config, name) for name in WEIGHTS} | {"perceptual": config.perceptual.weight} | others
    (_, (total, weight, parts)), slopes = jax.device_get(run(params, frozen, batch, progress, weights))
    return (total, weight, {name: part[0] for name, part in parts.items()}), leaves_by_path(slopes)


@pytest.mark.usefixtures("x64")
def test_the_loss_equals_its_definition(image_setting):
    objective, params, _, batch = image_setting("vqvae", l1=0.3, l2=0.7, quantiser=0.9, commitment=0.2)
    (total, weight, parts), _ = measured(objective, widened(params), batch)
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["vqvae"])
    images = np.asarray(batch["image"]) / 127.5 - 1
    features = reference.features(VQVAE, tree, images)
    _, f_hats = reference.encode(VQVAE, tree, features)
    decoded = reference.reconstruct(VQVAE, tree, f_hats[-1])
    both = sum(np.mean((f_hat - features) ** 2, axis=(1, 2, 3)) for f_hat in f_hats) / len(f_hats)
    expected = {
        "l1": 0.3 * np.abs(decoded - images).mean(axis=(1, 2, 3)).sum(),
        "l2": 0.7 * ((decoded - images) ** 2).mean(axis=(1, 2, 3)).sum(),
        "quantiser": 0.9 * 1.2 * both.sum(),
    }
    assert parts == pytest.approx(expected, rel=1e-10)
    assert float(total) == pytest.approx(sum(expected.values()), rel=1e-10) and weight == 6


@pytest.mark.usefixtures("x64")
def test_the_decoders_gradient_passes_the_quantiser_straight(image_setting):
    objective, params, _, batch = image_setting("vqvae", l1=0.0, l2=1.0, quantiser=0.0)
    params = widened(params)
    _, found = measured(objective, params, batch)
    images = np.asarray(batch["image"]) / 127.5 - 1
    f_hat, decoded = jax.device_get(rebuilt(params["vqvae"], images))
    _, by_f_hat = pulled(params["vqvae"], f_hat, 2 * (decoded - images) / images.size)
    # The bias of the last layer before the quantiser is added everywhere, so its slope is the features' sum.
    np.testing.assert_allclose(found["vqvae/quant/bias"], np.sum(by_f_hat, axis=(0, 1, 2)), rtol=1e-9)
    assert np.abs(found["vqvae/encoder/conv_in/kernel"]).max() > 0
    for path in ("codebook/embedding", "phi/0/kernel", "phi/3/bias"):
        assert not np.any(found[f"vqvae/{path}"])


@pytest.mark.usefixtures("x64")
def test_the_perceptual_term_compares_features_of_the_net_that_was_loaded(image_setting, toy_net):
    objective, params, frozen, batch = image_setting("vqvae", perceptual=PERCEPTUAL, gan=GAN)
    assert toy_net == ["toy.pth"] and jax.tree.map(jnp.shape, frozen) == jax.tree.map(np.shape, ToyNet.drawn())
    params, frozen = widened(params), widened(frozen)
    (total, _, parts), _ = measured(objective, params, batch, frozen=frozen)
    tree, net = (jax.tree.map(np.asarray, part) for part in (params["vqvae"], frozen))
    images = np.asarray(batch["image"]) / 127.5 - 1
    _, f_hats = reference.encode(VQVAE, tree, reference.features(VQVAE, tree, images))
    expected = 0.6 * toy_distance(np, net, images, reference.reconstruct(VQVAE, tree, f_hats[-1])).sum()
    assert not parts["adversarial"] and not parts["discriminator"]  # which have not begun
    assert expected > 0.1 and float(parts["perceptual"]) == pytest.approx(expected, rel=1e-10)
    assert float(total) == pytest.approx(sum(map(float, parts.values())), rel=1e-12)


@jax.jit
def toy_slope(net, images, decoded):
    """Of the summed toy distances, at the decoded images."""
    return jax.grad(lambda y: jnp.sum(toy_distance(jnp, net, images, y)))(decoded)


@pytest.mark.usefixtures("x64")
def test_the_perceptual_slope_reaches_the_decoder_and_through_it_the_features(image_setting, toy_net):
    plain = {"l1": 0.0, "l2": 1e-30, "quantiser": 0.0}
    objective, params, frozen, batch = image_setting("vqvae", **plain, perceptual=PERCEPTUAL, gan=GAN)
    assert params.keys() == {"vqvae", "discriminator"}  # all that is differentiated
    params, frozen = widened(params), widened(frozen)
    _, found = measured(objective, params, batch, frozen=frozen)
    images = np.asarray(batch["image"]) / 127.5 - 1
    f_hat, decoded = jax.device_get(rebuilt(params["vqvae"], images))
    by_decoder, by_f_hat = pulled(
        params["vqvae"], f_hat, 0.6 * np.asarray(toy_slope(frozen, images, decoded)) / len(images)
    )
    for path, slope in leaves_by_path(by_decoder).items():
        np.testing.assert_allclose(found[f"vqvae/decoder/{path}"], slope, rtol=1e-8, atol=1e-12)
    assert np.abs(by_decoder["conv_out"]["kernel"]).max() > 1e-3
    np.testing.assert_allclose(found["vqvae/quant/bias"], np.sum(by_f_hat, axis=(0, 1, 2)), rtol=1e-8)


@jax.jit
def judged(critic, images, decoded):
    """The decoder's adversarial loss, summed, and its slope at the decoded images; the slope of the critic's own."""
    net = Discriminator(4, 2)

    def fooled(y):
        return -jnp.sum(jnp.mean(call(net, critic, y), axis=(1, 2)))

    def told_apart(critic):
        return jnp.mean(hinge(call(net, critic, images), call(net, critic, decoded)))

    return *jax.value_and_grad(fooled)(decoded), jax.grad(told_apart)(critic)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_adaptive_weight_counts_the_perceptual_term(image_setting, toy_net):
    objective, params, frozen, batch = image_setting("vqvae", gan=GAN, perceptual=PERCEPTUAL)
    params, frozen = widened(params), widened(frozen)
    (_, _, parts), _ = measured(objective, params, batch, 0.5, frozen)
    images = np.asarray(batch["image"]) / 127.5 - 1
    f_hat, decoded = jax.device_get(rebuilt(params["vqvae"], images))
    error = decoded - images
    rebuilding = (0.2 * np.sign(error) + 2 * error) / error[0].size + 0.6 * np.asarray(
        toy_slope(frozen, images, decoded)
    )
    fooled, fooling, _ = jax.device_get(judged(params["discriminator"], images, decoded))
    wanted, made = (
        np.linalg.norm(pulled(params["vqvae"], f_hat, slope)[0]["conv_out"]["kernel"])
        for slope in (rebuilding, fooling)
    )
    assert float(parts["adversarial"]) == pytest.approx(0.5 * wanted / (made + 1e-4) * float(fooled), rel=1e-8)


@pytest.mark.usefixtures("x64")
def test_codebook_and_phis_learn_from_the_quantisers_loss(image_setting):
    objective, params, _, batch = image_setting("vqvae", l1=0.0, l2=1e-30, commitment=0.0)
    _, found = measured(objective, widened(params), batch)
    for path in ("codebook/embedding", "phi/0/kernel", "phi/3/bias"):
        assert np.abs(found[f"vqvae/{path}"]).max() > 1e-6
    assert np.abs(found["vqvae/encoder/conv_in/kernel"]).max() < 1e-20
    objective, params, _, batch = image_setting("vqvae", l1=0.0, l2=1e-30, commitment=0.5)
    assert np.abs(measured(objective, widened(params), batch)[1]["vqvae/encoder/conv_in/kernel"]).max() > 1e-6


@pytest.mark.usefixtures("x64", "toy_net")
def test_each_player_sees_the_other_as_a_constant(image_setting):
    # The program of the perceptual tests; here that term weighs nothing.
    objective, params, frozen, batch = image_setting("vqvae", gan=GAN, perceptual=PERCEPTUAL)
    alone, _, _, _ = image_setting("vqvae")
    params, frozen = widened(params), widened(frozen)
    images = np.asarray(batch["image"]) / 127.5 - 1

    before, after = (measured(objective, params, batch, at, frozen, perceptual=0.0)[1] for at in (0.49, 0.5))
    _, plain = measured(alone, {"vqvae": params["vqvae"]}, batch)
    for path, slope in before.items():
        np.testing.assert_allclose(slope, plain.get(path, 0.0), atol=1e-12)

    f_hat, decoded = jax.device_get(rebuilt(params["vqvae"], images))
    _, fooling, by_critic = jax.device_get(judged(params["discriminator"], images, decoded))
    for path, slope in leaves_by_path(by_critic).items():
        np.testing.assert_allclose(after[f"discriminator/{path}"], slope, atol=1e-12)

    # What the adversary adds at the last layer is its gradient, scaled to 0.5 times the reconstruction's norm.
    error = decoded - images
    rebuilding = (0.2 * np.sign(error) + 2 * error) / error.size
    at_last = (pulled(params["vqvae"], f_hat, slope)[0]["conv_out"]["kernel"] for slope in (fooling / 6, rebuilding))
    fooled, wanted = map(np.asarray, at_last)
    path = "vqvae/decoder/conv_out/kernel"
    unit = fooled / np.linalg.norm(fooled)
    # The sums over six images, to which 1e-4 is added.
    ratio = 6 * np.linalg.norm(fooled) / (6 * np.linalg.norm(fooled) + 1e-4)
    np.testing.assert_allclose(
        after[path] - plain[path], 0.5 * ratio * np.linalg.norm(wanted) * unit, rtol=1e-8, atol=1e-12
    )


def test_the_adaptive_weight_has_a_closed_form():
    slopes = jnp.full((1, 2, 2, 3), 3.0), jnp.full((1, 2, 2, 3), -0.5)
    assert adaptive_weight(lambda slope: 10 * slope, *slopes) == pytest.approx(6.0, rel=1e-5)
    assert adaptive_weight(lambda slope: slope, slopes[0], 0 * slopes[1]) == 1e4
    assert adaptive_weight(lambda slope: slope, 0 * slopes[0], slopes[1]) == 0


def test_hinge_punishes_only_what_is_within_the_margin():
    true, decoded = jnp.array([[[2.0, 0.5]], [[1.0, 1.0]]]), jnp.array([[[-3.0, -0.5]], [[0.0, 1.0]]])
    np.testing.assert_allclose(hinge(true, decoded), [0.25 * (0.5 + 0.5), 0.25 * (1 + 2)])


@pytest.mark.usefixtures("x64")
def test_codes_that_the_batch_did_not_choose_become_vectors_of_the_batch(image_setting):
    objective, params, _, batch = image_setting("vqvae", batch_size=2, reset_every=4)
    params = widened(params)
    codebook = params["vqvae"]["codebook"]
    far = 100.0 * np.isin(np.arange(24), range(7, 12))[:, None]  # so that nothing chooses these five
    params["vqvae"]["codebook"] = {"embedding": jnp.asarray(np.asarray(codebook["embedding"]) + far)}
    tree = jax.tree.map(np.asarray, params["vqvae"])
    images = np.asarray(batch["image"]) / 127.5 - 1
    features = reference.features(VQVAE, tree, images)
    indices, f_hats = reference.encode(VQVAE, tree, features)
    used = np.isin(np.arange(24), np.concatenate([index.reshape(-1) for index in indices]))
    residuals = [features, *(features - f_hat for f_hat in f_hats[:-1])]
    sought = np.concatenate([reference.tokens(VQVAE, k, r).reshape(-1, 4) for k, r in enumerate(residuals)])
    old = tree["codebook"]["embedding"]
    replace = jax.jit(objective.replace)
    later, _ = replace(params, None, batch, 4, 0.5, jax.random.key(1))
    new = np.asarray(later["vqvae"]["codebook"]["embedding"])
    assert not np.any(used[7:12]) and used.sum() >= 12
    np.testing.assert_array_equal(new[used], old[used])
    nearest = np.abs(new[~used][:, None] - sought).max(axis=-1)
    assert nearest.min(axis=1).max() < 1e-9 and len(set(nearest.argmin(axis=1))) > 1

    for step, progress in ((3, 0.5), (4, 0.5), (4, 0.9)):
        later, mask = replace(params, None, batch, step, progress, jax.random.key(1))
        before, after = (leaves_by_path(jax.device_get(tree)) for tree in (params, later))
        changed = {p for p, leaf in after.items() if not np.array_equal(leaf, before[p])}
        due = (step, progress) == (4, 0.5)
        assert changed == ({"vqvae/codebook/embedding"} if due else set())
        # What the average forgets are these rows, and no other parameter.
        ((path, rows),) = leaves_by_path(mask).items()
        assert path == "vqvae/codebook/embedding" and rows[:, 0].tolist() == (~used & due).tolist()


def test_without_a_reset_nothing_is_traced(image_setting):
    objective, params, _, batch = image_setting("vqvae")
    same, mask = objective.replace(params, None, batch, 1, 0.1, jax.random.key(0))
    assert same is params and mask is None


def test_evaluation_counts_images_and_codes_but_no_padding(image_setting):
    objective, params, _, batch = image_setting("vqvae")
    batch = {**batch, "label": batch["label"].at[-2:].set(-1)}
    sums = jax.jit(objective.evaluate)(params, None, batch)
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["vqvae"])
    images = np.asarray(batch["image"])[:4] / 127.5 - 1
    indices, f_hats = reference.encode(VQVAE, tree, reference.features(VQVAE, tree, images))
    error = ((reference.decode(VQVAE, tree, f_hats[-1]) - images) ** 2).mean(axis=(1, 2, 3))
    counts = sum(np.bincount(index.reshape(-1), minlength=24) for index in indices)
    means = {name: np.float64(total) / np.float64(weight) for name, (total, weight) in sums.items()}
    found = objective.report(means)
    p = counts[counts > 0] / counts.sum()
    assert found["squared_error"] == pytest.approx(error.mean(), rel=1e-4)
    assert found["psnr"] == pytest.approx(np.mean(10 * np.log10(4 / error)), rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert found["codes_used"] == np.mean(counts > 0)
    for k, index in enumerate(indices):
        p = np.bincount(index.reshape(-1), minlength=24) / index.size
        expected = math.exp(-(p[p > 0] * np.log(p[p > 0])).sum())
        assert found[f"scale_perplexity_{k}"] == pytest.approx(expected, rel=1e-4)


def test_a_scale_that_collapses_shows(image_setting):
    objective, _, _, _ = image_setting("vqvae")
    count_KV = np.zeros((4, 24))
    count_KV[0, 5], count_KV[1, :2], count_KV[2:] = 1, 2, 1
    found = objective.report({"squared_error": 0.1, "psnr": 10.0, "codes": count_KV})
    by_scale = [found[f"scale_perplexity_{k}"] for k in range(4)]
    assert by_scale == pytest.approx([1, 2, 24, 24]) and found["codes_used"] == 1


def test_perceptual_distance_compares_unit_features():
    class Net:
        """Scaled images, and their mean rows."""

        def features(self, params, images):
            return [params * images, images.mean(axis=1, keepdims=True)]

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 4, 4, 3))

    def unit(f):
        return f / np.linalg.norm(f, axis=-1, keepdims=True)

    maps = [(x, y), (x.mean(axis=1, keepdims=True), y.mean(axis=1, keepdims=True))]
    expected = sum(((unit(a) - unit(b)) ** 2).sum(axis=-1).mean(axis=(1, 2)) for a, b in maps)
    images = [jnp.asarray(image, jnp.float32) for image in (x, y)]
    distance = jax.jit(lambda x, y: perceptual_distance(Net(), 7.0, x, y))
    np.testing.assert_allclose(distance(*images), expected, rtol=1e-5)
    slope = jax.jit(jax.grad(lambda x: distance(x, images[0]).sum()))(images[0])
    assert not np.any(np.isnan(slope)) and np.abs(slope).max() < 1e-4


def test_inception_is_tapped_at_four_depths_and_reads_what_it_was_made_for():
    net = InceptionTaps("nowhere.pth")
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    shapes = [leaf.shape for leaf in jax.eval_shape(net.features, net.shapes(), images)]
    assert [(len(shape), shape[-1]) for shape in shapes] == [(4, 64), (4, 192), (4, 288), (4, 768)]
    rng = np.random.default_rng(0)
    first = {"kernel": rng.normal(0, 0.2, (3, 3, 3, 32)), "scale": np.ones(32), "variance": np.ones(32)}
    first = {**first, "bias": np.zeros(32), "mean": np.zeros(32)}
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), net.shapes())
    params["Conv2d_1a_3x3"] = jax.tree.map(lambda leaf: leaf.astype(np.float32), first)
    grey = rng.integers(0, 256, (1, 80, 80, 3)).astype(np.float32)
    taps = InceptionTaps("nowhere.pth", ("Conv2d_1a_3x3",))
    (found,) = jax.jit(taps.features)(params, jnp.asarray(grey / 127.5 - 1))
    unit = inception.Unit(32, (3, 3), 2, "VALID")
    expected = call(unit, params["Conv2d_1a_3x3"], jnp.asarray((grey - 128) / 128))
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"perceptual": {"net": "inception"}}, "objective.perceptual.weights to the file of its weights"),
        ({"perceptual": {"weights": "x.pth"}}, "no objective.perceptual.net to read them"),
        ({"perceptual": {"net": "vgg"}}, "objective.perceptual.net must be None or one of 'inception', got 'vgg'"),
        ({"perceptual": {"net": "inceptoin"}}, "did you mean 'inception'?"),
        ({"gan": {"start_fraction": 1.0}}, "objective.gan.start_fraction must lie in 0..1"),
        ({"l1": 0.0, "l2": 0.0}, "objective.l1 or objective.l2 must be positive"),
        ({"reset_every": -1}, "objective.reset_every must not be negative"),
        ({"reset_until": 1.5}, "objective.reset_until must lie in 0..1"),
    ],
)
def test_a_wrong_section_gets_one_sentence(objective, words, image_job):
    with pytest.raises(UserError) as caught:
        image_job("vqvae", objective=objective)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert PerceptualConfig() == PerceptualConfig(net=None, weights=None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": 8}, "the objective vqvae reads images: length must be None, got 8"),
        ({"data": {"tokenizer": "x"}}, "data.tokenizer must be None for images, got 'x'"),
        ({"data": {"fields": "x"}}, "data.fields must be None for images, got 'x'"),
    ],
)
def test_options_of_text_are_refused(changes, words, image_job, tmp_path):
    with pytest.raises(UserError, match=words):
        trainer.train(image_job("vqvae", **changes), tmp_path)


def test_a_job_learns_against_a_net_that_stays_as_it_is_and_leaves_a_vqvae(image_job, toy_net, tmp_path, capsys):
    weights = tmp_path / "toy.pth"
    weights.write_bytes(b"known by what it holds")
    sections = {"checkpoint": {"every": 30}, "evaluation": {"every": 15}}
    # Of one level, which compiles sooner; what two do to slopes, the tests of the loss show.
    model = dataclasses.replace(VQVAE, multipliers=(1,), scales=(1, 2, 4, 8))
    perceptual = {**PERCEPTUAL, "weights": str(weights)}
    config = image_job("vqvae", {"model": dataclasses.asdict(model), "perceptual": perceptual}, steps=30, **sections)
    plan = trainer.make_plan(config, ("A", "B", "C"))
    assert jax.tree.map(jnp.shape, plan.frozen) == jax.tree.map(np.shape, ToyNet.drawn())
    assert not toy_net and plan.state["params"].keys() == {"vqvae"}
    trainer.train(config, tmp_path)
    assert toy_net == [str(weights)]
    found = lines(tmp_path)
    losses = [line["loss"] for line in found if "loss" in line]
    valid = [line for line in found if "valid/squared_error" in line]
    assert np.mean(losses[-3:]) < 0.8 * losses[0] and valid[1]["valid/squared_error"] < valid[0]["valid/squared_error"]
    assert {"l1", "l2", "quantiser"} < found[0].keys()
    assert all(line["perceptual"] > 0 for line in found if "loss" in line)
    shown = ("squared_error", "psnr", "perplexity", "codes_used", "scale_perplexity_0", "scale_perplexity_3")
    assert {f"valid/{name}" for name in shown} < valid[0].keys()
    assert "images_per_second" in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert files.load(tmp_path / "vqvae", VQVAEConfig)[0] == model
    said = capsys.readouterr().out
    assert "30 steps of 4 images" in said
    assert re.search(r"  scale_perplexity( [\d.]+){4}\n", said)  # one place in the line for all scales


@pytest.mark.slow
def test_a_killed_job_ends_bitwise_as_one_that_was_not(image_job, die_at, tmp_path):
    objective = {"gan": {**GAN, "start_fraction": 0.3}, "reset_every": 2}
    config = image_job("vqvae", objective=objective, optimizer={"ema": 0.8})
    trainer.train(config, tmp_path / "whole")
    with die_at(5):
        trainer.train(config, tmp_path / "broken")
    trainer.train(config, tmp_path / "broken")
    assert weights(tmp_path / "whole" / "vqvae") == weights(tmp_path / "broken" / "vqvae")
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")


def smoke(name: str, data: object, workdir: object, *options: str) -> str:
    """Runs the smoke job of a config through the command; what it said."""
    command = [sys.executable, "-m", "train.main", f"--config=configs/{name}.py:smoke", f"--workdir={workdir}"]
    given = [f"--config.data.path={data}", *(f"--config.{option}" for option in options)]
    done = subprocess.run([*command, *given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_smoke_job_runs(image_set, tmp_path):
    said = smoke("vqvae", image_set, tmp_path, "steps=3", "batch_size=4", "optimizer.warmup_steps=1")
    assert "finished 3 steps" in said and "psnr" in said
    assert files.read_config(tmp_path / "vqvae", VQVAEConfig).image_size == 32
