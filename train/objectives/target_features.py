"""What drafters learn from: the frozen target's features on a batch, wherever they come from.

An objective asks `read_target` of `drafting.py` once per batch and passes the answer on to its loss, so that several
drafters share one forward, and features kept on disk take its place.

What is kept of a row is rounded to bfloat16. The target's distribution is kept as its `k` most probable tokens, or, for
k = 0, as the feature below the head, from which the head makes all of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models import transformer
from models.config import TransformerConfig
from models.heads.medusa import vocab_kernel
from models.layout import Layout
from train.data import features
from train.objectives.objective import Batch, Params
from train.objectives.pieces import mapped, pieces_of

LOGITS = "logits"  # Among the names of taps: the target's distribution.
_KEPT = "target/"  # Begins the names of what a batch carries of the target.
_TOKENS, _SCORES = f"{_KEPT}top_tokens", f"{_KEPT}top_log_probabilities"
_NEVER = -1e9  # Log-probability of tokens that were not kept: nothing after a softmax, and finite before it.


class TargetFeatures(NamedTuple):
    """The target on a batch, its logits still to be read.

    Attributes:
      taps: features by name, those asked for and perhaps others.
      scored: arrays `[B, T, ...]` that `read` makes logits from.
      read: from rows of `scored`, any number of leading axes, to logits `[..., V]`, float32 or wider; with `known` to
        those of these tokens alone. A loss calls it as late and for as many rows as it likes.
    """

    taps: dict[str, Float[Array, "B T H"]]
    scored: Any
    read: Callable[..., Float[Array, "*R V"]]

    @property
    def hidden(self) -> Float[Array, "B T H"]:
        """Post-norm features."""
        return self.taps["post_norm"]

    @property
    def logits(self) -> Float[Array, "B T V"]:
        """At every position."""
        return self.read(self.scored)


def target_features(
    model: TransformerConfig, frozen: Params, batch: Batch, taps: Iterable[str], attention: str = "dense"
) -> TargetFeatures:
    """The target on the text of a batch: what the batch carries of it, else by the target's forward.

    Args:
      model: the target's shape.
      frozen: its parameters.
      batch: `tokens` and `segments`, int [B, T], and perhaps what `rounded` made, which holds `taps` then.
      taps: features by name, and `LOGITS`.
      attention: of the forward (`models.layout.Layout`).
    """
    if any(name.startswith(_KEPT) for name in batch):
        return _carried(model, frozen, batch)
    names = sorted({*taps, "post_norm"} - {LOGITS})
    output = transformer.forward(model, frozen, batch["tokens"], layout_of(batch, attention), taps=names)
    return TargetFeatures(output.taps, output.hidden, functools.partial(_read, model, frozen))


def _read(model: TransformerConfig, frozen: Params, rows: Array, known: Array | None = None) -> Array:
    if known is None:
        return transformer.head(model, frozen, rows)
    some = dataclasses.replace(model, vocab_size=len(known), tied_embeddings=False)
    return transformer.head(some, {"head": {"kernel": vocab_kernel(frozen)[:, known]}}, rows)


def layout_of(batch: Batch, attention: str = "dense") -> Layout:
    """Who sees whom in the text of a batch; `attention` as in `Layout`."""
    batch_size, rows = batch["tokens"].shape
    return Layout.causal(batch_size, rows, batch["segments"], attention)


def _carried(model: TransformerConfig, frozen: Params, batch: Batch) -> TargetFeatures:
    dtype = frozen["embed"]["embedding"].dtype
    kept = {name.removeprefix(_KEPT): values for name, values in batch.items() if name.startswith(_KEPT)}
    taps = {name: x.astype(dtype) for name, x in kept.items() if f"{_KEPT}{name}" not in (_TOKENS, _SCORES)}
    if _TOKENS not in batch:
        return TargetFeatures(taps, taps["post_norm"], functools.partial(_read, model, frozen))

    def read(rows, known=None):
        tokens, scores = (x.reshape(-1, x.shape[-1]) for x in rows)
        spread = jnp.full((len(tokens), model.vocab_size), _NEVER, jnp.float32)
        spread = jax.vmap(lambda row, at, value: row.at[at].set(value))(spread, tokens, scores.astype(jnp.float32))
        return (spread if known is None else spread[:, known]).reshape(*rows[0].shape[:-1], -1)

    return TargetFeatures(taps, (batch[_TOKENS], batch[_SCORES]), read)


def arrays_to_keep(model: TransformerConfig, taps: Iterable[str], length: int, top_k: int) -> dict[str, features.Array]:
    """What is kept of a row of `length` tokens so that no forward is needed for `taps`, by the name in a batch."""
    names = set(taps)
    spread = LOGITS in names and top_k > 0
    names = (names if spread or LOGITS not in names else names | {"post_norm"}) - {LOGITS}
    arrays = {f"{_KEPT}{name}": features.Array("bfloat16", (length, model.width)) for name in sorted(names)}
    if spread:
        arrays[_TOKENS] = features.Array("int32", (length, top_k))
        arrays[_SCORES] = features.Array("bfloat16", (length, top_k))
    return arrays


def rounded(target: TargetFeatures, arrays: Mapping[str, features.Array], devices: int = 1) -> dict[str, Array]:
    """The arrays to keep, in the dtypes that they are kept in, of texts on so many devices."""
    found = {f"{_KEPT}{name}": feature for name, feature in target.taps.items()}
    if _TOKENS in arrays:
        count = arrays[_TOKENS].shape[-1]

        def best(scored):  # Of a piece: scores of whole texts would be the largest array by far.
            scores, tokens = jax.lax.top_k(jax.nn.log_softmax(target.read(scored), axis=-1), count)
            return jnp.concatenate([scores, tokens.astype(scores.dtype)], axis=-1)

        both = mapped(best, target.scored, pieces_of([(target.read, target.scored)], devices))
        found[_SCORES], found[_TOKENS] = jnp.split(both, 2, axis=-1)
    return {name: found[name].astype(array.dtype) for name, array in arrays.items()}
