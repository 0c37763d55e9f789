"""Sampling parameters against an independent numpy version, and draws that depend on request and position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.sampling import (
    Sampling,
    apply_sampling,
    argmax,
    batch_sampling,
    best_logits,
    best_tokens,
    draft_keys,
    draw,
    invert,
    target_probabilities,
    top_k,
)
from models.errors import UserError

VOCAB = 17

# One program per call, where operation by operation each would be many.
apply_sampling, draw, invert, target_probabilities = map(jax.jit, (apply_sampling, draw, invert, target_probabilities))


def keys_of(seeds) -> jax.Array:
    """One key per seed."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def reference(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Probabilities after temperature, top-k, top-p, min-p, each on what the one before left, in loops."""
    p = np.exp((logits - logits.max()) / s.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if s.top_k:
        for token in order[s.top_k :]:
            p[token] = 0.0
        p /= p.sum()
    mass = 0.0
    for token in order:
        if s.top_p < 1 and mass >= s.top_p:
            p[token], mass = 0.0, mass + p[token]
        else:
            mass += p[token]
    p /= p.sum()
    p[p < s.min_p * p.max()] = 0.0
    return p / p.sum()


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=2.0, top_k=4),
    Sampling(temperature=1.0, top_k=100),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=1.5, top_p=0.01),
    Sampling(temperature=3.0, top_k=9, top_p=0.7),
    Sampling(temperature=1.2, min_p=0.1),
    Sampling(temperature=2.0, top_k=8, top_p=0.8, min_p=0.3),
]


@pytest.mark.parametrize("seed", range(3))
def test_sampling_matches_numpy(x64: None, seed: int) -> None:
    logits = 2 * np.random.default_rng(seed).normal(size=(len(SETTINGS), VOCAB))
    ours = np.exp(apply_sampling(jnp.array(logits), batch_sampling(SETTINGS)))
    ours /= ours.sum(axis=-1, keepdims=True)
    theirs = np.stack([reference(row, setting) for row, setting in zip(logits, SETTINGS, strict=True)])
    # Settings travel as float32.
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert np.array_equal(np.asarray(ours) > 0, theirs > 0)


def test_static_facts() -> None:
    assert batch_sampling([Sampling(), Sampling(top_k=3)]).greedy and not batch_sampling([Sampling(top_k=3)]).cuts
    mixed = batch_sampling([Sampling(), Sampling(temperature=1.0, top_p=0.9)])
    assert mixed.cuts and not mixed.greedy
    assert not batch_sampling([Sampling(temperature=1.0, min_p=0.5)]).cuts


def test_ties_at_a_threshold_are_kept() -> None:
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    shaped = apply_sampling(
        logits, batch_sampling([Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=0.2)])
    )
    assert np.isfinite(shaped).tolist() == [[False, True, True, False], [True] * 4]


# Of masses 1/2, 1/4, 1/8 and 1/8, whose sums no rounding touches, shuffled.
DYADIC = np.log([0.25, 1.0, 0.25, 0.5])


def kept(logits, settings: list[Sampling], dtype) -> list[list[int]]:
    """The tokens that each setting leaves of the same logits."""
    rows = jnp.asarray(np.broadcast_to(np.asarray(logits, dtype), (len(settings), len(logits))))
    return [np.flatnonzero(row).tolist() for row in np.isfinite(apply_sampling(rows, batch_sampling(settings)))]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_top_p_stops_where_the_mass_is_reached(x64: None, dtype) -> None:
    """Exactly p is enough; one rounding more takes the token that crosses it, with all that tie with it."""
    np.testing.assert_array_equal(jax.nn.softmax(jnp.asarray(DYADIC, dtype)), [0.125, 0.5, 0.125, 0.25])

    def beside(p: float, towards: float) -> float:
        return float(np.nextafter(np.float32(p), np.float32(towards)))

    wanted = {
        1e-30: [1],
        0.25: [1],
        beside(0.5, 0): [1],
        0.5: [1],
        beside(0.5, 1): [1, 3],
        beside(0.75, 0): [1, 3],
        0.75: [1, 3],
        beside(0.75, 1): [0, 1, 2, 3],
        0.875: [0, 1, 2, 3],
        beside(1, 0): [0, 1, 2, 3],
        1.0: [0, 1, 2, 3],
    }
    found = kept(DYADIC, [Sampling(temperature=1.0, top_p=p) for p in wanted], dtype)
    assert found == list(wanted.values())
    # Of 100 tokens of one mass the best is all of them; of one that has it all, itself. Nothing else is ever lost at 1.
    peaked = np.array([-200.0, 0.0, -300.0])
    settings = [Sampling(temperature=1.0, top_p=p) for p in (1e-3, 0.5, 0.999, 1.0)]
    assert kept(np.zeros(100), settings, dtype) == [list(range(100))] * 4
    assert kept(peaked, settings, dtype) == [[1], [1], [1], [0, 1, 2]]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_min_p_keeps_what_has_exactly_that_share_of_the_best(x64: None, dtype) -> None:
    share = np.asarray(jnp.log(jnp.asarray(0.25, dtype)))
    below = np.nextafter(share, np.asarray(-np.inf, dtype))
    logits = [share, 0.0, below, -np.inf, 0.0]
    settings = [Sampling(temperature=1.0, min_p=p) for p in (0.25, 0.0, 0.26, 0.999)]
    assert kept(logits, settings, dtype) == [[0, 1, 4], [0, 1, 2, 4], [1, 4], [1, 4]]
    # The best is that of the row, wherever it lies.
    assert kept(np.array([5.0, 7.0]) + 90, [Sampling(temperature=1.0, min_p=0.13)], dtype) == [[0, 1]]
    assert kept(np.array([5.0, 7.0]) + 90, [Sampling(temperature=1.0, min_p=0.14)], dtype) == [[1]]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_top_k_keeps_that_many_and_their_equals(x64: None, dtype) -> None:
    logits = [2.0, -1.0, 3.0, 2.0, -1.0, 0.5, -np.inf]
    most = 2**31 - 1
    wanted = {1: [2], 2: [0, 2, 3], 3: [0, 2, 3], 4: [0, 2, 3, 5], 5: [0, 1, 2, 3, 4, 5], 6: [0, 1, 2, 3, 4, 5]}
    wanted |= {k: [0, 1, 2, 3, 4, 5] for k in (7, 8, 100, most, 0)}
    assert kept(logits, [Sampling(temperature=1.0, top_k=k) for k in wanted], dtype) == list(wanted.values())
    # More than float32 could tell apart by value are counted right, whatever their sign.
    close = np.nextafter(dtype(-1.0), np.arange(-2, 3).astype(dtype)[:, None])[:, 0]
    ladder = np.sort(np.unique([close, -close]))
    settings = [Sampling(temperature=1.0, top_k=k + 1) for k in range(len(ladder))]
    assert kept(ladder, settings, dtype) == [list(range(len(ladder) - k - 1, len(ladder))) for k in range(len(ladder))]


def test_each_filter_works_on_what_the_one_before_left() -> None:
    """Masses 1/2, 1/4, 1/8, 1/8: of the two best, which are 2/3 and 1/3, the first is enough for 0.6, not for 0.7."""
    settings = [Sampling(temperature=1.0, top_k=2, top_p=p) for p in (0.6, 0.7)]
    assert kept(DYADIC, settings, jnp.float32) == [[1], [1, 3]]
    # Top-p of the masses at temperature 2, which are 0.37, 0.26 and twice 0.18; min-p of the share of the best.
    settings = [Sampling(temperature=2.0, top_p=0.6), Sampling(temperature=1.0, top_p=0.6)]
    settings += [Sampling(temperature=2.0, min_p=0.6), Sampling(temperature=1.0, min_p=0.6)]
    assert kept(DYADIC, settings, jnp.float32) == [[1, 3], [1, 3], [1, 3], [1]]
    assert kept(DYADIC, [Sampling(temperature=2.0, top_p=0.7)], jnp.float32) == [[0, 1, 2, 3]]


def test_target_probabilities_are_those_that_draws_follow() -> None:
    """And at temperature 0 the whole of it is on the first of the best, in mixed batches too."""
    logits = jnp.asarray(np.stack([DYADIC, [1.0, 3.0, 3.0, 0.0]]), jnp.float32)
    warm, cold = Sampling(temperature=1.0, top_k=2), Sampling()
    one = [0.0, 1.0, 0.0, 0.0]
    np.testing.assert_array_equal(target_probabilities(logits, batch_sampling([cold, cold])), [one, one])
    np.testing.assert_allclose(
        target_probabilities(logits, batch_sampling([warm, cold])), [[0, 2 / 3, 0, 1 / 3], one], rtol=1e-6
    )


def test_greedy_rows_ignore_sampling_and_keys() -> None:
    logits = jnp.array(np.random.default_rng(0).normal(size=(2, VOCAB)), jnp.float32)
    settings = [Sampling(), Sampling(temperature=1.0)]
    draws = []
    for seed in range(20):
        keys = keys_of([seed, seed])
        draws.append(np.asarray(draw(logits, batch_sampling(settings), keys, jnp.array([5, 5]))))
    first, second = np.array(draws).T
    assert set(first) == {int(np.argmax(logits[0]))} and len(set(second)) > 3


def test_draws_depend_on_key_and_position_only() -> None:
    logits = np.zeros((4, 1000), np.float32)
    sampling = batch_sampling([Sampling(temperature=1.0)] * 4)
    drawn = draw(jnp.asarray(logits), sampling, keys_of([1, 1, 1, 2]), jnp.array([7, 7, 8, 7])).tolist()
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3
    alone = draw(jnp.asarray(logits[:1]), batch_sampling([Sampling(temperature=1.0)]), keys_of([1]), jnp.array([8]))
    assert int(alone[0]) == drawn[2]


def test_keys_of_drafts_are_nobody_elses() -> None:
    """Neither those that verification makes of a request's key for a position and its numbers, nor each other's."""

    @jax.jit
    def everyone():
        requests, positions = jax.vmap(jax.random.key)(jnp.arange(20)), jnp.arange(300)

        def folded(keys, data):
            return jax.vmap(jax.random.fold_in)(keys.ravel(), jnp.broadcast_to(data, keys.shape).ravel())

        every = jnp.repeat(requests, len(positions))
        of_position = folded(every, jnp.tile(positions, len(requests)))
        of_drafts = draft_keys(every, jnp.tile(positions, len(requests)))
        of_levels = [folded(of_drafts, jnp.asarray(level)) for level in range(3)]
        apart = [requests, of_position, folded(of_position, jnp.asarray(1)), of_drafts, *of_levels]
        return jnp.concatenate([jax.random.key_data(keys) for keys in apart])

    data = np.asarray(everyone())
    assert len(np.unique(data, axis=0)) == len(data) == 20 + 6 * 20 * 300


def test_draw_follows_the_distribution(x64: None) -> None:
    logits = np.random.default_rng(3).normal(size=6)
    setting, samples = Sampling(temperature=0.8, top_p=0.9), 4000
    sampling = batch_sampling([setting] * samples)
    rows, places = np.broadcast_to(logits, (samples, 6)), np.full(samples, 3)
    drawn = draw(jnp.asarray(rows), sampling, keys_of(np.arange(samples)), jnp.asarray(places))
    p = reference(logits, setting)
    observed, expected = np.bincount(drawn, minlength=6), p * samples
    assert observed[p == 0].sum() == 0
    statistic = np.sum((observed - expected)[p > 0] ** 2 / expected[p > 0])
    # p > 1e-4 for 5 degrees of freedom or fewer.
    assert statistic < 25.7


def test_inversion_gives_each_place_its_share(x64: None) -> None:
    """Of a grid over both random numbers, as exactly as the grid can tell; 150 places are three blocks."""
    mass = np.random.default_rng(5).exponential(size=150) * (np.random.default_rng(6).random(150) < 0.5)
    mass[64:128] *= 9
    mass[128:140] = 0
    side = 200
    grid = (np.stack(np.meshgrid(*[np.arange(side)] * 2), axis=-1).reshape(-1, 2) + 0.5) / side
    drawn = np.asarray(invert(jnp.asarray(np.broadcast_to(mass, (side**2, 150))), jnp.array(grid)))
    share = np.bincount(drawn, minlength=150) / side**2
    assert share[mass == 0].sum() == 0 and (mass == 0).any()
    blocks = np.array([mass[start : start + 64].sum() for start in (0, 64, 128)]).repeat(64)[:150]
    # A grid tells each of the two shares, of the block and inside it, to one in `side`.
    allowed = (blocks / mass.sum() + mass / blocks + 1 / side) / side
    assert (np.abs(share - mass / mass.sum()) <= allowed).all()
    ends = invert(jnp.asarray(np.stack([mass, mass])), jnp.array([[0.0, 0.0], [1 - 1e-9, 1 - 1e-9]]))
    assert ends.tolist() == [np.flatnonzero(mass)[0], np.flatnonzero(mass)[-1]]


def test_inversion_finds_what_little_there_is() -> None:
    """Whatever a sum rounds to: one place with the smallest mass that float32 holds beside others with none."""
    mass = np.zeros((3, 200), np.float32)
    mass[np.arange(3), [0, 77, 199]] = np.finfo(np.float32).tiny
    # 1, which no generator gives, is as if the sums had rounded so that nothing were past its share.
    for number in (0.0, 0.5, 1 - 2**-23, 1.0):
        assert invert(jnp.asarray(mass), jnp.asarray(np.full((3, 2), number, np.float32))).tolist() == [0, 77, 199]


def test_inversion_takes_the_place_whose_share_begins_at_the_number() -> None:
    """Shares that no sum rounds, of one, two and four blocks: a place has its beginning, not its end."""
    rng = np.random.default_rng(7)
    for size in (50, 64, 100, 128, 250, 256):
        blocks = -(-size // 64)
        sizes = np.minimum(64, size - 64 * np.arange(blocks))
        mass = np.zeros((40, blocks, 64))
        for row, block in np.ndindex(40, blocks):
            mass[row, block, : sizes[block]] = rng.multinomial(64, rng.dirichlet(np.full(sizes[block], 0.3)))
        place = np.array([rng.choice(np.flatnonzero(row)) for row in mass.reshape(40, -1)])
        of_row, block = np.arange(40), place // 64
        begins = (np.cumsum(mass, axis=2) - mass).reshape(40, -1)[of_row, place] / 64
        lasts = begins + (mass.reshape(40, -1)[of_row, place] - 0.5) / 64
        flat = jnp.asarray(mass.reshape(40, -1)[:, :size], jnp.float32)
        for of_block, inside in ((block, begins), (block + 0.99, lasts)):
            numbers = jnp.asarray(np.stack([of_block / blocks, inside], axis=1), jnp.float32)
            assert invert(flat, numbers).tolist() == place.tolist(), size


# (size, count): around the size at which `best_logits` begins to look at blocks, with whole and ragged last ones, far
# above it, and as small as can be.
BEST = [
    (size, count)
    for count in (1, 2, 3, 5, 10)
    for size in (count, 256 * count - 1, 256 * count, 256 * count + 1, 256 * count + 63, 5000)
]


def awkward_rows(size: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of eighths, which bfloat16 holds exactly, in which equals stand together, apart, and at either end."""
    few = rng.integers(-3, 4, (2, size)) / 8
    lonely = np.full((4, size), -np.inf)
    lonely[0, rng.integers(size, size=3)] = 1.0
    lonely[1, [0, size - 1]] = 2.0
    lonely[2, -2:] = 0.5
    # One of each block, all equal, and a better one in the last.
    spread = np.full((2, size), -2.0)
    spread[:, 5::64] = 1.0
    spread[1, -1] = 3.0
    cut = np.where(rng.random((2, size)) < 0.5, -np.inf, rng.integers(-99, 99, (2, size)) / 8)
    ramp = np.arange(size)[None] // 37 % 128 / 8
    return np.concatenate([few, lonely, spread, cut, np.zeros((1, size)), ramp, -ramp])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_best_logits_are_those_of_a_stable_sort(x64: None, dtype) -> None:
    """At every size, by blocks or not: best first, of equals the smaller first, none twice, none beyond the end."""
    rng = np.random.default_rng(11)
    rows = {size: awkward_rows(size, rng) + 0.0 for size, _ in BEST}

    @jax.jit
    def found(rows):
        return [best_logits(rows[size], count) for size, count in BEST]

    answers = found({size: jnp.asarray(x, dtype) for size, x in rows.items()})
    order = {size: np.argsort(-x, axis=1, kind="stable") for size, x in rows.items()}
    for (size, count), (values, tokens) in zip(BEST, answers, strict=True):
        wanted = order[size][:, :count]
        assert tokens.dtype == jnp.int32 and values.dtype == dtype
        np.testing.assert_array_equal(tokens, wanted, err_msg=f"{count} of {size}")
        np.testing.assert_array_equal(
            values, np.take_along_axis(rows[size], wanted, axis=1), err_msg=f"{count} of {size}"
        )


def test_best_tokens_takes_any_axes_before_the_last() -> None:
    x = np.random.default_rng(12).integers(-9, 9, (2, 3, 700)).astype(np.float32)
    wanted = np.argsort(-x, axis=-1, kind="stable")

    @jax.jit
    def found(x, row, few):
        return [(best_tokens(x, count), best_tokens(row, count)) for count in (1, 2, 4)], best_tokens(few, 3)

    answers, of_few = found(jnp.asarray(x), jnp.asarray(x[1, 2]), jnp.array([0.0, 3.0, 1.0, 3.0]))
    for count, (of_all, of_row) in zip((1, 2, 4), answers, strict=True):
        assert np.array_equal(of_all, wanted[..., :count]) and np.array_equal(of_row, wanted[1, 2, :count])
    assert of_few.tolist() == [1, 3, 2]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16, jnp.int32])
def test_argmax_and_top_k_take_the_first_of_equals(x64: None, dtype) -> None:
    rng = np.random.default_rng(13)
    rows = [rng.integers(-3, 4, (20, size)) for size in (1, 2, 65, 300)]
    ends = np.array([[-np.inf, -np.inf, 0.0], [-np.inf] * 3, [1.0, np.inf, np.inf]])

    @jax.jit
    def found(rows):
        return [(argmax(x), top_k(x, min(x.shape[1], 7 if len(x) == 20 else 2))) for x in rows]

    given = rows if dtype == jnp.int32 else [*rows, ends]
    for x, (best, (values, places)) in zip(given, found([jnp.asarray(x, dtype) for x in given]), strict=True):
        order = np.argsort(-x, axis=1, kind="stable")[:, : values.shape[1]]
        assert np.array_equal(best, np.argmax(x, axis=1))
        assert places.dtype == jnp.int32 and np.array_equal(places, order)
        assert np.array_equal(values, np.take_along_axis(x, order, axis=1))


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        (dict(temperature=-0.1), "temperature must be 0, or from 1e-6 to 1e6, got -0.1"),
        (dict(temperature=float("nan")), "temperature must be"),
        (dict(top_k=-1), "top_k must be"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(top_p=1.1), "top_p must be"),
        (dict(min_p=1.0), "min_p must be"),
    ],
)
def test_settings_out_of_range(setting: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Sampling(**setting)
