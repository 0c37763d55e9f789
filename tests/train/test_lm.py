"""The language-model objective against its definition: every document by itself, and only the labels that count."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.formats.tokenizer import Tokenizer
from models.layout import Layout
from tests.noise import noisy
from tests.train.conftest import SHAPE
from train.objectives.lm import LM, LMConfig
from train.objectives.objective import Compute

LENGTH = 16
# Rows of (documents' lengths); what is left of a row is padding.
ROWS = [(5, 8), (16,), (3, 1, 7)]


@pytest.fixture(scope="module")
def tokenizer(data_set):
    return Tokenizer.load(data_set / "tokenizer")


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Packed documents of random tokens, half of which the data set marks as labels."""
    rng = np.random.default_rng(0)
    segments = np.zeros((len(ROWS), LENGTH), np.int32)
    for row, lengths in zip(segments, ROWS, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    tokens = np.where(segments > 0, rng.integers(0, tokenizer.vocab_size, segments.shape), 0).astype(np.int32)
    return {"tokens": tokens, "segments": segments, "mask": rng.integers(0, 2, segments.shape).astype(np.uint8)}


@pytest.fixture(scope="module")
def params(tokenizer):
    objective = LM(LMConfig("lm", SHAPE), tokenizer)
    return noisy(jax.jit(objective.init)(jax.random.key(0), None), 0.3)


@pytest.fixture(scope="module")
def alone(tokenizer, batch, params):
    """(likelihood, first choice, label, marked) of all that answers for a token, each document read by itself."""
    model = LM(LMConfig("lm", SHAPE), tokenizer).model
    places = [(b, s) for b, lengths in enumerate(ROWS) for s in range(1, len(lengths) + 1)]
    documents = np.zeros((len(places), LENGTH), np.int32)
    for row, (b, s) in zip(documents, places, strict=True):
        inside = batch["segments"][b] == s
        row[: inside.sum()] = batch["tokens"][b, inside]
    forward = jax.jit(lambda tokens: transformer.forward(model, params, tokens, Layout.causal(*tokens.shape)).logits)
    logits = np.asarray(forward(jnp.asarray(documents)), np.float64)
    likelihood = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    found = []
    for row, (b, s) in enumerate(places):
        marks = batch["mask"][b, batch["segments"][b] == s]
        for p in range(len(marks) - 1):
            label = documents[row, p + 1]
            found.append((likelihood[row, p, label], logits[row, p].argmax(), label, marks[p + 1]))
    return [np.array(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("labels", ["all", "assistant"])
def test_loss_and_evaluation_equal_their_definition(labels, tokenizer, batch, params, alone):
    objective = LM(LMConfig("lm", SHAPE, labels=labels), tokenizer)
    likelihood, chosen, label, marked = alone
    counted = np.ones(len(label), bool) if labels == "all" else marked > 0
    assert {"all": counted.all(), "assistant": 5 < counted.sum() < len(counted) - 5}[labels]
    (total, weight), measured = jax.jit(objective.loss)(params, None, batch, jax.random.key(0), 0.0)
    expected = -likelihood[counted].sum()
    assert (float(total), float(weight)) == (pytest.approx(expected, rel=1e-5), counted.sum()) and measured == {}

    sums = jax.jit(objective.evaluate)(params, None, batch)
    means = {name: float(value) / float(count) for name, (value, count) in sums.items()}
    assert all(float(count) == counted.sum() for _, count in sums.values())
    shown = objective.report(means)
    loss = expected / counted.sum()
    right = np.mean((chosen == label)[counted])
    assert shown == pytest.approx({"loss": loss, "perplexity": math.exp(loss), "accuracy": right}, rel=1e-4)


def test_the_forward_computes_as_the_job_says(tokenizer, batch, params, monkeypatch):
    objective, heard = LM(LMConfig("lm", SHAPE), tokenizer), []
    objective.prepare(Compute("float32", remat="layers"))
    forward = transformer.forward

    def listened(config, params, tokens, layout, **settings):
        heard.append((layout.attention, settings["remat"]))
        return forward(config, params, tokens, layout, **settings)

    monkeypatch.setattr(transformer, "forward", listened)
    jax.eval_shape(objective.loss, params, None, batch, jax.random.key(0), 0.0)
    assert heard == [(objective.compute.attention, "layers")] and heard[0][0] != "dense"
