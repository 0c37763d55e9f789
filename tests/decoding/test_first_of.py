"""Combinations: whose tree a row gets, when the second is asked, and what each of the two learns."""

import dataclasses
import functools
import itertools
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding import loop
from decoding.drafter import Drafter, Riders, TargetView, TrueRows
from decoding.drafters import first_of
from decoding.drafters.draft_model import DraftModel
from decoding.drafters.first_of import FirstOf, joined
from decoding.drafters.lookahead import Lookahead
from decoding.drafters.plain import Plain
from decoding.drafters.prompt_lookup import PromptLookup
from decoding.drafters.token_recycling import TokenRecycling
from decoding.generate import generate
from decoding.place import Place
from decoding.policies import Static
from decoding.sampling import Sampling, batch_sampling
from decoding.trees import TokenTree, chain
from models import transformer
from models.errors import UserError
from tests.decoding.drafter_cases import BUSHY, LOPSIDED, random_target
from tests.decoding.test_prompt_lookup import search

PROMPTS = [[1, 2, 3, 4, 1, 2], [4, 5, 6, 7, 8], [9]]

pytestmark = pytest.mark.usefixtures("x64")


@dataclasses.dataclass(frozen=True)
class Told(Drafter):
    """Drafts its parameters where they are not negative, and counts in its state how often it was asked."""

    depth: int = 2
    under: str = "match"
    riding: int = 0
    name: ClassVar[str] = "told"
    taps: ClassVar[tuple[str, ...]] = ("pre_norm",)

    @property
    def max_nodes(self) -> int:
        return self.depth + 1

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def num_riders(self) -> int:
        return self.riding

    def rule(self, greedy):
        return self.under

    def draft(self, params, target, state, root, keys):
        tokens = jnp.concatenate([root[:, None], params[:, : self.depth]], axis=1)
        proposals = jnp.ones((root.shape[0], self.depth, 12)) / 12 if self.under == "swor" else None
        drawn_from = () if proposals is None else (proposals, np.arange(self.depth, dtype=np.int32)[None])
        tree = chain(self.depth).fill(jnp.maximum(tokens, 0), self.under, *drawn_from)
        return dataclasses.replace(tree, valid=tokens >= 0), None

    def riders(self, params, target, state, tree):
        batch, nodes = tree.tokens.shape
        if not self.riding:
            return None
        return Riders(
            tokens=jnp.full((batch, self.riding), self.depth, jnp.int32),
            positions=target.length[:, None] + 1 + jnp.arange(self.riding, dtype=jnp.int32),
            sees_tree=jnp.broadcast_to(jnp.arange(nodes) == 0, (1, self.riding, nodes)),
            sees_riders=jnp.eye(self.riding, dtype=bool)[None],
        )


def view(batch: int) -> TargetView:
    target = random_target(vocab_size=12)
    zero = jnp.zeros(batch, jnp.int32)
    place = Place.of_text(zero + 3)
    return TargetView(target.config, target.params, [], place, jnp.zeros((batch, 9), jnp.int32), SAMPLINGS)


SAMPLINGS = batch_sampling([Sampling()])
ROOTS = np.array([7, 8], np.int32)
GUESSES = [[5, -1, -1], [-1, -1, -1]], [[1, 2, 3], [4, 6, -1]]


def both() -> list:
    return [jax.device_put(np.array(guess, np.int32)) for guess in GUESSES]


@functools.partial(jax.jit, static_argnums=0)
def draft(drafter: FirstOf, seen: TargetView, guesses: list, roots: jax.Array) -> tuple:
    """Tokens are told to drafters without states."""
    return drafter.draft(guesses, seen, [()] * len(guesses), roots, None)


def drafted(drafter: FirstOf, guesses: list, roots: np.ndarray) -> tuple:
    """What `draft` returns, by one program."""
    return draft(drafter, view(len(roots)), guesses, roots)


def on_host(tree: TokenTree) -> types.SimpleNamespace:
    """Its arrays as NumPy's, every look at which is no program."""
    return types.SimpleNamespace(**{name: np.asarray(x) for name, x in vars(tree).items() if isinstance(x, jax.Array)})


@pytest.mark.parametrize("sizes", [(3, 2), (1, 3)])
def test_a_row_without_candidates_gets_the_second_tree(sizes: tuple[int, int]) -> None:
    drafter = FirstOf((Told(sizes[0]), Told(sizes[1])))
    tree, kept = drafted(drafter, both(), ROOTS)
    assert kept is None, "neither kept anything"
    tree = on_host(tree)
    assert drafter.max_nodes == 4 and drafter.max_depth == 3 and drafter.taps == ("pre_norm",)
    expected = [[7, *GUESSES[0][0][: sizes[0]]], [8, *GUESSES[1][1][: sizes[1]]]]
    for row, tokens in enumerate(expected):
        valid = [token >= 0 for token in tokens]
        assert tree.valid[row].tolist() == valid + [False] * (4 - len(tokens))
        assert tree.tokens[row, : len(tokens)].tolist() == [max(token, 0) for token in tokens]
        lineage = np.tri(len(tokens), dtype=bool)
        assert np.array_equal(tree.ancestors[row, : len(tokens), : len(tokens)], lineage)
        assert tree.children[row, :, 0].tolist() == [*range(1, len(tokens)), *[-1] * (5 - len(tokens))]
    # Padding hangs below the root: it sees the root and itself, and stands one place behind.
    assert tree.ancestors.diagonal(axis1=1, axis2=2).all() and tree.ancestors[:, :, 0].all()
    padding = ~tree.valid & (np.arange(4) >= np.array([[sizes[0] + 1], [sizes[1] + 1]]))
    assert (tree.depth[padding] == 1).all() and (tree.ancestors.sum(axis=2)[padding] == 2).all()


def test_rule_of_the_joined_tree() -> None:
    point, match = (FirstOf((Told(2, "point"), Told(2, rule))) for rule in ("point", "match"))
    assert drafted(point, both(), ROOTS)[0].rule == "point"
    assert drafted(match, both(), ROOTS)[0].rule == "match"
    for drafter in (FirstOf((Told(2, "swor"), Told(2))), FirstOf((Told(2), Told(2, "swor")))):
        with pytest.raises(UserError, match=r"told cannot be combined with another drafter.*rule 'swor'"):
            drafter.rule(greedy=False)


def test_a_sampled_rule_is_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    target = random_target(vocab_size=12)
    drafter = FirstOf((PromptLookup(depth=2), DraftModel(target.config, Static(chain(2), "without"))))
    params = [None, target.params]
    assert drafter.rule(greedy=True) == "match"
    monkeypatch.delattr(loop, "init_state")
    with pytest.raises(UserError, match=r"draft_model cannot be combined with another drafter.*rule 'swor'"):
        generate(target, PROMPTS, drafter=drafter, drafter_params=params, sampling=Sampling(temperature=1.0))


def test_the_second_is_skipped_when_no_row_needs_it() -> None:
    """Under the conditional's predicate, a draft that would be wrong is never looked at."""
    drafter, seen = FirstOf((Told(2), Told(3))), view(2)
    lowered = jax.jit(lambda *told: draft(drafter, seen, *told)).lower(both(), ROOTS).as_text()
    assert lowered.count("stablehlo.case") == 1


def test_the_second_is_not_asked_for_rows_that_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[jax.Array] = []
    draft_if = first_of._draft_if
    monkeypatch.setattr(first_of, "_draft_if", lambda needed, *rest: asked.append(needed) or draft_if(needed, *rest))
    drafter, guesses = FirstOf((Told(2), Told(2))), both()
    for done in ([False, True], [True, False], None):
        seen = dataclasses.replace(view(2), done=None if done is None else jnp.array(done))
        drafter.draft(guesses, seen, [(), ()], jnp.asarray(ROOTS), None)
    assert [bool(needed) for needed in asked] == [False, True, True], "only the second row has no candidates"


def test_riders_of_both_reach_their_drafters() -> None:
    seen = {}

    @dataclasses.dataclass(frozen=True)
    class Watcher(Told):
        def observe(self, params, target, state, tree, output, verdict, live):
            seen[self.riding] = output
            return state

    drafter = FirstOf((Watcher(1, riding=2), Watcher(2, riding=3)))
    state, target = [(), ()], view(2)
    tree, _ = drafted(drafter, both(), ROOTS)
    riders = jax.jit(lambda tree: drafter.riders(both(), target, state, tree))(tree)
    assert drafter.num_riders == 5 == riders.tokens.shape[1]
    assert riders.tokens[0].tolist() == [1, 1, 2, 2, 2] and riders.positions[0].tolist() == [4, 5, 4, 5, 6]
    assert np.array_equal(riders.sees_riders, np.broadcast_to(np.eye(5, dtype=bool), (2, 5, 5)))
    assert np.array_equal(riders.sees_tree, np.broadcast_to(np.arange(3) == 0, (2, 5, 3)))
    rows = np.arange(8.0)

    def filled(x, *shape):
        return jax.device_put(np.broadcast_to(x, shape).astype(np.float32))

    output = transformer.Output(
        logits=filled(rows[:, None], 2, 8, 12),
        hidden=filled(rows[:, None], 2, 8, 4),
        taps={"pre_norm": filled(rows[:, None], 2, 8, 4)},
        rows=[{"k": filled(rows, 2, 1, 4, 8), "v": filled(rows[:, None], 2, 1, 8, 4)}],
    )

    @jax.jit
    def observed(tree, output):
        drafter.observe(both(), target, state, tree, output, None, jnp.array([True, True]))
        return seen

    seen = observed(tree, output)
    for count, expected in ((2, [0, 1, 2, 3, 4]), (3, [0, 1, 2, 5, 6, 7])):
        own = seen[count]
        hidden, pre_norm, k, v = map(np.asarray, (own.hidden, own.taps["pre_norm"], own.rows[0]["k"], own.rows[0]["v"]))
        assert np.asarray(own.logits)[0, :, 0].tolist() == hidden[0, :, 0].tolist() == expected
        assert pre_norm[1, :, 0].tolist() == k[0, 0, 0].tolist() == v[0, 0, :, 0].tolist() == expected


def test_each_learns_from_what_the_other_drafted() -> None:
    target = random_target(vocab_size=12)
    arguments = dict(max_new_tokens=30, stop=[], sampling=Sampling(temperature=1.0))
    plain = generate(target, PROMPTS, **arguments)
    drafter = FirstOf((PromptLookup(depth=3), TokenRecycling(LOPSIDED), Lookahead(3, 4, 2)))
    generation = generate(target, PROMPTS, drafter=drafter, **arguments)
    assert generation.tokens == plain.tokens
    assert generation.memory[0] is None and generation.memory[2] is None
    table = np.asarray(generation.memory[1])
    for row, new in enumerate(generation.tokens):
        for token in set(new[:-1]):
            assert table[row, token].min() >= 0, "every root was a node, whoever drafted"
    warm = generate(target, PROMPTS, drafter=drafter, memory=generation.memory, **arguments)
    assert warm.tokens == plain.tokens
    assert sum(stats.steps for stats in warm.stats) < sum(stats.steps for stats in generation.stats)
    assert generate(target, PROMPTS, drafter=FirstOf((Plain(), Plain())), **arguments).memory is None


@pytest.mark.parametrize("candidates", [(0, 1, 2), (1, 2), (2,), ()], ids=str)
def test_a_combination_of_three_asks_one_after_the_other(candidates: tuple[int, ...]) -> None:
    guesses = [jax.device_put(np.full((1, 2), 5 + i if i in candidates else -1, np.int32)) for i in range(3)]
    tree = on_host(drafted(FirstOf((Told(2), Told(2), Told(2))), guesses, ROOTS[:1])[0])
    assert tree.valid[0].tolist() == [True, bool(candidates), bool(candidates)]
    assert not candidates or tree.tokens[0].tolist() == [7, 5 + candidates[0], 5 + candidates[0]]


def test_each_is_told_where_text_comes_from() -> None:
    """The prompt is the prompt to all; what the joined tree became is to each what another wrote."""
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Watched(Told):
        def draft(self, params, target, state, root, keys):
            return super().draft(params, target, state, root, keys)[0], jnp.zeros(2)

        def ingest(self, params, target, state, rows):
            seen.append((rows.source, rows.nodes is None, rows.drafted is None))
            return state

    drafter = FirstOf((Watched(1), Watched(2), Watched(3)))
    params, state, roots = [*both(), both()[1]], [(), (), ()], jax.device_put(ROOTS)
    assert drafter.ingests and not drafter.begins
    assert drafted(drafter, params, ROOTS)[1] is None
    place, one = Place.of_text(jnp.array([3, 3])), jnp.array([1, 1])
    for source, nodes in (("prompt", None), ("own", jnp.zeros((2, 1), jnp.int32))):
        drafter.ingest(params, view(2), state, TrueRows(roots[:, None], place, one, {}, source, nodes, None))
    assert seen == [("prompt", True, True)] * 3 + [("other", True, True)] * 3


def test_what_is_no_combination_is_refused() -> None:
    with pytest.raises(UserError, match="at least two drafters, got 1"):
        FirstOf((Plain(),))
    with pytest.raises(UserError, match="holds a combination"):
        FirstOf((FirstOf((Plain(), Plain())), Plain()))


@pytest.mark.parametrize("order", [pytest.param("first", marks=pytest.mark.slow), "second"])
def test_a_draft_model_keeps_up_with_text_that_it_did_not_draft(order: str) -> None:
    """The target as its own draft model: wherever the lookup finds nothing, everything is accepted."""
    target = random_target(vocab_size=12)
    model = DraftModel(target.config, Static(chain(3), "top"))
    lookup = PromptLookup(depth=2, ngram=3)
    parts = {lookup: None, model: target.params} if order == "second" else {model: target.params, lookup: None}
    drafter, params = FirstOf(tuple(parts)), list(parts.values())
    generation = generate(target, PROMPTS, drafter=drafter, drafter_params=params, max_new_tokens=61, stop=[], seeds=3)
    assert generation.tokens == generate(target, PROMPTS, max_new_tokens=61, stop=[]).tokens
    for prompt, new, stats in zip(PROMPTS, generation.tokens, generation.stats, strict=True):
        if order == "first":
            assert stats.accepted_by_depth.tolist() == [stats.steps] * 3
        else:
            text = [*prompt, *new]
            places = [len(prompt)]
            while places[-1] < len(text) - 1:
                known = text[: places[-1] + 1]
                match = search(known, 3, 2)
                copied = known[match + 1 :][:2]
                wrong = [i for i, token in enumerate(copied) if text[len(known) :][i : i + 1] != [token]]
                places.append(places[-1] + 1 + (3 if match < 0 else min([*wrong, len(copied)])))
            assert stats.steps == len(places) - 1
            assert any(after - before == 4 for before, after in itertools.pairwise(places))


def test_joined_trees_may_differ_in_width() -> None:
    @jax.jit
    def both_of(by_second) -> TokenTree:
        wide = BUSHY.fill(jnp.zeros((2, BUSHY.size), jnp.int32), "point")
        narrow = chain(2).fill(jnp.ones((2, 3), jnp.int32), "point")
        return joined(narrow, wide, by_second, "match")

    tree = on_host(both_of(np.array([True, False])))
    assert tree.children.shape == (2, *BUSHY.children.shape)
    assert np.array_equal(tree.children[0], BUSHY.children) and (tree.children[1, :, 1:] == -1).all()
    assert np.array_equal(tree.ancestors[0], BUSHY.ancestors)


def test_all_are_checked() -> None:
    target = random_target(vocab_size=12)
    for drafter in (FirstOf((PromptLookup(depth=0), Plain())), FirstOf((Plain(), PromptLookup(depth=0)))):
        with pytest.raises(UserError, match="prompt_lookup needs depth of at least 1"):
            drafter.check(target.config)
