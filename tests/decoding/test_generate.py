"""`generate`: streams, chunks, stop sequences, statistics, and one clear sentence for every bad request."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import costs, loop, spread
from decoding import generate as module
from decoding.drafters.first_of import FirstOf
from decoding.drafters.lookahead import Lookahead
from decoding.drafters.medusa import Medusa
from decoding.drafters.prompt_lookup import PromptLookup
from decoding.drafters.token_recycling import TokenRecycling
from decoding.generate import bucket, cache_sizes, generate, slots_needed
from decoding.sampling import Sampling
from decoding.spread import generate_together
from decoding.trees import MC_SIM_7B_63
from decoding.verify import Typical
from models.errors import UserError
from models.formats.target import Target
from models.heads.medusa import MedusaHeads
from tests.decoding.drafter_cases import CASES, LOPSIDED, random_target

PROMPTS = [[1, 2, 3], list(range(12)) * 3, [11]]


@pytest.fixture(scope="module")
def target() -> Target:
    with jax.enable_x64(True):
        return random_target(vocab_size=12)


@pytest.fixture(scope="module")
def drafter(target: Target) -> dict:
    with jax.enable_x64(True):
        drafter, params = CASES["hydra++"](target, jax.random.key(3))
    return dict(drafter=drafter, drafter_params=params)


pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("every", [1, 3])
def test_stream_is_the_output_every_m_steps(target: Target, drafter: dict, every: int) -> None:
    whole = generate(target, PROMPTS, max_new_tokens=[40, 25, 33], **drafter)
    calls: list[tuple[int, list[int], list[int]]] = []
    arguments = dict(max_new_tokens=[40, 25, 33], stream_every=every, **drafter)
    streamed = generate(target, PROMPTS, on_tokens=lambda *call: calls.append(call), **arguments)
    assert streamed.tokens == whole.tokens and streamed.writers == whole.writers
    for row in range(3):
        pieces = [(tokens, writers) for r, tokens, writers in calls if r == row]
        assert [token for tokens, _ in pieces for token in tokens] == whole.tokens[row]
        assert [writer for _, writers in pieces for writer in writers] == whole.writers[row]
        assert pieces[0] == (whole.tokens[row][:1], [0]), "the token that prefill chose comes first"
        # Every step ends with a token that the target wrote.
        ends = [sum(writer == 0 for writer in writers) for _, writers in pieces[1:-1]]
        assert ends == [every] * len(ends) and len(pieces) >= 1 + whole.stats[row].steps // every


def test_few_sizes_of_caches_and_prompts_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_sizes([200, 70, 129, 1000, 30]) == [224, 80, 224, 1024, 80]
    assert cache_sizes([64]) == [64] and cache_sizes([]) == []
    assert module.chunk_sizes(600) == [512, 96] and module.chunk_sizes(30, 64) == [32]
    monkeypatch.setattr(module.jax, "default_backend", lambda: "gpu")
    assert module.chunk_sizes(600) == [512, 512] and module.chunk_sizes(30, 8) == [64]
    assert module.chunk_sizes(30, 64) == [32] and module.chunk_sizes(1, 2) == [1]
    assert slots_needed(30, 60, 3) == 512 and slots_needed(30, 60, 3, batch=64) == 94


# What drafters make of chunks is shown in test_rows.py.
@pytest.mark.parametrize("name", ["none", pytest.param("hydra++", marks=pytest.mark.slow)])
def test_chunked_prefill_is_whole_prefill(target: Target, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, params = CASES[name](target, jax.random.key(3))
    arguments = dict(drafter=drafter, drafter_params=params, max_new_tokens=30, capacity=80)
    whole = generate(target, PROMPTS, **arguments)
    monkeypatch.setattr(module, "PREFILL_CHUNK", 16)
    chunked = generate(target, PROMPTS, **arguments)
    assert chunked.tokens == whole.tokens and chunked.writers == whole.writers
    exact = generate(target, [PROMPTS[1][:32], [5]], **arguments)
    assert exact.tokens[1] == generate(target, [[5], [6]], **arguments).tokens[0]


def test_default_tree_is_lossless(target: Target) -> None:
    heads = MedusaHeads(num_heads=4)
    params = jax.jit(heads.init, static_argnums=0)(target.config, target.params, jax.random.key(0))
    drafted = generate(target, PROMPTS, drafter=Medusa(heads), drafter_params=params, max_new_tokens=60)
    assert Medusa(heads).tree is MC_SIM_7B_63
    assert drafted.tokens == generate(target, PROMPTS, max_new_tokens=60).tokens
    assert sum(stats.committed for stats in drafted.stats) == 3 * 59
    assert sum(stats.steps for stats in drafted.stats) < 3 * 59


def test_stop_sequences(target: Target) -> None:
    free = generate(target, PROMPTS[:1], max_new_tokens=60).tokens[0]

    def stopped(*stop: list[int]) -> list[int]:
        return generate(target, PROMPTS[:1], max_new_tokens=60, stop=stop).tokens[0]

    assert stopped(free[7:10]) == free[: next(i for i in range(3, 60) if free[i - 3 : i] == free[7:10])]
    # The earliest of several ends the text; longer than the text so far never matches.
    assert stopped([99], free[5:9], free[20:22]) == min((stopped(free[5:9]), stopped(free[20:22])), key=len)
    assert stopped(free[:9]) == free[:9] and stopped([99], [98] * 9) == free
    # The prompt's tokens are not text: its end joined with the first new token stops nothing.
    assert stopped([PROMPTS[0][-1], free[0], free[1]]) != free[:2]


def test_end_tokens_of_the_config_stop(target: Target) -> None:
    free = generate(target, PROMPTS, max_new_tokens=60).tokens
    ends = free[0][4], free[2][9]
    ending = Target(dataclasses.replace(target.config, eos_ids=ends), target.params)
    stopped = generate(ending, PROMPTS, max_new_tokens=60).tokens
    for row, text in enumerate(free):
        cut = next((i + 1 for i, token in enumerate(text) if token in ends), 60)
        assert stopped[row] == text[:cut]
    assert generate(ending, PROMPTS, max_new_tokens=60, stop=[]).tokens == free


def test_seeds_and_settings_belong_to_the_row(target: Target) -> None:
    settings = [Sampling(temperature=4.0), Sampling(), Sampling(temperature=6.0, top_k=5)]
    batch = generate(target, PROMPTS, max_new_tokens=20, sampling=settings, seeds=[7, 8, 9], capacity=80)
    for row in range(3):
        order = [row, *(other for other in range(3) if other != row)]
        arguments = {"sampling": [settings[i] for i in order], "seeds": [7 + row, 1, 2]}
        moved = generate(target, [PROMPTS[i] for i in order], max_new_tokens=20, capacity=80, **arguments)
        assert moved.tokens[0] == batch.tokens[row]
    counted = generate(target, PROMPTS, max_new_tokens=20, sampling=settings, seeds=7, capacity=80)
    assert counted.tokens == batch.tokens
    other = generate(target, PROMPTS, max_new_tokens=20, sampling=settings, seeds=70, capacity=80)
    assert [a == b for a, b in zip(other.tokens, batch.tokens, strict=True)] == [False, True, False]


def test_typical_acceptance_takes_more_and_differs(target: Target, drafter: dict) -> None:
    plain = generate(target, PROMPTS, max_new_tokens=60, **drafter)
    lossy = generate(target, PROMPTS, max_new_tokens=60, typical=Typical(epsilon=1e-3, delta=1e-3), **drafter)
    assert lossy.tokens != plain.tokens and sum(s.steps for s in lossy.stats) < sum(s.steps for s in plain.stats)


def test_one_new_token_takes_no_step(target: Target, drafter: dict) -> None:
    one = generate(target, PROMPTS, max_new_tokens=1, **drafter)
    assert [len(tokens) for tokens in one.tokens] == [1, 1, 1] and [s.steps for s in one.stats] == [0, 0, 0]
    assert one.prefill_seconds > 0 and one.decode_seconds >= 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(prompts=[]), "there is no prompt"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1, 12]]), "prompt 0 has token 12, outside the target's vocabulary of 12"),
        (dict(prompts=[[-3, 1]]), "prompt 0 has token -3"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(max_new_tokens=[3, 3]), "max_new_tokens has 2 entries for 3 prompts"),
        (dict(max_new_tokens=3000), "more than the target's context of 2048"),
        (dict(sampling=[Sampling()]), "sampling has 1 entries for 3 prompts"),
        (dict(seeds=[1, 2]), "seeds has 2 entries for 3 prompts"),
        (dict(seeds=[1, 2, -1]), r"seeds must be in \[0, 2\^32\), got -1"),
        (dict(seeds=2**32 - 2), "seeds must be in"),
        (dict(stop=[[1], []]), "a stop sequence is empty"),
        (dict(stop=[[1, -1]]), "a stop sequence holds the token -1"),
        (
            dict(stop=["Lily"]),
            r"stop must be a list of token sequences, .*got the text 'Lily' in it; texts .* stop_texts",
        ),
        (dict(stop="Lily"), "stop must be a list of token sequences, .*stop_texts"),
        (dict(stop=[1, 2]), "stop must be a list of token sequences, .*got 1 in it"),
        (dict(stop=[[1.5]]), "stop must be a list of token sequences"),
        (dict(stop=3), "stop must be a list of token sequences"),
        (dict(stop=[[2**40]]), "a stop sequence holds the token 1099511627776"),
        (dict(stop_texts=["Lily"]), "stop_texts need a tokenizer, which this target lacks"),
        (dict(prompts="Once"), "prompts must be lists of token ids, one per prompt, got the text 'Once'"),
        (dict(prompts=["Once"]), "got a list of texts: encode each of them"),
        (dict(prompts=[1, 2, 3]), "got a list of int values: put one prompt in a list of its own"),
        (dict(prompts=np.array([1, 2, 3])), "put one prompt in a list of its own"),
        (dict(prompts=7), "prompts must be lists of token ids, one per prompt, got 7"),
        (dict(prompts=[[1, 2], "Once"]), "prompt 1 must be a list of token ids, got the text 'Once'"),
        (dict(prompts=[[1, 2], 3]), "prompt 1 must be a list of token ids, got 3"),
        (dict(prompts=[[1, 2.0]]), "prompt 0 must hold token ids, which are whole numbers, got 2.0"),
        (dict(prompts=[np.array([1.0, 2.0])]), "prompt 0 must hold token ids"),
        (dict(prompts=[[1, None]]), "prompt 0 must hold token ids, which are whole numbers, got None"),
        (dict(prompts=[[1, True]]), "prompt 0 must hold token ids, which are whole numbers, got True"),
        (dict(prompts=[[10**30]]), f"prompt 0 has token {10**30}, outside"),
        (dict(max_new_tokens=2.5), "max_new_tokens must be a whole number, or one per prompt, got 2.5"),
        (dict(max_new_tokens="9"), "max_new_tokens must be a whole number"),
        (dict(max_new_tokens=10**30), "more than the target's context of 2048"),
        (dict(seeds=1.5), "seeds must be a whole number"),
        (dict(seeds=None), "seeds must be a whole number"),
        (dict(seeds="x"), "seeds must be a whole number"),
        (dict(sampling={"temperature": 1}), "sampling must be a Sampling, or one per prompt, got"),
        (dict(sampling=None), "sampling must be a Sampling"),
        (dict(capacity=64.5), "capacity must be a whole number of at least 1, got 64.5"),
        (dict(stream_every=1.5), "stream_every must be a whole number of at least 1 step, got 1.5"),
        (dict(stream_every=2**40), r"stream_every must be at least 1 step, and less than 2\^31, got 1099511627776"),
        (dict(typical=Typical(-1.0, 0.3)), "typical.epsilon must be a number that is not negative, got -1.0"),
        (dict(typical=Typical(0.1, float("nan"))), "typical.delta must be a number that is not negative, got nan"),
        (
            dict(drafter="lookahead"),
            "drafter must be a drafter, or a pair as load_drafter.* returns, got the text",
        ),
        (dict(drafter=(TokenRecycling(), None), drafter_params={}), "drafter is a pair with its parameters"),
        (dict(memory="abc"), "memory must be Generation.memory of an earlier request, got the text 'abc'"),
        (dict(stop_texts=np.array(["a", "b"])), "stop_texts need a tokenizer"),
        (dict(drafter=PromptLookup(ngram=10**9)), "prompt_lookup needs ngram of at most 4096, got 1000000000"),
        (dict(drafter=Lookahead(guesses=10**9)), "at most 4096 candidates"),
        (dict(typical=True), "typical must be a Typical or None, got True"),
        (dict(mesh="tensor=2"), "mesh must be a Mesh or None, got the text 'tensor=2'"),
        (dict(on_tokens="x"), "on_tokens must be a function"),
        (dict(capacity=10**9), "a cache of 1000000000 slots is too large: with a context of 2048 no text"),
        (dict(stream_every=0), "stream_every must be at least 1 step, .*, got 0"),
        (dict(capacity=50), "a cache of 50 slots is too small: the request needs 57"),
        (
            dict(max_new_tokens=1, capacity=39),
            r"a cache of 39 slots is too small: the request needs 40 \(longest prompt, in whole chunks\)",
        ),
        (dict(drafter=Medusa(MedusaHeads(2))), "draft tree is 4 deep, but the drafter has 2 heads"),
        (dict(drafter=Medusa(MedusaHeads(4)), narrow=True), "asks for 10 candidates, but the vocabulary has 4 tokens"),
    ],
)
def test_bad_requests_are_one_sentence(target: Target, change: dict, complaint: str) -> None:
    arguments = dict(prompts=PROMPTS, max_new_tokens=20) | change
    if arguments.pop("narrow", False):
        target = Target(dataclasses.replace(target.config, vocab_size=4), target.params)
    with pytest.raises(UserError, match=complaint) as caught:
        generate(target, arguments.pop("prompts"), **arguments)
    assert "\n" not in str(caught.value)


def test_buckets_waste_at_most_a_quarter() -> None:
    sizes = range(1, 3000)
    assert all(size <= bucket(size) <= max(64, 1.25 * size) for size in sizes)
    assert len({bucket(size) for size in sizes}) < 28
    assert all(bucket(bucket(size)) == bucket(size) for size in sizes)
    assert slots_needed(36, 20, 0) == 57 and slots_needed(36, 20, 4) == 61 and slots_needed(36, 1, 0) == 40


def test_memory_goes_only_where_it_was_kept(target: Target, drafter: dict) -> None:
    recycling = TokenRecycling(LOPSIDED)
    first = generate(target, PROMPTS, drafter=recycling, max_new_tokens=30)
    again = generate(target, PROMPTS, drafter=recycling, max_new_tokens=30, memory=first.memory)
    assert again.tokens == first.tokens
    assert sum(stats.steps for stats in again.stats) < sum(stats.steps for stats in first.stats)
    assert generate(target, PROMPTS, max_new_tokens=5, **drafter).memory is None
    with pytest.raises(UserError, match="hydra keeps nothing between requests"):
        generate(target, PROMPTS, max_new_tokens=5, memory=first.memory, **drafter)
    pair = FirstOf((recycling, recycling))
    with pytest.raises(UserError, match="needs the memory of a combination"):
        generate(target, PROMPTS, drafter=pair, max_new_tokens=5, memory=first.memory)


def test_one_seed_counts_up_whatever_integer_it_is(target: Target) -> None:
    warm = dict(max_new_tokens=12, sampling=Sampling(temperature=4.0))
    counted = generate(target, [[1]] * 3, seeds=np.int64(5), **warm)
    for seeds in ([5, 6, 7], np.array(5), jnp.int32(5)):
        assert counted.tokens == generate(target, [[1]] * 3, seeds=seeds, **warm).tokens
    assert counted.tokens[0] != counted.tokens[1]


def test_nothing_is_measured_for_a_request_that_is_refused(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(costs, "measured")
    free = TokenRecycling().opened(((8, 1.2),))
    sizes = (dict(capacity=3), dict(capacity=64.5), dict(capacity=10**9), dict(max_new_tokens=3000))
    for change in (*sizes, dict(seeds=-1), dict(stop="x"), dict(stream_every=0)):
        with pytest.raises(UserError):
            generate(target, PROMPTS, drafter=free, **change)


def test_processes_share_rows_with_all_that_belongs_to_them(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another had the second of every two prompts, and had sent the same texts."""
    monkeypatch.setattr(spread.processes, "count", lambda: 2)
    monkeypatch.setattr(spread.processes, "share", lambda items: list(items)[::2])
    monkeypatch.setattr(spread.processes, "gathered", lambda made: [made, dataclasses.replace(made, augmentations=[7])])
    options = dict(sampling=(Sampling(), Sampling(4.0), Sampling(4.0)), seeds=np.int64(3))
    made = generate_together(target, PROMPTS, max_new_tokens=np.array([5, 6, 7]), **options)
    own = generate(target, PROMPTS[::2], max_new_tokens=[5, 7], sampling=[Sampling(), Sampling(4.0)], seeds=[3, 5])
    assert made.tokens[::2] == own.tokens and made.augmentations == [0, 7, 0]


def test_a_drafter_without_its_parameters_is_refused(target: Target) -> None:
    with pytest.raises(UserError, match="the drafter medusa has parameters: give them as drafter_params"):
        generate(target, PROMPTS, drafter=Medusa(MedusaHeads(3), LOPSIDED))


def test_parameters_of_another_drafter_are_refused(target: Target, drafter: dict) -> None:
    heads = MedusaHeads(3)
    params = jax.jit(heads.init, static_argnums=0)(target.config, target.params, jax.random.key(0))
    for complaint, arguments in (
        ("of the drafter hydra: heads/0/blocks/0/linear/kernel has shape", {**drafter, "drafter_params": params}),
        ("of the drafter token_recycling: token_recycling has none", {**drafter, "drafter": TokenRecycling(LOPSIDED)}),
        (
            "of the drafter medusa: heads/0/blocks/0/linear/kernel has shape",
            {**drafter, "drafter": Medusa(heads, LOPSIDED)},
        ),
        ("of the drafter hydra: heads/.* is missing", {**drafter, "drafter_params": {"heads": params["heads"][:0]}}),
    ):
        with pytest.raises(UserError, match=f"drafter_params are not those {complaint}"):
            generate(target, PROMPTS, max_new_tokens=20, **arguments)


def test_a_drafter_may_come_as_the_pair_that_loading_it_returns(target: Target, drafter: dict) -> None:
    pair = drafter["drafter"], drafter["drafter_params"]
    expected = generate(target, PROMPTS, max_new_tokens=20, **drafter)
    assert generate(target, PROMPTS, max_new_tokens=20, drafter=pair).tokens == expected.tokens


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=4.0, top_k=5)])
def test_scores_that_are_not_finite_end_in_a_sentence(
    target: Target, drafter: dict, bad: float, sampling: Sampling
) -> None:
    arguments = dict(max_new_tokens=40, sampling=sampling, seeds=3)
    text = generate(target, PROMPTS[:1], **arguments).tokens[0]
    # Every text that has read this token has no scores from there on; prompts are padded with 0.
    known = {0, *PROMPTS[0], *text[:2]}
    poison = next(token for token in text[2:] if token not in known)
    embedding = target.params["embed"]["embedding"].at[poison].set(bad)
    broken = Target(target.config, {**target.params, "embed": {"embedding": embedding}})
    where = len(PROMPTS[0]) + text.index(poison) + 1
    streamed: list[int] = []
    # With a drafter the token may be met before, among candidates.
    streaming = dict(on_tokens=lambda row, tokens, writers: streamed.extend(tokens))
    for place, extra in ((where, {}), (r"\d+", drafter), (where, streaming)):
        with pytest.raises(UserError, match=rf"not finite \(NaN or infinity\) for the token {place} of prompt 0's"):
            generate(broken, PROMPTS[:1], **arguments, **extra)
    assert streamed == text[: len(streamed)]


def test_reading_a_prompt_writes_its_text(target: Target) -> None:
    """What a drafter reads in `ingest` is there, whether or not the state was made with the prompts."""
    prompts = [[1, 2, 3], [5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 2, 1]]
    text = np.zeros((2, 32), np.int32)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = prompt
    request = module._make_request(target.config, prompts, [1, 1], 0, Sampling(), [[99]], "dense", None, None)
    models = loop.Models(target.config, TokenRecycling(LOPSIDED), target.params, None)
    state = loop.init_state(target.config, models.drafter, 2, 40, jnp.float64)
    hidden = jnp.zeros((2, target.config.width))
    for first in (0, 16):
        state, hidden = loop.read_prompt(models, state, hidden, request, jnp.asarray(text[:, first : first + 16]))
        known = np.array(state.text.length)
        assert known.tolist() == [3, min(17, first + 16)]
        for row, prompt in enumerate(prompts):
            assert models.view(state, request).text[row, : known[row]].tolist() == prompt[: known[row]]
            assert not np.any(state.text.tokens[row, known[row] :])


def test_all_drafters_share_the_programs_that_read_a_prompt(target: Target, drafter: dict) -> None:
    """Reading is keyed by shape, taps and chunk, the choice of the first token by shape alone: no drafter, no mode."""
    prompts = [[1, 2, 3], [5, 6, 7, 8]]
    tokens = jnp.asarray([prompt + [0] * (16 - len(prompt)) for prompt in prompts], jnp.int32)
    recycling, heads = TokenRecycling(LOPSIDED), drafter["drafter"]
    assert recycling.taps == heads.taps
    compiled = []
    sampled = Sampling(temperature=4.0, top_k=5)
    for asked, params, sampling in ((recycling, None, Sampling()), (heads, drafter["drafter_params"], sampled)):
        models = loop.Models(target.config, asked, target.params, asked.for_decoding(params))
        request = module._make_request(target.config, prompts, [1, 1], 0, sampling, [[99]], "dense", None, None)
        state = loop.init_state(target.config, asked, 2, 40, jnp.float64)
        state, hidden = loop.read_prompt(models, state, jnp.zeros((2, target.config.width)), request, tokens)
        loop.choose_root(models, state, hidden, request)
        compiled.append((loop._read_chunk._cache_size(), loop._choose_first._cache_size()))
    assert compiled[0] == compiled[1]


def test_numpy_arrays_serve_as_prompts_limits_and_seeds(target: Target) -> None:
    lists = generate(target, PROMPTS, max_new_tokens=[5] * len(PROMPTS), seeds=[*range(len(PROMPTS))])
    arrays = [np.array(prompt) for prompt in PROMPTS]
    limits, seeds = np.full(len(PROMPTS), 5), np.arange(len(PROMPTS))
    assert generate(target, arrays, max_new_tokens=limits, seeds=seeds).tokens == lists.tokens
