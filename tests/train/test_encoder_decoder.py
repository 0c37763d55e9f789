"""Training encoder-decoders: pairs, the alignment with a teacher, and the losses by their definitions."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import load_target, transformer
from models.encoder_decoder import beside, encode
from models.errors import UserError
from models.layout import Layout
from scripts import build_dataset
from tests.noise import drawn
from tests.train.conftest import SHAPE
from train import trainer
from train.config import parse
from train.data.corpus import open_corpus
from train.data.pairs import PairRows
from train.data.texts import Documents
from train.objectives import OBJECTIVES
from train.objectives.encoder_decoder import joined

KEY = jax.random.key(7)
MU = {**SHAPE, "encoder_layers": 2, "num_layers": 1, "tied_embeddings": True, "gated_mlp": False, "mlp_bias": True}


def documents(*texts: tuple[list[int], list[int]]) -> Documents:
    """Of (tokens, mask)."""
    made = [{"name": "", "tokens": np.array(t, np.int32), "mask": np.array(m, np.uint8)} for t, m in texts]
    return Documents(np.array([len(text[0]) for text in texts]), made.__getitem__)


def test_one_process_says_what_is_left_out(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    PairRows(documents(([5, 6, 7], [0, 0, 1]), ([1] * 9, [0] * 8 + [1])), 6, 4)
    assert not capsys.readouterr().err


def test_every_answer_is_a_row_with_all_before_it_as_its_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    chat = ([5, 6, 7, 8, 9, 10, 11], [0, 0, 1, 1, 0, 1, 0])
    rows = PairRows(documents(chat, ([1, 2], [1, 1]), ([3] * 9, [0] * 8 + [1])), 6, 4)
    assert len(rows) == 2 and rows.left_out == 1 and "1 of 3 answers are left out" in capsys.readouterr().err
    first, second = rows[0], rows[1]
    assert first["source"].tolist() == [5, 6, 0, 0, 0, 0] and first["source_length"] == 2
    assert first["tokens"].tolist() == [0, 7, 8, 0] and first["segments"].tolist() == [1, 1, 1, 0]
    assert first["mask"].tolist() == [0, 1, 1, 0]
    assert second["source"][: second["source_length"]].tolist() == [5, 6, 7, 8, 9]
    assert second["tokens"].tolist() == [0, 10, 0, 0]
    assert rows.padding["mask"].sum() == 0 and rows.padding["source_length"] == 1
    with pytest.raises(UserError, match="no document has a prompt before its labels"):
        PairRows(documents(([1, 2], [1, 1])), 6, 4)
    with pytest.raises(UserError, match="none of 2 answers fits"):
        PairRows(documents(chat), 1, 4)


def test_the_teachers_rows_lie_beside_the_decoders() -> None:
    """Two prompts of two lengths, S = 3, T = 4: by hand."""
    batch = {
        "source": jnp.array([[5, 6, 7], [8, 0, 0]], jnp.int32),
        "source_length": jnp.array([3, 1], jnp.int32),
        "tokens": jnp.array([[0, 11, 12, 13], [0, 14, 0, 0]], jnp.int32),
        "segments": jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]], jnp.int32),
    }
    tokens, segments, first = joined(batch)
    assert tokens.tolist() == [[5, 6, 7, 11, 12, 13], [0, 0, 8, 14, 0, 0]] and first == 2
    assert segments.tolist() == [[1] * 6, [0, 0, 1, 1, 0, 0]]
    layout = Layout.causal(2, 6, segments)
    assert layout.positions[:, 2:4].tolist() == [[2, 3], [0, 1]]
    # The row that has read the whole prompt answers for the answer's first token, the last one for its last.
    assert tokens[:, first + 1 : first + 4].tolist() == batch["tokens"][:, 1:].tolist()


@pytest.fixture
def job(data_set, target_directory):
    """`job(source="student")`: a config with a teacher."""

    def make(**objective):
        section = {"name": "encoder_decoder", "target": str(target_directory), "model": MU, "source_length": 9}
        return parse(
            {
                "objective": {**section, "soft": 0.9, "hard": 0.1, **objective},
                "data": {"path": str(data_set)},
                "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
                "evaluation": {"every": 100, "batches": 2},
                "checkpoint": {"every": 2},
                "steps": 2,
                "batch_size": 3,
                "length": 8,
            },
            OBJECTIVES,
        )

    return make


@pytest.fixture
def setting(job):
    """`setting(source="student")`: objective, student, teacher, a batch of ragged prompts and answers."""

    def make(**changes):
        config = job(**changes)
        plan = trainer.make_plan(config, open_corpus_facts(config))
        frozen = plan.objective.frozen_part(plan.objective.load_base(plan.mesh))
        rng = np.random.default_rng(0)
        ends, answers = np.array([9, 4, 1]), np.array([7, 3, 5])
        source = rng.integers(3, 200, (3, 9)) * (np.arange(9) < ends[:, None])
        segments = (np.arange(8) <= answers[:, None]).astype(np.int32)
        tokens = rng.integers(3, 200, (3, 8)) * segments
        mask = segments * (np.arange(8) > 0)
        arrays = {"source": source, "source_length": ends, "tokens": tokens, "segments": segments, "mask": mask}
        batch = {name: np.asarray(x, np.int32) for name, x in arrays.items()}
        return plan.objective, drawn(plan.state["params"], 0.3, 1), frozen, batch

    return make


def open_corpus_facts(config):
    from models.formats.tokenizer import Tokenizer

    return Tokenizer.load(config.objective.base)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


@functools.partial(jax.jit, static_argnames="model")
def student_logits(model, params, source, lengths, text):
    memory = encode(model, params, source, lengths)
    return transformer.forward(model, params, text, *beside(memory, Layout.causal(*text.shape))).logits


def by_definition(objective, params, teacher, batch, tokens):
    """Per row of the batch (log q, log p, labels) at the answer's places, the teacher's from a text of its own."""
    begun = tokens.copy()
    begun[:, 0] = objective.model.bos_id
    ours = student_logits(objective.model, params, batch["source"], batch["source_length"], begun)
    found = []
    for row, count in enumerate(batch["segments"].sum(axis=1) - 1):
        prompt = batch["source"][row, : batch["source_length"][row]].tolist()
        answer = tokens[row, 1 : 1 + count]
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(prompt) + count] = [*prompt, *answer]
        theirs = teacher.apply(padded).logits[0, len(prompt) - 1 : len(prompt) - 1 + count]
        found.append((log_softmax(ours[row, :count]), log_softmax(theirs), answer))
    return found


def test_the_loss_is_its_definition_and_the_teacher_gets_no_gradient(setting, target_directory) -> None:
    objective, params, frozen, batch = setting()
    teacher = load_target(target_directory)
    pairs = by_definition(objective, params, teacher, batch, batch["tokens"])
    likelihood = np.concatenate([log_q[np.arange(len(answer)), answer] for log_q, _, answer in pairs])
    divergence = np.concatenate([np.sum(np.exp(log_p) * (log_p - log_q), axis=-1) for log_q, log_p, _ in pairs])

    def wide(batch):  # Longer rows, and other tokens where there is no text.
        more = {name: np.pad(x, ((0, 0), (0, 2))) if x.ndim == 2 else x for name, x in batch.items()}
        reads = np.arange(11) < batch["source_length"][:, None]
        source, tokens = np.where(reads, more["source"], 9), np.where(more["segments"] > 0, more["tokens"], 9)
        return {**more, "source": source, "tokens": tokens}

    @jax.jit
    def results(params, frozen, batch, wider):
        def loss(params, frozen, batch):
            return objective.loss(params, frozen, batch, KEY, 0.0)[0]

        slopes = jax.value_and_grad(loss, (0, 1), has_aux=True)
        return slopes(params, frozen, batch), loss(params, frozen, wider), objective.evaluate(params, frozen, batch)

    (plain, slopes), padded, told = results(params, frozen, batch, wide(batch))
    assert float(plain[1]) == len(likelihood) == float(padded[1])
    expected = 0.9 * divergence.sum() - 0.1 * likelihood.sum()
    np.testing.assert_allclose(plain[0], expected, rtol=1e-4)
    np.testing.assert_allclose(padded[0], expected, rtol=1e-4)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(slopes[1]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(slopes[0]["encoder"]))
    shown = objective.report({name: float(value) / float(count) for name, (value, count) in told.items()})
    assert shown["loss"] == pytest.approx(-likelihood.mean(), rel=1e-4)
    assert shown["divergence"] == pytest.approx(divergence.mean(), rel=1e-4) and 0 < shown["alpha"] < 1


def test_the_students_answers_are_judged_and_the_data_sets_learnt(setting, target_directory) -> None:
    objective, params, frozen, batch = setting(source="student", sampling=0.0, top_k=0)
    made = objective.refresh(params, frozen, batch, KEY)
    written = {**batch, "tokens": made["written"], "segments": made["written_segments"]}
    teacher = load_target(target_directory)
    own = by_definition(objective, params, teacher, written, made["written"])
    assert all(np.array_equal(np.argmax(log_q, axis=-1), answer) for log_q, _, answer in own)
    divergence = sum(np.sum(np.exp(log_p) * (log_p - log_q)) for log_q, log_p, _ in own)
    gold = by_definition(objective, params, teacher, batch, batch["tokens"])
    likelihood = sum(log_q[np.arange(len(answer)), answer].sum() for log_q, _, answer in gold)
    (sums, weights), _ = jax.jit(objective.loss)(params, frozen, {**batch, **made}, KEY, 0.0)
    np.testing.assert_allclose(sums, [0.9 * divergence, -0.1 * likelihood], rtol=1e-4)
    assert weights.tolist() == [sum(len(answer) for *_, answer in pairs) for pairs in (own, gold)]
    # A step that learns from it again reads other rows, whose prompts it is no answer to.
    later = {name: np.asarray(values)[::-1] for name, values in batch.items()}
    again, _ = jax.jit(objective.loss)(params, frozen, {**later, **made}, KEY, 0.0)
    np.testing.assert_array_equal(again[0], sums)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"soft": 0.0}, "soft must be positive with a teacher"),
        ({"target": None}, "and 0 without, got 0.9"),
        ({"target": None, "soft": 0.0, "source": "student"}, "is for a teacher to judge"),
        ({"divergence": {"name": "tvd++"}}, "is not for encoder-decoders"),
        ({"target": None, "soft": 0.0, "divergence": {"name": "tvd"}}, "divergence has no use without a teacher"),
        ({"reuse": 2}, "objective.reuse is for answers that the student writes .*: leave it at 1, got 2"),
        ({"model": {**MU, "family": "llama"}}, "model.family is that of all"),
    ],
)
def test_configs_that_cannot_be_are_refused(job, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        job(**changes)


@pytest.mark.slow
def test_a_killed_run_writes_the_same_answers_again(job, die_at, target_directory, tmp_path) -> None:
    turns = [[("user", f"q{i}"), ("assistant", f"a{i % 5}")] for i in range(24)]
    chats = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "chats.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}:{% endif %}{% endfor %}"
    )
    arguments = ["--kind", "chat", "--src", str(tmp_path / "chats.jsonl"), "--tokenizer", str(target_directory)]
    arguments += ["--chat_template", str(tmp_path / "chats.jinja"), "--valid_documents", "4"]
    build_dataset.main([*arguments, "--out", str(tmp_path / "data")])
    config = job(source="student")
    config = dataclasses.replace(config, steps=5, data=dataclasses.replace(config.data, path=str(tmp_path / "data")))
    trainer.train(config, tmp_path / "whole")
    with die_at(4):
        trainer.train(config, tmp_path / "killed")
    trainer.train(config, tmp_path / "killed")
    whole, killed = ((tmp_path / name / "target/model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


def test_models_of_the_other_kind_are_refused(job, target_directory) -> None:
    def plan(**changes):
        config = job(**changes)
        return trainer.make_plan(config, open_corpus_facts(config))

    with pytest.raises(UserError, match="the model is a decoder, which the objective lm trains"):
        plan(model=None, init_from=str(target_directory))
    with pytest.raises(UserError, match=r"source_length \(3000\) exceeds"):
        plan(source_length=3000)
    with pytest.raises(UserError, match=r"exceed the teacher's longest sequence \(2048\)"):
        plan(source_length=2045)
    config = job()
    with pytest.raises(UserError, match="no document has a prompt before its labels"):
        next(iter(open_corpus(config).batches(3, 0)))
