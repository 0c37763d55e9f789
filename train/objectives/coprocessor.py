"""A coprocessor on a frozen target (`models/coprocessor.py`): latents at many places of a text at once.

Of every row M *places* q are drawn, without replacement among those whose next token is a label of the same document.
The coprocessor reads the target's cache up to p = q - n, where n is 0, or drawn from 0 to `max_lag` where it works
beside the target and is late; its latents z are put behind q, and the target's own loss on what follows is

    loss = sum w -log p(x_{q+a} | x_{<=q}, z, x_{q+1..q+a-1}) / sum w          a = 1 .. N_A

with w 1 for labels of the same document, else 0. Three passes over static shapes, S tokens and M places:

    1  the target on the text                      its cache, S rows; nothing of it is learnt
    2  the network on soft tokens                  M N rows, keys: the cache up to p, and its own place
    3  the target on latents and the tokens ahead  M (N + N_A - 1) rows, keys: the cache up to q, and its own place

The last token ahead is only a label, so that it needs no row, and the first is read off the last latent. Scores with
the cache exist of some places at a time (`models/attention.py`), scores over the vocabulary too (`pieces.py`);
gradients pass through the frozen target's activations to z, and to nothing else of it.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decoding.coprocessors import save_coprocessor
from models import coprocessor, schema, transformer
from models.config import TransformerConfig
from models.coprocessor import CoprocessorConfig, Points
from models.formats.tokenizer import Tokenizer
from models.layout import Layout
from models.sharding import keep_batch
from train.config import OptimizerConfig
from train.objectives.frozen_target import BesideFrozenTarget
from train.objectives.guess import drawn_places, picked
from train.objectives.objective import Batch, Compute, Params, Sums
from train.objectives.pieces import pieces_of, separable_sums, summed
from train.objectives.shift import label_mask, log_likelihood
from train.objectives.target_features import layout_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoprocessorTraining:
    """The section `objective` of a coprocessor job.

    Attributes:
      name: `coprocessor`.
      target: directory of the target, which stays as it is.
      coprocessor: what it is.
      places: M, augmentation points per row.
      ahead: N_A, tokens behind each that are predicted.
      labels: which tokens are learnt: `assistant`, those that the data set marks, or `all`.
      soft: an optimizer for the soft tokens, and the gate of `z_base`, alone; None is the job's.
    """

    reads: ClassVar[str] = "text"

    name: Literal["coprocessor"]
    target: str | None
    coprocessor: CoprocessorConfig = dataclasses.field(default_factory=CoprocessorConfig)
    places: int = 32
    ahead: int = 16
    labels: Literal["assistant", "all"] = "all"
    soft: OptimizerConfig | None = None

    def __post_init__(self):
        schema.require(
            self.target is not None, "objective.target must be the directory of the target to serve", self.target
        )
        schema.require(self.places >= 1, "objective.places must be at least 1", self.places)
        schema.require(self.ahead >= 1, "objective.ahead must be at least 1", self.ahead)

    @property
    def base(self) -> str:
        """The target."""
        return str(self.target)

    def forward_tokens(self, length: int) -> int:
        """What a step costs per row of `length` tokens, in tokens' passes through the target: gradients count as one
        more pass where they go to activations alone, as two where they go to weights as well."""
        config = self.coprocessor
        learning = {"full": 3, "scratch": 3, "lora": 2, "soft": 2, "pause": 0}[config.kind]
        read = learning * length if config.needs_features else 0
        behind = self.places * (config.num_latents + self.ahead - 1)
        return length + read + learning * self.places * config.num_latents + 2 * behind


class Places(NamedTuple):
    """Where latents are put in the texts of a batch, and what follows.

    Attributes:
      at: q, the token that latents stand behind.
      lag: n, tokens up to q that the coprocessor has not read.
      kept: whether there is such a place; its latents see nothing otherwise, and nothing counts.
      labels: x_{q+1} to x_{q+N_A}.
      counted: which of them count.
    """

    at: Int[Array, "B M"]
    lag: Int[Array, "B M"]
    kept: Bool[Array, "B M"]
    labels: Int[Array, "B M A"]
    counted: Bool[Array, "B M A"]

    def points(self, positions: Int[Array, "B T"], lag: Int[Array, "B M"] | int = 0) -> Points:
        """What is seen of the text, but for the last `lag` tokens."""
        last_BM = picked(positions, self.at)
        seen_BM = jnp.where(self.kept, self.at - lag + 1, 0)
        return Points(last_BM - lag, seen_BM, self.at - last_BM)


class Passes(NamedTuple):
    """What the passes over a batch found.

    Attributes:
      latents: z.
      hidden: what the target's head reads of every label behind latents.
      of_text: what it reads at every token of the text alone.
    """

    latents: Float[Array, "B M N H"]
    hidden: Float[Array, "B M A H"]
    of_text: Float[Array, "B T H"]


class CoprocessorObjective(BesideFrozenTarget):
    """The `coprocessor` objective."""

    Config: ClassVar[type] = CoprocessorTraining
    product: ClassVar[str] = "coprocessor"
    recomputes = True

    def __init__(self, config: CoprocessorTraining, tokenizer: Tokenizer):
        """`tokenizer` is the target's, and the data's. Raises UserError for a missing or broken target."""
        super().__init__(config, tokenizer)
        self.prepare(Compute())

    @property
    def optimizers(self) -> Mapping[str, OptimizerConfig | None]:  # type: ignore[override]
        """The soft tokens may have one of their own."""
        if self._config.soft is None:
            return {}
        learnt = jax.eval_shape(self.init, jax.random.key(0), self.base)
        return {name: self._config.soft if name == "soft" else None for name in learnt}

    def check(self, length: int | None) -> None:
        """Also refuses rows too short for what is to be predicted, or so long that latents leave the target's context;
        and latents that decoding would refuse."""
        super().check(length)
        config = self._config.coprocessor
        config.check_target(self.model)
        if length is None:
            return
        needed, room = self._config.ahead + 1, self.model.max_position - config.shift
        schema.require(length >= needed, f"config.length must be at least {needed}", length)
        left = f"config.length must be at most {room}, which latents leave of the target's context"
        schema.require(length <= room, left, length)

    def init(self, key: Array, base: Params) -> Params:
        """A fresh coprocessor in float32, whatever the target's dtype: small updates must not round away."""
        params = coprocessor.init_params(self._config.coprocessor, self.model, base, key)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    def places(self, batch: Batch, key: Array | None) -> Places:
        """Drawn with `key`; None, for evaluations, draws always the same, without a lag."""
        config = self._config
        mask = label_mask(batch, config.labels)
        at_key, lag_key = jax.random.split(jax.random.key(0) if key is None else key)
        at_BM, kept_BM = drawn_places(before_label(batch["segments"], mask), config.places, at_key)
        lag_BM = jnp.zeros_like(at_BM)
        if key is not None and config.coprocessor.max_lag:
            drawn_BM = jax.random.randint(lag_key, at_BM.shape, 0, config.coprocessor.max_lag + 1, jnp.int32)
            lag_BM = jnp.minimum(drawn_BM, picked(layout_of(batch).positions, at_BM))
        return places_at(batch, mask, at_BM, kept_BM, lag_BM, config.ahead)

    def passes(self, trainable: Params, frozen: Params, batch: Batch, places: Places) -> Passes:
        """All three."""
        compute = self.compute
        text = layout_of(batch, compute.attention)
        return passes(
            self._config.coprocessor,
            compute.cast(trainable),
            self.model,
            frozen,
            batch["tokens"],
            text,
            places,
            compute.remat,
        )

    def loss(self, trainable: Params, frozen: Params, batch: Batch, key: Array, progress: Array | float):
        """Mean cross-entropy over the labels behind latents, in nats."""
        places = self.places(batch, key)
        return self.loss_at(places, trainable, frozen, batch), {}

    def loss_at(self, places: Places, trainable: Params, frozen: Params, batch: Batch) -> tuple[Array, Array]:
        """(sum, weight) of `loss` at given places."""
        frozen = jax.lax.stop_gradient(frozen)
        hidden = self.passes(trainable, frozen, batch, places).hidden

        def score(_, read, hidden, places, shared):
            return -jnp.sum(self._likelihood(frozen, hidden, places))

        total = separable_sums(lambda _: None, score, [{}], [hidden], places, self._pieces(frozen, hidden))[0]
        return total, jnp.sum(places.counted).astype(total.dtype)

    def evaluate(self, trainable: Params, frozen: Params, batch: Batch) -> Sums:
        """By offset: the loss behind latents, and of the target alone on the same labels; and how many labels."""
        places = self.places(batch, None)
        _, hidden, of_text = self.passes(trainable, frozen, batch, places)
        alone = before_labels(of_text, places)

        def measure(piece):
            hidden, alone, places = piece
            found = {"loss": hidden, "base": alone}
            return {name: -jnp.sum(self._likelihood(frozen, x, places), axis=(0, 1)) for name, x in found.items()}

        sums = summed(measure, (hidden, alone, places), self._pieces(frozen, hidden))
        count_A = jnp.sum(places.counted, axis=(0, 1)).astype(sums["loss"].dtype)
        found = {f"{name}_{a + 1}": (of[a], count_A[a]) for name, of in sums.items() for a in range(len(count_A))}
        return found | {f"labels_{a + 1}": (count, jnp.ones(())) for a, count in enumerate(count_A)}

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """Perplexity by offset, and by how many percent it is above the target's own there, or below; the means of
        both losses over offsets. Of an offset without labels there is none."""
        offsets = [a for a in range(1, self._config.ahead + 1) if means[f"labels_{a}"]]
        loss, base = ({a: float(means[f"{name}_{a}"]) for a in offsets} for name in ("loss", "base"))
        shown = {"loss": loss, "base_loss": base} if offsets else {}
        found = {name: sum(of.values()) / len(of) for name, of in shown.items()}
        found |= {f"perplexity_{a}": math.exp(loss[a]) for a in offsets}
        return found | {f"change_{a}": 100 * math.expm1(loss[a] - base[a]) for a in offsets}

    def export(self, directory: Path, trainable: Params, frozen: Params) -> None:
        """Writes a coprocessor directory that names the base that `load_base` read."""
        save_coprocessor(directory, self._config.coprocessor, trainable, self.fingerprint, overwrite=True)

    def _likelihood(self, frozen, hidden, places: Places) -> Float[Array, "B M A"]:
        """log p of the labels that count, else 0."""
        logits = keep_batch(transformer.head(self.model, frozen, keep_batch(hidden)))
        return log_likelihood(logits, places.labels) * places.counted

    def _pieces(self, frozen, hidden) -> int:
        return pieces_of([(lambda x: transformer.head(self.model, frozen, x), hidden)], self.compute.devices)


def passes(
    config: CoprocessorConfig,
    params: Params,
    model: TransformerConfig,
    frozen: Params,
    tokens: Int[Array, "B T"],
    text: Layout,
    places: Places,
    remat: str = "none",
) -> Passes:
    """All three, of which nothing has a gradient to the target.

    Args:
      config: of the coprocessor.
      params: its parameters.
      model: shape of the target.
      frozen: its parameters.
      tokens: texts.
      text: their layout, whose `attention` all three have.
      places: where.
      remat: as for `models.coprocessor.latents`.
    """
    frozen = jax.lax.stop_gradient(frozen)
    output = transformer.forward(model, frozen, tokens, text)
    cache = memory = jax.lax.stop_gradient(output.rows)
    if config.needs_features:
        memory = coprocessor.read_features(config, params, model, frozen, output.hidden, text, remat=remat)
    settings: dict[str, Any] = {"prefix_positions": text.positions, "attention": text.attention, "remat": remat}
    read, put = places.points(text.positions, places.lag), places.points(text.positions)
    z = coprocessor.latents(config, params, model, frozen, memory, read, picked(tokens, places.at), **settings)
    known = places.labels[..., :-1]
    hidden = coprocessor.augmented(config, model, frozen, cache, put, keep_batch(z), known, **settings)
    return Passes(z, keep_batch(hidden[:, :, config.num_latents - 1 :]), output.hidden)


def before_labels(of_text: Float[Array, "B T H"], places: Places) -> Float[Array, "B M A H"]:
    """What the head reads of the text alone for the same labels."""
    before_BMA = places.at[..., None] + jnp.arange(places.labels.shape[-1], dtype=jnp.int32)
    return picked(of_text, jnp.minimum(before_BMA, of_text.shape[1] - 1))


def before_label(segments: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Where latents may stand: behind tokens whose next one is a label of the same document."""
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.pad(same & mask[:, 1:], ((0, 0), (0, 1)))


def places_at(
    batch: Batch,
    mask: Bool[Array, "B T"],
    at: Int[Array, "B M"],
    kept: Bool[Array, "B M"],
    lag: Int[Array, "B M"],
    ahead: int,
) -> Places:
    """`Places` at given tokens.

    Args:
      batch: `tokens` and `segments`, int [B, T].
      mask: which tokens are labels.
      at: q.
      kept: which of them are.
      lag: n, at most q's position in its document.
      ahead: N_A.
    """
    tokens, segments = batch["tokens"], batch["segments"]
    index_BMA = at[..., None] + 1 + jnp.arange(ahead, dtype=jnp.int32)
    inside_BMA = index_BMA < tokens.shape[1]
    index_BMA = jnp.minimum(index_BMA, tokens.shape[1] - 1)
    same_BMA = picked(segments, index_BMA) == picked(segments, at)[..., None]
    counted_BMA = kept[..., None] & inside_BMA & same_BMA & picked(mask, index_BMA)
    return Places(at, lag, kept, picked(tokens, index_BMA), counted_BMA)
