"""P-EAGLE's loss against its definition over the rows that were drawn, and what its config refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import UserError
from tests.train.test_eagle import counted, log_softmax


def test_loss_equals_its_definition_row_by_row(draft_setting) -> None:
    """And nothing that is trained lacks a slope."""
    depth, changes = 3, {"vocabulary": 12, "own_embedding": True, "fc_norm": True}
    objective, params, frozen, batch = draft_setting("p_eagle", depth=depth, num_layers=2, keep=0.7, **changes)
    key = jax.random.key(3)

    def loss(params):
        sums, metrics = objective.loss(params, frozen, batch, key, 0.0)
        return jnp.sum(sums[0]), (sums, metrics)

    @jax.jit
    def run(params):
        target = objective.read_target(frozen, batch)
        guesses = objective.teacher_forced(target, params, frozen, batch, key)
        read = [(guess.at, guess.labels.counted, guess.read(guess.hidden)) for guess in guesses]
        return target.logits, read, jax.value_and_grad(loss, has_aux=True)(params)

    logits, read, ((_, ((sums, weights), metrics)), slopes) = jax.device_get(run(params))
    known = np.asarray(frozen["draft_vocab"])
    total = rows = 0
    for d, (at, there, guesses) in enumerate(read):
        labels = {(b, p): label for b, p, label in counted(batch, 2 + d)}
        at = np.broadcast_to(np.arange(guesses.shape[1]), there.shape) if at is None else at
        loss_d = rows_d = 0
        for b, row in zip(*np.nonzero(there), strict=True):
            teacher = logits[b, labels[b, at[b, row]] - 1]
            if int(np.argmax(teacher)) in known:
                loss_d -= float(np.exp(log_softmax(teacher[known])) @ log_softmax(guesses[b, row]))
                rows_d += 1
        assert rows_d > 2 and float(metrics[f"loss_{d + 1}"][0]) == pytest.approx(loss_d, rel=1e-4)
        total, rows = total + loss_d, rows + rows_d
        most = [len([1 for row, *_ in labels if row == b]) for b in range(len(there))]
        assert all(there.sum(axis=1) <= most)
    assert sums.shape == weights.shape == (1,) and float(weights[0]) == rows
    assert float(sums[0]) == pytest.approx(total, rel=1e-4)
    assert [at is None for at, *_ in read] == [True, False, False] and read[2][2].shape[1] < read[1][2].shape[1]
    assert {"mask_hidden", "mask_embedding", "embed", "fc_norm", "blocks"} <= set(slopes)
    assert all(np.max(np.abs(leaf)) > 0 for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 0}, "objective.depth must be at least 1"),
        ({"num_layers": 0}, "objective.num_layers must be at least 1"),
        ({"keep": 0.0}, "objective.keep must lie in 0..1, 0 excluded"),
        ({"keep_least": 1.5}, "objective.keep_least must lie in 0..1"),
        ({"fc_norm": True, "norm_before_fc": True}, "only one of fc_norm and norm_before_fc"),
        ({"layers": (1, 2)}, "objective.layers must name three layers"),
    ],
)
def test_bad_configs(changes: dict, words: str, job) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        job("p_eagle", objective=changes)
