"""What objectives share whose drafter fills a block of tokens in one pass: DFlash, JetSpec, DSpark, Domino.

A block begins at an *anchor*, the token x_a that would be pending, and sees the target's features of what precedes it
in its document (`models/heads/dflash.py`). Of every row some positions are drawn as anchors, without replacement among
those where the anchor and the token behind it are labels; slot i answers for x_{a+1+i} if that is a label of the same
document, and its teacher is the target at a + i. With c the slots that count, and w their weights (`block_losses.py`),

    loss = sum c w l / sum c w        and with D-PACE, whose weights say how much a slot is worth, sum c w l / sum c

where l is a slot's loss. With a draft vocabulary (`draft_vocabulary.py`) a slot counts only where that holds its label,
if labels are learnt, and the teacher's first choice, if that is; c of a loss that counts wherever there is a label
(`counted_loss`) stays as it is, over the same denominator. All slots of a block are read at once, and scores over
the vocabulary exist of a piece of the anchors at a time (`pieces.py`).
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from decoding.sampling import argmax
from models import schema
from models.attention import Rows
from models.config import TransformerConfig
from models.heads import vocabulary
from models.heads.dflash import Anchors, DFlashHeads, dflash_layers
from models.sharding import keep_batch
from train.objectives import block_losses, divergences
from train.objectives.block_losses import Terms
from train.objectives.draft_vocabulary import WithDraftVocabulary
from train.objectives.drafting import check_drafting
from train.objectives.guess import Weights, drawn_places, first_choices, log_masses, picked
from train.objectives.objective import Batch, Params
from train.objectives.pieces import pieces_of, separable_sums, summed
from train.objectives.shift import label_mask
from train.objectives.target_features import TargetFeatures, layout_of


class Slots(NamedTuple):
    """What is known of the D slots of A blocks.

    Attributes:
      tokens: the anchor, and the labels of the slots: a slot's true predecessor stands at its own index.
      counted: slots that have a label.
      scored: what the teacher's logits are read off.
      choice: its first choice; None where nobody asks.
      outputs: the labels as the drafter's outputs, -1 for one outside of its vocabulary; None where these are all
        tokens.
      learnt: of the counted slots those from which is learnt; None is all.
      log_mass: log of the teacher's probability of all tokens that the drafter scores; None is 0, or nobody asks.
    """

    tokens: Int[Array, "B A D+1"]
    counted: Bool[Array, "B A D"]
    scored: Any
    choice: Int[Array, "B A D"] | None = None
    outputs: Int[Array, "B A D"] | None = None
    learnt: Bool[Array, "B A D"] | None = None
    log_mass: Float[Array, "B A D"] | None = None

    @property
    def before(self) -> Int[Array, "B A D"]:
        """True predecessors."""
        return self.tokens[..., :-1]

    @property
    def labels(self) -> Int[Array, "B A D"]:
        """What the slots answer for."""
        return self.tokens[..., 1:]

    @property
    def answers(self) -> Int[Array, "B A D"]:
        """The same as outputs of the drafter."""
        return self.labels if self.outputs is None else self.outputs

    @property
    def weighed(self) -> Bool[Array, "B A D"]:
        """The slots whose losses count."""
        return self.counted if self.learnt is None else self.learnt

    def of(self, measure: str) -> Bool[Array, "B A D"]:
        """The slots over which a measure is a mean."""
        return self.weighed if measure == "loss" else self.counted


class BlockObjective(WithDraftVocabulary):
    """Base of these objectives. The config has, besides what every drafter's has, the fields of `check_blocks`.

    A subclass may give `scores`, `choices`, `more_loss` and `counted_loss`, and `head_params`, what is trained through
    them.

    Class attributes:
      unbroken: a slot counts only while all before it in its block do.
    """

    unbroken: ClassVar[bool] = False

    @property
    def asks_mass(self) -> bool:
        """Whether `counted_loss` asks for `Slots.log_mass`."""
        return False

    @property
    def heads(self) -> DFlashHeads:
        """The network that fills blocks."""
        return self.drafter.heads

    @property
    def depth(self) -> int:
        """Tokens that a block drafts."""
        return self.heads.depth

    def head_params(self, params: Params) -> Params:
        """Of the drafter's parameters those that `scores` and `more_loss` read."""
        return self.heads.head_params(params)

    def scores(
        self, read: Params, frozen: Params, hidden: Float[Array, "*B D H"], before: Int[Array, "*B D"]
    ) -> Float[Array, "*B D W"]:
        """Logits of the slots of blocks, given true predecessors."""
        return self.read_head(read, frozen, hidden)

    def read_head(self, read: Params, frozen: Params, hidden: Float[Array, "*B H"]) -> Float[Array, "*B W"]:
        """The network's logits, of slots by themselves."""
        return self.heads.logits(self.model, read, frozen, hidden)

    def choices(
        self,
        read: Params,
        frozen: Params,
        logits: Float[Array, "*B D W"],
        hidden: Float[Array, "*B D H"],
        before: Int[Array, "*B D"],
    ) -> Int[Array, "*B D"]:
        """The token that every slot chooses, given true predecessors."""
        return vocabulary.tokens_of(self.known(frozen), argmax(logits))

    def more_loss(
        self,
        read: Params,
        frozen: Params,
        hidden: Float[Array, "B A D H"],
        logits: Float[Array, "B A D W"],
        log_p: Float[Array, "B A D W"] | None,
        slots: Slots,
        progress: Array | float,
    ) -> Float[Array, "B A D"] | float:
        """A slot's loss besides the config's `terms`."""
        return 0.0

    def counted_loss(
        self,
        read: Params,
        frozen: Params,
        hidden: Float[Array, "B A D H"],
        logits: Float[Array, "B A D W"],
        log_p: Float[Array, "B A D W"] | None,
        slots: Slots,
    ) -> Float[Array, "B A D"] | float:
        """A slot's loss that is added wherever there is a label, in the draft vocabulary or not."""
        return 0.0

    @property
    def _pace(self) -> Float[Array, "D"]:
        return block_losses.exponential_decay(self.depth, self._config.pace)

    def loss_on(self, target, trainable, frozen, batch, key, progress):
        """One term."""
        config = self._config
        params, (hidden, slots) = self._filled(target, trainable, frozen, batch, key, asked=False)
        read = self.head_params(params)
        target = self._as_teacher(target, frozen)
        pieces = self._pieces(target, read, frozen, hidden, slots)
        blend = self._blend(target, read, frozen, hidden, slots, pieces)

        def score(_, read, hidden, slots, log_p):
            logits, loss = self._slot_losses(read, frozen, hidden, slots, log_p, blend)
            loss = loss + self.more_loss(read, frozen, hidden, logits, log_p, slots, progress)
            everywhere = self.counted_loss(read, frozen, hidden, logits, log_p, slots) * slots.counted * self._pace
            return jnp.sum(loss * self._weights(logits, slots)) + jnp.sum(everywhere)

        share = functools.partial(self._taught, target)
        total = separable_sums(share, score, [read], [hidden], slots, pieces)[0]
        counts = slots.weighed if config.d_pace else slots.weighed * self._pace
        return (total, jnp.sum(counts).astype(total.dtype)), {}

    def evaluate_on(self, target, trainable, frozen, batch):
        """As `DraftObjective`'s; the slots of blocks are its depths."""
        params, (hidden, slots) = self._filled(target, trainable, frozen, batch, None, asked=True)
        read = self.head_params(params)
        target = self._as_teacher(target, frozen)
        pieces = self._pieces(target, read, frozen, hidden, slots)
        blend = self._blend(target, read, frozen, hidden, slots, pieces)

        def measure(piece):
            hidden, slots = piece
            logits, loss = self._slot_losses(read, frozen, hidden, slots, self._taught(target, slots), blend)
            choice = self.choices(read, frozen, logits, hidden, slots.before)
            found = {"loss": loss, "accuracy": choice == slots.labels, "agreement": choice == slots.choice}
            return {name: jnp.sum(x * slots.of(name), axis=(0, 1)).astype(loss.dtype) for name, x in found.items()}

        sums = summed(measure, (hidden, slots), pieces)
        counts = {name: jnp.sum(slots.of(name), axis=(0, 1)).astype(of.dtype) for name, of in sums.items()}
        return {f"{name}_{i + 1}": (of[i], counts[name][i]) for name, of in sums.items() for i in range(self.depth)}

    def _filled(self, target: TargetFeatures, trainable, frozen, batch, key, asked: bool):
        """The drafter's parameters, and what it makes of blocks at drawn anchors, with what is known of them."""
        params = self.compute.cast(trainable)
        mask = label_mask(batch, self._config.labels)
        at, kept = drawn_anchors(batch, mask, self._config.anchors, jax.random.key(0) if key is None else key)
        terms, known_W = self._config.terms, self.known(frozen)
        asked = asked or (known_W is not None and terms.soft)
        choice = first_choices(target.read, target.scored, self.compute.devices) if asked else None
        log_mass = None
        if known_W is not None and self.asks_mass:
            log_mass = log_masses(target.read, target.scored, known_W, self.compute.devices)
        slots = slots_at(batch, mask, at, kept, self.depth, target.scored, choice, log_mass)
        if known_W is not None:
            slots = learnt_slots(slots, terms, known_W)
        if self.unbroken:
            slots = slots._replace(
                counted=block_losses.unbroken(slots.counted),
                learnt=None if slots.learnt is None else block_losses.unbroken(slots.learnt),
            )
        context = context_of(self.heads, self.model, params, target, batch)
        where, positions = anchors_at(batch, at, kept)
        hidden = self.heads.at_anchors(
            self.model, params, frozen, context, where, positions, devices=self.compute.devices
        )
        return params, (keep_batch(hidden), slots)

    def _as_teacher(self, target: TargetFeatures, frozen) -> TargetFeatures:
        """The target, of the tokens that the drafter scores."""
        return target._replace(read=functools.partial(target.read, known=self.known(frozen)))

    def _slot_losses(self, read, frozen, hidden, slots: Slots, log_p, blend):
        logits = keep_batch(self.scores(read, frozen, keep_batch(hidden), slots.before))
        return logits, self.loss_of(logits, slots, log_p, blend)

    def loss_of(
        self,
        logits: Float[Array, "B A D W"],
        slots: Slots,
        log_p: Float[Array, "B A D W"] | None,
        blend: Float[Array, ""] | None = None,
    ) -> Float[Array, "B A D"]:
        """The config's `terms` of every slot."""
        temperature = self._config.temperature
        log_q = jax.nn.log_softmax(logits / temperature, axis=-1)
        return temperature**2 * block_losses.slot_losses(self._config.terms, log_q, log_p, slots.answers, blend)

    def _taught(self, target: TargetFeatures, slots: Slots):
        """The teacher's log-probabilities, where they are asked for."""
        if not self._config.terms.soft:
            return None
        return jax.nn.log_softmax(keep_batch(target.read(slots.scored)) / self._config.temperature, axis=-1)

    def _weights(self, logits, slots: Slots) -> Float[Array, "B A D"]:
        if not self._config.d_pace:
            return slots.weighed * self._pace
        log_q = jax.nn.log_softmax(jax.lax.stop_gradient(logits), axis=-1)
        return block_losses.d_pace(block_losses.of_label(log_q, slots.answers), slots.weighed)

    def _pieces(self, target: TargetFeatures, read, frozen, hidden, slots: Slots) -> int:
        heads = [(lambda x: self.scores(read, frozen, *x), (hidden, slots.before))]
        teachers = [(target.read, slots.scored)] if self._config.terms.soft else []
        return pieces_of([*heads, *teachers], self.compute.devices)

    def _blend(self, target, read, frozen, hidden, slots, pieces):
        """Of KL in `hybrid` where one number serves a batch; None where every slot has its own."""
        if not (self._config.terms.hybrid and self._config.hybrid_of == "batch"):
            return None

        def accepted(piece):
            hidden, slots = piece
            log_q = jax.nn.log_softmax(self.scores(read, frozen, hidden, slots.before), axis=-1)
            alpha = divergences.acceptance(log_q, self._taught(target, slots))
            return jnp.sum(alpha * slots.weighed)

        alpha = summed(accepted, jax.lax.stop_gradient((hidden, slots)), pieces) / jnp.maximum(
            jnp.sum(slots.weighed), 1
        )
        return divergences.hybrid_weight(alpha, decay=1.0)


def drawn_anchors(
    batch: Batch, mask: Bool[Array, "B T"], count: int, key: Array
) -> tuple[Int[Array, "B A"], Bool[Array, "B A"]]:
    """Places of anchors, ascending, and which of them are: rows that have fewer are filled up.

    An anchor is a label, as is the token behind it, and one at least stands before it in its document.

    Args:
      batch: `tokens` and `segments`, int [B, T].
      mask: which tokens are labels.
      count: how many of a row.
      key: which.
    """
    segments = batch["segments"]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    both = mask[:, :-1] & mask[:, 1:] & same
    valid_BT = jnp.pad(both[:, 1:] & same[:, :-1], ((0, 0), (1, 1)))
    return drawn_places(valid_BT, count, key)


def slots_at(
    batch: Batch,
    mask: Bool[Array, "B T"],
    at: Int[Array, "B A"],
    kept: Bool[Array, "B A"],
    depth: int,
    scored: Any,
    choice: Int[Array, "B T"] | None,
    log_mass: Float[Array, "B T"] | None = None,
) -> Slots:
    """What is known of the slots of blocks at `at`; `scored`, `choice` and `log_mass` are the teacher's on the whole
    text."""
    tokens, segments = batch["tokens"], batch["segments"]
    index_BAE = at[:, :, None] + jnp.arange(depth + 1, dtype=jnp.int32)
    inside_BAE = index_BAE < tokens.shape[1]
    index_BAE = jnp.minimum(index_BAE, tokens.shape[1] - 1)
    same_BAE = picked(segments, index_BAE) == picked(segments, at)[:, :, None]
    counted_BAE = kept[:, :, None] & inside_BAE & same_BAE & picked(mask, index_BAE)
    taught = jax.tree.map(lambda leaf: picked(leaf, index_BAE[..., :-1]), (scored, choice, log_mass))
    scored, choice, log_mass = taught
    return Slots(picked(tokens, index_BAE), counted_BAE[..., 1:], scored, choice, log_mass=log_mass)


def learnt_slots(slots: Slots, terms: Terms, known: Int[Array, "W"]) -> Slots:
    """The slots of a drafter that scores the tokens `known` alone, of which `terms` compare with labels or teacher."""
    learnt, outputs = slots.counted, vocabulary.outputs_of(known, slots.labels)
    if terms.hard:
        learnt &= outputs >= 0
    if terms.soft:
        assert slots.choice is not None
        learnt &= vocabulary.outputs_of(known, slots.choice) >= 0
    return slots._replace(outputs=outputs, learnt=learnt)


def anchors_at(batch: Batch, at: Int[Array, "B A"], kept: Bool[Array, "B A"]) -> tuple[Anchors, Int[Array, "B T"]]:
    """Where blocks at `at` begin, and where all tokens stand; a dropped one sees nothing of the text."""
    positions_BT = layout_of(batch).positions
    positions_BA = picked(positions_BT, at)
    horizon_BA = jnp.where(kept, at, 0)
    return Anchors(picked(batch["tokens"], at), positions_BA, horizon_BA, at - positions_BA), positions_BT


def context_of(heads: DFlashHeads, model: Any, params: Params, target: TargetFeatures, batch: Batch) -> list[Rows]:
    """Keys and values of the text of a batch."""
    fused = heads.fuse(model, params, target.taps)
    return heads.context_rows(model, params, fused, layout_of(batch).positions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What the sections `objective` of these jobs share.

    Attributes:
      target: directory of the target, which stays as it is.
      target_layers: the layers whose incoming residual stream is read; None spreads `taps` over the target's depth.
      taps: how many, where `target_layers` does not say.
      num_layers: of the network.
      block: rows of a block, the anchor's included.
      mask_token: the token that fills a block; None is the target's last.
      window: sliding window of the network; None is all.
      vocabulary: W, size of the draft vocabulary: the most frequent labels of the training split; 0 is all tokens.
      terms: of a slot's loss, by weight: `hard`, `l1`, `forward_kl`, `nla`, `hybrid` (`block_losses.py`).
      pace: slot k counts exp(-k / pace); None counts all alike.
      d_pace: D-PACE's weights in its place, for `terms.hard` alone.
      anchors: blocks per row.
      labels: which tokens are learnt: `assistant`, those that the data set marks, or `all`.
      loop_prompts: prompts from the valid split that every evaluation decodes, at most a batch; 0 is none.
      loop_tokens: new tokens per such prompt; 0 decodes nothing.
    """

    reads: ClassVar[str] = "text"

    target: str | None
    target_layers: tuple[int, ...] | None = None
    taps: int = 5
    num_layers: int = 5
    block: int = 16
    mask_token: int | None = None
    window: int | None = None
    vocabulary: int = 0
    terms: Terms = dataclasses.field(default_factory=functools.partial(Terms, hard=1.0))
    pace: float | None = None
    d_pace: bool = False
    anchors: int = 512
    labels: Literal["assistant", "all"] = "assistant"
    loop_prompts: int = 4
    loop_tokens: int = 64

    def __post_init__(self):
        check_blocks(self)

    def network(self, model: TransformerConfig, **more: Any) -> DFlashHeads:
        """For a target of that shape; `more` are its other fields. Raises UserError for one that does not fit."""
        layers = self.target_layers or dflash_layers(model.num_layers, self.taps)
        mask = model.vocab_size - 1 if self.mask_token is None else self.mask_token
        more["vocab_size"] = 0 if self.vocabulary == model.vocab_size else self.vocabulary
        heads = DFlashHeads(layers, mask, self.num_layers, self.block, self.window, **more)
        heads.check(model)
        return heads

    @property
    def weights(self) -> Weights:
        """Of the loss's terms, as far as they say what is read of the target."""
        return Weights(self.terms.hard, float(self.terms.soft), 0.0, 1.0)

    @property
    def base(self) -> str:
        """The target."""
        return str(self.target)


def check_blocks(config: Any) -> None:
    """Rules that the configs share. Raises UserError."""
    check_drafting(config)
    terms = dataclasses.asdict(config.terms)
    for name, weight in terms.items():
        schema.require(weight >= 0, f"objective.terms.{name} must not be negative", weight)
    schema.require(any(terms.values()), "one of objective.terms must be positive", terms)
    schema.require(config.taps >= 1, "objective.taps must be at least 1", config.taps)
    schema.require(
        config.target_layers is None or len(config.target_layers) > 0,
        "objective.target_layers must name a layer, or be none to choose by objective.taps",
        config.target_layers,
    )
    schema.require(
        config.hybrid_of == "slot" or terms["hybrid"] > 0,
        "objective.hybrid_of is for objective.terms.hybrid, which is 0",
        config.hybrid_of,
    )
    schema.require(config.vocabulary >= 0, "objective.vocabulary must not be negative", config.vocabulary)
    schema.require(config.anchors >= 1, "objective.anchors must be at least 1", config.anchors)
    schema.require(config.pace is None or config.pace > 0, "objective.pace must be positive", config.pace)
    schema.require(config.temperature > 0, "objective.temperature must be positive", config.temperature)
    others = [name for name, weight in terms.items() if weight and name != "forward_kl"]
    schema.require(
        config.temperature == 1 or not others, "objective.temperature is for objective.terms.forward_kl alone", others
    )
    soft = [name for name, weight in terms.items() if weight and name != "hard"]
    schema.require(not (config.d_pace and soft), "objective.d_pace weighs objective.terms.hard alone", soft)
    schema.require(
        not config.d_pace or config.pace is None, "objective.d_pace takes the place of objective.pace", config.pace
    )
