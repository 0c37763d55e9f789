"""Serial heads: step after step is the whole block, and what each kind is when its parameters are special."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import TransformerConfig
from models.errors import UserError
from models.heads.serial import SerialHead
from models.linear import BLOCK
from tests.noise import noisy

V, H, R, D, BATCH = 2 * BLOCK, 6, 4, 3, 2
CONFIG = TransformerConfig(
    vocab_size=V, width=H, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, mlp_width=4, tied_embeddings=True
)
HEADS = {
    "vanilla": SerialHead("vanilla", R),
    "gated": SerialHead("gated", R, confidence="hidden"),
    "rnn": SerialHead("rnn", R, confidence="none"),
    "gru": SerialHead("gru", R, state=5, plain=1, confidence="none"),
}
rng = np.random.default_rng(0)
TARGET = {"embed": {"embedding": rng.normal(size=(V, H))}}
HIDDEN, TOKENS = rng.normal(size=(BATCH, D, H)), rng.integers(0, V, (BATCH, D)).astype(np.int32)
SOME = rng.integers(0, V, (BATCH, 7)).astype(np.int32)


def params_of(head: SerialHead) -> Any:
    shapes = jax.eval_shape(lambda: head.init(CONFIG, jax.tree.map(jnp.asarray, TARGET), jax.random.key(0)))
    return jax.tree.map(np.asarray, noisy(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), 0.5))


def results(head: SerialHead, params: Any) -> dict[str, Any]:
    """Everything that a head says of a block, at once and slot by slot."""
    before = head.embed(params, jax.tree.map(jnp.asarray, TARGET), jnp.asarray(TOKENS))
    hidden = jnp.asarray(HIDDEN)
    latents = head.latents(params, hidden, before)
    state, steps = head.begin((BATCH,), hidden.dtype), []
    for k in range(D):
        latent, state = head.step(params, k, state, hidden[:, k], before[:, k])
        steps.append(latent)
    found = {"latents": latents, "steps": jnp.stack(steps, axis=1), "state": state}
    found["scores"] = head.scores(params, latents)
    found["some"] = head.scores_of(params, latents, jnp.asarray(SOME))
    kernel = params["vocab"]["kernel"].reshape(R, -1, BLOCK).swapaxes(0, 1)
    found["some in blocks"] = head.scores_of({"vocab": {"kernel": kernel}}, latents, jnp.asarray(SOME))
    if head.confidence != "none":
        found["confidence"] = head.confidence_logit(params, hidden, before)
    return found


def only_its_predecessor(params: Any) -> Any:
    """An RNN's parameters with `joint` zero but for e -> o, which is the identity."""
    kernel = np.zeros_like(params["joint"]["kernel"])
    kernel[R : 2 * R, 2 * R :] = np.eye(R)
    return {**params, "joint": {"kernel": kernel, "bias": np.zeros(3 * R)}}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """By kind what `results` says and a fresh head; of a special RNN too. One program."""
    with jax.enable_x64(True):
        params = {kind: params_of(head) for kind, head in HEADS.items()}
        target = jax.tree.map(jnp.asarray, TARGET)

        def everything(params):
            found = {kind: results(HEADS[kind], own) for kind, own in params.items() if kind in HEADS}
            fresh = {kind: head.init(CONFIG, target, jax.random.key(0)) for kind, head in HEADS.items()}
            return found, fresh, results(HEADS["rnn"], params["special"])

        every = jax.jit(everything)({**params, "special": only_its_predecessor(params["rnn"])})
        found, fresh, special = jax.tree.map(np.asarray, every)
    return {kind: (params[kind], found[kind], fresh[kind]) for kind in HEADS} | {"special": special}


each_kind = pytest.mark.parametrize("kind", HEADS)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def by_hand(kind: str, params: Any) -> np.ndarray:
    """Latents as the module's table writes them down, in NumPy."""
    table = TARGET["embed"]["embedding"] if kind == "gru" else params["embed"]["embedding"]
    state, latents = 0, []
    for k in range(D):
        h, e = HIDDEN[:, k], table[TOKENS[:, k]]
        if kind == "vanilla":
            latent = e
        elif kind == "gated":
            latent = sigmoid(np.hstack([h, e]) @ params["gate"]["kernel"] + params["gate"]["bias"]) * e
        elif kind == "rnn":
            state = state if k else np.zeros((BATCH, R))
            g, c, o = np.split(np.hstack([state, e, h]) @ params["joint"]["kernel"] + params["joint"]["bias"], 3, 1)
            state, latent = sigmoid(g) * state + (1 - sigmoid(g)) * np.tanh(c), np.tanh(o)
        else:
            state = state if k else np.zeros((BATCH, 5))
            (r, z, n), (r_s, z_s, n_s) = (
                np.split(x @ params[name]["kernel"], 3, 1) for x, name in ((e, "input"), (state, "state"))
            )
            z = sigmoid(z + z_s)
            state = (1 - z) * np.tanh(n + sigmoid(r + r_s) * n_s) + z * state
            x = np.hstack([h, state]) @ params["down"]["kernel"]
            latent = x * sigmoid(x) if k else np.zeros((BATCH, R))
        latents.append(latent)
    return np.stack(latents, axis=1)


@each_kind
def test_a_block_is_its_slots_one_after_the_other_and_both_are_what_they_are_called(kind: str, found) -> None:
    params, said, _ = found[kind]
    np.testing.assert_allclose(said["latents"], by_hand(kind, params), atol=1e-12)
    np.testing.assert_allclose(said["steps"], said["latents"], atol=1e-12)
    np.testing.assert_allclose(said["scores"], said["latents"] @ params["vocab"]["kernel"], atol=1e-12)
    for name in ("some", "some in blocks"):
        np.testing.assert_allclose(said[name], np.take_along_axis(said["scores"], SOME[:, None], 2), atol=1e-12)
    assert np.abs(said["scores"][:, HEADS[kind].plain :]).min() > 1e-6


@each_kind
def test_confidence_reads_what_it_says(kind: str, found) -> None:
    params, said, _ = found[kind]
    if HEADS[kind].confidence == "none":
        assert "confidence" not in params
        return
    inputs = [HIDDEN] if kind == "gated" else [HIDDEN, params["embed"]["embedding"][TOKENS]]
    logit = np.concatenate(inputs, axis=2) @ params["confidence"]["kernel"][:, 0] + params["confidence"]["bias"]
    np.testing.assert_allclose(said["confidence"], logit, atol=1e-12)


def test_an_rnn_that_looks_at_its_predecessor_alone_is_a_bigram_through_tanh(found) -> None:
    params = found["rnn"][0]
    scores = np.tanh(params["embed"]["embedding"])[TOKENS] @ params["vocab"]["kernel"]
    np.testing.assert_allclose(found["special"]["scores"], scores, atol=1e-12)


@each_kind
def test_a_fresh_head_changes_nothing_and_is_sure_of_nothing(kind: str, found) -> None:
    params, _, fresh = found[kind]
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, params)
    idle = {name for name, part in fresh.items() if not any(leaf.any() for leaf in part.values())}
    assert idle == {"vocab", "confidence"} & set(fresh)


@pytest.mark.parametrize(
    "head", [SerialHead("gru"), SerialHead(rank=0), SerialHead("gru", plain=-1, confidence="none")]
)
def test_what_no_head_has_is_refused(head: SerialHead) -> None:
    with pytest.raises(UserError, match=r"serial head needs|no table of tokens"):
        head.check()
