"""The oracle is accepted as often as it is told to be, and the text is plain decoding's whatever it is told."""

import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.oracle import Oracle
from decoding.generate import generate
from models.errors import UserError
from tests.decoding.drafter_cases import random_target

PROMPT = [1, 2, 3]


def test_it_is_accepted_at_the_rate_that_it_is_given() -> None:
    target = random_target(vocab_size=12, dtype=jnp.float32)
    plain = generate(target, [PROMPT], max_new_tokens=96, capacity=128).tokens[0]
    text = np.array([*PROMPT, *plain], np.int32)
    drafter, tau = Oracle(depth=3, known=len(text)), {}
    for rate in (0.0, 0.8, 1.0):
        told = {"text": jnp.asarray(text), "rate": jnp.float32(rate)}
        made = generate(
            target, [PROMPT], drafter=drafter, drafter_params=told, max_new_tokens=96, capacity=128, seeds=3
        )
        assert made.tokens == [plain]
        tau[rate] = made.stats[0].acceptance_length
    # Of 95 tokens four at a time; the last of 24 steps is cut short.
    assert tau[0.0] == 1 and tau[1.0] == pytest.approx(95 / 24) and 2.2 < tau[0.8] < 3.7


def test_what_it_cannot_replay() -> None:
    with pytest.raises(UserError, match="oracle needs depth of at least 1, got 0"):
        Oracle(depth=0).check(None)
    assert Oracle().with_budget(9).max_nodes == 10 and Oracle.from_name("") is None
