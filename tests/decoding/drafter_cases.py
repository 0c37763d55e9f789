"""The drafters that must pass the battery (test_battery.py): a new one joins by adding its name to `CASES`.

A case is a function of a target and a key that returns a drafter with small random parameters. Its tree should branch,
below other children than the first too, and be small: the battery compiles every case several times.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from decoding.drafter import Drafter
from decoding.drafters.around import Around
from decoding.drafters.dflash import DFlash
from decoding.drafters.draft_model import DraftModel
from decoding.drafters.dspark import DSpark
from decoding.drafters.eagle import Eagle, Eagle3
from decoding.drafters.early_exit import EarlyExit
from decoding.drafters.falcon import Falcon
from decoding.drafters.first_of import FirstOf
from decoding.drafters.hydra import Hydra
from decoding.drafters.lookahead import Lookahead
from decoding.drafters.medusa import Medusa
from decoding.drafters.nested import Nested
from decoding.drafters.network_drafter import NetworkDrafter
from decoding.drafters.p_eagle import PEagle
from decoding.drafters.plain import Plain
from decoding.drafters.prompt_lookup import PromptLookup
from decoding.drafters.registry import load_drafter
from decoding.drafters.token_recycling import TokenRecycling
from decoding.policies import Confidence, DySpec, Expanding, Scheduled, Slots, Static, StochasticBeam, TreePolicy
from decoding.trees import Topology, chain, from_child_counts
from models import transformer
from models.config import TransformerConfig
from models.formats.target import Target, load_target
from models.heads.dflash import DFlashHeads, Selector
from models.heads.eagle import Eagle3Heads, EagleHeads
from models.heads.falcon import FalconHeads
from models.heads.hydra import HydraHeads
from models.heads.medusa import MedusaHeads, vocab_kernel
from models.heads.p_eagle import PEagleHeads
from models.heads.serial import SerialHead
from tests.noise import drawn, noisy

# The second child has more descendants than the first: a builder that takes the first's for granted goes wrong.
LOPSIDED = Topology(((0,), (1,), (2,), (0, 0), (1, 0), (1, 1), (1, 0, 0), (1, 1, 0), (1, 1, 1)))
# Slots that are blind to each other seldom meet the text twice in a row: most places are where they may.
BROAD = from_child_counts({(): 3, (0,): 3, (1,): 3, (2,): 3, (1, 1): 1, (1, 1, 0): 1})
BUSHY = Topology(
    ((0,), (1,), (2,), (3,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 1, 1, 0))
)


def plain(target: Target, key: Array) -> tuple[Drafter, Any]:
    """No candidates."""
    return Plain(), None


def medusa(target: Target, key: Array) -> tuple[Drafter, Any]:
    """Two residual blocks per head."""
    return _random(Medusa(MedusaHeads(num_heads=4, num_layers=2), BUSHY), target, key)


def hydra(target: Target, key: Array) -> tuple[Drafter, Any]:
    """Heads that read their path, on a tree whose first child is not the one with descendants."""
    return _random(Hydra(HydraHeads(num_heads=3), LOPSIDED), target, key)


def hydra_prefix(target: Target, key: Array) -> tuple[Drafter, Any]:
    """Hydra++: a prefix block with a cache of its own, several blocks per head."""
    return _random(Hydra(HydraHeads(num_heads=4, num_layers=2, prefix=True), BUSHY), target, key)


def token_recycling(target: Target, key: Array) -> tuple[Drafter, Any]:
    """Two candidates per token, not more: there are only twelve tokens to know; warmed with the prompt."""
    return TokenRecycling(Topology(((0,), (1,), (1, 0), (1, 1), (1, 1, 0))), warm_start=True), None


def prompt_lookup(target: Target, key: Array) -> tuple[Drafter, Any]:
    """A short chain; random text repeats little more than pairs."""
    return PromptLookup(depth=4, ngram=2), None


def lookahead(target: Target, key: Array) -> tuple[Drafter, Any]:
    """Riders, and a tree whose topology is data."""
    return Lookahead(window=3, ngram=4, guesses=2), None


def lookup_or_hydra(target: Target, key: Array) -> tuple[Drafter, Any]:
    """Drafters of different trees, one of them with parameters and a cache."""
    last, params = hydra_prefix(target, key)
    return FirstOf((PromptLookup(depth=3, ngram=3), last)), [None, params]


def eagle(target: Target, key: Array) -> tuple[Drafter, Any]:
    """EAGLE-1 on a static tree."""
    return _random(Eagle(EagleHeads(), Static(LOPSIDED, "top")), target, key)


def eagle2(target: Target, key: Array) -> tuple[Drafter, Any]:
    """The same network, a tree that follows confidence."""
    return _random(Eagle(EagleHeads(bias=False), Confidence(top_k=3, depth=3, total=10)), target, key)


def eagle3(target: Target, key: Array) -> tuple[Drafter, Any]:
    """A vocabulary of its own, which is not the beginning of the target's."""
    known = _some_tokens(target)
    policy = Confidence(top_k=min(4, len(known)), depth=3, total=10)
    drafter, params = _random(Eagle3(Eagle3Heads(0, 1, 1, len(known)), policy), target, key)
    return drafter, {**params, "draft_vocab": known}


def eagle3_static(target: Target, key: Array) -> tuple[Drafter, Any]:
    """A static tree, whose hits can be replayed."""
    drafter, params = eagle3(target, key)
    return drafter.with_tree(LOPSIDED), params


def dspark(target: Target, key: Array) -> tuple[Drafter, Any]:
    """One pass for a block, a bigram for its branches, over a vocabulary of its own, of which most is scored after the
    parent."""
    known = _some_tokens(target)
    mask, size = target.config.vocab_size - 1, len(known)
    heads = DFlashHeads((0, 1), mask, num_layers=1, block=3, shifted=True, vocab_size=size)
    candidates = max(size - 1, LOPSIDED.max_rank)
    drafter, params = _random(DSpark(heads, Static(LOPSIDED, "top"), SerialHead("vanilla", 4), candidates), target, key)
    return drafter, {**params, "draft_vocab": known}


def dspark_lattice(target: Target, key: Array) -> tuple[Drafter, Any]:
    """The same with the tree of its most probable paths, all from one pass."""
    drafter, params = dspark(target, key)
    assert isinstance(drafter, DSpark)
    return dataclasses.replace(drafter, policy=Confidence(top_k=3, depth=3, total=8)), params


def domino(target: Target, key: Array) -> tuple[Drafter, Any]:
    """A block whose slots are told the whole path by a GRU, the first of them not."""
    heads = DFlashHeads((0, 1), target.config.vocab_size - 1, num_layers=1, block=4)
    serial = SerialHead("gru", 4, 6, plain=1, confidence="none")
    return _random(DSpark(heads, Static(LOPSIDED, "top"), serial), target, key)


def eagle31(target: Target, key: Array) -> tuple[Drafter, Any]:
    """EAGLE-3.1: every norm that EAGLE-3 can have at once."""
    heads = Eagle3Heads(0, 1, 1, fc_norm=True, norm_before_residual=True, norm_output=True)
    return _random(Eagle3(heads, Static(LOPSIDED, "top")), target, key)


def p_eagle(target: Target, key: Array) -> tuple[Drafter, Any]:
    """All depths in one pass, through two layers, over a vocabulary of its own."""
    known = _some_tokens(target)
    heads = PEagleHeads(0, 1, 1, len(known), num_layers=2)
    drafter, params = _random(PEagle(heads, Static(LOPSIDED, "top")), target, key)
    return drafter, {**params, "draft_vocab": known}


def dflash(target: Target, key: Array) -> tuple[Drafter, Any]:
    """Blocks in a sliding window, with convolutions; a static tree on their slots."""
    heads = DFlashHeads((0, 1), target.config.vocab_size - 1, num_layers=1, block=5, window=6, convolution=True)
    return _random(DFlash(heads, Static(BROAD, "top")), target, key)


def dflash_slots(target: Target, key: Array) -> tuple[Drafter, Any]:
    """The most valuable candidates of all, a tree whose topology is data."""
    heads = DFlashHeads((0, 1), target.config.vocab_size - 1, num_layers=1, block=4)
    return _random(DFlash(heads, Slots(depth=3, total=9)), target, key)


def dflash2(target: Target, key: Array) -> tuple[Drafter, Any]:
    """Blocks whose slots are chosen from a few candidates by the token before them."""
    heads = DFlashHeads((1,), 0, num_layers=2, block=4, selector=Selector(rank=4, candidates=4))
    return _random(DFlash(heads, Static(LOPSIDED, "top")), target, key)


def jetspec(target: Target, key: Array) -> tuple[Drafter, Any]:
    """Causal blocks longer than the tree is deep, over a vocabulary of their own, and a tree whose topology is data."""
    known = _some_tokens(target)
    heads = DFlashHeads((0, 1), 0, num_layers=1, block=6, causal=True, vocab_size=len(known))
    drafter, params = _random(DFlash(heads, Expanding(depth=3, total=10, width=3)), target, key)
    return drafter, {**params, "draft_vocab": known}


def falcon(target: Target, key: Array) -> tuple[Drafter, Any]:
    """Blocks of two on a tree that needs two passes, the second of which ends in its middle; one layer, one cache; a
    vocabulary of its own."""
    known = _some_tokens(target)
    heads = FalconHeads(block=2, vocab_size=len(known))
    drafter, params = _random(Falcon(heads, Static(LOPSIDED, "top")), target, key)
    return drafter, {**params, "draft_vocab": known}


def falcon_recurrent(target: Target, key: Array) -> tuple[Drafter, Any]:
    """Blocks of three, a cache for each way to cut a text into them, and an LSTM that remembers."""
    heads = FalconHeads(block=3, layers=2, lstm_mode="recurrent")
    return _random(Falcon(heads, Static(BUSHY, "top")), target, key)


def draft_chain(target: Target, key: Array) -> tuple[Drafter, Any]:
    """Speculative decoding: a chain drawn from a smaller transformer, the target's first layer and its head."""
    return _draft_model(target, Static(chain(3)))


def draft_beam(target: Target, key: Array) -> tuple[Drafter, Any]:
    """RSD-S: a tree of sampled siblings, its topology data."""
    return _draft_model(target, StochasticBeam(width=3, depth=3))


def draft_dyspec(target: Target, key: Array) -> tuple[Drafter, Any]:
    """DySpec: sampled siblings where the draft model is sure of them."""
    return _draft_model(target, DySpec(budget=8, depth=3, width=3, branch=4))


def _draft_model(target: Target, policy: TreePolicy) -> tuple[Drafter, Any]:
    small = dataclasses.replace(target.config, num_layers=1, windows=target.config.windows[:1])
    first = {**target.params, "layers": target.params["layers"][:1]}
    return DraftModel(small, policy), transformer.split_projections(small, first)


def nested(target: Target, key: Array) -> tuple[Drafter, Any]:
    """The target's own layers, the last of them with noise: a candidate ends behind the first where that is sure, and
    the chain where the last is not either."""
    params = transformer.split_projections(target.config, target.params)
    *layers, last = params["layers"]
    policy = Scheduled(depth=2, threshold=0.2)
    exits = target.config.num_layers - 1, target.config.num_layers
    return Nested(target.config, policy, exits, (0.6,)), {**params, "layers": [*layers, noisy(last, 0.2)]}


def early_exit(target: Target, key: Array) -> tuple[Drafter, Any]:
    """The first of the target's two layers."""
    return EarlyExit(1, Static(LOPSIDED, "top")), None


CASES: dict[str, Callable[[Target, Array], tuple[Drafter, Any]]] = {
    "none": plain,
    "medusa": medusa,
    "hydra": hydra,
    "hydra++": hydra_prefix,
    "token_recycling": token_recycling,
    "prompt_lookup": prompt_lookup,
    "lookahead": lookahead,
    "prompt_lookup+hydra++": lookup_or_hydra,
    "early_exit": early_exit,
    "draft chain": draft_chain,
    "draft rsd-s": draft_beam,
    "draft dyspec": draft_dyspec,
    "nested": nested,
    "eagle": eagle,
    "eagle2": eagle2,
    "eagle3": eagle3,
    "eagle3 static": eagle3_static,
    "dspark": dspark,
    "dspark lattice": dspark_lattice,
    "domino": domino,
    "eagle3.1": eagle31,
    "p_eagle": p_eagle,
    "dflash": dflash,
    "dflash slots": dflash_slots,
    "dflash2": dflash2,
    "jetspec": jetspec,
    "falcon": falcon,
    "falcon recurrent": falcon_recurrent,
}

# What these add is shown elsewhere too: the network by another policy or a relative's, the policy by
# tests/decoding/policies, its rule by test_losslessness.py, what is its own by its file. They run with `-m slow`.
VARIANTS = (
    "medusa",
    "hydra",
    "prompt_lookup+hydra++",
    "eagle2",
    "eagle3 static",
    "eagle3.1",
    "early_exit",
    "draft rsd-s",
    "draft dyspec",
    "nested",
    "eagle",
    "p_eagle",
    "domino",
    "dspark lattice",
    "dflash slots",
    "dflash2",
    "jetspec",
    "falcon recurrent",
)
each_drafter = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in CASES]
)


def learns_from_rejected_nodes(drafter: Drafter) -> bool:
    """Whether the state depends on more than the committed text; of a combination: any part's."""
    parts = getattr(drafter, "parts", ())
    return any(map(learns_from_rejected_nodes, parts)) if parts else type(drafter).observe is not Drafter.observe


def read_by(drafter: Drafter, length: np.ndarray) -> np.ndarray:
    """How much of a text the state stands for: a draft model reads the last committed token with the next draft."""
    return np.asarray(length) - isinstance(drafter, DraftModel)


def _some_tokens(target: Target) -> Array:
    """A draft vocabulary that is not the beginning of the target's."""
    return jnp.array([token for token in (0, 1, 3, 5, 6, 8, 10, 11) if token < target.config.vocab_size], jnp.int32)


def _random(drafter, target: Target, key: Array) -> tuple[Drafter, Any]:
    """Heads whose vocabulary maps are near the target's own, as in fresh ones, and noise everywhere else.

    NumPy draws them: what makes fresh ones is a program for each drafter and target.
    """
    params = drawn(_shapes_of(drafter, target), 0.25, int(jax.random.key_data(key)[-1]))
    own = np.asarray(vocab_kernel(target.params))

    def near_the_targets(path, leaf):
        is_map = [getattr(step, "key", None) for step in path[-2:]] == ["vocab", "kernel"] and len(leaf) == len(own)
        return jax.device_put(np.asarray(np.asarray(leaf) + own[:, : leaf.shape[1]], leaf.dtype)) if is_map else leaf

    return drafter, jax.tree.map_with_path(near_the_targets, params)


_SHAPES: dict[Any, Any] = {}


def _shapes_of(drafter: Drafter, target: Target) -> Any:
    """Shapes of a drafter's parameters, traced once each."""
    kind = drafter, target.config, target.params["embed"]["embedding"].dtype
    if kind not in _SHAPES:
        init = functools.partial(drafter.init_params, target.config)
        _SHAPES[kind] = jax.eval_shape(init, target.params, jax.random.key(0))
    return _SHAPES[kind]


def random_target(
    *, vocab_size: int, width: int = 32, scale: float = 16.0, seed: int = 0, dtype=jnp.float64, **config
) -> Target:
    """A tiny target whose weights are large enough (`scale` times the usual) for lively text; made once each."""
    shape = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=3 * width // 2) | config
    shape = TransformerConfig(vocab_size=vocab_size, width=width, **shape)
    return Target(shape, _random_params(shape, scale, seed, dtype, jax.config.jax_enable_x64))


@functools.cache
def _random_params(shape: TransformerConfig, scale: float, seed: int, dtype, wide: bool) -> Any:
    """`wide` is the mode of JAX, which says what random numbers are drawn."""
    params = transformer.init(shape, jax.random.key(seed))
    params = jax.tree.map(lambda x: (x * (scale if x.ndim > 1 else 1)).astype(dtype), params)
    return transformer.for_decoding(params)


# A directory made by `scripts/stories.sh`, whose models then stand in for random ones in the battery.
TRAINED = os.environ.get("TANDEM_TRAINED", "")
# Random weights are so large that their text is lively only at high temperatures.
WARM = 1.0 if TRAINED else 6.0
_TRAINED_AS = {
    "hydra++": "hydra_pp",
    "eagle2": "eagle",
    "eagle3 static": "eagle3",
    "eagle3.1": "eagle3",
    "dflash slots": "dflash",
}


def battery_target() -> Target:
    """The target, in float64, of a context as long as the battery needs and with no token that ends a text.

    The random one has a sliding window and soft caps, as Gemma-2 does; targets of most other tests have none.
    """
    if not TRAINED:
        # A seed whose text stays lively, where most others soon go round in circles; and a head size that no number of
        # rows shares, so that a cache is told from scores by its shape.
        gemma = dict(windows=(6, None), attention_softcap=30.0, logit_softcap=8.0)
        return random_target(vocab_size=12, seed=2, head_dim=22, **gemma)
    target = load_target(f"{TRAINED}/target", dtype=jnp.float64)
    return dataclasses.replace(target, config=dataclasses.replace(target.config, max_position=1024, eos_ids=()))


def battery_case(name: str, target: Target) -> tuple[Drafter, Any]:
    """A drafter and its parameters, in float64."""
    drafter, params = CASES[name](target, jax.random.key(7))
    return _with_trained(name, drafter, params, target) if TRAINED else (drafter, params)


def _with_trained(name: str, drafter: Drafter, params: Any, target: Target) -> tuple[Drafter, Any]:
    """A case's drafter with the network that was trained in the place of its own; the tree or policy is the case's."""
    if isinstance(drafter, FirstOf):
        *others, last = drafter.parts
        last, last_params = _with_trained(name.partition("+")[2], last, params[-1], target)
        return FirstOf((*others, last)), [*params[:-1], last_params]
    if params is None:
        return drafter, None
    folder = "draft_model" if isinstance(drafter, DraftModel) else f"{_TRAINED_AS.get(name, name)}/drafter"
    trained, params = load_drafter(f"{TRAINED}/{folder}", target)
    if isinstance(drafter, DraftModel):
        exits = {"exits": (1, trained.model.num_layers)} if isinstance(drafter, Nested) else {}
        return dataclasses.replace(drafter, model=trained.model, **exits), params
    kept = "policy" if isinstance(drafter, NetworkDrafter) else "tree"
    return dataclasses.replace(trained, **{kept: getattr(drafter, kept)}), params  # type: ignore[type-var]


def cyclic_target(vocab_size: int = 12) -> tuple[Target, list[int]]:
    """A target that repeats three tokens for ever, and those tokens: blocks that add nothing, and a head that steps."""
    target = random_target(vocab_size=vocab_size)
    period = [7, 2, 5]
    layers = jax.tree.map(jnp.zeros_like, target.params["layers"])
    read = jnp.eye(vocab_size, target.config.width, dtype=jnp.float64)
    behind = jnp.zeros((target.config.width, vocab_size), jnp.float64)
    for now, then in zip(period, period[1:] + period[:1], strict=True):
        behind = behind.at[now, then].set(1.0)
    params = {**target.params, "embed": {"embedding": read}, "layers": layers, "head": {"kernel": behind}}
    return Target(target.config, params), period


@dataclasses.dataclass(frozen=True)
class Oracle(Drafter):
    """Knows the text and puts the truth at one rank of every list of children, and wrong tokens at the others.

    Its parameters are the text, `[B, capacity]`, long enough for the deepest candidate.
    """

    tree: Topology
    vocab_size: int
    rank: int = 0
    name = "oracle"

    @property
    def max_nodes(self) -> int:
        return self.tree.size

    @property
    def max_depth(self) -> int:
        return self.tree.max_depth

    def rule(self, greedy):
        return "point"

    def draft(self, params, target, state, root, keys):
        truth_BN = jnp.take_along_axis(params, target.length[:, None] + self.tree.depth, axis=1)
        tokens_BN = (truth_BN + self.tree.rank - self.rank) % self.vocab_size
        return self.tree.fill(tokens_BN.at[:, 0].set(root), self.rule(target.sampling.greedy)), None


@dataclasses.dataclass(frozen=True)
class Recorder(Around):
    """Another drafter, and what the loop computed in its last step: the tree, and the target's logits at every node.

    The battery decodes with nothing else, so that one program of the loop serves all its items.
    """

    name = "recorder"

    def init(self, config, batch, capacity, dtype, mesh=None):
        nodes = self.max_nodes
        return super().init(config, batch, capacity, dtype, mesh) | {
            "tokens": jnp.zeros((batch, nodes), jnp.int32),
            "ancestors": jnp.zeros((batch, nodes, nodes), bool),
            "logits": jnp.zeros((batch, nodes, config.vocab_size), jnp.promote_types(dtype, jnp.float32)),
        }

    def draft(self, params, target, state, root, keys):
        tree, drafted = super().draft(params, target, state, root, keys)
        assert tree.rule == self.rule(target.sampling.greedy)
        return tree, drafted

    def observe(self, params, target, state, tree, output, verdict, live):
        ancestors = jnp.broadcast_to(tree.ancestors, state["ancestors"].shape)
        state = super().observe(params, target, state, tree, output, verdict, live)
        logits = output.logits[:, : tree.tokens.shape[1]]
        return {**state, "tokens": tree.tokens, "ancestors": ancestors, "logits": logits}
