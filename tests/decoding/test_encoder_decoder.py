"""The battery of an encoder-decoder: what drafters must prove on a target whose prompt is read by an encoder, once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import loop
from decoding.drafter import Drafter, TargetView
from decoding.drafters.draft_model import DraftModel
from decoding.drafters.first_of import FirstOf
from decoding.drafters.prompt_lookup import PromptLookup
from decoding.generate import Generation, generate
from decoding.place import Place
from decoding.policies import Static
from decoding.sampling import Sampling, batch_sampling
from decoding.trees import chain
from eval.losslessness import SMALLEST_P, chi_square, count_strings
from models import transformer
from models.config import TransformerConfig
from models.encoder_decoder import Memory, beside, encode
from models.errors import UserError
from models.formats.target import Target
from models.layout import Layout
from tests.decoding.drafter_cases import LOPSIDED
from tests.noise import drawn

pytestmark = pytest.mark.usefixtures("x64")
RUN_LONG = True

SHAPE = TransformerConfig(
    vocab_size=12,
    width=32,
    num_layers=2,
    encoder_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    qkv_bias=True,
    output_bias=True,
    gated_mlp=False,
    mlp_bias=True,
    family="mu",
    bos_id=0,
    max_position=128,
)
PROMPTS = [[1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9, 10, 1, 2, 3], [11]]
CAPACITY = 128
# Greedy rows and sampled ones decode with one program.
SAMPLINGS = [Sampling(), Sampling(temperature=6.0, top_p=0.9), Sampling()]
LIMITS = [100, 90, 80]
ALONE = dict(max_new_tokens=60, sampling=Sampling(), seeds=5)


@functools.cache
def params() -> dict:
    with jax.enable_x64(True):
        return drawn(transformer.param_shapes(SHAPE, jnp.float64), 1.0, 3)


@functools.cache
def target() -> Target:
    return Target(SHAPE, params())


@functools.cache
def case(name: str) -> tuple[Drafter | None, dict | None]:
    """A drafter without parameters, which copies from the prompt; and an encoder-decoder of one layer."""
    if name == "draft model":
        first = {**params(), "layers": params()["layers"][:1]}
        return DraftModel(dataclasses.replace(SHAPE, num_layers=1), Static(LOPSIDED, "top")), first
    return (None if name == "none" else PromptLookup(depth=4, ngram=2)), None


def decode(name: str, prompts=PROMPTS, **settings) -> Generation:
    drafter, own = case(name)
    usual = dict(max_new_tokens=LIMITS, capacity=CAPACITY, sampling=SAMPLINGS, seeds=[5, 6, 7])
    return generate(target(), prompts, **(usual | {"drafter": drafter, "drafter_params": own} | settings))


@functools.cache
def run(name: str) -> Generation:
    with jax.enable_x64(True):
        return decode(name)


@functools.partial(jax.jit, static_argnames=("config",))
def whole(config, params, source, lengths, text):
    memory = encode(config, params, source, lengths)
    return transformer.forward(config, params, text, *beside(memory, Layout.causal(*text.shape))).logits


def test_plain_decoding_is_the_argmax_of_a_whole_forward() -> None:
    plain, size = run("none").tokens, max(map(len, PROMPTS))
    source = jnp.array([[*prompt, *[0] * (size - len(prompt))] for prompt in PROMPTS], jnp.int32)
    text = np.zeros((len(PROMPTS), max(LIMITS)), np.int32)
    for row, new in enumerate(plain):
        text[row, 1 : len(new)] = new[:-1]
    lengths = jnp.array(list(map(len, PROMPTS)), jnp.int32)
    best = np.argmax(whole(SHAPE, params(), source, lengths, jnp.asarray(text)), axis=-1)
    for row in (0, 2):
        assert plain[row] == best[row, : LIMITS[row]].tolist()
        assert len({tuple(plain[row][i : i + 3]) for i in range(LIMITS[row] - 2)}) > 10


@pytest.mark.parametrize("name", ["prompt_lookup", "draft model"])
def test_drafters_are_lossless(name: str) -> None:
    """Greedy and sampled, to the last slot of the cache and with parameters of another model."""
    generation = run(name)
    assert generation.tokens == run("none").tokens
    together = sum(generation.stats[1:], generation.stats[0])
    assert together.acceptance_length > 1.1 and np.all(together.accepted_by_depth[:2] > 3)
    room = CAPACITY - case(name)[0].max_depth - 2
    garbage = jax.tree.map(lambda leaf: leaf[..., ::-1] * 2, case(name)[1])
    full = decode(name, max_new_tokens=[room, 9, 1], stop=[[5, 5, 5, 5]], drafter_params=garbage)
    plain = decode("none", max_new_tokens=[room, 9, 1], stop=[[5, 5, 5, 5]])
    assert full.tokens == plain.tokens
    with pytest.raises(UserError, match=f"cache of {CAPACITY - 1} slots is too small"):
        decode(name, max_new_tokens=room, capacity=CAPACITY - 1)


def test_a_draft_model_reads_what_it_begins_with_in_a_combination_too() -> None:
    """The target drafts for itself, so that all is accepted if it has read all."""
    pair = FirstOf((PromptLookup(depth=3, ngram=100, shortest=100), DraftModel(SHAPE, Static(chain(3), "top"))))
    both = decode("none", PROMPTS[:1], drafter=pair, drafter_params=[None, params()], **ALONE)
    assert both.tokens[0] == run("none").tokens[0][:60] and np.all(both.stats[0].conditional_acceptance == 1)


def test_sampled_drafts_follow_the_targets_distribution() -> None:
    """The second and third token behind one prompt against exact enumeration; drafts are drawn, kept and replaced."""
    drafter, own = case("draft model")
    drafter, rows, size = dataclasses.replace(drafter, policy=Static(chain(2))), 1024, SHAPE.vocab_size
    sampling, drawn, kept = Sampling(temperature=8.0), [], 0
    for first in (0, rows):
        made = generate(
            target(),
            PROMPTS[:1] * rows,
            drafter=drafter,
            drafter_params=own,
            max_new_tokens=3,
            sampling=sampling,
            seeds=list(range(first, first + rows)),
        )
        drawn += made.tokens
        kept += sum(int(one.accepted_by_depth[0]) for one in made.stats)
    pairs = np.array([[0, a, b] for a in range(size) for b in range(size)], np.int32)
    prompt = jnp.tile(jnp.array(PROMPTS[:1], jnp.int32), (len(pairs), 1))
    lengths = jnp.full(len(pairs), prompt.shape[1], jnp.int32)
    scores = np.asarray(whole(SHAPE, params(), prompt, lengths, jnp.asarray(pairs))) / sampling.temperature
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = (shares / shares.sum(axis=-1, keepdims=True)).reshape(size, size, 3, size)
    exact = np.einsum("a,ab,abc->bc", shares[0, 0, 0], shares[:, 0, 1], shares[:, :, 2])
    counts = count_strings(np.array(drawn), size).sum(axis=0)
    assert 0.2 < kept / len(drawn) < 0.95
    assert chi_square(counts, exact).p_value > SMALLEST_P
    # Another distribution is told apart.
    assert chi_square(counts, np.roll(exact, 1, axis=1)).p_value < SMALLEST_P


def test_drafters_that_copy_see_the_prompt_before_the_text() -> None:
    memory = Memory([], jnp.array([[5, 6, 7, 0], [8, 0, 0, 0]], jnp.int32), jnp.array([3, 1], jnp.int32))
    own, length = jnp.array([[0, 9, 10, 0], [0, 11, 0, 0]], jnp.int32), jnp.array([2, 1], jnp.int32)
    view = TargetView(SHAPE, {}, [], Place.of_text(length), own, batch_sampling([Sampling()] * 2), memory)
    text, root = view.all_text()
    assert root.tolist() == [5, 2]
    assert [row[: end + 1].tolist() for row, end in zip(text, root, strict=True)] == [[5, 6, 7, 0, 9, 10], [8, 0, 11]]


def test_neighbours_change_nothing() -> None:
    long = [*PROMPTS[:1], [7, 3] * 8, *PROMPTS[2:]]
    assert decode("none", long).tokens[::2] == run("none").tokens[::2]


def test_the_encoder_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the loop steps with, its encoder spoilt, writes the same."""
    plain, read, loops = run("none"), loop.encode_prompt, loop.run
    calls = []

    def counted(*arguments):
        calls.append(1)
        return read(*arguments)

    def spoilt(models, *arguments):
        broken = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), models.params["encoder"])
        return loops(dataclasses.replace(models, params={**models.params, "encoder": broken}), *arguments)

    monkeypatch.setattr(loop, "encode_prompt", counted)
    monkeypatch.setattr(loop, "run", spoilt)
    assert decode("none").tokens == plain.tokens and len(calls) == 1


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="prompt 1 has 129 tokens, more than the target's encoder reads, 128"):
        decode("none", [[1], [2] * 129, [3]])
    nameless = dataclasses.replace(target(), config=dataclasses.replace(SHAPE, bos_id=None))
    with pytest.raises(UserError, match="needs bos_token_id"):
        generate(nameless, PROMPTS)
    alone = dataclasses.replace(SHAPE, family="llama", encoder_layers=0)
    with pytest.raises(UserError, match="drafts for encoder-decoders alone"):
        case("draft model")[0].check(alone)
