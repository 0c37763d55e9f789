"""The parts of a decoding step, each as a function that can be timed alone (`eval/timing.py`).

Nothing can be timed inside the fused loop, so its pieces are called as the loop calls them (`decoding/loop.py`), on a
text in mid-decode: `draft` (the drafter's networks and the choice of candidates), `choice` (that choice alone),
`forward` (the target on the tree's rows), `verdict` (which candidates become text), `commit` (tokens and cache) and
`update` (what the drafter learns). `step` is the fused loop itself.

The state is synthetic, random tokens over an empty cache: how long a step takes depends on shapes, and on how many
candidates are accepted only through the verdict, which looks at one more node for each.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding import loop
from decoding.cache import commit, init_cache
from decoding.drafter import Drafter, TargetView, TrueRows
from decoding.drafters.heads import HeadDrafter
from decoding.generate import bucket
from decoding.sampling import Sampling, batch_warps, best_tokens
from decoding.verify import verify
from eval.timing import Part, Timed, Timing
from models.config import TransformerConfig
from models.heads.hydra import HydraHeads
from models.layout import Layout
from models.transformer import Params, forward

STEPS_PER_SAMPLE = 16


@dataclasses.dataclass(frozen=True)
class Scene:
    """A text in mid-decode: one row of `length` committed tokens in a cache of `capacity` slots."""

    config: TransformerConfig
    params: Params
    length: int
    capacity: int

    @classmethod
    def with_room(cls, config: TransformerConfig, params: Params, length: int, max_depth: int) -> "Scene":
        """A scene whose cache holds one sample of `step` with drafts as deep as `max_depth`."""
        return cls(config, params, length, bucket(length + (STEPS_PER_SAMPLE + 2) * (max_depth + 1)))

    @property
    def dtype(self):
        """Of parameters and cache."""
        return self.params["embed"]["embedding"].dtype

    def tokens(self, count: int) -> np.ndarray:
        """Random tokens, int32 `[1, count]`."""
        return np.random.default_rng(0).integers(0, self.config.vocab_size, (1, count), dtype=np.int32)

    def request(self, max_depth: int = 0) -> loop.Request:
        """A greedy request that no stop sequence and no limit ends within a sample."""
        return loop.Request(
            prompt_length=jnp.full(1, self.length, jnp.int32),
            limit=jnp.full(1, self.capacity - max_depth, jnp.int32),
            stops=jnp.full((1, 1, 1), -1, jnp.int32),
            keys=jax.random.key(0)[None],
            warps=jax.tree.map(jnp.asarray, batch_warps([Sampling()])),
        )

    def state(self, drafter: Drafter) -> loop.DecodeState:
        """The loop's carry."""
        text = self.tokens(self.capacity)
        state = loop.init_state(self.config, drafter, 1, self.capacity, self.dtype, text)
        return dataclasses.replace(state, length=jnp.full(1, self.length, jnp.int32))


def rows_forward(scene: Scene, rows: int) -> Part:
    """The target's forward on `rows` new rows in causal order, logits included."""
    cache = init_cache(scene.config, 1, scene.capacity, scene.dtype)
    length = jnp.full(1, scene.length, jnp.int32)

    def run(fixed, tokens):
        params, cache, length = fixed
        return forward(scene.config, params, tokens, Layout.extend(length, rows), cache).logits

    return Part.of(run, (scene.params, cache, length), scene.tokens(rows))


def draft_part(scene: Scene, drafter: Drafter, drafter_params: Any) -> Part:
    """The drafter's `draft`: its networks and the choice of candidates."""
    draft, fixed, varying = _drafting(scene, drafter, drafter_params)
    return Part.of(lambda fixed, varying: draft(fixed, varying).tokens, fixed, varying)


def _drafting(scene: Scene, drafter: Drafter, drafter_params: Any):
    """A function of (fixed, varying) to a token tree, and these arguments."""
    state, request = scene.state(drafter), scene.request()

    def draft(fixed, varying):
        params, drafter_params, cache = fixed
        drafter_state, root = varying
        view = TargetView(scene.config, params, cache, state.length, state.tokens, request.warps)
        return drafter.draft(drafter_params, view, drafter_state, root, request.keys)[0]

    prepared = jax.jit(drafter.prepare)(drafter_params)
    return draft, (scene.params, prepared, state.cache), (state.drafter, state.tokens[:, scene.length])


def choice_part(scene: Scene, drafter: HeadDrafter) -> Part:
    """What `draft` does beside its networks: for every row of every level, the best candidates among the vocabulary."""
    tree = drafter.tree
    # Medusa's heads read no path: one row serves all nodes of a level.
    levels = [len(tree.expanded(d)) if isinstance(drafter.heads, HydraHeads) else 1 for d in range(tree.max_depth)]
    counts = [int(tree.rank[tree.level(d + 1)].max()) + 1 for d in range(tree.max_depth)]
    key = jax.random.key(0)
    logits = [jax.random.normal(key, (1, rows, scene.config.vocab_size), jnp.float32) for rows in levels]

    def choose(_, logits):
        return [best_tokens(scores, count) for scores, count in zip(logits, counts, strict=True)]

    return Part.of(choose, (), logits)


def step_parts(scene: Scene, drafter: Drafter, drafter_params: Any) -> dict[str, Timed]:
    """One step: `draft`, `forward`, `verdict`, `commit` and `update` alone, and the whole as `step`.

    For drafters made of heads there is `choice` too: `draft` without it is what their networks take.
    """
    config, params = scene.config, scene.params
    state, request = scene.state(drafter), scene.request()
    cache, length = state.cache, state.length

    def read(fixed, tree):
        params, cache = fixed
        layout = Layout(length[:, None] + tree.depth, length, tree.ancestors)
        return forward(config, params, tree.tokens, layout, cache, taps=drafter.taps)

    def judge(_, varying):
        tree, logits = varying
        return verify(tree, logits, request.warps, request.keys, length, drafter.max_depth)

    def append(_, varying, carry):
        rows, verdict = varying
        text, cache = carry
        after, _ = loop.emit(text, request, verdict.tokens, verdict.drafts)
        cache = commit(cache, rows, verdict.path if drafter.max_depth else None, text.length)
        return dataclasses.replace(after, length=text.length, done=text.done), cache

    def update(fixed, varying, drafter_state):
        params, drafter_params, cache = fixed
        tokens, taps, verdict = varying
        taken = {name: jnp.take_along_axis(tap, verdict.path[:, :, None], axis=1) for name, tap in taps.items()}
        rows = TrueRows(jnp.take_along_axis(tokens, verdict.path, axis=1), length, verdict.drafts + 1, taken)
        view = TargetView(config, params, cache, length, state.tokens, request.warps)
        return drafter.ingest(drafter_params, view, drafter_state, rows)

    draft, models, varying = _drafting(scene, drafter, drafter_params)
    tree = jax.jit(draft)(models, varying)
    # Outputs of zeros depend on nothing, which saves the compilation of another forward.
    out = jax.jit(lambda *inputs: jax.tree.map(jnp.zeros_like, read(*inputs)))((params, cache), tree)
    verdict = jax.jit(judge)((), (tree, out.logits))
    text = dataclasses.replace(state, cache=[], drafter=())
    parts: dict[str, Timed] = {
        "draft": Part.of(lambda fixed, varying: draft(fixed, varying).tokens, models, varying),
        "forward": Part.of(lambda fixed, tree: read(fixed, tree).logits, (params, cache), tree),
        "verdict": Part.of(lambda fixed, varying: judge(fixed, varying).tokens, (), (tree, out.logits)),
        "commit": Part(append, (), (out.rows, verdict), (text, cache)),
        "update": Part(update, models, (tree.tokens, out.taps, verdict), state.drafter),
        "step": Step(scene, drafter, drafter_params),
    }
    return {**parts, "choice": choice_part(scene, drafter)} if isinstance(drafter, HeadDrafter) else parts


def network_ms(timings: dict[str, Timing]) -> float:
    """Milliseconds of the drafter's networks, from the timings of a step's parts."""
    choice = timings["choice"].median if "choice" in timings else 0.0
    return max(0.0, timings["draft"].median - choice)


class Step:
    """The fused loop, `STEPS_PER_SAMPLE` steps at a time from the same place in the text."""

    def __init__(self, scene: Scene, drafter: Drafter, drafter_params: Any):
        """The loop of `drafter` on `scene`, whose cache must have room for a sample (`Scene.with_room`)."""
        self._call = (scene.config, drafter, scene.params, drafter_params)
        self._state, self._request = scene.state(drafter), scene.request(drafter.max_depth)
        self._length = scene.length

    def sample(self) -> float:
        """Seconds per step."""
        state = dataclasses.replace(self._state, length=jnp.full(1, self._length, jnp.int32), done=jnp.zeros(1, bool))
        jax.block_until_ready(state)
        started = time.perf_counter()
        self._state = jax.block_until_ready(loop.run(*self._call, state, self._request, np.int32(STEPS_PER_SAMPLE)))
        return (time.perf_counter() - started) / STEPS_PER_SAMPLE
