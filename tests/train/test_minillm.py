"""MiniLLM: rewards to advantages, the policy gradient by its definition, and what a student and its teacher write."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from decoding.blend import blend
from decoding.generate import generate
from decoding.sampling import Sampling, noise
from models.errors import UserError
from models.formats.target import Target, load_target
from tests.noise import noisy
from tests.train.test_distill import both
from train.objectives.divergences import Student
from train.objectives.minillm import MiniLLMConfig, MiniLLMObjective, _Written, advantages, policy_sums
from train.objectives.shift import labels_at

V = 7
CONFIG = MiniLLMConfig("minillm", "somewhere", model={}, single=0.3, clip=0.2)


def test_advantages_are_discounted_means_of_what_remains_and_padding_takes_no_part() -> None:
    reward = np.array([[9.0, 1.0, 2.0, 4.0, 9.0], [3.0, 0.0, 9.0, 9.0, 9.0]])
    counted = np.array([[False, True, True, True, False], [True, True, False, False, False]])
    returns = np.array([(1 + 0.5 * 2 + 0.25 * 4) / 3, (2 + 0.5 * 4) / 2, 4.0, 3.0 / 2, 0.0])
    expected = (returns - returns.mean()) / returns.std(ddof=1)
    np.testing.assert_allclose(advantages(reward, counted, 0.5)[counted], expected, rtol=1e-6)
    assert not advantages(reward, counted, 0.5)[~counted].any()
    assert not advantages(reward, np.zeros_like(counted), 0.5).any()


def test_the_loss_is_the_clipped_policy_gradient_and_the_exact_next_step() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4, V)), rng.normal(size=(2, 4, V))
    log_q, log_p = (z - np.log(np.exp(z).sum(axis=-1, keepdims=True)) for z in (x, y))
    labels, counted = rng.integers(0, V, (2, 4)), np.array([[True] * 4, [True, True, False, False]])
    likely = np.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]
    # Ratios below, inside and above what is not clipped.
    ratio = np.array([[0.5, 0.9, 1.1, 1.5], [1.0, 1.6, 1.0, 1.0]])
    weight = np.full((2, 4), 0.8)
    advantage = rng.normal(size=(2, 4))
    rows = _Written(counted, y, labels, likely - np.log(ratio / weight), weight, advantage)

    @jax.jit
    def found(x, rows):
        student = lambda x: Student(x, Partial(lambda z: z))  # noqa: E731
        return jax.value_and_grad(lambda x: policy_sums(CONFIG, student(x), lambda z: z, rows))(x)

    value, slope = found(jnp.asarray(x, jnp.float32), jax.device_put(rows))
    q = np.exp(log_q)
    step = np.sum(q * (log_q - log_p), axis=-1)
    near = np.clip(ratio, 0.8, 1.2)
    loss = np.maximum(-advantage * ratio, -advantage * near) + 0.3 * step
    assert float(value) == pytest.approx(loss[counted].sum(), rel=1e-4)
    free = -advantage * ratio >= -advantage * near
    policy = np.where(free, -advantage * ratio, 0)[..., None] * (np.eye(V)[labels] - q)
    exact = policy + 0.3 * q * (log_q - log_p - step[..., None])
    np.testing.assert_allclose(slope, np.where(counted[..., None], exact, 0), atol=1e-5)


def test_a_mixture_is_drawn_token_by_token_from_what_both_say_of_the_whole_text(target_directory) -> None:
    """With the draws of plain decoding, keyed by a text's seed and a token's place in it."""
    teacher = load_target(target_directory)
    student = Target(teacher.config, noisy(teacher.params, 0.3), teacher.tokenizer)
    prompts, seeds, share = [[5, 6], [7, 8, 9], [5, 6, 7, 8]], [3, 1, 4], 0.3
    made = blend(student, teacher, share, prompts, 6, seeds, room=16)
    texts = [[*prompt, *new] for prompt, new in zip(prompts, made, strict=True)]
    padded = np.stack([np.pad(text, (0, 10 - len(text))) for text in texts])
    both = [jax.nn.log_softmax(model.apply(padded).logits) for model in (student, teacher)]
    mixed = np.log((1 - share) * np.exp(both[0]) + share * np.exp(both[1]))
    ends, seen = teacher.config.eos_ids, 0
    for row, (prompt, new) in enumerate(zip(prompts, made, strict=True)):
        places = np.arange(len(prompt), len(prompt) + len(new), dtype=np.int32)
        keys = jax.vmap(jax.random.key)(jnp.full(len(places), seeds[row], jnp.uint32))
        drawn = noise(keys, jnp.asarray(places), mixed.shape[-1], jnp.float32)
        assert np.argmax(mixed[row, places - 1] + drawn, axis=-1).tolist() == new
        assert not set(new[:-1]) & set(ends) and (len(new) == 6 or new[-1] in ends)
        seen += len(new)
    assert seen > 9


@pytest.mark.slow
def test_a_mixture_of_one_model_alone_is_what_it_writes_and_between_them_lies_their_mean(target_directory) -> None:
    teacher = load_target(target_directory)
    student = Target(teacher.config, noisy(teacher.params, 0.5), teacher.tokenizer)
    prompts, rows = [[5, 6], [7, 8, 9], [5, 6, 7, 8]], 100
    many = prompts + [[5, 6]] * (rows - len(prompts))
    for share, model in ((0.0, student), (1.0, teacher)):
        made = blend(student, teacher, share, many, 6, range(rows), room=16)
        alone = generate(model, prompts, max_new_tokens=6, sampling=Sampling(1.0), seeds=[0, 1, 2])
        assert made[:3] == alone.tokens
    tokens = [
        new[0]
        for first in range(0, 2000, rows)
        for new in blend(student, teacher, 0.3, many, 6, range(first, first + rows), room=16)[3:]
    ]
    count = len(tokens)
    logits = [np.asarray(model.apply([[5, 6]]).logits)[0, -1].astype(np.float64) for model in (student, teacher)]
    q, p = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in logits)
    mixed = 0.7 * q + 0.3 * p
    frequency = np.bincount(tokens, minlength=len(mixed)) / count
    likely = mixed > 0.01
    error = (frequency - mixed) / np.sqrt(mixed / count)
    assert np.abs(error[likely]).max() < 4.5 and np.abs(q - p)[likely].max() > 0.05
    with pytest.raises(UserError, match=r"lie in 0\.\.1"):
        blend(student, teacher, 1.5, prompts, 4, [0, 1, 2], room=16)


def test_the_first_step_stands_at_a_ratio_of_student_over_mixture(draft_setting) -> None:
    """Of the parameters that wrote the text, what the step makes of its tokens is what the batch tells."""
    objective, params, frozen, batch = draft_setting("minillm", pretrain=0.0, single=0.0, clip=1e6)
    host = {name: np.asarray(values) for name, values in batch.items()}
    made = objective.refresh(params, frozen, host, jax.random.key(0))
    again = objective.refresh(params, frozen, host, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, made, again)
    shapes = {name: (values.shape[1:], values.dtype) for name, values in made.items()}
    assert objective.refreshed(batch["tokens"].shape[1]) == shapes
    loss = jax.jit(objective.loss)
    (sums, weights), _ = loss(params, frozen, {**batch, **made}, jax.random.key(0), 0.0)
    assert (made["written/segments"] == 0).any()
    other = np.where(made["written/segments"] > 0, made["written/tokens"], 3).astype(np.int32)
    padded = loss(params, frozen, {**batch, **made, "written/tokens": other}, jax.random.key(0), 0.0)[0]
    np.testing.assert_array_equal(padded, (sums, weights), err_msg="what pads a row takes part")
    told = {name.removeprefix("written/"): values for name, values in made.items()}
    assert weights[0] == told["mask"].sum() > 20
    # What is told of a token stands one place before it: from whole texts of both models.
    tokens, counted = told["tokens"], np.pad(told["mask"][:, 1:].astype(bool), ((0, 0), (0, 1)))
    log_q, log_p = (
        np.take_along_axis(x[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        for x in both(objective, params, frozen, tokens)
    )
    old, taught = (np.pad(x, ((0, 0), (0, 1))) for x in (log_q, log_p))
    np.testing.assert_allclose(told["old"], np.where(counted, old, 0), atol=1e-4)
    share = np.exp(old) / (0.8 * np.exp(old) + 0.2 * np.exp(taught))
    np.testing.assert_allclose(told["weight"], np.where(counted, share, 0), rtol=1e-3)
    # Rewards are good where the teacher likes a token more than the student did.
    expected = advantages((taught - old) / 0.5, counted, objective._config.discount)
    np.testing.assert_allclose(told["advantage"], expected, atol=1e-2)
    assert np.ptp(expected) > 1 and np.ptp(told["weight"][counted]) > 0.02
    expected = -np.sum(told["advantage"] * told["weight"])
    np.testing.assert_allclose(sums[0], expected, atol=1e-3)
    # The same parameters, by which rewards are cut, and the data set's text is learnt too.
    cut = MiniLLMObjective(dataclasses.replace(objective._config, pretrain=3.0, reward_clip=0.1), objective._tokenizer)
    made = cut.refresh(params, frozen, host, jax.random.key(0))
    expected = advantages(np.clip((taught - old) / 0.5, -0.1, 0.1), counted, objective._config.discount)
    np.testing.assert_allclose(made["written/advantage"], expected, atol=1e-2)
    assert np.mean(np.abs((taught - old)[counted] / 0.5) > 0.1) > 0.5
    (sums, weights), _ = jax.jit(cut.loss)(params, frozen, {**batch, **made}, jax.random.key(0), 0.0)
    labels, known = map(np.asarray, labels_at({**host, "mask": host["segments"] > 0}, 1))
    log_q, log_p = both(objective, params, frozen, host["tokens"])
    kl = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    likely = np.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]
    assert weights[1] == known.sum()
    assert float(sums[1]) == pytest.approx(1.5 * np.sum((kl - likely) * known), rel=1e-4)
