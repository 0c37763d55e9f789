"""Confidences that mean what they say: sequential temperature scaling on held-out drafts (DSpark, section 4).

What is scheduled by is the product of a chain's confidences, so that is what is made right: slot by slot one
temperature, by which the logit of its confidence is divided, such that the product up to there is off by the least on
average, the temperatures before it kept.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from decoding.drafter import Drafter
from decoding.drafters.around import Around
from decoding.generate import generate
from decoding.sampling import Sampling
from models.formats.target import Target

_TEMPERATURES = np.geomspace(0.2, 5.0, 97)  # The middle one is 1.
_BINS = 15


def sequential_temperatures(
    logits: Float[np.ndarray, "M D"], survived: Float[np.ndarray, "M D"]
) -> Float[np.ndarray, "D"]:
    """One temperature per slot.

    Args:
      logits: of the confidences of M held-out drafts.
      survived: 1 where a draft survived verification up to this slot, itself included, else 0; or how probable that is.
    """
    reached, found = np.ones(len(logits)), []
    for logit, label in zip(logits.T, survived.T, strict=True):
        products = reached / (1 + np.exp(-logit / _TEMPERATURES[:, None]))
        errors = np.array([calibration_error(product, label) for product in products])
        # Of equally good ones that which changes least.
        near = np.abs(np.log(_TEMPERATURES))
        best = np.lexsort((near, errors))[0]
        found.append(_TEMPERATURES[best])
        reached = products[best]
    return np.array(found)


def calibration_error(predicted: Float[np.ndarray, "M"], label: Float[np.ndarray, "M"]) -> float:
    """Expected calibration error: |mean prediction - mean label| over bins of equal width, by what they hold."""
    place = np.minimum((predicted * _BINS).astype(int), _BINS - 1)
    gap = np.bincount(place, predicted - label, _BINS)
    return float(np.abs(gap).sum() / len(predicted))


def recorded_drafts(
    target: Target,
    drafter: Drafter,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> tuple[Float[np.ndarray, "M D"], Float[np.ndarray, "M D"]]:
    """Logits of the confidences of all drafts of some texts, and 1 up to the slot that each survived verification to.

    Args:
      target: whose texts they are.
      drafter: with the policy `scheduled`, none of whose cuts are made here.
      params: of the drafter.
      prompts: token ids.
      max_new_tokens: of each text.
      temperature: at which they are decoded.

    Raises:
      UserError: a drafter or a policy that says nothing of how sure it is.
    """
    recorder = _Recorder(drafter, max_new_tokens)
    made = generate(
        target,
        prompts,
        drafter=recorder,
        drafter_params=params,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature),
    )
    confidence, accepted, steps = (np.asarray(made.memory[name]) for name in ("confidence", "accepted", "steps"))
    # The last draft of a text may have been cut by its end.
    whole = np.arange(max_new_tokens) < steps[:, None] - 1
    sure, accepted = confidence[whole].astype(np.float64), accepted[whole]
    sure = np.clip(sure, 1e-9, 1 - 1e-9)
    survived = np.arange(sure.shape[1]) < accepted[:, None]
    return np.log(sure) - np.log1p(-sure), survived.astype(np.float64)


@dataclasses.dataclass(frozen=True)
class _Recorder(Around):
    """Another drafter, whose chains are not cut, and what it said of them and what became of them, step by step.

    Attributes:
      steps: that there is room for.
    """

    steps: int
    name: ClassVar[str] = "recorder"

    def init(self, config, batch, capacity, dtype, mesh=None):
        return super().init(config, batch, capacity, dtype, mesh) | {
            "confidence": jnp.zeros((batch, self.steps, self.max_depth), jnp.float32),
            "accepted": jnp.zeros((batch, self.steps), jnp.int32),
            "steps": jnp.zeros(batch, jnp.int32),
        }

    def draft(self, params, target, state, root, keys):
        return self.inner.uncut(params, target, state["inner"], root, keys)

    def ingest(self, params, target, state, rows):
        # What its draft kept is not here any more: it reads its own text as another's.
        read = rows if rows.drafted is None else dataclasses.replace(rows, source="other", nodes=None, drafted=None)
        state = super().ingest(params, target, state, read)
        if rows.drafted is None:
            return state
        # A finished row has no rows of text.
        own_BS = (jnp.arange(self.steps) == state["steps"][:, None]) & (rows.count > 0)[:, None]
        drafted_B1D = rows.drafted[:, None].astype(jnp.float32)
        return {
            **state,
            "confidence": jnp.where(own_BS[:, :, None], drafted_B1D, state["confidence"]),
            "accepted": jnp.where(own_BS, rows.count[:, None] - 1, state["accepted"]),
            "steps": state["steps"] + (rows.count > 0),
        }

    def memory(self, state):
        return {name: state[name] for name in ("confidence", "accepted", "steps")}
