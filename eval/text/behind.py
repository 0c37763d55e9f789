"""What a target says of the tokens behind points of a text: as it is, or with a coprocessor's latents at each point.

The two see the same true tokens, so that they may be compared token by token. At a point behind token p, offset a is
the token p + a; with latents, offset 1 is read off the last of them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decoding.coprocessors import Coprocessor
from eval.measure.intervals import choices
from models.coprocessor import CoprocessorConfig
from models.errors import UserError
from models.formats.target import Target
from models.sharding import mesh_of, on_mesh
from models.transformer import forward, head
from train.objectives.coprocessor import before_label, before_labels, passes, places_at
from train.objectives.guess import picked
from train.objectives.shift import log_likelihood
from train.objectives.target_features import layout_of

if TYPE_CHECKING:
    from train.data.texts import Batch


@functools.partial(jax.jit, static_argnames=("config", "network", "ahead"))
def likelihoods_behind(
    config,
    network: CoprocessorConfig | None,
    ahead: int,
    params,
    network_params: Any,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    at: Int[Array, "B M"],
    labels: Bool[Array, "B T"] | None = None,
    lag: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "B M A"], Bool[Array, "B M A"]]:
    """Log-likelihoods of the tokens at offsets 1 to `ahead` behind tokens `at`, and which of them there are.

    Args:
      config: shape of the target.
      network: what the coprocessor is; None is the target as it is.
      ahead: A.
      params: of the target.
      network_params: of the coprocessor, beside them.
      tokens: texts.
      segments: their documents, from 1; 0 is padding.
      at: the points.
      labels: tokens that count; None is all of the texts. Points stand before them alone, as in training.
      lag: tokens up to a point that the coprocessor has not read, or all but the first of the document if fewer.
    """
    batch, mask_BT = {"tokens": tokens, "segments": segments}, segments > 0 if labels is None else labels
    layout = layout_of(batch, "blocks")
    kept_BM, lag_BM = picked(before_label(segments, mask_BT), at), jnp.minimum(lag, picked(layout.positions, at))
    places = places_at(batch, mask_BT, at, kept_BM, lag_BM, ahead)
    if network is None:
        hidden = before_labels(forward(config, params, tokens, layout).hidden, places)
    else:
        hidden = passes(network, network_params, config, params, tokens, layout, places).hidden

    # Of one point at a time: the logits of all would be the largest array by far.
    def of_point(of_one):
        hidden_BAH, labels_BA = of_one
        return log_likelihood(head(config, params, hidden_BAH), labels_BA)

    found = jax.lax.map(of_point, (hidden.swapaxes(0, 1), places.labels.swapaxes(0, 1)))
    return found.swapaxes(0, 1), places.counted


def scored(
    target: Target,
    network: Coprocessor | None,
    tokens: np.ndarray,
    segments: np.ndarray,
    at: np.ndarray,
    ahead: int,
    labels: np.ndarray | None = None,
    lag: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """`likelihoods_behind` of a target and a coprocessor, or the target as it is, on the host."""
    config, params = network or (None, None)
    arrays = [jnp.asarray(values, jnp.int32) for values in (tokens, segments, at)]
    counted = None if labels is None else jnp.asarray(labels, bool)
    with on_mesh(mesh_of(target.params)):
        found = likelihoods_behind(target.config, config, ahead, target.params, params, *arrays, counted, np.int32(lag))
    return np.asarray(found[0]), np.asarray(found[1])


@dataclasses.dataclass(frozen=True)
class ByOffset:
    """Sums over points, per row of text and offset: `nll` `[R, A]` and how many tokens, `count` `[R, A]`."""

    nll: np.ndarray
    count: np.ndarray

    @property
    def perplexity(self) -> np.ndarray:
        """`[A]`; nan where no token counts."""
        return np.exp(self.nll.sum(axis=0) / np.where(self.count.sum(axis=0), self.count.sum(axis=0), np.nan))

    def change(self, base: "ByOffset") -> tuple[np.ndarray, np.ndarray]:
        """Perplexity over the base's, less 1 `[A]`, and its 95% bootstrap interval over the choice of rows `[A, 2]`."""
        picks = choices(len(self.nll))
        difference = self.nll - base.nll

        def ratio(nll, count):
            return np.expm1(nll / np.where(count, count, np.nan))

        resampled = ratio(difference[picks].sum(axis=1), self.count[picks].sum(axis=1))
        # A row alone may hold no token so far ahead; where none does, there is no interval.
        known = self.count.sum(axis=0) > 0
        interval = np.full((len(known), 2), np.nan)
        interval[known] = np.nanquantile(resampled[:, known], [0.025, 0.975], axis=0).T
        return ratio(difference.sum(axis=0), self.count.sum(axis=0)), interval


def by_offset(
    target: Target,
    network: Coprocessor | None,
    batches: "Sequence[Batch]",
    points: int,
    ahead: int,
    labels: Literal["all", "assistant"] = "all",
    lag: int = 0,
) -> ByOffset:
    """Likelihoods behind `points` places spread evenly over every row of text, of all tokens or of those that the data
    set marks, and then only places before one of these; `lag` as of `likelihoods_behind`.

    Raises:
      UserError: no token counts.
    """
    sums, counts = [], []
    for batch in batches:
        rows, length = batch["tokens"].shape
        places = np.unique(np.linspace(0, length - 2, min(points, length - 1)).astype(np.int32))
        at = np.broadcast_to(places, (rows, len(places)))
        counted = None if labels == "all" else batch["mask"]
        likelihood, there = scored(target, network, batch["tokens"], batch["segments"], at, ahead, counted, lag)
        sums.append(-np.where(there, likelihood, 0).astype(np.float64).sum(axis=1))
        counts.append(there.sum(axis=1))
    found = ByOffset(np.concatenate(sums), np.concatenate(counts))
    if not found.count.sum():
        raise UserError("there is no token to predict: the rows to measure on hold none that counts")
    return found
