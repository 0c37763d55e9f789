"""Draft heads on a frozen target: Medusa-1 (Cai et al. 2024), Hydra and Hydra++ (Ankner et al. 2024).

Head i at position p reads the target's feature at p and, in Hydra, the embeddings of the true tokens x_{p+1} ..
x_{p+1+i}; it answers for x_{p+2+i}, and its teacher is the target's distribution at p+1+i, the one that verification
would consult there (`shift.py`, distance i + 2). With rho the head's decay, and means over the labels of each head:

    loss = sum_i rho^i mean( hard * -log q_i(x) + soft * -sum_v t(v) log q_i(v) + feature * SmoothL1(g_i, h_{p+1+i}) )

where q_i is the head, t the teacher, g_i what the head's vocabulary map reads and h the target's post-norm feature.
Medusa-1 and Hydra are hard = 1; Hydra++ is soft = 1.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from decoding.drafters import DRAFTERS, save_drafter
from decoding.drafters.heads import HeadDrafter
from decoding.generate import generate
from decoding.replay import replay_acceptance
from decoding.sampling import argmax
from decoding.trees import MC_SIM_7B_63, Topology, chain
from models import transformer
from models.errors import UserError
from models.hf import load_config
from models.layout import Layout
from models.target import Target, check_vocabulary, load_target
from models.tokenizer import Tokenizer
from models.transformer import Output
from train import schema
from train.objectives.objective import Batch, Params, Sums
from train.objectives.shift import ahead, label_mask, labels_at, log_likelihood


@dataclasses.dataclass(frozen=True)
class DraftHeadsConfig:
    """The section `objective` of a draft-head job.

    Attributes:
      name: `draft_heads`.
      target: directory of the target, which stays as it is.
      drafter: which heads.
      heads: their hyper-parameters: the fields of `MedusaHeads` or `HydraHeads`.
      hard: weight of the cross-entropy with the text.
      soft: weight of the cross-entropy with the target's distribution.
      feature: weight of the smooth L1 distance to the target's feature.
      head_decay: rho; 1 weighs all heads alike, Medusa's later recipe has 0.8.
      labels: which tokens are learnt: `assistant`, those that the data set marks, or `all`.
      noise: alpha of the uniform noise on embeddings and, but for Hydra++, features, alpha / sqrt(length * H)
        (NEFTune, Jain et al. 2023); 0 is none.
      loop_prompts: prompts from the valid split that every evaluation decodes with the heads, at most a batch; 0 is
        none.
      loop_tokens: new tokens per such prompt; 0 decodes nothing.
    """

    name: Literal["draft_heads"]
    target: str | None
    drafter: Literal["medusa", "hydra"]
    heads: Mapping[str, Any]
    hard: float = 1.0
    soft: float = 0.0
    feature: float = 0.0
    head_decay: float = 1.0
    labels: Literal["assistant", "all"] = "assistant"
    noise: float = 0.0
    loop_prompts: int = 4
    loop_tokens: int = 64

    def __post_init__(self):
        if self.target is None:
            raise UserError("objective.target must be the directory of the target that the heads are for")
        for name in ("hard", "soft", "feature", "noise", "loop_prompts", "loop_tokens"):
            schema.require(getattr(self, name) >= 0, f"objective.{name} must not be negative", getattr(self, name))
        if not self.hard + self.soft + self.feature:
            raise UserError("objective.hard, objective.soft and objective.feature are all 0: there is nothing to learn")
        schema.require(0 < self.head_decay <= 1, "objective.head_decay must lie in 0..1, 0 excluded", self.head_decay)
        self.untrained()

    @property
    def base(self) -> str:
        """The target that the heads are for."""
        return str(self.target)

    def untrained(self) -> HeadDrafter:
        """The drafter without parameters, its tree the published one as far down as there are heads."""
        drafter: Any = DRAFTERS[self.drafter]
        heads = schema.parse(type(drafter().heads), self.heads, "objective.heads")
        schema.require(heads.num_heads >= 1, "objective.heads.num_heads must be at least 1", heads.num_heads)
        schema.require(heads.num_layers >= 1, "objective.heads.num_layers must be at least 1", heads.num_layers)
        paths = tuple(path for path in MC_SIM_7B_63.paths if len(path) <= heads.num_heads)
        return drafter(heads, Topology(paths))


class HeadOutput(NamedTuple):
    """What one head says at every position: its logits, and what its vocabulary map read."""

    logits: Float[Array, "B T V"]
    hidden: Float[Array, "B T H"]


class DraftHeads:
    """The `draft_heads` objective (see `objective.py` for the protocol)."""

    Config: ClassVar[type] = DraftHeadsConfig
    product: ClassVar[str] = "drafter"
    base_is_frozen = True

    def __init__(self, config: DraftHeadsConfig, tokenizer: Tokenizer):
        """`tokenizer` is the target's, and the data's. Raises UserError for a missing or broken target."""
        self._config, self._tokenizer = config, tokenizer
        self.drafter = config.untrained()
        self.heads = self.drafter.heads
        self.model = load_config(config.base)
        self.drafter.check(self.model)
        check_vocabulary(self.model, tokenizer, config.base)
        self._fingerprint: dict[str, int | str | None] = {}
        self._dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.base: Params | None = transformer.param_shapes(self.model, self._dtype)

    def load_base(self, mesh: Mesh) -> Params:
        """The target, float32 on CPU and bfloat16 on accelerators."""
        target = load_target(self._config.base, dtype=self._dtype, mesh=mesh)
        # Now, while every process takes part: no single one may be able to read the whole embedding at the export.
        self._fingerprint = target.fingerprint()
        return target.params

    def init(self, key: Array, base: Params) -> Params:
        """Fresh heads in float32, whatever the target's dtype: small updates must not round away."""
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), self.heads.init(self.model, base, key))

    def loss(self, trainable: Params, frozen: Params, batch: Batch, key: Array):
        """One term per head: ([K] sums, [K] weights); metrics hold each head's mean before its decay."""
        target, heads = self.teacher_forced(trainable, frozen, batch, key)
        terms = [self._term(i, head, target, batch) for i, head in enumerate(heads)]
        totals, weights = (jnp.stack(values) for values in zip(*terms, strict=True))
        decay = self._config.head_decay ** jnp.arange(len(heads), dtype=totals.dtype)
        return (decay * totals, weights), {f"loss_{i + 1}": term for i, term in enumerate(terms)}

    def evaluate(self, trainable: Params, frozen: Params, batch: Batch) -> Sums:
        """By depth: the loss; how often the head's first choice is the text's token (accuracy); how often it is the
        target's first choice there (agreement), which is what greedy verification would accept on this text."""
        target, heads = self.teacher_forced(trainable, frozen, batch, None)
        preferred_BT = argmax(target.logits)
        sums: Sums = {}
        for i, head in enumerate(heads):
            labels_BT, weight_BT = self._labels(i, batch)
            choice_BT = argmax(head.logits)
            weight = jnp.sum(weight_BT)
            sums[f"loss_{i + 1}"] = self._term(i, head, target, batch)
            sums[f"accuracy_{i + 1}"] = (jnp.sum((choice_BT == labels_BT) * weight_BT), weight)
            sums[f"agreement_{i + 1}"] = (jnp.sum((choice_BT == ahead(preferred_BT, i + 1)) * weight_BT), weight)
        return sums

    def report(self, means: dict[str, float]) -> dict[str, float]:
        """The means, in the order of depth."""
        measures = ("loss", "accuracy", "agreement")
        return {f"{name}_{i + 1}": means[f"{name}_{i + 1}"] for name in measures for i in range(self.heads.num_heads)}

    def probe(self, trainable: Params, frozen: Params, batches: Iterator[Batch]) -> dict[str, float]:
        """Share of decoding steps that accept depth d: in the loop, and by the training-time forward on its text.

        The loop decodes the beginnings of held-out rows greedily, with the rank-0 chain as its tree. The two shares
        must be equal (`decoding/replay.py`); a difference means that heads are not served as they are trained. Empty
        when nothing is to be decoded, or the target has no room for it, or there are several processes.
        """
        if jax.process_count() > 1:
            return {}
        batch = next(batches)
        size = max(batch["tokens"].shape[1] // 4, 1)
        tokens_BT, segments_BT = (np.asarray(batch[name])[:, :size] for name in ("tokens", "segments"))
        prompts = tokens_BT[(segments_BT > 0).all(axis=1)][: self._config.loop_prompts].tolist()
        new_tokens = min(self._config.loop_tokens, self.model.max_position - size)
        if not prompts or new_tokens <= 0:
            return {}
        depth = self.heads.num_heads
        params = jax.tree.map(lambda leaf: leaf.astype(self._dtype), trainable)
        target = Target(self.model, frozen, self._tokenizer)
        drafter = dataclasses.replace(self.drafter, tree=chain(depth))
        decoded = generate(target, prompts, drafter=drafter, drafter_params=params, max_new_tokens=new_tokens)
        replayed = replay_acceptance(target, drafter, params, prompts, decoded)
        stats = sum(decoded.stats[1:], decoded.stats[0])
        shares = {"loop": stats.accepted_by_depth, "replay": replayed}
        return {
            f"{name}_{i + 1}": float(hits[i]) / max(stats.steps, 1)
            for name, hits in shares.items()
            for i in range(depth)
        }

    def export(self, directory: Path, trainable: Params, frozen: Params) -> None:
        """Writes a drafter directory that names the base that `load_base` read."""
        save_drafter(directory, self.drafter, trainable, self._fingerprint, overwrite=True)

    def teacher_forced(
        self, trainable: Params, frozen: Params, batch: Batch, key: Array | None
    ) -> tuple[Output, list[HeadOutput]]:
        """The target on the text, and every head at every position with the true tokens as its path.

        Args:
          trainable: the heads.
          frozen: the target.
          batch: `tokens` and `segments`, int [B, T].
          key: for noise and dropout; None is without either.
        """
        tokens_BT = batch["tokens"]
        params = jax.tree.map(lambda leaf: leaf.astype(self._dtype), trainable)
        batch_size, rows = tokens_BT.shape
        layout = Layout.causal(batch_size, rows, batch["segments"])
        target = transformer.forward(self.model, frozen, tokens_BT, layout)
        feature_BTH, embedding_BTH = target.hidden, transformer.lookup(frozen, tokens_BT)
        if key is not None and self._config.noise:
            key, noise_key = jax.random.split(key)
            size = self._config.noise / (tokens_BT.shape[1] * self.model.width) ** 0.5
            noise_BTH = size * jax.random.uniform(noise_key, feature_BTH.shape, feature_BTH.dtype, -1.0, 1.0)
            embedding_BTH = embedding_BTH + noise_BTH
            if not getattr(self.heads, "prefix", False):
                feature_BTH = feature_BTH + noise_BTH
        feature_BTH = self.heads.features(self.model, params, feature_BTH, layout)
        outputs = []
        for i in range(self.heads.num_heads):
            path_BTPH = jnp.stack([ahead(embedding_BTH, step) for step in range(1, i + 2)], axis=2)
            extra = {}
            if key is not None and getattr(self.heads, "dropout", 0.0) > 0:
                extra["dropout_key"] = jax.random.fold_in(key, i)
            hidden_BTH = self.heads.hidden(params, i, feature_BTH, path_BTPH, **extra)
            outputs.append(HeadOutput(self.heads.vocab(params, i, hidden_BTH), hidden_BTH))
        return target, outputs

    def _labels(self, i, batch):
        return labels_at({**batch, "mask": label_mask(batch, self._config.labels)}, i + 2)

    def _term(self, i, head, target, batch):
        """(sum, weight) of head i's loss over the labels of the batch."""
        config = self._config
        labels_BT, weight_BT = self._labels(i, batch)
        loss_BT = jnp.zeros(labels_BT.shape, head.logits.dtype)
        if config.hard:
            loss_BT -= config.hard * log_likelihood(head.logits, labels_BT)
        if config.soft:
            teacher_BTV = jax.nn.softmax(ahead(target.logits, i + 1), axis=-1)
            expected_BT = jnp.sum(teacher_BTV * head.logits, axis=-1)
            loss_BT += config.soft * (jax.nn.logsumexp(head.logits, axis=-1) - expected_BT)
        if config.feature:
            distance_BTH = optax.huber_loss(head.hidden, ahead(target.hidden, i + 1))
            loss_BT += config.feature * jnp.mean(distance_BTH, axis=-1)
        weight_BT = weight_BT.astype(loss_BT.dtype)
        return jnp.sum(loss_BT * weight_BT), jnp.sum(weight_BT)
