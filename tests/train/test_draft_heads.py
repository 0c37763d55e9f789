"""The draft-head losses against their definition, and training against decoding."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafter import Drafter
from decoding.drafters.head_drafter import HeadDrafter
from models import transformer
from models.errors import UserError
from models.formats.target import load_target
from models.layout import Layout
from train import trainer
from train.checkpoint import restore
from train.data.corpus import open_corpus
from train.data.texts import Documents
from train.objectives import pieces
from train.objectives.block_losses import d_pace
from train.objectives.draft_heads import DraftHeads
from train.objectives.drafting import prompts_of
from train.objectives.shift import ahead, labels_at, log_likelihood


@pytest.fixture
def setting(draft_setting):
    """`setting(objective={...})`: objective, random heads, frozen target, one batch."""
    return lambda objective=None: draft_setting("draft_heads", **(objective or {}))


@pytest.mark.parametrize("drafter", ["medusa", "hydra"])
@pytest.mark.parametrize("term", ["hard", "soft", "feature"])
def test_each_loss_equals_its_definition_row_by_row(drafter, term, setting):
    only = {"hard": 0.0, "soft": 0.0, "feature": 0.0, term: 2.0}
    objective, heads, frozen, batch = setting(objective={"drafter": drafter, "head_decay": 0.5, **only})
    # The heads read the table as it stands, also where the target scales what it reads.
    objective.model = dataclasses.replace(objective.model, embed_scale=True)
    (sums, weights), metrics = jax.jit(objective.loss)(heads, frozen, batch, jax.random.key(0), 0.0)

    @jax.jit
    def forward(tokens, segments):
        layout = Layout.causal(*tokens.shape, segments=segments)
        out = transformer.forward(objective.model, frozen, tokens, layout)
        return out.logits, out.hidden

    @functools.partial(jax.jit, static_argnums=0)
    def head(i, feature, path):
        hidden = objective.heads.hidden(heads, i, feature, path)
        return hidden, objective.heads.vocab(heads, i, hidden)

    tokens, segments, mask = (np.asarray(batch[name]) for name in ("tokens", "segments", "mask"))
    target_logits, target_hidden = jax.device_get(forward(tokens, segments))
    embedding = np.asarray(frozen["embed"]["embedding"])
    for i in range(2):
        rows = [
            (b, p)
            for b, p in np.ndindex(tokens.shape)
            if p + 2 + i < tokens.shape[1] and segments[b, p] == segments[b, p + 2 + i] and mask[b, p + 2 + i]
        ]
        paths = np.stack([embedding[tokens[b, p + 1 : p + 2 + i]] for b, p in rows])
        guessed = jax.device_get(head(i, np.stack([target_hidden[b, p] for b, p in rows]), paths))
        total, count = 0.0, 0
        for (b, p), hidden, logits in zip(rows, *guessed, strict=True):
            guess = logits - np.log(np.exp(logits).sum())
            seen = target_logits[b, p + 1 + i]
            distance = np.abs(hidden - target_hidden[b, p + 1 + i])
            smooth = np.where(distance < 1, 0.5 * distance**2, distance - 0.5)
            teacher = np.exp(seen) / np.exp(seen).sum()
            total += {"hard": -guess[tokens[b, p + 2 + i]], "soft": -teacher @ guess, "feature": np.mean(smooth)}[term]
            count += 1
        assert count > 5 and float(weights[i]) == count
        assert float(sums[i]) == pytest.approx(2.0 * 0.5**i * float(total), rel=1e-4)
        assert float(metrics[f"loss_{i + 1}"][0]) == pytest.approx(2.0 * float(total), rel=1e-4)


def test_d_pace_weighs_guesses_by_what_the_length_of_the_draft_gains(setting, monkeypatch):
    """Value and gradients, whole and in pieces, are those of the cross-entropy by position times weights that are
    constant."""
    objective, heads, frozen, batch = setting(objective={"hard": 2.0, "d_pace": True})

    def by_position(heads):
        target = objective.read_target(frozen, batch)
        guesses = objective.teacher_forced(target, heads, frozen, batch, None)
        likely = [log_likelihood(guess.read(guess.hidden), guess.labels.tokens) for guess in guesses]
        counted = [guess.labels.counted for guess in guesses]
        weight = d_pace(jnp.stack(likely, -1), jnp.stack(counted, -1))
        sums = [jnp.sum(-2.0 * weight[..., i] * likely[i] * counted[i]) for i in range(2)]
        return jnp.stack(sums), jnp.stack([jnp.sum(one) for one in counted])

    def sums_of(heads):
        (sums, weights), _ = objective.loss(heads, frozen, batch, jax.random.key(0), 0.0)
        return sums, weights

    def both(function):
        return jax.jit(lambda heads: (function(heads), jax.grad(lambda heads: jnp.sum(function(heads)[0]))(heads)))

    expected = both(by_position)(heads)
    tree_equal(both(sums_of)(heads), expected, 1e-5)
    monkeypatch.setattr(pieces, "SCORES", 2 * objective.model.vocab_size * 5)
    tree_equal(both(sums_of)(heads), expected, 1e-5)


def tree_equal(found, expected, rtol):
    for mine, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=rtol * np.max(np.abs(theirs)))


class Oracle:
    """Heads that know the target's own logits: what every head should learn to say."""

    def __init__(self, logits):
        self.num_heads, self._logits = 2, logits

    def features(self, config, params, post_norm, layout):
        return post_norm

    def hidden(self, params, i, feature, path, dropout_key=None):
        return ahead(self._logits, i + 1)

    def vocab(self, params, i, hidden):
        return hidden


def test_a_perfect_head_always_agrees_with_the_target(setting, monkeypatch):
    objective, heads, frozen, batch = setting(objective={"soft": 1.0, "hard": 0.0})

    @jax.jit
    def evaluated(heads, frozen, batch):
        target = objective.read_target(frozen, batch)
        monkeypatch.setattr(objective, "heads", Oracle(target.logits))
        right = []
        for depth in (1, 2):
            labels, counted = labels_at(batch, depth + 1)
            choice = jnp.argmax(ahead(target.logits, depth), axis=-1)
            right.append(jnp.sum((choice == labels) & counted))
        return objective.evaluate(heads, frozen, batch), right

    sums, right = evaluated(heads, frozen, batch)
    for depth in (1, 2):
        agreed, weight = sums[f"agreement_{depth}"]
        assert float(agreed) == float(weight) > 5
        assert float(sums[f"accuracy_{depth}"][0]) == float(right[depth - 1])


def test_no_gradient_needs_the_target(setting):
    objective, heads, frozen, batch = setting(objective={"soft": 1.0, "feature": 1.0})

    def loss(trainable, parameters):
        (sums, weights), _ = objective.loss(trainable, parameters, batch, jax.random.key(0), 0.0)
        return jnp.sum(sums / weights)

    gradient = jax.device_get(jax.jit(jax.grad(loss))(heads, frozen))
    assert jax.tree.structure(gradient) == jax.tree.structure(heads)
    assert all(np.max(np.abs(leaf)) > 0 for leaf in jax.tree.leaves(gradient))


def test_noise_and_dropout_act_in_training_only(setting):
    heads = {"num_heads": 2, "dropout": 0.5}
    objective, params, frozen, batch = setting(objective={"heads": heads, "noise": 10.0})
    loss = jax.jit(lambda seed: objective.loss(params, frozen, batch, jax.random.key(seed), 0.0)[0][0][0])
    losses = [float(loss(seed)) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    quiet = DraftHeads(dataclasses.replace(objective._config, noise=0.0), objective._tokenizer)
    silent, loud = (jax.device_get(jax.jit(o.evaluate)(params, frozen, batch)) for o in (quiet, objective))
    assert jax.tree.all(jax.tree.map(np.array_equal, silent, loud))


class Listener(Oracle):
    """Heads that keep what they are given."""

    def __init__(self, logits, prefix):
        super().__init__(logits)
        self.prefix = prefix

    def features(self, config, params, post_norm, layout):
        self.feature = post_norm
        return post_norm

    def hidden(self, params, i, feature, path, dropout_key=None):
        self.path = path
        return feature


@pytest.mark.parametrize("prefix", [False, True])
def test_noise_spares_the_features_of_a_prefix_block(prefix, setting, monkeypatch):
    objective, params, frozen, batch = setting(objective={"noise": 10.0})
    target = objective.read_target(frozen, batch)
    listener = Listener(target.logits, prefix)
    monkeypatch.setattr(objective, "heads", listener)
    heard = []
    for key in (None, jax.random.key(0)):
        objective.teacher_forced(target, params, frozen, batch, key)
        heard.append((listener.feature, listener.path))
    (quiet_feature, quiet_path), (feature, path) = heard
    assert not jnp.array_equal(quiet_path, path)
    assert jnp.array_equal(quiet_feature, feature) == prefix


def test_the_probe_needs_room_and_whole_prompts(setting):
    objective, params, frozen, batch = setting(objective={"loop_prompts": 2, "loop_tokens": 4})
    batch["mask"] = jnp.ones_like(batch["mask"])

    def probe(batch=batch, max_position=objective.model.max_position, **changes):
        again = DraftHeads(dataclasses.replace(objective._config, **changes), objective._tokenizer)
        again.model = dataclasses.replace(again.model, max_position=max_position)
        return again.probe(params, frozen, iter([batch]))

    assert probe(loop_tokens=0) == probe(loop_prompts=0) == {}
    assert probe(max_position=batch["tokens"].shape[1] // 4) == {}
    padded = {**batch, "segments": batch["segments"].at[:, 3:].set(0)}
    assert probe(padded) == {}
    # With its first rows padded, a batch is as good as the rest of it.
    first = {**batch, "segments": batch["segments"].at[:2, 3:].set(0)}
    assert probe(first) == probe({name: rows[2:] for name, rows in batch.items()}) != {}


def test_the_export_names_the_base_that_was_loaded(setting, target_directory, tmp_path):
    objective, params, _, _ = setting()
    objective.export(tmp_path / "drafter", params, None)
    record = json.loads((tmp_path / "drafter" / "drafter.json").read_text())
    assert record["base"] == load_target(target_directory).fingerprint()


@pytest.mark.parametrize(("name", "key"), [("draft_heads", "target"), ("lm", "init_from")])
def test_a_data_set_with_more_tokens_than_the_target_is_refused(name, key, job, target_directory, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(target_directory, small)
    config = json.loads((small / "config.json").read_text())
    size = config["vocab_size"]
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": size - 1}))
    changes = {key: str(small), **({"model": None} if name == "lm" else {})}
    with pytest.raises(UserError, match=f"has {size} entries, more than the {size - 1} embeddings"):
        trainer.train(job(name, objective=changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["draft_heads", "lm"])
def test_rows_longer_than_the_target_are_refused(name, job, tmp_path):
    with pytest.raises(UserError, match=r"config.length \(4096\) exceeds the longest sequence of the model \(2048\)"):
        trainer.train(job(name, length=4096), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("drafter", [pytest.param("medusa", marks=pytest.mark.slow), "hydra"])
def test_the_loop_accepts_exactly_what_the_training_forward_says(drafter, setting, job, tmp_path):
    config = job(
        "draft_heads",
        steps=30,
        checkpoint={"every": 30},
        objective={"drafter": drafter, "loop_prompts": 4, "loop_tokens": 40},
    )
    trainer.train(config, tmp_path)
    _, _, frozen, batch = setting()
    corpus = open_corpus(config)
    plan = trainer.make_plan(config, corpus.facts)
    state, _ = restore(tmp_path / "checkpoints" / "30", plan.state)
    found = plan.objective.probe(state["params"], frozen, iter([batch]))
    assert found["loop_1"] == found["replay_1"] and found["loop_2"] == found["replay_2"]
    assert 0 < found["loop_2"] <= found["loop_1"]


def test_heads_that_can_have_no_labels_are_refused(job):
    config = job("draft_heads", objective={"heads": {"num_heads": 12}}, length=13)
    with pytest.raises(UserError, match=r"^12 guesses in a row need rows of at least 14 tokens.*config\.length is 13$"):
        trainer.make_plan(config, open_corpus(config).facts)
    config = dataclasses.replace(config, length=14)
    corpus = open_corpus(config)
    objective = trainer.make_plan(config, corpus.facts).objective
    objective.scan_data(corpus.train)
    short = Documents(np.array([3, 13]), corpus.train.__getitem__)
    with pytest.raises(UserError, match=r"need documents of at least 14 tokens.*the longest to learn from has 13$"):
        objective.scan_data(short)


def test_a_drafter_that_takes_no_chain_is_refused_before_the_first_step(job, monkeypatch):
    config = job("draft_heads", objective={"loop_prompts": 1})
    monkeypatch.setattr(HeadDrafter, "with_tree", Drafter.with_tree)
    with pytest.raises(UserError, match=r"decode with a chain of 2, which Hydra cannot be given \(the drafter hydra"):
        trainer.make_plan(config, open_corpus(config).facts)


def test_probes_begin_where_answers_do():
    batch = {
        "tokens": np.arange(24).reshape(2, 12),
        "segments": np.array([[1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]]),
        "mask": np.array([[0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0]]),
    }
    first = [[3, 4], [3, 4, 5, 6, 7, 8], [12, 13, 14], [12, 13, 14, 15, 16, 17, 18, 19]]
    assert prompts_of(batch, room=9) == first
    batch["mask"][0, 4] = 1  # An answer right at the beginning of its document is no answer to anything.
    batch["mask"][0, 3] = 1
    assert prompts_of(batch, room=9) == first[1:]
    batch["mask"][0, 3:6] = 0
    assert prompts_of(batch, room=2) == [[3, 4, 5], *first[1:]]
    assert prompts_of(batch, room=3) == [[3, 4, 5], [12, 13, 14]]
    everything = {**batch, "mask": batch["segments"] > 0}
    assert prompts_of(everything, room=9) == [[0, 1, 2], [12, 13, 14]]


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"target": None}, "objective.target must be the directory"),
        ({"hard": 0.0}, "are all 0: there is nothing to learn"),
        ({"soft": -1.0}, "objective.soft must not be negative"),
        ({"head_decay": 0.0}, "objective.head_decay must lie in 0..1"),
        ({"d_pace": True, "soft": 1.0}, "objective.d_pace weighs objective.hard alone, got ['soft']"),
        ({"d_pace": True, "head_decay": 0.8}, "objective.d_pace takes the place of objective.head_decay, got 0.8"),
        ({"heads": {"num_head": 2}}, "unknown key objective.heads.num_head (did you mean 'num_heads'?)"),
        ({"heads": {"num_heads": 0}}, "heads.num_heads must be from 1 to 64, got 0"),
        ({"drafter": "medusa", "heads": {"dropout": 0.1}}, "unknown key objective.heads.dropout"),
        ({"drafter": "hydre"}, "did you mean 'hydra'"),
    ],
)
def test_a_wrong_objective_gets_one_sentence(objective, words, job):
    with pytest.raises(UserError) as caught:
        job("draft_heads", objective=objective)
    assert words in str(caught.value)


def test_a_data_set_of_another_tokenizer_is_refused(job, target_directory, data_set, tmp_path):
    other = tmp_path / "other"
    load_target(target_directory).tokenizer.with_chat_template("x").save(other)
    text = (other / "tokenizer.json").read_text().replace('"<eos>"', '"<end>"')
    (other / "tokenizer.json").write_text(text)
    config = (other / "tokenizer_config.json").read_text().replace("<eos>", "<end>")
    (other / "tokenizer_config.json").write_text(config)
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((target_directory / name).read_bytes())
    with pytest.raises(UserError, match="was tokenised by tokenizer"):
        trainer.train(job("draft_heads", objective={"target": str(other)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_target_is_one_sentence(job, tmp_path):
    with pytest.raises(UserError, match="absent"):
        trainer.train(job("draft_heads", objective={"target": str(tmp_path / "absent")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
