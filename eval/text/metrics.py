"""How good a model is, apart from how fast: perplexity of a target, accuracy of draft heads by depth.

Both are teacher-forced, on rows of real text, with the shifts and masks that training uses
(`train/objectives/shift.py`) and the ranks that the decoding loop would see (`decoding/replay.py`).
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decoding.drafter import Drafter
from decoding.replay import Replayable, teacher_forced_ranks
from decoding.tree_search import RANKS, Acceptance
from decoding.trees import Topology
from models.errors import UserError
from models.formats.target import Target
from models.formats.text_files import read_text
from models.layout import Layout
from models.sharding import mesh_of, on_mesh
from models.transformer import forward
from train.objectives.shift import label_mask, labels_at, log_likelihood

if TYPE_CHECKING:  # TFDS takes seconds to import, and most of what is here reads no data set.
    from train.data.texts import Batch, Documents


def text_documents(path: str | Path, target: Target) -> "Documents":
    """A text file as one document.

    Raises:
      UserError: no such file, or a target without a tokenizer.
    """
    from train.data.texts import Document, Documents

    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no text file {path}")
    if target.tokenizer is None:
        raise UserError(f"{target.path or 'the target'} has no tokenizer, so it cannot read the text {path}")
    tokens = np.asarray(target.tokenizer.encode(read_text(path), specials=False), np.int32)
    if len(tokens) < 2:
        raise UserError(f"{path} holds {len(tokens)} tokens, which is too little to measure anything on")
    document = Document(name=str(path), tokens=tokens, mask=np.ones(len(tokens), np.uint8))
    return Documents(np.array([len(tokens)]), lambda _: document)


def rows_of_text(
    target: Target, data: str | None, split: str, text: str | None, length: int, rows: int, batch_size: int = 4
) -> "list[Batch]":
    """Rows to measure on: the first of a data set split, or of a text file.

    Args:
      target: whose tokenizer the data must come from.
      data: a data set directory or `tfds:NAME`; or None.
      split: its split.
      text: a text file; or None.
      length: tokens per row; a row that begins inside a document sees nothing before its own beginning.
      rows: how many, rounded up to whole batches.

    Raises:
      UserError: neither or both are given, they cannot be read, or rows are longer than the target's context.
    """
    from train.data.order import in_order
    from train.data.texts import PackedRows, open_split

    target.refuse_encoder("is measured on answers behind their prompts, by its training's evaluations")
    if (data is None) == (text is None):
        raise UserError("give either a data set or a text file to measure on")
    if length > target.config.max_position:
        raise UserError(f"length must be at most the target's context, {target.config.max_position}, got {length}")
    if text is not None:
        documents = text_documents(text, target)
    else:
        fingerprint = target.tokenizer.fingerprint if target.tokenizer else None
        documents = open_split(str(data), split, tokenizer=target.tokenizer, tokenizer_fingerprint=fingerprint)
    documents = documents.within(target.config.vocab_size, text or f"{data}, split {split}")
    batches = in_order(PackedRows(documents, length), batch_size, max_batches=-(-rows // batch_size))
    return cast("list[Batch]", list(batches))


@functools.partial(jax.jit, static_argnames=("config",))
def _negative_log_likelihood(config, params, batch):
    labels_BT, weight_BT = labels_at({**batch, "mask": label_mask(batch, "all")}, 1)
    rows, length = batch["tokens"].shape
    layout = Layout.causal(rows, length, batch["segments"])
    likelihood_BT = log_likelihood(forward(config, params, batch["tokens"], layout).logits, labels_BT)
    return -jnp.sum(likelihood_BT * weight_BT), jnp.sum(weight_BT)


def perplexity(target: Target, batches: "Iterable[Batch]") -> float:
    """exp of the mean negative log-likelihood per token, over every token that has one before it in its row."""
    total = weight = 0.0
    for batch in batches:
        with on_mesh(mesh_of(target.params)):
            loss, count = _negative_log_likelihood(target.config, target.params, batch)
        total, weight = total + float(loss), weight + float(count)
    if not weight:
        raise UserError("there is no token to predict: the rows to measure on are empty")
    return float(np.exp(total / weight))


def comb(depth: int, width: int) -> Topology:
    """The best path, `depth` deep, with `width` choices at each of its nodes: every rank of every depth once."""
    return Topology(tuple((*(0,) * d, rank) for d in range(depth) for rank in range(width)))


def head_ranks(
    target: Target, drafter: Drafter, drafter_params, tokens: Int[np.ndarray, "B T"], width: int = RANKS
) -> Int[np.ndarray, "D B T"]:
    """Where each head, teacher-forced at p, ranks the token at p + 2 + i among its guesses; `width` if not among them.

    D is the number of heads, whatever tree the drafter has. See `decoding.replay.teacher_forced_ranks`.
    """
    width = min(width, target.config.vocab_size)
    full = cast(Replayable, drafter.with_tree(comb(drafter.num_heads, width)))
    with on_mesh(mesh_of(target.params)):
        ranks = teacher_forced_ranks(target.config, full, target.params, drafter_params, jnp.asarray(tokens))
    return np.asarray(ranks)


def head_accuracy(
    target: Target, drafter: Drafter, drafter_params, batches: "Sequence[Batch]", width: int = RANKS
) -> list[list[float]]:
    """Top-1 to top-`width` accuracy of each head: how often the true token is among its first k guesses.

    A place counts at every depth or at none: its label at the deepest head must lie in the same document. Documents
    that share a row are not kept apart in what the heads read, only in what counts.
    """
    width = min(width, target.config.vocab_size)
    picked = []
    for batch in batches:
        ranks_DBT = head_ranks(target, drafter, drafter_params, batch["tokens"], width)
        arrays: dict[str, Array] = {name: jnp.asarray(array) for name, array in batch.items()}
        _, counts_BT = labels_at({**arrays, "mask": label_mask(arrays, "all")}, 1 + drafter.num_heads)
        picked.append(ranks_DBT[:, np.asarray(counts_BT)])
    ranks_DN = np.concatenate(picked, axis=1)
    if not ranks_DN.size:
        raise UserError("the rows to measure heads on are shorter than the heads reach")
    return np.cumsum(Acceptance.of_ranks(ranks_DN, width).accuracy, axis=1).tolist()
