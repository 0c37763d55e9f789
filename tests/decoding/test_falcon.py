"""Falcon's drafter beyond the battery: published trees, where candidates come from, uneven commits, shared draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafter import TargetView, TrueRows
from decoding.drafters.falcon import Falcon
from decoding.generate import generate
from decoding.place import Place
from decoding.policies import Confidence, Slots, Static, TreePolicy
from decoding.sampling import Sampling, batch_sampling
from decoding.trees import FALCON_75, FALCON_165, Topology, load_topology
from eval.losslessness import check_losslessness
from models.config import TransformerConfig
from models.errors import UserError
from models.heads.falcon import FalconHeads, guesses_everywhere
from models.layout import Layout
from tests.decoding.drafter_cases import LOPSIDED, random_target
from tests.noise import drawn

pytestmark = pytest.mark.usefixtures("x64")


def test_published_trees() -> None:
    levels = [[len(tree.level(depth)) for depth in range(1, tree.max_depth + 1)] for tree in (FALCON_165, FALCON_75)]
    assert levels == [[20, 15, 19, 23, 21, 23, 21, 23], [20, 19, 21, 15]]
    blocks = [[len(tree.expanded(depth)) for depth in range(0, tree.max_depth, 2)] for tree in (FALCON_165, FALCON_75)]
    assert blocks == [[1, 7, 11, 12], [1, 6]]
    assert Falcon().topology == FALCON_165 == load_topology("falcon_165") and load_topology("falcon_75") == FALCON_75
    with pytest.raises(UserError, match="asks for 20 candidates, but the vocabulary has 12 tokens"):
        Falcon().check(random_target(vocab_size=12).config)


OFFERED = 20


@dataclasses.dataclass(frozen=True)
class Counting(FalconHeads):
    """A network that numbers its pairs as they run; pair n offers the tokens 20 n, 20 n + 1, ... in this order."""

    def join(self, params, feature, embedding, state=None, begins=None, dropout_key=None):
        """Notes what the pairs are, whose embeddings are the tokens themselves."""
        params["read"].append((feature[..., 0], embedding[..., 0]))
        return feature, None

    def run(self, config, params, joined, layout, sources=None, mixes=None):
        """Numbers."""
        params["seen"].append((layout.positions, layout.scratch_seen))
        first = sum(joined.shape[1] for joined in params["ran"])
        params["ran"].append(joined)
        number = jnp.broadcast_to(first + jnp.arange(joined.shape[1], dtype=joined.dtype)[:, None], joined.shape)
        rows = jnp.zeros((1, 1, 2, joined.shape[1]))
        return number, [{"k": rows, "v": rows.swapaxes(2, 3)}]

    def logits(self, config, params, target, hidden):
        """A token is the worse the further it is from the first that is offered."""
        beyond = jnp.arange(config.vocab_size) - OFFERED * hidden
        return jnp.where((beyond >= 0) & (beyond < OFFERED), -beyond, -1e3)


def grown(policy: TreePolicy, k: int):
    """Tokens, parents and depths of the tree that a policy grows on such a network, root 7 behind nine tokens; and what
    the network was told."""
    passes = -(-policy.max_depth // k)
    vocab = OFFERED * k * (1 + sum(policy.levels[depth] for depth in range(k, policy.max_depth, k)))
    config = TransformerConfig(vocab, width=1, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, mlp_width=1)
    target = {"embed": {"embedding": jnp.arange(vocab, dtype=jnp.float64)[:, None]}}
    drafter, sampling = Falcon(Counting(block=k), policy), batch_sampling([Sampling()])

    @jax.jit
    def grow(root):
        place, text = Place.of_text(jnp.array([9], jnp.int32)), jnp.zeros((1, 16), jnp.int32)
        view = TargetView(config, target, [], place, text, sampling)
        told: dict[str, list] = {"read": [], "seen": [], "ran": []}
        network = drafter.network(told, view, drafter.init(config, 1, 16, jnp.float64))
        tree = policy.grow(network, root, None, sampling).tree
        return (tree.tokens[0], tree.parent[0], tree.depth[0]), told

    tree, told = jax.device_get(grow(jnp.array([7], jnp.int32)))
    assert len(told["ran"]) == passes and told["read"][0][1] == 7
    return tree, told


@pytest.mark.parametrize("k", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_where_candidates_come_from(k: int) -> None:
    """Of path s at block position j, below block b: blockidx(b) k 20 + 20 j + s[-1], blocks numbered pass by pass."""
    (tokens, *_), told = grown(Static(FALCON_165, "top"), k)
    paths = FALCON_165.paths
    above = sorted({path[: (len(path) - 1) // k * k] for path in paths}, key=lambda path: (len(path), path))
    number = {path: i for i, path in enumerate(above)}
    source = {path: OFFERED * (number[path[: (len(path) - 1) // k * k]] * k + (len(path) - 1) % k) for path in paths}
    token = {path: source[path] + path[-1] for path in paths}
    assert tokens.tolist() == [7, *(token[path] for path in paths)]
    for p in range(1, len(told["ran"])):
        blocks = [path for path in above if len(path) == p * k]
        feature, embedding = told["read"][p]
        positions, scratch_seen = told["seen"][p]
        seen = scratch_seen[0].reshape(len(blocks), k, -1, k)
        earlier = [path for path in above if len(path) < p * k]
        assert positions[0].tolist() == [*range(9 + (p - 1) * k, 9 + p * k)] * len(blocks)
        for m, path in enumerate(blocks):
            assert embedding[m].tolist() == [token[path[: p * k - k + j + 1]] for j in range(k)]
            assert feature[m].tolist() == [number[path[: p * k - k]] * k + j for j in range(k)]
            for n, other in enumerate(earlier):
                assert (seen[m, :, n] == (path[: len(other)] == other)).all()


def test_trees_by_value_have_blocks_too() -> None:
    (tokens, parent, depth), _ = grown(Confidence(top_k=3, depth=5, total=24), 2)
    block_of: dict[tuple, int] = {}
    for node in range(1, 24):
        path = [node]
        while parent[path[0]] > 0:
            path.insert(0, parent[path[0]])
        block, position = divmod(int(tokens[node]) // OFFERED, 2)
        assert position == (depth[node] - 1) % 2
        assert block_of.setdefault(tuple(path[: (depth[node] - 1) // 2 * 2]), block) == block
    assert len(set(block_of.values())) == len(block_of) > 2


def test_uneven_commits_leave_what_reading_all_at_once_does() -> None:
    """Over borders of blocks, with rows that are no text and rows that get none; and what is drafted next is what the
    whole text says, whichever of the k cuts its end asks for."""
    config = random_target(vocab_size=12).config
    heads = FalconHeads(block=3, layers=2, lstm_mode="recurrent")
    drafter = Falcon(heads, Static(LOPSIDED, "top"))
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(12, config.width)))
    target = {"embed": {"embedding": table}, "head": {"kernel": table.T}}
    config = dataclasses.replace(config, tied_embeddings=False)
    params = drawn(jax.eval_shape(lambda: heads.init(config, target, jax.random.key(0))), 0.3)
    capacity, counts = 32, np.array([[1, 4, 0, 3, 2, 4, 1], [4, 1, 1, 1, 0, 2, 0], [2, 2, 4, 4, 3, 1, 4]])
    lengths = counts.sum(axis=1)
    tokens = jnp.asarray(rng.integers(0, 12, (3, capacity)), jnp.int32)
    feature = jnp.asarray(rng.normal(size=(3, capacity, config.width)))

    def view(length):
        return TargetView(config, target, [], Place.of_text(length), tokens, batch_sampling([Sampling()] * 3))

    @jax.jit
    def ingest(state, start, count, rows, features):
        true = TrueRows(rows, Place.of_text(start), count, {"post_norm": features}, "own")
        return drafter.ingest(params, view(start + count), state, true)

    @jax.jit
    def drafted(state, length):
        root = jnp.take_along_axis(tokens, length[:, None], axis=1)[:, 0]
        _, scratch = drafter.network(params, view(length), state).begin(root, 1)
        embeddings = [table[jnp.roll(tokens, -1 - j, axis=1)] for j in range(3)]
        hidden = guesses_everywhere(heads, config, params, feature, embeddings, Layout.causal(3, capacity), 3)
        at = (length - 1)[:, None, None]
        return scratch.passes[0].hidden[:, 0], [jnp.take_along_axis(h, at, axis=1)[:, 0] for h in hidden]

    state = empty = drafter.init(config, 3, capacity, jnp.float64)
    start = np.zeros(3, np.int64)
    for count in counts.T:
        place = np.minimum(start[:, None] + np.arange(4), capacity - 1)
        # Rows that are no text hold anything.
        rows = np.where(np.arange(4) < count[:, None], np.take_along_axis(np.asarray(tokens), place, axis=1), 5)
        features = np.take_along_axis(np.asarray(feature), place[:, :, None], axis=1)
        given = (jnp.asarray(x, jnp.int32) for x in (start, count, rows))
        state = ingest(state, *given, jnp.asarray(features))
        start += count
        found, expected = drafted(state, jnp.asarray(np.maximum(start, 1), jnp.int32))
        for b in np.flatnonzero(start):
            for j in range(3):
                np.testing.assert_allclose(found[b, j], expected[j][b], rtol=0, atol=1e-10)
    whole = ingest(empty, jnp.zeros(3, jnp.int32), jnp.asarray(lengths, jnp.int32), tokens[:, :20], feature[:, :20])
    for kept, once in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(kept, once, rtol=0, atol=1e-10)


def test_slots_of_a_first_pass_make_a_best_tree() -> None:
    """They do not hang on the path; those of the next pass do."""
    target = random_target(vocab_size=6, scale=6.0)
    drafter = Falcon(FalconHeads(block=2), Slots(2, 9))
    drafter.check(target.config)
    with pytest.raises(UserError, match="only those of 2 slots do not depend on the path"):
        drafter.with_policy(Slots(3, 9)).check(target.config)
    params = drawn(jax.eval_shape(lambda: drafter.init_params(target.config, target.params, jax.random.key(1))), 0.3)
    prompts = [[1, 2], [3, 4, 5]]
    made = generate(target, prompts, drafter=drafter, drafter_params=params, max_new_tokens=40)
    assert made.tokens == generate(target, prompts, max_new_tokens=40).tokens
    assert all(stats.accepted_by_depth.all() for stats in made.stats)


@pytest.mark.parametrize("k", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_draws_shared_by_a_block_are_lossless(k: int) -> None:
    """One list for each position of a block, of which every parent takes the beginning."""
    target = random_target(vocab_size=6, scale=6.0)
    deep = Topology((*LOPSIDED.paths, (1, 1, 1, 0), (1, 1, 1, 1)))
    drafter = Falcon(FalconHeads(block=k), Static(deep if k == 3 else LOPSIDED, "without"))
    shapes = jax.eval_shape(lambda: drafter.init_params(target.config, target.params, jax.random.key(1)))
    params = drawn(shapes, 0.3, seed=1)
    settings = [Sampling(temperature=1.0), Sampling(temperature=1.3, top_p=0.9)]
    for result in check_losslessness(target, drafter, params, [1, 2], k + 1, settings, 1024, seed=1):
        assert result.rule == "swor" and result.test.degrees > 5 and result.passed, result
        assert result.acceptance_length > 1.05
