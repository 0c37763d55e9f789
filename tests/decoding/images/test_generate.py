"""Images scale by scale against the NumPy reference; collaboration, batches, keys, edits."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.images import scales
from decoding.images.generate import Stage, Tokenizer, code_stages, decode_pixels, generate_images, keep
from decoding.images.scales import Drawing, Draws
from decoding.sampling import filtered
from eval.images.programs import compile_stages
from models.errors import UserError
from models.images.config import VARConfig, VQVAEConfig
from tests import image_reference as reference

VQVAE = VQVAEConfig(
    vocab_size=19, latent_channels=6, width=8, multipliers=(1, 2), blocks=1, scales=(1, 2, 3, 4), phis=4
)
LARGE = VARConfig(2, 24, 3, num_classes=5, vocab_size=19, latent_channels=6, scales=VQVAE.scales)
SMALL = dataclasses.replace(LARGE, depth=1, width=16, num_heads=2, shared_modulation=True)
LABELS = [0, 3, 5, 2]
GREEDY = Drawing(guidance=1.5, temperature=0.0)
WARM = Drawing(guidance=2.0, top_k=9, top_p=0.8, temperature=1.2)

# One program per shape, where operation by operation it would be many.
draw_codes = jax.jit(scales.draw_codes, static_argnums=3)

pytestmark = pytest.mark.usefixtures("x64", "structs_may_hold_shapes")


@functools.cache
def tokenizer() -> Tokenizer:
    with jax.enable_x64(True):
        return Tokenizer(VQVAE, jax.device_put(reference.random_vqvae(VQVAE)))


@functools.cache
def model(config: VARConfig):
    with jax.enable_x64(True):
        return config, jax.device_put(reference.random_var(config))


def var_stages(config: VARConfig, drawing=GREEDY) -> list[Stage]:
    return [Stage(*model(config), config.num_scales, drawing)]


def same(one, other) -> bool:
    return all(np.array_equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_greedy_images_are_the_references(guidance: float) -> None:
    drawing = dataclasses.replace(GREEDY, guidance=guidance)
    for config in (LARGE, SMALL) if guidance else (LARGE,):
        made = generate_images(tokenizer(), var_stages(config, drawing), LABELS)
        host = jax.tree.map(np.asarray, (tokenizer().params, model(config)[1]))
        models = [(config, host[1])] * config.num_scales
        indices, f_hat = reference.generate(VQVAE, host[0], models, np.array(LABELS), guidance)
        assert same(made.indices, indices) and len({*indices[-1].ravel()}) > 5
        np.testing.assert_allclose(made.f_hat, f_hat, atol=1e-11)
        pixels = (reference.decode(VQVAE, host[0], f_hat) + 1) * 127.5
        assert np.abs(made.pixels - pixels).max() <= 0.5 + 1e-9 and pixels.std() > 5


@pytest.mark.parametrize(
    "draft_scales", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_collaboration_of_two_models(draft_scales: int) -> None:
    made = generate_images(tokenizer(), code_stages(model(LARGE), model(SMALL), draft_scales, GREEDY, GREEDY), LABELS)
    host = [(config, jax.tree.map(np.asarray, model(config)[1])) for config in (LARGE, SMALL)]
    models = [host[0]] * draft_scales + [host[1]] * (4 - draft_scales)
    codes = jax.tree.map(np.asarray, tokenizer().params)
    indices, f_hat = reference.generate(VQVAE, codes, models, np.array(LABELS), GREEDY.guidance)
    assert same(made.indices, indices)
    np.testing.assert_allclose(made.f_hat, f_hat, atol=1e-11)


@pytest.mark.parametrize(
    ("draft_scales", "drawing"),
    [(1, GREEDY), pytest.param(2, GREEDY, marks=pytest.mark.slow), (3, GREEDY), (2, WARM)],
    ids=["1", "2", "3", "2, sampled"],
)
def test_a_model_that_refines_its_own_draft_is_var(draft_scales: int, drawing: Drawing) -> None:
    """CoDe's identity: token for token, at any number of draft scales."""
    alone = generate_images(tokenizer(), var_stages(LARGE, drawing), LABELS, seeds=7)
    both = code_stages(model(LARGE), model(LARGE), draft_scales, drawing, drawing)
    made = generate_images(tokenizer(), both, LABELS, seeds=7)
    assert same(made.indices, alone.indices) and np.array_equal(made.pixels, alone.pixels)


def test_layers_in_a_loop_make_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """By themselves, and of two models, the second of which begins with a pass through several scales."""
    fields = [var_stages(LARGE, WARM), code_stages(model(LARGE), model(SMALL), 2, WARM, GREEDY)]

    def made():
        scales.run.clear_cache()
        return [generate_images(tokenizer(), stages, LABELS) for stages in fields]

    unrolled = made()
    monkeypatch.setattr(scales, "loops", lambda depth: True)
    for ours, theirs in zip(made(), unrolled, strict=True):
        assert same(ours.indices, theirs.indices)
        np.testing.assert_allclose(ours.f_hat, theirs.f_hat, atol=1e-10)
    scales.run.clear_cache()
    monkeypatch.undo()
    assert not scales.loops(30), "on a processor they are unrolled"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert scales.loops(30) and not scales.loops(16)


def test_phases_have_settings_of_their_own() -> None:
    warm = code_stages(model(LARGE), model(LARGE), 2, GREEDY, WARM)
    made = generate_images(tokenizer(), warm, LABELS)
    alone = generate_images(tokenizer(), var_stages(LARGE), LABELS)
    assert same(made.indices[:2], alone.indices[:2]) and not same(made.indices[2:], alone.indices[2:])


@pytest.mark.parametrize("rows", [[2], pytest.param([3, 1], marks=pytest.mark.slow)], ids=str)
def test_an_image_depends_on_its_own_class_seed_and_settings_alone(rows: list[int]) -> None:
    """Alone, the row without guidance takes a program that has none."""
    drawings = [WARM, GREEDY, dataclasses.replace(WARM, guidance=0.0), dataclasses.replace(WARM, top_k=0, top_p=0.5)]
    seeds = [11, 4, 2, 8]
    whole = generate_images(tokenizer(), var_stages(LARGE, drawings), LABELS, seeds=np.array(seeds))
    some, labels, own = ([x[row] for row in rows] for x in (drawings, LABELS, seeds))
    part = generate_images(tokenizer(), var_stages(LARGE, some), labels, seeds=own)
    assert same(part.indices, [index[rows] for index in whole.indices])
    assert not np.array_equal(whole.indices[-1][0], whole.indices[-1][3])
    other = generate_images(tokenizer(), var_stages(LARGE, drawings), LABELS, seeds=[11, 4, 3, 8])
    assert [np.array_equal(*pair) for pair in zip(other.indices[-1], whole.indices[-1], strict=True)] == [
        *(True, True, False, True)
    ]


def test_one_compilation_serves_all_settings_of_a_kind() -> None:
    generate_images(tokenizer(), var_stages(LARGE, WARM), LABELS)
    before = scales.run._cache_size()
    for guidance, top_k in ((3.0, 4), (0.5, 11)):
        drawing = Drawing(guidance, top_k, 0.7, 0.9)
        generate_images(tokenizer(), var_stages(LARGE, drawing), [1, 1, 2, 0], seeds=int(guidance))
    assert scales.run._cache_size() == before


def test_the_cache_is_written_in_place_and_nothing_is_sorted() -> None:
    """In the compiled program: no copy of a whole cache, and filters that search for thresholds."""
    codes = {name: tokenizer().params[name] for name in ("codebook", "phi")}
    (program,) = compile_stages(VQVAE, codes, var_stages(LARGE, WARM), 4)
    text = program.compiled.as_text()
    cache = r"f64\[8,3,30,8\]"
    assert re.search(rf"{cache}\S* dynamic-update-slice", text) and not re.search(rf"= {cache}\S* copy\(", text)
    assert not re.search(r" (sort|custom-call)\(", text), "no sort, and no TopK"


def test_a_program_compiled_ahead_is_the_one_that_runs(caplog: pytest.LogCaptureFixture) -> None:
    codes = {name: tokenizer().params[name] for name in ("codebook", "phi")}
    stages = code_stages(model(LARGE), model(SMALL), 2, GREEDY, GREEDY)
    compile_stages(VQVAE, codes, stages, 3)
    for turn, labels, compiled in ((stages, [0, 1, 2], 0), (var_stages(SMALL), [0], 1)):
        caplog.clear()
        with jax.log_compiles():
            generate_images(tokenizer(), turn, labels)
        assert caplog.text.count("Finished XLA compilation of jit(run)") == compiled


def test_a_drafters_cache_ends_with_its_program() -> None:
    """What a stage leaves behind is the sketch alone; keys and values of N scales would be six times as large."""
    codes = {name: tokenizer().params[name] for name in ("codebook", "phi")}
    drafter, _ = compile_stages(VQVAE, codes, code_stages(model(LARGE), model(SMALL), 2, WARM, WARM), 4)
    left = [leaf.shape for leaf in jax.tree.leaves(drafter.compiled.out_info)]
    # f_hat, what the transformer reads at scales 1 and 2, codes of scales 0 and 1.
    assert left == [(4, 4, 4, 6), (4, 4 + 9, 6), (4, 1), (4, 4)]


@jax.jit
def after_filters(scores: jax.Array, draws: Draws) -> jax.Array:
    """Scores after top-k and top-p, for images that share their settings."""
    rows = scores.reshape(-1, scores.shape[-1])
    filters = jax.tree.map(lambda setting: jnp.repeat(setting, scores.shape[1]), draws.filters)
    return filtered(rows, filters).reshape(scores.shape)


@pytest.mark.parametrize("drawing", [WARM, Drawing(top_k=3, top_p=1.0), Drawing(top_k=0, top_p=0.6, temperature=0.7)])
def test_codes_are_drawn_from_the_filtered_distribution(drawing: Drawing) -> None:
    """The filters see scores before the temperature, top-p what top-k left; checked as a distribution."""
    scores = 2 * np.random.default_rng(4).normal(size=(2, 3, 150))
    draws = Draws.of([drawing] * 2, jax.vmap(jax.random.key)(jnp.arange(2)), 5)
    left = np.asarray(after_filters(scores, draws)) / drawing.temperature
    expected = reference.distribution(scores, drawing.top_k, drawing.top_p, drawing.temperature)
    found = np.exp(left - left.max(-1, keepdims=True))
    np.testing.assert_allclose(found / found.sum(-1, keepdims=True), expected, atol=1e-12)
    assert (expected == 0).any()
    # And what is drawn follows it: 2,000 draws of one row.
    keys = jax.vmap(jax.random.key)(jnp.arange(2000))
    many = Draws.of([drawing] * 2000, keys, 5)
    rows = jnp.asarray(np.broadcast_to(scores[:1], (2000, 3, 150)))
    index, vectors = draw_codes(jnp.asarray(np.eye(150)), rows, many, 2)
    assert np.array_equal(np.argmax(vectors, axis=-1), index)
    for token in range(3):
        share = np.bincount(np.asarray(index[:, token]), minlength=150) / 2000
        assert np.abs(share - expected[0, token]).max() < 0.06 and share[expected[0, token] == 0].sum() == 0


@pytest.mark.parametrize("k", [0, 2, 4])
def test_smooth_pictures_mix_code_vectors(k: int) -> None:
    """By the Gumbel-softmax of VAR's published code, over what the filters left; codes are drawn as without."""
    smooth = dataclasses.replace(WARM, smooth=True)
    scores = np.random.default_rng(4).normal(size=(2, 3, 19))
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    draws = Draws.of([smooth] * 2, keys, 5)
    given = jnp.asarray(np.eye(19)), jnp.array(scores)
    index, weights = draw_codes(*given, draws, k)
    plain, _ = draw_codes(*given, Draws.of([WARM] * 2, keys, 5), k)
    assert np.array_equal(index, plain)
    left = reference.filtered(scores, WARM.top_k, WARM.top_p)

    @jax.jit
    def noise_of(keys):
        own = [jax.random.split(jax.random.fold_in(key, k))[1] for key in keys]
        return [jax.random.gumbel(key, (3, 19), jnp.float64) for key in own]

    noise = np.stack(noise_of(keys))
    ratio = k / 4
    mixed = (left * (1 + ratio) + noise) / max(0.27 * (1 - 0.95 * ratio), 0.005)
    expected = np.exp(mixed - mixed.max(-1, keepdims=True))
    np.testing.assert_allclose(weights, expected / expected.sum(-1, keepdims=True), atol=1e-12)
    assert (np.asarray(weights)[left == -np.inf] == 0).all() and (left == -np.inf).any()


def test_smooth_images_stand_alone() -> None:
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    with pytest.raises(UserError, match="must all be smooth or all not"):
        Draws.of([dataclasses.replace(WARM, smooth=True), WARM], keys, 4)


def test_every_scale_may_have_a_temperature_of_its_own() -> None:
    """Scales whose temperature is 0 take the best code, and the others those of their own temperature."""
    cold = generate_images(tokenizer(), var_stages(LARGE), LABELS)
    warm = dataclasses.replace(WARM, guidance=GREEDY.guidance)
    mixed = dataclasses.replace(warm, temperature=(0.0, 0.0, 1.2, 1.2))
    made = generate_images(tokenizer(), var_stages(LARGE, mixed), LABELS, seeds=3)
    assert same(made.indices[:2], cold.indices[:2]) and not np.array_equal(made.indices[2], cold.indices[2])
    phases = code_stages(model(LARGE), model(LARGE), 2, GREEDY, warm)
    assert same(made.indices, generate_images(tokenizer(), phases, LABELS, seeds=3).indices)
    with pytest.raises(UserError, match="temperature has 3 entries for 4 scales"):
        generate_images(tokenizer(), var_stages(LARGE, Drawing(temperature=(1.0, 1.0, 1.0))), LABELS)


def test_given_parts_stay() -> None:
    """Where the mask is false, f_hat is that of the given images but for what convolutions bring across the border."""
    side = VQVAE.image_size
    images = np.random.default_rng(5).integers(0, 256, (4, side, side, 3)).astype(np.uint8)
    nothing, everything = np.zeros((side, side), bool), np.ones((side, side), bool)
    kept = keep(tokenizer(), images, nothing)
    made = generate_images(tokenizer(), var_stages(LARGE), LABELS, kept=kept)
    codes = jax.tree.map(np.asarray, tokenizer().params)
    given, f_hats = reference.encode(VQVAE, codes, reference.features(VQVAE, codes, images / 127.5 - 1))
    assert same(kept.indices, given)
    np.testing.assert_allclose(made.f_hat, f_hats[-1], atol=1e-10)
    free = generate_images(tokenizer(), var_stages(LARGE), LABELS, kept=keep(tokenizer(), images, everything))
    assert same(free.indices, generate_images(tokenizer(), var_stages(LARGE), LABELS).indices)
    half = nothing.copy()
    half[:, side - 1] = True
    mixed = generate_images(tokenizer(), var_stages(LARGE), LABELS, kept=keep(tokenizer(), images, half))
    assert np.asarray(keep(tokenizer(), images, half).mask).sum() == 4 * 4, "a cell is new if any pixel is"
    np.testing.assert_allclose(mixed.f_hat[:, :, :-1], f_hats[-1][:, :, :-1], atol=1e-10)
    assert np.abs(mixed.f_hat[:, :, -1] - f_hats[-1][:, :, -1]).max() > 0.1


def test_images_are_decoded_a_few_at_a_time() -> None:
    f_hat = np.random.default_rng(6).normal(size=(5, 4, 4, 6))
    whole = decode_pixels(tokenizer(), f_hat, 5)
    assert all(np.array_equal(decode_pixels(tokenizer(), f_hat, size), whole) for size in (1, 2, 9))


def test_what_does_not_fit_is_said() -> None:
    stages, other = var_stages(LARGE), dataclasses.replace(LARGE, vocab_size=20)
    for arguments, message in (
        ((stages, []), "no class to make an image of"),
        (([], [1]), "no model to make images with"),
        ((stages, [0, 6]), "class 6 is not one of model 1's 0 to 4"),
        (([stages[0]._replace(last=3)], [1]), "the models make 3 of 4 scales"),
        (([stages[0]._replace(last=3), stages[0]._replace(last=2)], [1]), "model 2 is to make scales 3 to 1"),
        (([Stage(other, {"positions": 0}, 4)], [1]), "made for vocab_size 20, the tokenizer has 19"),
    ):
        with pytest.raises(UserError, match=message):
            generate_images(tokenizer(), *arguments)
    for bad in (0, 4):
        with pytest.raises(UserError, match=f"draft_scales must be 1 to 3 of 4 scales, got {bad}"):
            code_stages(model(LARGE), model(SMALL), bad)
    with pytest.raises(UserError, match="guidance must be 0"):
        Drawing(guidance=-1.0)
    side = VQVAE.image_size
    kept = keep(tokenizer(), np.zeros((1, side, side, 3), np.uint8), np.zeros((side, side), bool))
    with pytest.raises(UserError, match="kept has 1 images for 2 labels"):
        generate_images(tokenizer(), stages, [0, 1], kept=kept)
    with pytest.raises(UserError, match=r"the mask must be bool \[8, 8\] or \[1, 8, 8\]"):
        keep(tokenizer(), np.zeros((1, side, side, 3), np.uint8), np.zeros((3, 3), bool))
