"""Distillation of draft models: the loss by its definition, whose text it learns from, and what it refuses."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.draft_model import DraftModel
from decoding.generate import Generation, generate
from decoding.policies import Static
from decoding.sampling import Sampling
from decoding.trees import chain
from models import transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.target import Target, load_target
from models.layout import Layout
from tests.noise import noisy
from tests.train.conftest import STUDENT
from train import trainer
from train.data.corpus import open_corpus
from train.objectives import distill
from train.objectives.distill import DistillConfig, principal
from train.objectives.written import openings

KEY = jax.random.key(7)


@pytest.fixture
def setting(draft_setting):
    """`setting(source="student")`: objective, student, frozen target, one batch."""

    def make(**changes):
        written = {"new_tokens": 12} if changes.get("source", "dataset") != "dataset" else {}
        return draft_setting("distill", **{**written, **changes})

    return make


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


@functools.partial(jax.jit, static_argnames="model")
def logits(model, params, tokens):
    return transformer.forward(model, params, tokens, Layout.causal(*tokens.shape)).logits


def both(objective, params, frozen, tokens):
    """Log-probabilities of student and teacher on texts."""
    models = ((objective.drafter.model, params), (objective.model, frozen))
    return [log_softmax(logits(model, params, jnp.asarray(tokens))) for model, params in models]


def test_the_loss_is_its_definition_whatever_pads_the_rows_and_with_all_best_tokens_kept(setting) -> None:
    objective, params, frozen, batch = setting(
        labels="assistant", soft=0.7, hard=0.4, divergence={"name": "reverse_kl"}
    )
    tokens = np.asarray(batch["tokens"])
    segments = np.ones_like(tokens)
    segments[:, 20:], segments[0, 12:] = 0, 0
    mask = np.asarray(batch["mask"])
    log_q, log_p = both(objective, params, frozen, tokens)
    q, counted = np.exp(log_q), mask[:, 1:].astype(bool) & (segments[:, 1:] > 0)
    loss = 0.7 * np.sum(q * (log_q - log_p), axis=-1)[:, :-1]
    loss -= 0.4 * np.take_along_axis(log_q[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]

    def padded(more, filler):
        wide = {"tokens": np.where(segments > 0, tokens, filler), "segments": segments, "mask": mask}
        return {name: jnp.pad(jnp.asarray(x), ((0, 0), (0, more))) for name, x in wide.items()}

    def kept(count):
        """What `data.features_top_k` keeps, in float32."""
        scores, places = jax.lax.top_k(jnp.asarray(log_p, jnp.float32), count)
        return padded(0, 0) | {"target/top_tokens": places, "target/top_log_probabilities": scores}

    @jax.jit
    def results(params, batches):
        of = jax.value_and_grad(lambda p, b: objective.loss(p, frozen, b, KEY, 0.0)[0], has_aux=True)
        return [of(params, batch) for batch in batches]

    size = objective.model.vocab_size
    (plain, slopes), (other, same), (every, all_of_it) = results(params, [padded(0, 0), padded(5, 3), kept(size)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), all_of_it, slopes)
    np.testing.assert_allclose(every[0], plain[0], rtol=1e-5)
    assert float(plain[1]) == counted.sum() == float(other[1])
    np.testing.assert_allclose(plain[0], loss[counted].sum(), rtol=1e-5)
    np.testing.assert_allclose(other[0], plain[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), same, slopes)


def test_teacher_and_student_write_as_they_decode_and_the_same_key_writes_the_same(setting) -> None:
    """Greedily, every label is its writer's first choice behind a prompt of the batch."""
    for number, source in enumerate(("student", "teacher")):
        objective, params, frozen, batch = setting(source=source, sampling=0.0, labels="all")
        host = {name: np.asarray(values) for name, values in batch.items()}
        rows = objective.refresh(params, frozen, host, KEY)
        choice = np.argmax(both(objective, params, frozen, rows["tokens"])[number], axis=-1)
        labels = rows["mask"][:, 1:].astype(bool)
        assert rows["tokens"].shape == host["tokens"].shape and labels.sum() >= 4 * 6
        np.testing.assert_array_equal(choice[:, :-1][labels], rows["tokens"][:, 1:][labels])
        begins = rows["mask"].argmax(axis=1)
        prompts = openings({**host, "mask": np.ones_like(host["mask"])}, host["tokens"].shape[1] - 12)
        assert [rows["tokens"][i, :end].tolist() for i, end in enumerate(begins)] == prompts
        assert all(0 < end <= host["tokens"].shape[1] // 4 for end in begins)
        # Of text that is written, what was written is learnt, whichever tokens of the data set would be.
        assert float(jax.jit(objective.loss)(params, frozen, rows, KEY, 0.0)[0][1]) == labels.sum()
    objective, params, frozen, _ = setting(source="student", labels="all")
    first, again, other = (objective.refresh(params, frozen, host, key) for key in (KEY, KEY, jax.random.key(8)))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first["tokens"] != other["tokens"]).any()


def test_served_text_is_learnt_where_the_rejected_draft_was_made(setting, target_directory) -> None:
    """One place before the corrected token a student close to its target would have gone on in another way; not learnt
    are drafts that were kept, and what the target says behind them, wrong though the student may be there, too."""
    objective, _, base, batch = setting(
        source="served", sampling=0.0, labels="all", new_tokens=20, model=None, init_from=str(target_directory)
    )
    params, frozen = noisy(base["student"], 0.02), objective.frozen_part(base)
    host = {name: np.asarray(values) for name, values in batch.items()}
    rows = objective.refresh(params, frozen, host, KEY)
    choice = np.argmax(both(objective, params, frozen, rows["tokens"])[0], axis=-1)[:, :-1]
    learnt, right = rows["mask"][:, 1:].astype(bool), choice == rows["tokens"][:, 1:]
    assert learnt.sum() >= 3 and not right[learnt].any()
    prompts = openings({**host, "mask": np.ones_like(host["mask"])}, host["tokens"].shape[1] - 20)
    begins = np.array([len(prompt) for prompt in prompts])[:, None]
    # Behind the first token that was written, which nobody drafted either.
    written = (np.arange(1, rows["tokens"].shape[1]) > begins) & (rows["segments"][:, 1:] > 0)
    assert (right & written).sum() > learnt.sum()
    assert (written & ~right & ~learnt).any()


def test_a_teacher_writes_the_same_greedily_with_the_student_as_its_drafter(setting, monkeypatch) -> None:
    helpers, write = [], distill.write

    def watched(*arguments):
        helpers.append(arguments[6] is not None)
        return write(*arguments)

    monkeypatch.setattr(distill, "write", watched)
    made = []
    for speculate in (False, True):
        objective, params, frozen, batch = setting(source="teacher", sampling=0.0, labels="all", speculate=speculate)
        host = {name: np.asarray(values) for name, values in batch.items()}
        made.append(objective.refresh(params, frozen, host, KEY))
    assert helpers == [False, True]
    jax.tree.map(np.testing.assert_array_equal, *made)


@pytest.mark.parametrize(
    ("name", "changes"), [("distill", {"divergence": {"name": "jsd"}, "hard": 0.5}), ("minillm", {})]
)
def test_no_gradient_enters_the_teacher(draft_setting, name, changes) -> None:
    objective, params, frozen, batch = draft_setting(name, **changes)
    rows, length = batch["tokens"].shape
    for key, (shape, dtype) in ({} if name == "distill" else objective.refreshed(length)).items():
        known = batch.get(key.removeprefix("written/"))
        batch[key] = jnp.full((rows, *shape), 0.7, dtype) if known is None else known.astype(dtype)

    @jax.jit
    def slopes(params, frozen):
        return jax.grad(lambda p, f: jnp.sum(objective.loss(p, f, batch, KEY, 0.0)[0][0]), (0, 1))(params, frozen)

    of_student, of_teacher = slopes(params, frozen)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_student))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher))


def test_batches_are_mixed_by_the_key_with_whoever_else_writes(setting, monkeypatch) -> None:
    """Shares of the student in many draws, told by who is asked to write."""
    asked = []

    def write(target, prompts, new_tokens, *_):
        asked.append(target)
        return Generation([[5] * new_tokens] * len(prompts), [[0] * new_tokens] * len(prompts), [], 0.0, 0.0)

    monkeypatch.setattr(distill, "write", write)
    for share in (0.0, 0.25, 1.0):
        objective, params, frozen, batch = setting(source="mixed", on_policy=share, otherwise="teacher", labels="all")
        monkeypatch.setattr(objective, "writers", lambda *_: (_Named("teacher"), _Named("student")))
        asked.clear()
        host = {name: np.asarray(values) for name, values in batch.items()}
        for key in jax.random.split(KEY, 80):
            objective.refresh(params, frozen, host, key)
        own = [target.name for target in asked].count("student")
        assert len(asked) == 80 and abs(own - 80 * share) <= 4 * math.sqrt(80 * share * (1 - share))


@dataclasses.dataclass
class _Named:
    name: str
    params: None = None


def test_batches_are_mixed_by_the_key(setting) -> None:
    for share, own in ((0.0, False), (1.0, True)):
        objective, params, frozen, batch = setting(source="mixed", on_policy=share, labels="all")
        host = {name: np.asarray(values) for name, values in batch.items()}
        rows = objective.refresh(params, frozen, host, KEY)
        assert (rows["tokens"] != host["tokens"]).any() == own
        np.testing.assert_array_equal(rows["mask"].astype(bool) <= (rows["segments"] > 0), True)


def test_the_loop_keeps_first_drafts_as_often_as_distributions_overlap(target_directory) -> None:
    """Sampled: steps that keep their first draft, against the sum over all steps of sum_v min(p, q)."""
    target = load_target(target_directory)
    shape = {**STUDENT, "vocab_size": target.config.vocab_size, "bos_id": None, "eos_ids": ()}
    drafter = DraftModel(TransformerConfig(**shape), Static(chain(1)))
    params = noisy(jax.jit(functools.partial(drafter.init_params, target.config))(target.params, KEY), 0.5)
    prompts = [[5 + row, 6] for row in range(16)]
    made = generate(
        target,
        prompts,
        drafter=(drafter, params),
        max_new_tokens=60,
        sampling=Sampling(1.0),
        stop=[],
    )
    tokens = jnp.asarray([[*prompt, *new] for prompt, new in zip(prompts, made.tokens, strict=True)])
    log_p = log_softmax(target.apply(tokens).logits)
    log_q = log_softmax(Target(drafter.model, params).apply(tokens).logits)
    alpha = np.exp(np.minimum(log_p, log_q)).sum(axis=-1)
    # A step begins at every token of the target's but the last, which nothing follows.
    roots = [(row, 2 + i) for row, writers in enumerate(made.writers) for i, w in enumerate(writers[:-1]) if w == 0]
    chances = np.array([alpha[root] for root in roots])
    stats = sum(made.stats[1:], made.stats[0])
    assert stats.steps == len(roots) > 500
    assert abs(stats.accepted_by_depth[0] - chances.sum()) < 4 * np.sqrt(np.sum(chances * (1 - chances)))
    assert 0.1 < chances.mean() < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("distill", {"source": "mixed", "otherwise": "teacher", "new_tokens": 12, "reuse": 2, "labels": "all"}),
        ("minillm", {"labels": "all"}),
    ],
)
def test_a_killed_run_writes_the_same_text_again(job, die_at, tmp_path, name, objective) -> None:
    config = job(name, objective=objective, steps=6)
    trainer.train(config, tmp_path / "whole")
    with die_at(3):
        trainer.train(config, tmp_path / "killed")
    trainer.train(config, tmp_path / "killed")
    whole, killed = ((tmp_path / name / "drafter/model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


@pytest.mark.slow
def test_a_teacher_on_a_mesh_of_its_own_teaches_the_same(job, as_code, on_two_devices, tmp_path) -> None:
    own = {"source": "served", "labels": "all", "sampling": 0.0, "new_tokens": 12}
    trainer.train(job("distill", objective=own, steps=3), tmp_path / "one")
    config = job("distill", objective={**own, "teacher_mesh": "tensor=2"}, steps=3)
    run = "import pathlib\nfrom train import trainer\ntrainer.train(config, pathlib.Path({!r}))\n"
    on_two_devices(as_code(config) + run.format(str(tmp_path / "two")))
    losses = []
    for name in ("one", "two"):
        told = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in told if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 3


def test_a_student_may_begin_as_a_target_or_a_draft_model_of_the_same_tokenizer(
    setting, target_directory, tmp_path
) -> None:
    objective, *_ = setting(model=None, init_from=str(target_directory))
    assert objective.drafter.model == load_target(target_directory).config
    first, params, frozen, _ = setting()
    first.export(tmp_path / "drafter", params, frozen)
    again, _, base, _ = setting(model=None, init_from=str(tmp_path / "drafter"))
    assert again.drafter == first.drafter
    jax.tree.map(np.testing.assert_array_equal, again.init(KEY, base), params)
    path = tmp_path / "drafter" / "drafter.json"
    path.write_text(json.dumps({name: x for name, x in json.loads(path.read_text()).items() if name != "base"}))
    with pytest.raises(UserError, match=r"drafter\.json must say whose drafter it is"):
        setting(model=None, init_from=str(tmp_path / "drafter"))
    other = tmp_path / "other"
    other.mkdir()
    for file in target_directory.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    definition = json.loads((other / "tokenizer.json").read_text())
    definition["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match="another tokenizer"):
        setting(model=None, init_from=str(other))


def test_a_new_student_may_begin_with_the_targets_embeddings(job) -> None:
    """Along as many directions as the student is wide: what is left of products of tokens is the best there can be."""
    table = np.random.default_rng(0).normal(size=(40, 9))
    found = np.asarray(jax.jit(principal, static_argnums=1)(jnp.asarray(table, jnp.float32), 5))
    left = np.linalg.eigvalsh(table.T @ table)[:-5]
    np.testing.assert_allclose(np.linalg.norm(found @ found.T - table @ table.T) ** 2, np.sum(left**2), rtol=1e-3)

    def plan(**objective):
        config = job("distill", objective={"embedding": "target", **objective})
        return trainer.make_plan(config, open_corpus(config).facts)

    narrow = plan(model={**STUDENT, "width": 8})
    shapes = jax.eval_shape(narrow.objective.init, KEY, narrow.base)
    assert shapes["embed"]["embedding"].shape == (narrow.objective.model.vocab_size, 8)
    with pytest.raises(UserError, match="as wide as the target"):
        plan(model={**STUDENT, "width": 32})
    with pytest.raises(UserError, match="brings its own"):
        plan(model=None, init_from="somewhere")


def test_what_cannot_be_done_is_refused(job) -> None:
    def plan(**changes):
        config = job("distill", **changes)
        return trainer.make_plan(config, open_corpus(config).facts)

    with pytest.raises(UserError, match="either objective"):
        job("distill", objective={"init_from": "somewhere"})
    with pytest.raises(UserError, match="vocab_size is the target's"):
        job("distill", objective={"model": {**STUDENT, "vocab_size": 3}})
    with pytest.raises(UserError, match="both 0"):
        job("distill", objective={"soft": 0.0})
    with pytest.raises(UserError, match=r"divergence\.beta"):
        job("distill", objective={"divergence": {"name": "jsd", "beta": 2.0}})
    with pytest.raises(UserError, match=r"new_tokens \(32\) must be smaller"):
        plan(objective={"source": "student", "new_tokens": 32})
    with pytest.raises(UserError, match=r"checkpoint\.every \(2\) must be a multiple of the 3 steps"):
        plan(objective={"source": "student", "new_tokens": 12, "reuse": 3})
    with pytest.raises(UserError, match=r"data\.features must be None"):
        plan(objective={"source": "student", "new_tokens": 12}, data={"features": "somewhere"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculate": True}, "objective.speculate is for text of the teacher .*: leave it at False, got True"),
        ({"source": "student", "speculate": True}, "objective.speculate is for text of the teacher"),
        ({"source": "served", "speculate": True}, "objective.speculate is for text of the teacher"),
        ({"source": "mixed", "speculate": True}, "objective.speculate is for text of the teacher"),
        ({"on_policy": 0.2}, "objective.on_policy is for objective.source 'mixed': leave it at 0.5, got 0.2"),
        ({"source": "student", "otherwise": "teacher"}, "objective.otherwise is for objective.source 'mixed'"),
        ({"reuse": 2}, "objective.reuse is for text that is written, not for objective.source 'dataset'"),
        ({"source": "mixed", "reuse": 2}, "objective.reuse must be 1 for objective.source 'mixed' with the data set's"),
        ({"new_tokens": 12}, "objective.new_tokens is for text that is written"),
        ({"sampling": 0.0}, "objective.sampling is for text that is written"),
        ({"source": "student", "sampling": math.inf}, "objective.sampling must be 0 or more, and finite, got inf"),
        ({"soft": math.inf}, "objective.soft must be 0 or more, and finite, got inf"),
        ({"hard": math.nan}, "objective.hard must be 0 or more, and finite, got nan"),
        ({"teacher_mesh": "foo"}, "mesh 'foo' is not a list of sizes"),
    ],
)
def test_options_without_a_use_are_refused_before_anything_is_read(changes, message) -> None:
    with pytest.raises(UserError, match=message):
        DistillConfig("distill", "somewhere", model={}, **changes)


def test_options_that_act_are_taken() -> None:
    DistillConfig("distill", "there", model={}, source="mixed", otherwise="teacher", on_policy=0.2, speculate=True)
    DistillConfig("distill", "there", model={}, source="teacher", speculate=True, reuse=2, teacher_mesh="tensor=64")
