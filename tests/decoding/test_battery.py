"""What every drafter must prove: the seven items of losslessness, in float64, on tiny random models.

With TANDEM_TRAINED=DIR, the same on a trained target and the drafters trained on it: those that `scripts/stories.sh
--out DIR` leaves there.

A new drafter joins by adding its name in `drafter_cases.py`; nothing here knows any drafter by name, except where a
construction is shown to be caught.

What is compiled is most of what the battery costs, so every item decodes with the same programs: one shape of batch and
cache, prompts in chunks of one size, recording always on (`Recorder`). A drafter adds its loop in two sampling modes,
its `ingest`, its replay, and what it alone needs. One drafter each has batches of one row, a third sampling mode, and
samples where there are latents.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import loop
from decoding.cache import SLOTS
from decoding.drafter import TargetView
from decoding.drafters.hydra import Hydra
from decoding.generate import generate
from decoding.place import Place
from decoding.replay import is_replayable, replay_acceptance
from decoding.request import Request
from decoding.sampling import Sampling, SamplingParameters, batch_sampling
from decoding.stats import Counters
from decoding.text import Text
from decoding.trees import SAMPLED_RULES, Topology, chain
from models.errors import UserError
from models.heads.hydra import HydraHeads
from tests.decoding.battery import (
    CAPACITY,
    PROMPTS,
    SAMPLINGS,
    SHORTER,
    augmented_run,
    blank,
    case,
    cut_after,
    decode,
    first_ends,
    full_limits,
    long_run,
    long_sampled_run,
    models,
    prefilled,
    programs,
    steps,
    target,
)
from tests.decoding.compiled_text import HOST, inside_loops, shapes_for_arrays, whole_copies
from tests.decoding.drafter_cases import (
    CASES,
    LOPSIDED,
    VARIANTS,
    Oracle,
    each_drafter,
    learns_from_rejected_nodes,
    read_by,
)

pytestmark = pytest.mark.usefixtures("x64")

RUN_LONG = True  # Thousands of steps per program: see conftest.py.
GROUP_BY = "name"  # Drafters share the target's programs alone, which the cache of compiled programs carries over.


# 1. Greedy output is plain greedy output.


def test_baseline_is_the_argmax_of_a_whole_forward_and_lively() -> None:
    baseline = long_run("none").tokens
    for prompt, new in zip(PROMPTS, baseline, strict=True):
        logits = target().apply([[*prompt, *new][:400]]).logits[0]
        assert np.array_equal(np.argmax(logits[len(prompt) - 1 : -1], axis=-1), new[: 400 - len(prompt)])
        assert len({tuple(new[i : i + 3]) for i in range(len(new) - 2)}) > 60


@each_drafter
def test_greedy_fills_ragged_rows_with_the_plain_text(name: str) -> None:
    drafter, _ = case(name)
    limits = full_limits(drafter)
    generation = long_run(name)
    for row, plain in enumerate(long_run("none").tokens):
        assert len(generation.tokens[row]) == limits[row]
        assert generation.tokens[row] == plain[: limits[row]]
        assert generation.stats[row].committed == limits[row] - 1
    assert max(stats.steps for stats in generation.stats) >= 200
    if drafter.max_depth:
        accepted = sum(stats.accepted_by_depth for stats in generation.stats)
        assert accepted[0] > 100 and accepted[1] > 8, "a case whose drafts are never accepted proves nothing"


# A table, and, with `-m slow`, heads with a cache of their own, as test_rows.py has them, and a draft model, whose
# cache is an earlier one's.
@pytest.mark.parametrize(
    "name", ["token_recycling", *(pytest.param(n, marks=pytest.mark.slow) for n in ("hydra++", "draft chain"))]
)
def test_greedy_of_one_row(name: str) -> None:
    assert decode(name, PROMPTS[:1], max_new_tokens=400).tokens[0] == long_run("none").tokens[0][:400]


@each_drafter
def test_one_slot_less_is_an_error(name: str) -> None:
    drafter, params = case(name)
    arguments = dict(drafter=drafter, drafter_params=params, max_new_tokens=full_limits(drafter))
    with pytest.raises(UserError, match=rf"cache of {CAPACITY - 1} slots is too small: the request needs {CAPACITY}"):
        generate(target(), PROMPTS, capacity=CAPACITY - 1, **arguments)


@each_drafter
def test_stops_at_every_tree_position(name: str) -> None:
    # Drafts that are copied from the text repeat three tokens that it had; with those before them they are new.
    limit, size, rows = 300, 6, range(3)
    plain = [text[:limit] for text in long_run("none").tokens]
    uncut = [writers[:limit] for writers in long_run(name).writers]
    depths = range(case(name)[0].max_depth + 1)
    news = [first_ends(plain[row], size) for row in rows]
    stops = [
        new[:2] + [end for depth in depths for end in [end for end in new if uncut[row][end - 1] == depth][:1]]
        for row, new in zip(rows, news, strict=True)
    ]
    ended: set[int] = set()
    for ends in itertools.zip_longest(*stops):
        met = {row: end for row, end in zip(rows, ends, strict=True) if end}
        stop = [plain[row][end - size : end] for row, end in met.items()]
        # No row writes much more than shows what becomes of it: this test's time is that of its steps.
        limits = [min(limit, met[row] + 5 if row in met else 25) for row in range(len(PROMPTS))]
        cut = [min((cut_after(text[:end], s) for s in stop), key=len) for text, end in zip(plain, limits, strict=True)]
        # Where another row's stop comes first, that is what ends it.
        ended |= {uncut[row][end - 1] for row, end in met.items() if len(cut[row]) == end}
        generation = decode(name, max_new_tokens=limits, stop=stop)
        assert generation.tokens == cut
        for tokens, writers, stats, whole in zip(
            generation.tokens, generation.writers, generation.stats, uncut, strict=True
        ):
            assert writers == whole[: len(tokens)] and stats.committed == len(tokens) - 1
            assert stats.accepted_by_depth.tolist() == [writers.count(depth) for depth in depths[1:]]
    assert ended >= {*depths[:3]}


@each_drafter
def test_stop_may_be_the_first_token(name: str) -> None:
    first = long_run("none").tokens[0][0]
    generation = decode(name, max_new_tokens=50, stop=[[first]])
    assert generation.tokens == [cut_after(text[:50], [first]) for text in long_run("none").tokens]
    assert generation.tokens[0] == [first] and generation.stats[0].steps == 0


def changed(change, params):
    """Parameters through `change`, but for integers: those are a draft vocabulary."""
    return jax.tree.map(lambda leaf: change(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params)


# 2. Sampled output: under `match` and `point` it is the plain sampled output, token for token; under other rules a seed
# still names one text. That it follows the target distribution is tested in test_losslessness.py.


# Ranked drafts are the same in both sampling modes. The loop that samples behind these runs with `-m slow`, and by
# default behind another of their kind: Hydra++, token recycling, EAGLE-3; and ranked slots of blocks in
# test_losslessness.py.
RANKED = ("medusa", "prompt_lookup", "dflash", "falcon")


def in_modes(slow: dict[bool, set[str]]):
    """Every drafter, greedy and sampled; some of them, by mode, with `-m slow`."""
    cases = [
        pytest.param(name, sampled, marks=[pytest.mark.slow] if name in slow[sampled] else [])
        for sampled in (False, True)
        for name in CASES
    ]
    return pytest.mark.parametrize(("name", "sampled"), cases)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS + RANKED else []) for name in CASES]
)
def test_sampled_output_is_that_of_the_seed(name: str) -> None:
    generation, plain = long_sampled_run(name), long_sampled_run("none")
    if case(name)[0].rule(greedy=False) in SAMPLED_RULES:
        again = decode(name, PROMPTS[::-1], max_new_tokens=130, sampling=SAMPLINGS[::-1], seeds=[1, 4, 1, 3])
        assert again.tokens == [text[:130] for text in generation.tokens[::-1]]
        assert generation.tokens != plain.tokens
    else:
        assert generation.tokens == plain.tokens
    assert all(len(set(tokens)) > 3 for tokens in generation.tokens)
    if case(name)[0].max_depth:
        assert sum(generation.stats[1:], generation.stats[0]).acceptance_length > 1.05


# And the same where latents of a coprocessor lie in the cache beside the text: each of the others is like one of these,
# and where rows sample, the latents are read by the same code.
ON_LATENTS = {False: {"hydra++", "token_recycling", "eagle3", "dflash"}, True: {"hydra++"}}


@in_modes({sampled: {*CASES}.difference(names) for sampled, names in ON_LATENTS.items()})
def test_latents_leave_drafts_lossless(name: str, sampled: bool) -> None:
    drafter, _ = case(name)
    made, plain = augmented_run(name, sampled), augmented_run("none", sampled)
    if sampled and drafter.rule(greedy=False) in SAMPLED_RULES:
        assert augmented_run(name, sampled, backwards=True).tokens == made.tokens[::-1]
        assert made.tokens != plain.tokens
    else:
        assert made.tokens == plain.tokens
    if sampled:
        return
    assert made.augmentations == plain.augmentations == [6, 4, 6, 4]
    assert plain.tokens[0] != long_run("none").tokens[0][:60], "latents that change nothing prove nothing"
    for stats in made.stats:
        assert stats.steps < stats.committed or not drafter.max_depth


@pytest.mark.parametrize("name", ["eagle3", "dflash", "draft chain"])
def test_who_reads_text_alone_drafts_as_without_latents(name: str) -> None:
    # Some of the slots in use are not of text: what the drafter has read stands where it was trained to find it.
    (seen, request), (drafter, _) = steps(name), case(name)
    now = seen[len(seen) // 2].before
    state = dataclasses.replace(blank(name, now.tokens), drafter=jax.device_put(now.drafter))
    state = dataclasses.replace(state, text=dataclasses.replace(state.text, length=jnp.asarray(now.length)))

    root = jnp.asarray(now.tokens[np.arange(len(now.tokens)), now.length])

    both = models(name)  # Kept: made while tracing, it would keep what is traced.

    @jax.jit
    def draft(slots):
        now = dataclasses.replace(state, slots=slots)
        network = drafter.network(both.drafter_params, both.view(now, request), now.drafter["inner"])
        return loop.draft(both, now, request), network.begin(root, 4)[0].logits

    plain, behind = (jax.tree.leaves(draft(jnp.asarray(now.length) + latents)) for latents in (0, 5))
    for one, other in zip(plain, behind, strict=True):
        np.testing.assert_array_equal(one, other)


# 3. Garbage is exact, the truth is accepted, wherever it stands.


@each_drafter
def test_garbage_is_exact(name: str) -> None:
    params = case(name)[1]
    rng = np.random.default_rng(1)
    garbage = changed(lambda leaf: jnp.asarray(5 * rng.normal(size=leaf.shape), leaf.dtype), params)
    generation = decode(name, params=garbage, max_new_tokens=120)
    assert generation.tokens == [text[:120] for text in long_run("none").tokens]


def oracle(tree: Topology, rank: int) -> dict[str, Any]:
    """Arguments of `generate` for a drafter that has read the plain texts."""
    text = np.zeros((len(PROMPTS), CAPACITY + 8), np.int32)
    for row, (prompt, new) in enumerate(zip(PROMPTS, long_run("none").tokens, strict=True)):
        text[row, : len(prompt) + len(new)] = [*prompt, *new]
    drafter = Oracle(tree, target().config.vocab_size, rank)
    return dict(drafter=drafter, drafter_params=jnp.array(text), capacity=CAPACITY)


@pytest.mark.parametrize(("tree", "rank"), [(chain(4), 0), (LOPSIDED, 1)], ids=["first", "second"])
def test_perfect_drafter_is_accepted_to_full_depth(tree: Topology, rank: int) -> None:
    depth, steps = tree.max_depth, 50
    size = 1 + steps * (depth + 1)
    generation = generate(target(), PROMPTS, max_new_tokens=size, **oracle(tree, rank))
    true_path = [i + 1 for i, path in enumerate(tree.paths) if set(path) == {rank}]
    assert len(true_path) == depth
    for row, stats in enumerate(generation.stats):
        assert generation.tokens[row] == long_run("none").tokens[row][:size]
        assert generation.writers[row] == [0] + [*range(1, depth + 1), 0] * steps
        assert stats.steps == steps and stats.accepted_by_depth.tolist() == [steps] * depth
        assert stats.acceptance_length == depth + 1
        assert np.flatnonzero(stats.accepted_by_node).tolist() == true_path
        assert set(stats.accepted_by_node[true_path]) == {steps}


def test_stops_and_limits_cut_a_perfect_path_anywhere() -> None:
    plain, arguments = long_run("none").tokens, oracle(chain(4), 0)
    ends = first_ends(plain[0][:60])[:12]
    assert {(end - 2) % 5 for end in ends} == {*range(5)}, "every depth, the bonus token included"
    for end in ends:
        stop = plain[0][end - 3 : end]
        stopped = generate(target(), PROMPTS, max_new_tokens=200, stop=[stop], **arguments)
        assert stopped.tokens == [cut_after(text[:200], stop) for text in plain]
        limited = generate(target(), PROMPTS, max_new_tokens=end, **arguments)
        assert limited.tokens == [text[:end] for text in plain]
        for generation in (stopped, limited):
            expected = [generation.writers[0].count(depth) for depth in range(1, 5)]
            assert len(generation.tokens[0]) == end and generation.stats[0].committed == end - 1
            assert generation.stats[0].accepted_by_depth.tolist() == expected


@each_drafter
def test_branches_other_than_the_first_are_accepted(name: str) -> None:
    drafter, _ = case(name)
    if not is_replayable(drafter):
        pytest.skip("has no static tree")
    visits = sum(stats.accepted_by_node for stats in long_run(name).stats)
    paths = drafter.ranked_tree.paths
    ranks = {path[0] for path, count in zip(paths, visits[1:], strict=True) if count}
    assert ranks == {path[0] for path in paths}
    assert any(count and path[-1] for path, count in zip(paths, visits[1:], strict=True) if len(path) > 1)


# 4 and 5. What a step computes is what a whole forward computes; what it leaves behind is what prefill would.


@each_drafter
def test_every_node_scores_like_a_plain_forward_over_its_root_path(name: str) -> None:
    paths, scores, checked = [], [], 0
    for step in steps(name)[0]:
        recorded = step.after.drafter
        for row in np.flatnonzero(~step.before.done):
            text = step.before.tokens[row, : step.before.length[row]].tolist()
            ancestors = recorded["ancestors"][row]
            # The path to a leaf shows all nodes on it.
            for leaf in np.flatnonzero(ancestors.sum(axis=0) == 1):
                nodes = np.flatnonzero(ancestors[leaf])
                for depth, node in enumerate(nodes):
                    assert np.array_equal(np.flatnonzero(ancestors[node]), nodes[: depth + 1])
                paths.append(text + recorded["tokens"][row, nodes].tolist())
                scores.append(recorded["logits"][row, nodes])
            checked += len(ancestors)
    assert checked > 25 * case(name)[0].max_nodes
    for first in range(0, len(paths), 128):  # In pieces of one shape, for one program to serve every drafter.
        part = paths[first : first + 128]
        padded = np.zeros((128, 48), np.int32)
        for row, path in enumerate(part):
            padded[row, : len(path)] = path
        logits = np.asarray(target().apply(padded).logits)
        for row, path, found in zip(logits, part, scores[first : first + 128], strict=False):
            np.testing.assert_allclose(found, row[len(path) - len(found) : len(path)], rtol=0, atol=1e-9)


@each_drafter
def test_cache_after_commit_is_a_fresh_prefill(name: str) -> None:
    seen, _ = steps(name)
    rows = target().apply(seen[-1].after.tokens[:, :64]).rows
    for step in seen:
        for layer, fresh in zip(step.after.cache, rows, strict=True):
            for kind, axis in SLOTS.items():
                for row, length in enumerate(step.after.length):
                    text_alone = [np.asarray(x[kind][row]).take(range(length), axis - 1) for x in (layer, fresh)]
                    np.testing.assert_allclose(*text_alone, rtol=0, atol=1e-9)


def visible(leaf: np.ndarray, length: np.ndarray) -> np.ndarray:
    """A leaf of a drafter's state without cache slots past the text, which nothing reads."""
    if CAPACITY not in leaf.shape:
        return leaf
    places = np.arange(CAPACITY).reshape([-1 if size == CAPACITY else 1 for size in leaf.shape])
    return np.where(places < length[:, None, None, None], leaf, 0)


@each_drafter
def test_drafter_state_is_that_of_the_committed_text(name: str) -> None:
    drafter, _ = case(name)
    if learns_from_rejected_nodes(drafter):
        pytest.skip("its state depends on the steps, too: see the replay of the same steps")
    seen, request = steps(name)
    for step in (seen[0], seen[len(seen) // 2], seen[-1]):
        text, length = step.after.tokens, step.after.length
        rebuilt = prefilled(name, text, request, [(first, length) for first in (0, 16, 32)])[0].drafter["inner"]
        kept = step.after.drafter["inner"]
        assert jax.tree.structure(kept) == jax.tree.structure(rebuilt)
        read = read_by(drafter, length)
        for ours, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(rebuilt), strict=True):
            expected = visible(np.asarray(theirs), read)
            np.testing.assert_allclose(visible(ours, read), expected, rtol=0, atol=1e-9)


@each_drafter
def test_replay_of_the_same_steps_rebuilds_the_drafter_state(name: str) -> None:
    """From a prefill in other chunks, and with rubbish wherever the text buffer and the cache hold no text."""
    drafter, _ = case(name)
    seen, request = steps(name)
    first = seen[0].before
    text = np.where(np.arange(CAPACITY) < first.length[:, None], first.tokens, 11)
    # Four tokens, then the rest, in chunks of the usual size of which not all is read.
    state, hidden = prefilled(name, text, request, [(0, np.minimum(first.length, 4)), (4, first.length)])
    replayed = loop.choose_root(models(name), state, hidden, request).drafter
    for step in seen:
        before, length = step.before, step.before.length[:, None]
        committed = {kind: np.arange(CAPACITY) < length[:, :, None, None] for kind in SLOTS}
        committed["v"] = committed["v"].swapaxes(2, 3)
        empty = blank(name, np.where(np.arange(CAPACITY) <= length, before.tokens, 11))
        dirty = dataclasses.replace(
            empty,
            text=dataclasses.replace(empty.text, length=jnp.array(before.length), done=jnp.array(before.done)),
            slots=jnp.array(before.length),
            cache=[{k: jnp.array(np.where(committed[k], layer[k], 1e3)) for k in SLOTS} for layer in before.cache],
            drafter=replayed,
        )
        after = loop.run(models(name), dirty, request, np.int32(1))
        replayed = jax.tree.map(np.array, after.drafter)
        for ours, theirs in zip(*map(jax.tree.leaves, (replayed["inner"], step.after.drafter["inner"])), strict=True):
            ends = read_by(drafter, step.after.length)
            np.testing.assert_allclose(visible(ours, ends), visible(theirs, ends), rtol=0, atol=1e-9)
        replayed = jax.device_put(replayed)


# 6. The training-time forward finds the same hits.


@in_modes({False: {*VARIANTS}, True: {*VARIANTS, *RANKED}})
def test_teacher_forced_replay_counts_the_same_hits(name: str, sampled: bool) -> None:
    drafter, params = case(name)
    if not is_replayable(drafter):
        pytest.skip("has no training-time forward, or a tree that is not static")
    generation = long_sampled_run(name) if sampled else decode(name, max_new_tokens=SHORTER)
    counted = [stats.accepted_by_depth.tolist() for stats in generation.stats]
    # Padded to one length, for one program to serve both.
    length = max(map(len, PROMPTS)) + max(SHORTER)
    replay = functools.partial(replay_acceptance, target(), drafter, generation=generation, prompts=PROMPTS)
    assert replay(params=params, length=length).tolist() == counted
    if sampled:  # One of the two is enough for what follows.
        return

    def waves(leaf):
        return np.asarray(leaf) + 0.1 * np.cos(np.arange(leaf.size)).reshape(leaf.shape)

    other = changed(lambda leaf: jnp.asarray(waves(leaf), leaf.dtype), params)
    assert replay(params=other, length=length).tolist() != counted


def test_heads_read_embeddings_that_are_not_scaled() -> None:
    """On a family that scales its inputs: the drafter, and the replay of its decode."""
    scaled = dataclasses.replace(target(), config=dataclasses.replace(target().config, embed_scale=True))
    drafter, params = Hydra(HydraHeads(num_heads=2), Topology(((0,), (1,), (1, 0)))), case("hydra")[1]
    params = {**params, "heads": params["heads"][:2]}
    generation = generate(scaled, PROMPTS, drafter=drafter, drafter_params=params, max_new_tokens=60)
    counted = [stats.accepted_by_depth.tolist() for stats in generation.stats]
    assert replay_acceptance(scaled, drafter, params, PROMPTS, generation).tolist() == counted

    @jax.jit
    def drafts_and_scores(root, feature):
        empty = Place.of_text(jnp.zeros(12, jnp.int32)), jnp.zeros((12, 1), jnp.int32)
        view = TargetView(scaled.config, scaled.params, [], *empty, batch_sampling([Sampling()] * 12))
        tree, _ = drafter.draft(drafter.for_decoding(params), view, {"feature": feature}, root, None)
        path = scaled.params["embed"]["embedding"][root][:, None]
        return tree.tokens, drafter.heads.vocab(params, 0, drafter.heads.hidden(params, 0, feature, path))

    feature = np.random.default_rng(0).normal(size=(12, scaled.config.width))
    tokens, scores = map(np.asarray, drafts_and_scores(jnp.arange(12), jnp.asarray(feature)))
    children = tokens[:, drafter.ranked_tree.level(1)]
    assert np.array_equal(children, np.argsort(-scores, axis=-1)[:, : children.shape[1]])


# 7. One compilation per bucket, which talks to no host and copies no cache.


@each_drafter
def test_one_compilation_per_bucket(name: str) -> None:
    plain, sampled = long_run(name), name in RANKED or long_sampled_run(name).tokens
    before = programs()
    decode(name, [[5], [6, 7], [8], [9] * 12], max_new_tokens=[3, 40, 5, 1], stop=[[1], [2, 3], [4] * 5])
    decode(name, max_new_tokens=9, stop=[], stream_every=3, on_tokens=lambda *_: None, seeds=[9, 8, 7, 6])
    if name not in RANKED:
        decode(name, max_new_tokens=7, sampling=Sampling(temperature=2.0, top_p=0.3), seeds=11)
    assert programs() == before
    assert plain.tokens and sampled


# A small loop, and, with `-m slow`, one that draws its drafts.
@pytest.mark.parametrize("name", ["token_recycling", pytest.param("draft chain", marks=pytest.mark.slow)])
def test_another_sampling_mode_is_another_loop_and_nothing_else(name: str) -> None:
    long_sampled_run(name)
    before = programs()
    decode(name, max_new_tokens=7, sampling=Sampling(temperature=2.0, min_p=0.3))
    assert programs() == [before[0] + 1, *before[1:]]


@each_drafter
def test_loop_stays_on_the_device_and_copies_no_cache(name: str) -> None:
    """Read off the program that decodes: lowered again it is the one that was compiled."""
    request = steps(name)[1]
    if name in RANKED:
        sampling = request.sampling
    else:
        long_sampled_run(name)
        sampling = batch_sampling(SAMPLINGS)
    state = blank(name, np.zeros((len(PROMPTS), 1), np.int32))
    arguments = models(name), state, dataclasses.replace(request, sampling=sampling), np.int32(1)
    with shapes_for_arrays(loop.Models, loop.DecodeState, Text, Counters, Request, SamplingParameters):
        text = loop.run.lower(*arguments).compile().as_text()
    assert text.count("while(") >= 1 and inside_loops(text)
    config = target().config
    cache = len(PROMPTS), config.num_kv_heads, CAPACITY, config.head_dim
    assert f"f64[{','.join(map(str, cache))}]" in text
    assert not HOST.findall(text)
    assert whole_copies(text, "f64", math.prod(cache)) == []
