"""Perplexity and head accuracies agree with what a few lines of NumPy say of the same logits."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.registry import load_drafter
from eval.text.metrics import comb, head_accuracy, head_ranks, perplexity, rows_of_text, text_documents
from models.errors import UserError
from models.formats.target import Target
from models.layout import Layout


def batch(rows: list[list[int]], segments: list[list[int]]) -> dict[str, np.ndarray]:
    tokens = np.array(rows, np.int32)
    return {"tokens": tokens, "segments": np.array(segments, np.int32), "mask": np.ones_like(tokens, dtype=np.uint8)}


def test_perplexity_counts_every_token_with_a_past(target: Target) -> None:
    rows = [[5, 9, 7, 3, 8, 6], [4, 4, 2, 0, 0, 0]]
    segments = [[1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0]]
    losses = []
    for text in ([5, 9, 7], [3, 8, 6], [4, 4, 2]):
        logits = np.asarray(target.apply([text]).logits[0], np.float64)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses += [-logp[i, text[i + 1]] for i in range(2)]
    assert perplexity(target, [batch(rows, segments)]) == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    with pytest.raises(UserError, match="no token"):
        perplexity(target, [batch([[0, 0]], [[0, 0]])])


@pytest.mark.parametrize("name", ["medusa", "hydra"])
def test_ranks_are_those_of_the_heads_logits(target: Target, drafter_directories, name: str) -> None:
    drafter, params = load_drafter(drafter_directories[name], target)
    tokens = np.random.default_rng(0).integers(0, target.config.vocab_size, (2, 12)).astype(np.int32)
    ranks_DBT = head_ranks(target, drafter, params, tokens, width=target.config.vocab_size)
    heads, layout = drafter.heads, Layout.causal(*tokens.shape)
    asked = [(i, b, p) for i in range(heads.num_heads) for b, p in [(0, 0), (1, 3), (0, 12 - 3 - i)]]

    @jax.jit
    def logits_there(hidden, embedding, tokens):
        feature = heads.features(target.config, params, hidden, layout)
        return {
            (i, b, p): heads.vocab(
                params, i, heads.hidden(params, i, feature[b, p], embedding[tokens[b, p + 1 : p + 2 + i]])
            )
            for i, b, p in asked
        }

    hidden, embedding = target.apply(tokens).hidden, target.params["embed"]["embedding"]
    found = jax.device_get(logits_there(hidden, embedding, jnp.asarray(tokens)))
    for i, b, p in asked:
        logits = found[i, b, p]
        truth = logits[tokens[b, p + 2 + i]]
        assert (
            abs(int(ranks_DBT[i, b, p]) - int((logits > truth + 1e-5).sum()))
            <= (np.abs(logits - truth) < 1e-4).sum() - 1
        )


def test_ranks_do_not_depend_on_the_tree(target: Target, drafter_directories) -> None:
    drafter, params = load_drafter(drafter_directories["hydra"], target)
    tokens = np.random.default_rng(1).integers(0, target.config.vocab_size, (1, 10)).astype(np.int32)
    other = dataclasses.replace(drafter, tree=comb(1, 2))
    assert np.array_equal(head_ranks(target, drafter, params, tokens), head_ranks(target, other, params, tokens))


def test_comb_holds_every_rank_of_every_depth() -> None:
    tree = comb(3, 4)
    assert tree.max_depth == 3 and tree.size == 13
    assert [sorted(tree.rank[tree.level(d)]) for d in (1, 2, 3)] == [[0, 1, 2, 3]] * 3


def test_head_accuracy_is_cumulative_and_masked(target: Target, drafter_directories) -> None:
    drafter, params = load_drafter(drafter_directories["medusa"], target)
    tokens = np.random.default_rng(2).integers(0, 30, (2, 16)).astype(np.int32)
    segments = np.array([[1] * 8 + [2] * 8, [1] * 6 + [0] * 10])
    width = target.config.vocab_size
    accuracy = head_accuracy(target, drafter, params, [batch(tokens.tolist(), segments.tolist())], width)
    assert len(accuracy) == 3 and all(np.all(np.diff(row) >= 0) for row in accuracy)
    assert all(row[-1] == pytest.approx(1.0) for row in accuracy), "among all tokens the true one is always found"
    ranks = head_ranks(target, drafter, params, tokens, width)
    # Places whose label at the deepest head, four tokens on, lies in the same document: 4 + 4 + 2.
    places = [ranks[0, 0, 0:4], ranks[0, 0, 8:12], ranks[0, 1, 0:2]]
    assert accuracy[0][0] == pytest.approx((np.concatenate(places) == 0).mean())


def test_rows_of_text(target: Target, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("once upon a time there was a small house by the sea " * 8)
    documents = text_documents(path, target)
    rows = rows_of_text(target, None, "valid", str(path), length=16, rows=4)
    assert [row["tokens"].shape for row in rows] == [(4, 16)]
    assert rows[0]["tokens"].reshape(-1).tolist() == documents[0]["tokens"][:64].tolist()


def test_bad_text(target: Target, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="either a data set or a text"):
        rows_of_text(target, None, "valid", None, 16, 4)
    with pytest.raises(UserError, match="no text file"):
        text_documents(tmp_path / "nowhere.txt", target)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="too little"):
        text_documents(tmp_path / "empty.txt", target)
    with pytest.raises(UserError, match="no tokenizer"):
        text_documents(tmp_path / "empty.txt", dataclasses.replace(target, tokenizer=None))
    assert jax.tree.leaves(target.params)
