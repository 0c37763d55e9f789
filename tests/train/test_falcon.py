"""Glancing distillation against its definition: what is shown, to whom, and the loss of the second reading."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.registry import load_drafter
from models.errors import UserError
from models.formats.target import load_target
from models.heads.falcon import FalconHeads
from train import trainer
from train.checkpoint import restore
from train.data.corpus import open_corpus
from train.objectives.falcon import FalconObjective, drawn_tokens, glancing_share, shown_pairs
from train.objectives.shift import ahead


def blocks_of(k: int, seed: int):
    """Counted pairs of three texts, their phases, and what is shown of them for a number of mistakes."""
    rng = np.random.default_rng(seed)
    counted, phase = rng.random((3, 40)) < 0.8, rng.integers(0, k, 3)
    show = jax.jit(lambda number, key: shown_pairs(key, jnp.asarray(counted), jnp.asarray(phase, jnp.int32), number, k))
    starts = counted & ((np.arange(40) + phase[:, None]) % k == 0)
    return counted, phase, starts, show


def test_pairs_that_begin_a_block_are_shown() -> None:
    counted, _, starts, show = blocks_of(2, 0)
    number = np.array([0, 5, 100])
    seen = np.zeros_like(counted)
    for seed in range(30):
        shown = np.asarray(show(jnp.asarray(number, jnp.int32), jax.random.key(seed)))
        assert not (shown & ~starts).any()
        assert shown.sum(axis=1).tolist() == [0, 5, starts[2].sum()]
        seen |= shown
    assert np.array_equal(seen[1:], starts[1:]), "each of them, sooner or later"


def test_runs_of_longer_blocks_leave_their_last_pair() -> None:
    counted, phase, starts, show = blocks_of(4, 1)
    last = np.array([np.flatnonzero(row).max() for row in starts])
    lengths = set()
    for seed in range(30):
        shown = np.asarray(show(jnp.full(3, 13, jnp.int32), jax.random.key(seed)))
        assert not (shown & ~counted).any()
        for b in range(3):
            begun = np.flatnonzero(shown[b] & starts[b])
            assert len(begun) == 13 // 4 and last[b] not in begun
            for block in range(11):
                places = [p for p in range(40) if (p + phase[b]) // 4 == block]
                assert not shown[b, places].any() or shown[b, places[0]], "a run begins with its block"
                assert len(places) < 4 or not shown[b, places[-1]], "a block is never shown as a whole"
                lengths.add(int(shown[b, places].sum()))
    assert lengths == {0, 1, 2, 3}


def test_ever_less_is_shown() -> None:
    assert [float(glancing_share("code", x)) for x in (0.0, 0.5, 1.0)] == pytest.approx([0.45, 0.275, 0.1])
    assert [float(glancing_share("paper", x)) for x in (0.0, 0.5, 1.0)] == pytest.approx([0.4, 0.2, 0.0])


def test_tokens_are_drawn_from_the_distribution() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 6)), jnp.float32)
    uniform = (jnp.arange(10_000, dtype=jnp.float32)[None] + 0.5) / 10_000
    drawn = jax.jit(lambda u: drawn_tokens(jnp.broadcast_to(logits, (1, 10_000, 6)), u))(uniform)
    shares = np.bincount(np.asarray(drawn[0]), minlength=6) / 10_000
    np.testing.assert_allclose(shares, jax.nn.softmax(logits[0, 0]), atol=2e-4)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_loss_is_that_of_the_second_reading_row_by_row(draft_setting, monkeypatch) -> None:
    """One program says what both readings got and put out, the tokens drawn, the loss and its slopes; what is learnt is
    what a draft vocabulary holds."""
    weights = dict(feature=2.0, soft=0.5, hard=0.25, temperature=0.8, vocabulary=40)
    objective, params, frozen, batch = draft_setting("falcon", noise=0.01, glancing="paper", **weights)
    heard: list = []
    whole, asked = FalconHeads.whole, FalconObjective._asked

    def reading(self, config, params, feature, embedding, layout, dropout_key=None):
        out = whole(self, config, params, feature, embedding, layout, dropout_key)
        heard.append((feature, embedding, out, layout.order.phase))
        return out

    def asking(self, key, target):
        heard.append(asked(self, key, target))
        return heard[-1]

    monkeypatch.setattr(FalconHeads, "whole", reading)
    monkeypatch.setattr(FalconObjective, "_asked", asking)

    @jax.jit
    def run(params, key, progress):
        def loss(params):
            heard.clear()
            (sums, counts), told = objective.loss(params, frozen, batch, key, progress)
            target = objective.read_target(frozen, batch)
            read = [objective.heads.logits(objective.model, params, frozen, out) for _, _, out, _ in heard[1:]]
            return jnp.sum(sums / counts), (sums, counts, told, list(heard), read, target.hidden, target.logits)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, found), slopes = jax.device_get(run(params, jax.random.key(1), 0.0))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slopes)), "nothing that is learnt is left out"
    sums, counts, told, (both, first, second), (read_first, read), hidden, logits = found
    choice, drawn = both
    k, phase = objective.heads.block, first[3]
    assert np.array_equal(choice, logits.argmax(axis=-1)) and np.array_equal(phase, second[3])
    embedding = np.asarray(frozen["embed"]["embedding"])[np.asarray(ahead(batch["tokens"], 1))]
    # Uniform noise of at most half of 0.01 * 512 / length to either side, the same in both readings.
    noise, most = first[0] - hidden, 0.01 * 512 / hidden.shape[1] / 2
    assert 0.98 * most < -noise.min() < 1.001 * most and 0.98 * most < noise.max() < 1.001 * most
    assert np.array_equal(first[1], embedding)

    tokens, segments, mask = (np.asarray(batch[name]) for name in ("tokens", "segments", "mask"))
    known = np.asarray(frozen["draft_vocab"])
    learnt = np.isin(choice, known) & np.isin(drawn, known)
    total = count = wrong_ones = shown_ones = 0
    for b in range(len(tokens)):
        places = range(tokens.shape[1] - k - 1)
        counted = [p for p in places if segments[b, p] == segments[b, p + k + 1] > 0 and mask[b, p + k + 1]]
        wrong = [p for p in counted if known[read_first[b, p].argmax()] != choice[b, p + k]]
        shown = np.flatnonzero((second[0][b] != first[0][b]).any(axis=-1)).tolist()
        starts = [p for p in counted if (p + phase[b]) % k == 0]
        assert len(shown) == min(int(np.floor(np.float32(0.4) * len(wrong))), len(starts)) and set(shown) <= set(starts)
        for p in shown:
            assert np.array_equal(second[0][b, p], hidden[b, p + k]), "the feature of the answer"
            assert np.array_equal(second[1][b, p], embedding[b, p + k]), "and its token"
        rest = [p for p in range(tokens.shape[1]) if p not in shown]
        assert np.array_equal(second[1][b, rest], embedding[b, rest])
        wrong_ones, shown_ones = wrong_ones + len(wrong), shown_ones + len(shown)
        counted = [p for p in counted if learnt[b, p + k]]
        for p in counted:
            distance = np.abs(second[2][b, p] - hidden[b, p + k])
            total += 2.0 * np.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
            total -= 0.5 * np.exp(log_softmax(logits[b, p + k, known])) @ log_softmax(read[b, p] / 0.8)
            total -= 0.25 * log_softmax(read[b, p])[known == drawn[b, p + k]].item()
        count += len(counted)
    assert count > 10 and not learnt.all() and shown_ones > 3 and counts.tolist() == [count]
    assert float(sums[0]) == pytest.approx(total, rel=1e-4)
    assert [float(told[name][0]) for name in ("wrong", "shown")] == [wrong_ones, shown_ones]

    # The paper's schedule ends with nothing shown: both readings are one.
    (_, found), _ = jax.device_get(run(params, jax.random.key(2), 1.0))
    first, second = found[3][1:]
    (*read_first, out_first, phase), (*read_second, out_second, phase_second) = first, second
    assert all(map(np.array_equal, (*read_first, phase), (*read_second, phase_second)))
    # The compiler may order the sums of either in its own way.
    np.testing.assert_allclose(out_first, out_second, rtol=1e-5, atol=1e-6)
    assert float(found[2]["shown"][0]) == 0


def test_only_whole_blocks_of_a_document_are_evaluated(draft_setting) -> None:
    objective, params, frozen, batch = draft_setting("falcon", block=3, labels="all")
    target = objective.read_target(frozen, batch)

    @jax.jit
    def counts(params):
        """Of the labels, for which nothing has to be computed."""
        guesses = objective.teacher_forced(target, params, frozen, batch, None)
        return [jnp.sum(guess.labels.counted) for guess in guesses]

    found = counts(params)
    segments = np.asarray(batch["segments"])
    for i in range(objective.depth):
        counted = [
            p
            for b in range(len(segments))
            for p in range(2, segments.shape[1] - i - 2)
            if segments[b, p - 2] == segments[b, p] == segments[b, p + i + 2] > 0
        ]
        assert int(found[i]) == len(counted) > 0


def test_nothing_asked_means_read_once(draft_setting, monkeypatch) -> None:
    objective, params, frozen, batch = draft_setting("falcon", glancing="off", hard=0.0)
    readings = []
    whole = FalconHeads.whole
    monkeypatch.setattr(FalconHeads, "whole", lambda *a, **k: readings.append(1) or whole(*a, **k))
    told = jax.eval_shape(objective.loss, params, frozen, batch, jax.random.key(0), 0.0)[1]
    assert len(readings) == 1 and set(told) == {"loss_1"}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"block": 2}, {"block": 3, "layers": 2, "lstm_mode": "recurrent", "depth": 4}])
def test_the_loop_accepts_exactly_what_the_training_forward_says(changes, draft_setting, job, tmp_path) -> None:
    changes = {"loop_prompts": 4, "loop_tokens": 40, **changes}
    config = job(
        "falcon", steps=60, checkpoint={"every": 60}, evaluation={"every": 60, "batches": 2}, objective=changes
    )
    trainer.train(config, tmp_path)
    objective, _, frozen, batch = draft_setting("falcon", **changes)
    drafter, _ = load_drafter(tmp_path / "drafter", load_target(config.objective.target))
    assert drafter == objective.drafter
    plan = trainer.make_plan(config, open_corpus(config).facts)
    state, _ = restore(tmp_path / "checkpoints" / "60", plan.state)
    found = objective.probe(state["params"], frozen, iter([batch]))
    depths = range(1, objective.depth + 1)
    assert [found[f"loop_{d}"] for d in depths] == [found[f"replay_{d}"] for d in depths]
    assert 0 < found["loop_2"] <= found["loop_1"]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"target": None}, "objective.target must be the directory of the target to draft for"),
        ({"feature": 0.0, "soft": 0.0, "hard": 0.0}, "objective.feature, objective.soft or objective.hard must be"),
        ({"temperature": 0.0}, "objective.temperature must be positive, got 0.0"),
        ({"block": 4}, "objective.depth must be at least objective.block, got 3"),
        ({"block": 0}, "a Falcon network needs a block of at least 1, got 0"),
        ({"glancing": "never"}, "objective.glancing must be"),
        (
            {"divergence": "nla"},
            "objective.divergence nla needs an objective.temperature of 1, got 0.95",
        ),
        ({"lstm": "recurrent"}, "unknown key objective.lstm (did you mean 'lstm_mode'?)"),
    ],
)
def test_a_wrong_objective_gets_one_sentence(objective, words, job) -> None:
    with pytest.raises(UserError) as caught:
        job("falcon", objective=objective)
    assert words in str(caught.value)


def test_all_of_the_network_is_a_config(job) -> None:
    config = job("falcon", objective={"block": 3, "layers": 2, "lstm_mode": "recurrent", "dropout": 0.1}).objective
    assert config.heads == FalconHeads(3, 2, "recurrent", 0.1)
    assert dataclasses.replace(config, glancing="off").weights == config.weights
