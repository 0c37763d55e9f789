"""Many augmentation points at once against one at a time, decoded from a cache of its own; what is learnt and what is
not; files, evaluations and devices."""

import dataclasses
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.coprocessors import load_coprocessor
from eval.text.behind import likelihoods_behind
from models import attention, coprocessor, transformer
from models.coprocessor import CoprocessorConfig
from models.errors import UserError
from models.formats.target import load_target
from models.formats.tokenizer import Tokenizer
from models.layout import Layout
from tests.noise import drawn
from tests.train.points import AT, FLAGS, LENGTH, ROWS, TURNS, compare, one_at_a_time
from train import trainer
from train.data.corpus import open_corpus
from train.objectives import pieces
from train.objectives.coprocessor import CoprocessorObjective, CoprocessorTraining, places_at
from train.objectives.objective import Compute


@pytest.fixture
def batch():
    """Packed documents of random tokens."""
    rng = np.random.default_rng(0)
    segments = np.zeros((len(ROWS), LENGTH), np.int32)
    for row, lengths in zip(segments, ROWS, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    tokens = np.where(segments > 0, rng.integers(0, 280, segments.shape), 0).astype(np.int32)
    return {name: jnp.asarray(x) for name, x in {"tokens": tokens, "segments": segments, "mask": segments > 0}.items()}


@pytest.fixture
def setting(job, batch):
    """`setting("lora")`: objective, random coprocessor, frozen target, a batch and places in it, all float64.

    The target's second layer has a window, its scores a cap.
    """

    def make(name):
        config = job("coprocessor", objective={"coprocessor": {"num_latents": 3, **FLAGS[name]}})
        objective = CoprocessorObjective(config.objective, Tokenizer.load(config.objective.target))
        special = {"windows": (None, 4), "attention_softcap": 3.0, "embed_scale": True}
        objective.model = dataclasses.replace(objective.model, **special)
        shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.base)
        params, frozen = (drawn(as_float64(tree), 0.3) for tree in (shapes, objective.base))
        lag = jnp.asarray([[1, 2, 0, 2, 1], [0, 1, 2, 0, 1]], jnp.int32) * bool(FLAGS[name].get("max_lag"))
        kept = jnp.ones((2, 5), bool).at[1, 3].set(False)
        places = places_at(batch, batch["segments"] > 0, jnp.asarray(AT, jnp.int32), kept, lag, 4)
        return objective, params, frozen, batch, places

    return make


def as_float64(shapes):
    """Shapes of parameters, wider."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), shapes)


def test_packed_points_that_read_features_are_what_decoding_one_at_a_time_finds(x64, setting):
    objective, params, frozen, batch, places = setting("last_layer")
    packed = jax.jit(objective.passes)(params, frozen, batch, places)
    compare(packed, one_at_a_time(objective, params, frozen, batch, places), places)


def test_packed_points_are_what_decoding_one_at_a_time_finds_and_see_no_others(x64, setting, monkeypatch):
    objective, params, frozen, batch, places = setting("full")
    # Some points take turns.
    monkeypatch.setattr(attention, "BLOCK", TURNS)
    passes, kept = jax.jit(objective.passes), np.asarray(places.kept)
    packed = passes(params, frozen, batch, places)
    compare(packed, one_at_a_time(objective, params, frozen, batch, places), places)

    # What stands behind a point does not reach its latents, nor does another document or another point.
    late = {**batch, "tokens": batch["tokens"].at[:, 8:].add(1)}
    moved = np.any(np.asarray(passes(params, frozen, late, places).latents != packed.latents), axis=(2, 3))
    np.testing.assert_array_equal(moved, (np.asarray(AT) >= 8) & kept)
    early = {**batch, "tokens": batch["tokens"].at[0, :9].add(1).at[1, :2].add(1)}
    moved = np.any(np.asarray(passes(params, frozen, early, places).latents != packed.latents), axis=(2, 3))
    np.testing.assert_array_equal(moved, [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    others = places._replace(at=places.at.at[:, 1].set(2), labels=places.labels.at[:, 1].add(1))
    again = passes(params, frozen, batch, others)
    for ours, theirs in ((again.latents, packed.latents), (again.hidden, packed.hidden)):
        same = np.all(np.asarray(ours == theirs), axis=(2, 3))
        np.testing.assert_array_equal(same, [[True, False, True, True, True]] * 2)

    # All of the copy is learnt.
    def loss(params, frozen):
        return objective.loss_at(places, params, frozen, batch)[0]

    slopes, of_target = jax.jit(jax.grad(loss, (0, 1)), compiler_options=trainer.unoptimised())(params, frozen)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(of_target))
    assert set(slopes["network"]) == {"layers", "final_norm"}
    assert all(np.any(leaf, axis=tuple(range(1, leaf.ndim))).all() for leaf in jax.tree.leaves(slopes))


def test_slopes_reach_all_that_is_learnt_and_nothing_of_the_target(x64, setting, monkeypatch):
    objective, params, frozen, batch, places = setting("lora")

    def slopes(compute, told):
        objective.prepare(compute)

        def loss(params, frozen):
            total, weight = objective.loss_at(places, params, frozen, batch)
            return total / weight, told(params, frozen, batch, places)

        return jax.device_get(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, frozen))

    (value, passes), (learnt, of_target) = slopes(Compute("float32"), objective.passes)
    compare(passes, one_at_a_time(objective, params, frozen, batch, places), places)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(of_target))
    assert not np.any(learnt["network"].pop("latent")["scale"])
    assert all(np.any(leaf, axis=tuple(range(1, leaf.ndim))).all() for leaf in jax.tree.leaves(learnt))
    # In pieces, and computed again, it is the same.
    monkeypatch.setattr(attention, "BLOCK", TURNS)
    monkeypatch.setattr(pieces, "SCORES", 2 * 2 * 4 * 280)
    (again, _), (in_pieces, _) = slopes(Compute("float32", remat="layers"), lambda *_: None)
    assert value == pytest.approx(again, rel=1e-12)
    del in_pieces["network"]["latent"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-13), learnt, in_pieces)


@pytest.mark.parametrize("name", ["pause", "soft", "last_layer"])
def test_slopes_reach_all_that_a_baseline_learns(name, x64, setting):
    objective, params, frozen, batch, places = setting(name)

    def loss(params, frozen):
        return objective.loss_at(places, params, frozen, batch)[0]

    slopes, of_target = jax.jit(jax.grad(loss, (0, 1)), compiler_options=trainer.unoptimised())(params, frozen)
    assert set(slopes) == ({"soft", "network"} if name == "last_layer" else {"soft"})
    assert all(np.any(leaf, axis=tuple(range(1, leaf.ndim))).all() for leaf in jax.tree.leaves(slopes))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(of_target))


def test_fresh_latents_continue_the_text_or_repeat_its_last_token_and_none_change_nothing(x64, setting, batch):
    objective, params, frozen, _, _ = setting("full")
    model = objective.model
    tokens = jnp.asarray([[5, 9, 2]])
    soft = {"embedding": transformer.embed(model, frozen, tokens[0])}

    @jax.jit
    def run(frozen, params, text):
        """Around the fifth token of a text."""
        alone = transformer.forward(model, frozen, text, Layout.causal(1, LENGTH))
        points, found = coprocessor.Points(jnp.asarray([[4]]), jnp.asarray([[5]])), []
        for kind in ("full", "lora", "soft"):
            config = coprocessor.CoprocessorConfig(kind=kind, num_latents=3)
            fresh = {**coprocessor.init_params(config, model, frozen, jax.random.key(0)), "soft": soft}
            found.append(coprocessor.latents(config, fresh, model, frozen, alone.rows, points, text[:, 4:5]))
        config = dataclasses.replace(config, z_base="last_token")
        fresh = coprocessor.init_params(config, model, frozen, jax.random.key(0))
        based = coprocessor.latents(config, fresh, model, frozen, alone.rows, points, text[:, 4:5])[0, 0, -1]
        none = coprocessor.augmented(config, model, frozen, alone.rows, points, found[0][:, :, :0], text[:, None, 5:9])
        read = transformer.forward(model, frozen, jnp.concatenate([text[:, :5], tokens], axis=1), Layout.causal(1, 8))

        # And one that reads features of the text: as if these and the soft tokens were a text of its own.
        config = coprocessor.CoprocessorConfig(num_latents=3, reads="last_layer")
        rows = coprocessor.read_features(config, params, model, frozen, alone.hidden, Layout.causal(1, LENGTH))
        own = coprocessor.latents(config, params, model, frozen, rows, points, text[:, 4:5])
        inputs = jnp.concatenate([alone.hidden[:, :5], params["soft"]["embedding"][None]], axis=1)
        whole = transformer.forward(model, {**frozen, **params["network"]}, inputs, Layout.causal(1, 8))
        pairs = (none[:, 0], alone.hidden[:, 5:9]), (own[:, 0], whole.hidden[:, 5:])
        return found, read.hidden[:, 5:], *pairs, (based, transformer.embed(model, frozen, text[0, 4]))

    found, read, *pairs = run(frozen, params, batch["tokens"][1:])
    for ours, theirs in [*((z[0], read) for z in found), *pairs]:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)


def test_what_is_learnt_begins_as_it_says(x64, setting) -> None:
    """Soft tokens as embeddings of tokens, latents as large as embeddings are, adapters that add nothing, and a network
    from scratch as none that is there."""
    model, frozen = setting("full")[0].model, setting("full")[2]
    kinds = {kind: CoprocessorConfig(kind, num_latents=3, z_scale="match_rms") for kind in ("full", "scratch", "lora")}

    @jax.jit
    def begun(frozen):
        every = {kind: coprocessor.init_params(one, model, frozen, jax.random.key(0)) for kind, one in kinds.items()}
        return every, transformer.embed(model, frozen, jnp.arange(model.vocab_size))

    every, table = jax.device_get(begun(frozen))
    assert np.std(table[:, 0]) > 2 * np.std(frozen["embed"]["embedding"][:, 0]), "embeddings are scaled"
    for own in every.values():
        assert all((row == table).all(axis=1).any() for row in own["soft"]["embedding"])
        size = np.mean(np.sqrt(np.mean(table**2, axis=1)))
        np.testing.assert_allclose(own["network"]["latent"]["scale"], [size], rtol=1e-12)
    for part, names in every["lora"]["network"]["adapters"].items():
        for name, adapter in names.items():
            inputs = np.shape(frozen["layers"][part][name]["kernel"])[1]
            most = (6 / inputs) ** 0.5
            assert adapter["a"].shape[1] == inputs and not adapter["b"].any()
            assert 0.99 * most < -adapter["a"].min() <= most and 0.99 * most < adapter["a"].max() <= most
    copy, fresh = (every[kind]["network"] for kind in ("full", "scratch"))
    jax.tree.map(np.testing.assert_array_equal, copy["layers"], jax.device_get(frozen["layers"]))
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, copy)
    ours, theirs = (x["layers"]["mlp"]["up"]["kernel"] for x in (fresh, copy))
    assert not np.any(ours == theirs)


@pytest.mark.parametrize("labels", ["assistant", "all"])
def test_places_and_labels_are_those_that_are_learnt(labels, job, batch) -> None:
    """Latents stand before a label, and of the tokens ahead only labels of the same document count."""
    config = job("coprocessor", objective={"labels": labels, "places": LENGTH})
    objective = CoprocessorObjective(config.objective, Tokenizer.load(config.objective.target))
    batch = {**batch, "mask": jnp.asarray(np.random.default_rng(1).integers(0, 2, (2, LENGTH)), jnp.uint8)}
    places = jax.device_get(jax.jit(lambda batch: objective.places(batch, jax.random.key(0)))(batch))
    segments = np.asarray(batch["segments"])
    learnt = (np.asarray(batch["mask"]) > 0 if labels == "assistant" else np.ones_like(segments, bool)) & (segments > 0)
    for b in range(2):
        starts = [q for q in range(LENGTH - 1) if segments[b, q] == segments[b, q + 1] and learnt[b, q + 1]]
        assert places.at[b][places.kept[b]].tolist() == starts
        for q, counted in zip(starts, places.counted[b], strict=False):
            ahead = [q + 1 + a for a in range(4)]
            there = [p < LENGTH and segments[b, p] == segments[b, q] and learnt[b, p] for p in ahead]
            assert counted.tolist() == there
    assert not places.counted[~places.kept].any()


def test_evaluation_compares_the_same_labels_with_and_without_latents(x64, setting):
    objective, params, frozen, batch, _ = setting("full")
    objective._config = dataclasses.replace(objective._config, places=LENGTH)

    @jax.jit
    def run(params, frozen, batch):
        """All places, read in the plain way."""
        places = objective.places(batch, None)
        passes = objective.passes(params, frozen, batch, places)
        layout = Layout.causal(2, LENGTH, batch["segments"], objective.compute.attention)
        same = passes.of_text == transformer.forward(objective.model, frozen, batch["tokens"], layout).hidden
        logits = [transformer.head(objective.model, frozen, x) for x in (passes.hidden, passes.of_text)]
        scores = [jax.nn.log_softmax(x) for x in logits]
        measured = [
            likelihoods_behind(
                objective.model, network, 4, frozen, params, batch["tokens"], batch["segments"], places.at
            )
            for network in (objective._config.coprocessor, None)
        ]
        return places, same, scores, measured, objective.evaluate(params, frozen, batch)

    places, same, (augmented, alone), measured, sums = jax.device_get(run(params, frozen, batch))
    assert np.all(same)
    # Every token but the last of its document is a place, and nothing behind its document or the row counts.
    segments = np.asarray(batch["segments"])
    expected = {q for q in range(LENGTH - 1) if segments[1, q] == segments[1, q + 1] > 0}
    assert set(places.at[1][places.kept[1]].tolist()) == expected
    total = {name: np.zeros(4) for name in ("loss", "base")}
    count = np.zeros(4)
    for b, m in zip(*np.nonzero(places.kept), strict=True):
        for a in range(4):
            q = places.at[b, m] + 1 + a
            if q < LENGTH and segments[b, q] == segments[b, places.at[b, m]]:
                token = int(batch["tokens"][b, q])
                count[a] += 1
                expected = augmented[b, m, a, token], alone[b, q - 1, token]
                total["loss"][a] -= expected[0]
                total["base"][a] -= expected[1]
                assert [found[b, m, a] for found, _ in measured] == pytest.approx(expected, rel=1e-12)
    for _, there in measured:
        np.testing.assert_array_equal(there[places.kept], places.counted[places.kept])
    for name, of in total.items():
        for a in range(4):
            np.testing.assert_allclose(sums[f"{name}_{a + 1}"], (of[a], count[a]), rtol=1e-10)
    shown = objective.report({name: value / weight for name, (value, weight) in sums.items()})
    assert shown["perplexity_2"] == pytest.approx(np.exp(total["loss"][1] / count[1]))
    gain = np.exp((total["loss"] - total["base"]) / count) - 1
    assert [shown[f"change_{a + 1}"] for a in range(4)] == pytest.approx(100 * gain)
    # An offset without labels is left out.
    few = objective.report({f"{name}_{a + 1}": float(a) for name in ("loss", "base", "labels") for a in range(4)})
    assert few["loss"] == 2 and {name[-1] for name in few if name[-1].isdigit()} == {"2", "3", "4"}

    # Padding changes nothing, and lags stay inside of documents.
    longer = {name: jnp.pad(x, ((0, 0), (0, 12))) for name, x in batch.items()}
    late = dataclasses.replace(objective._config.coprocessor, max_lag=2)

    @jax.jit
    def padded(params, frozen, batch):
        loss = objective.loss_at(objective.places(batch, None), params, frozen, batch)
        objective._config = dataclasses.replace(objective._config, coprocessor=late)
        return loss, objective.places(batch, jax.random.key(1))

    (loss, weight), places = jax.device_get(padded(params, frozen, longer))
    np.testing.assert_allclose((loss, weight), (total["loss"].sum(), count.sum()), rtol=1e-10)
    position = np.concatenate([np.arange(length) for length in ROWS[0]])[places.at[0][places.kept[0]]]
    assert set(places.lag[places.kept].tolist()) == {0, 1, 2}
    assert np.all(places.lag[0][places.kept[0]] <= position)


ON_TWO_DEVICES = """
import pathlib
import jax
from jax.sharding import NamedSharding, PartitionSpec
from models import sharding
from train import trainer
from train.data.corpus import open_corpus

trainer.train(config, pathlib.Path({workdir!r}))
plan = trainer.make_plan(config, open_corpus(config).facts)
batch = next(open_corpus(config).batches(4, 0))
batch = {{name: x[:1] for name, x in batch.items()}}
frozen = plan.objective.load_base(plan.mesh)
params = jax.jit(plan.objective.init)(jax.random.key(0), frozen)
places = plan.objective.places(batch, jax.random.key(0))
with sharding.on_mesh(plan.mesh):
    for spec in (PartitionSpec(), PartitionSpec(None, "data")):
        split = jax.device_put(places, NamedSharding(plan.mesh, spec))
        total, weight = jax.jit(plan.objective.loss_at)(split, params, frozen, batch)
        print(float(total / weight))
"""


@pytest.mark.slow
def test_a_run_leaves_the_target_as_it_was_and_two_devices_learn_the_same(
    job, as_code, on_two_devices, tmp_path, monkeypatch
):
    settings = {"soft": {"learning_rate": 0.05}, "places": 6, "coprocessor": {"kind": "lora", "z_base": "last_token"}}
    config, two = (job("coprocessor", steps=2, objective=settings, mesh={"data": count}) for count in (1, 2))
    seen = []

    def first_state(plan, restored, original=trainer.first_state):
        state, frozen = original(plan, restored)
        seen.append((frozen, jax.tree.map(np.array, frozen)))
        return state, frozen

    monkeypatch.setattr(trainer, "first_state", first_state)
    files = hashes(config.objective.target)
    trainer.train(config, tmp_path / "one")
    assert len(files) > 2 and hashes(config.objective.target) == files
    ((frozen, before),) = seen
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: np.asarray(x).tobytes() == y.tobytes(), frozen, before)))
    target = load_target(config.objective.target)
    directory = tmp_path / "one" / "coprocessor"
    loaded = load_coprocessor(directory, target)
    assert loaded.config == config.objective.coprocessor
    assert loaded.params["network"]["adapters"][1]["attention"]["q_k_v"]["a"].shape == (16, 3 * 64)
    with pytest.raises(UserError, match="was made for another target: its base had tokenizer hash"):
        load_coprocessor(directory, dataclasses.replace(target, tokenizer=None))
    with pytest.raises(UserError, match="is no coprocessor directory: there is no"):
        load_coprocessor(tmp_path, target)

    said = on_two_devices(as_code(two) + ON_TWO_DEVICES.format(workdir=str(tmp_path / "two")))
    whole, split = map(float, said.split()[-2:])
    assert whole == pytest.approx(split, rel=1e-5)
    ours, theirs = (numbers(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(ours) == 3 and "valid/change_4" in ours[-1]
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def hashes(directory):
    """Of every file of a directory."""
    files = (path for path in pathlib.Path(directory).rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def numbers(path):
    """Of every line of metrics those that are of the training, not of the machine."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = ("loss", "gradient_norm")
    return [{name: x for name, x in line.items() if name in kept or name.startswith("valid/")} for line in lines]


@pytest.mark.parametrize(
    "objective, words",
    [
        ({"target": None}, "objective.target must be the directory of the target to serve, got None"),
        ({"places": 0}, "objective.places must be at least 1, got 0"),
        ({"ahead": 0}, "objective.ahead must be at least 1, got 0"),
        ({"coprocessor": {"num_latents": 0}}, "num_latents must be at least 1, got 0"),
        ({"coprocessor": {"kind": "lorra"}}, "objective.coprocessor.kind must be one of 'full', 'scratch', 'lora'"),
        ({"coprocessor": {"kind": "lora", "lora_scale": 0.0}}, "lora_scale must be a number above 0, got 0.0"),
        ({"coprocessor": {"kind": "lora", "lora_scale": float("nan")}}, "lora_scale must be a number above 0, got nan"),
        ({"coprocessor": {"rank": 4}}, "a coprocessor of kind 'full' has no rank: leave it out, got 4"),
        ({"coprocessor": {"kind": "pause", "reads": "last_layer"}}, "kind 'pause' has no reads"),
        ({"coprocessor": {"kind": "pause", "z_scale": "match_rms"}}, "kind 'pause' has no z_scale"),
        ({"coprocessor": {"kind": "pause", "max_lag": 2}}, "kind 'pause' has no max_lag"),
        ({"coprocessor": {"latents": 3}}, "unknown key objective.coprocessor.latents"),
    ],
)
def test_a_wrong_objective_gets_one_sentence(objective, words, job):
    with pytest.raises(UserError) as caught:
        job("coprocessor", objective=objective)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind, latents, tokens", [("full", 16, 16_128), ("full", 64, 46_848), ("pause", 16, 9984)])
def test_a_step_costs_what_the_publication_s_sizes_say(kind, latents, tokens):
    told = CoprocessorConfig(kind=kind, num_latents=latents)
    job = CoprocessorTraining(name="coprocessor", target="-", coprocessor=told, places=128, ahead=16)
    assert job.forward_tokens(2048) == tokens


def test_rows_too_short_for_what_is_ahead_are_refused(job, tmp_path):
    with pytest.raises(UserError, match=r"config\.length must be at least 33, got 32"):
        trainer.train(job("coprocessor", objective={"ahead": 32}), tmp_path / "run")


def test_what_decoding_would_refuse_is_not_trained(job):
    """Latents that leave the context, or hold a position where windows slide."""
    for positions, room in (("advance", 2045), ("hold", 2048)):
        config = job("coprocessor", objective={"coprocessor": {"num_latents": 3, "positions": positions}})
        objective = CoprocessorObjective(config.objective, Tokenizer.load(config.objective.target))
        objective.model = dataclasses.replace(objective.model, max_position=2048)
        objective.check(room)
        with pytest.raises(UserError, match=f"must be at most {room}, which latents leave .* got {room + 1}"):
            objective.check(room + 1)
    objective.model = dataclasses.replace(objective.model, windows=(None, 4))
    with pytest.raises(UserError, match="need a target without sliding windows"):
        objective.check(32)


def test_two_steps_leave_every_bit_of_the_target(job):
    config = job("coprocessor", steps=2, objective={"coprocessor": {"num_latents": 3, "kind": "lora", "rank": 2}})
    corpus = open_corpus(config)
    plan = trainer.make_plan(config, corpus.facts)
    state, frozen = trainer.first_state(plan, None)
    before, began = (jax.tree.map(np.array, tree) for tree in (frozen, state["params"]))
    step = jax.jit(trainer.make_step(plan), donate_argnums=0, compiler_options=trainer.unoptimised())
    batches = corpus.batches(config.batch_size, config.seed)
    for _ in range(2):
        state, _ = step(state, frozen, trainer.to_devices(plan, next(batches)))
    for ours, theirs in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True):
        assert ours.tobytes() == np.asarray(theirs).tobytes()
    changed = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (began, state["params"])), strict=True)]
    assert all(changed)
