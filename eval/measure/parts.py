"""The parts of a decoding step, each as a function that can be timed alone (`eval/measure/timing.py`).

Nothing can be timed inside the fused loop, so its pieces are called as the loop calls them (`decoding/loop.py`), on a
text in mid-decode: `draft` (the drafter's networks and the choice of candidates), `choice` (that choice alone),
`forward` (the target on the tree's rows), `verdict` (which candidates become text), `commit` (tokens and cache) and
`update` (what the drafter learns). `step` is the fused loop itself. The drafter's networks alone are what a loop
without any overhead would still pay for: `draft` without `choice` for heads, `network` for drafters with a policy.

The state is synthetic, random tokens over an empty cache: how long a step takes depends on shapes, and on how many
candidates are accepted only through the verdict, which looks at one more node for each.
"""

import dataclasses
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from decoding import loop
from decoding.cache import commit, init_cache
from decoding.drafter import Drafter, TargetView, TrueRows
from decoding.drafters.head_drafter import HeadDrafter
from decoding.drafters.network_drafter import NetworkDrafter
from decoding.generate import bucket
from decoding.sampling import Sampling, batch_sampling, best_tokens
from decoding.verify import verify
from eval.measure.timing import Part, Timed, Timing
from models.config import TransformerConfig
from models.heads.hydra import HydraHeads
from models.layout import Layout
from models.transformer import Params, forward

STEPS_PER_SAMPLE = 16
GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Scene:
    """Texts in mid-decode: `batch` rows of `length` committed tokens in a cache of `capacity` slots."""

    config: TransformerConfig
    params: Params
    length: int
    capacity: int
    batch: int = 1
    sampling: Sampling = GREEDY

    @classmethod
    def with_room(
        cls, config: TransformerConfig, params: Params, length: int, max_depth: int, batch: int = 1
    ) -> "Scene":
        """A scene whose cache holds one sample of `step` with drafts as deep as `max_depth`."""
        return cls(config, params, length, bucket(length + (STEPS_PER_SAMPLE + 2) * (max_depth + 1)), batch)

    @property
    def dtype(self):
        """Of parameters and cache."""
        return self.params["embed"]["embedding"].dtype

    def tokens(self, count: int) -> np.ndarray:
        """Random tokens, int32 `[batch, count]`."""
        return np.random.default_rng(0).integers(0, self.config.vocab_size, (self.batch, count), dtype=np.int32)

    @property
    def lengths(self) -> Int[Array, "B"]:
        """Committed tokens of every row."""
        return jnp.full(self.batch, self.length, jnp.int32)

    def request(self, max_depth: int = 0) -> loop.Request:
        """A request that no stop sequence and no limit ends within a sample."""
        return loop.Request(
            prompt_length=self.lengths,
            limit=jnp.full(self.batch, self.capacity - max_depth, jnp.int32),
            stops=jnp.full((self.batch, 1, 1), -1, jnp.int32),
            keys=jax.vmap(jax.random.key)(jnp.arange(self.batch, dtype=jnp.uint32)),
            sampling=jax.tree.map(jnp.asarray, batch_sampling([self.sampling] * self.batch)),
        )

    def state(self, drafter: Drafter) -> loop.DecodeState:
        """The loop's carry."""
        text = self.tokens(self.capacity)
        state = loop.init_state(self.config, drafter, self.batch, self.capacity, self.dtype, text)
        return dataclasses.replace(state, length=self.lengths)


def rows_forward(scene: Scene, rows: int) -> Part:
    """The target's forward on `rows` new rows in causal order, logits included."""
    cache = init_cache(scene.config, scene.batch, scene.capacity, scene.dtype)
    length = scene.lengths

    def run(fixed, tokens):
        params, cache, length = fixed
        return forward(scene.config, params, tokens, Layout.extend(length, rows), cache).logits

    return Part.of(run, (scene.params, cache, length), scene.tokens(rows))


def draft_part(scene: Scene, drafter: Drafter, drafter_params: Any) -> Part:
    """The drafter's `draft`: its networks and the choice of candidates."""
    draft, fixed, varying = _drafting(scene, drafter, drafter_params)
    return Part.of(lambda fixed, varying: draft(fixed, varying)[0].tokens, fixed, varying)


def network_part(scene: Scene, drafter: NetworkDrafter, drafter_params: Any) -> Part:
    """What a policy asks of its network, pass by pass, with nothing chosen between the passes."""
    levels = drafter.policy.levels
    view, fixed, (drafter_state, root) = _drafting_inputs(scene, drafter, drafter_params)
    tokens = [jnp.asarray(scene.tokens(count)) for count in levels[1:]]

    def run(fixed, varying):
        params, drafter_params, cache = fixed
        drafter_state, root, tokens = varying
        network = drafter.network(drafter_params, view(params, cache), drafter_state)
        first, scratch = network.begin(root, sum(levels))
        logits, at = [first], levels[0]
        for depth, rows in enumerate(tokens, start=1):
            like = jnp.zeros_like(rows)
            seen = jnp.zeros((*rows.shape, sum(levels)), bool).at[:, :, 0].set(True)
            found, scratch = network.extend(scratch, at, rows, like, like + depth, seen)
            logits.append(found)
            at += rows.shape[1]
        return logits

    return Part.of(run, fixed, (drafter_state, root, tokens))


def _drafting(scene: Scene, drafter: Drafter, drafter_params: Any):
    """A function of (fixed, varying) to what `draft` returns, and these arguments."""
    view, fixed, varying = _drafting_inputs(scene, drafter, drafter_params)
    keys = scene.request().keys

    def draft(fixed, varying):
        params, drafter_params, cache = fixed
        drafter_state, root = varying
        return drafter.draft(drafter_params, view(params, cache), drafter_state, root, keys)

    return draft, fixed, varying


def _drafting_inputs(scene: Scene, drafter: Drafter, drafter_params: Any):
    """The target as drafters see it, a function of (params, cache); and (fixed, varying) arguments of `draft`."""
    state, request = scene.state(drafter), scene.request()

    def view(params, cache):
        return TargetView(scene.config, params, cache, state.length, state.tokens, request.sampling)

    prepared = loop.prepare(drafter, drafter_params)
    return view, (scene.params, prepared, state.cache), (state.drafter, state.tokens[:, scene.length])


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

    What tells the drafter's networks from the rest of `draft` is there too: `choice` for drafters made of heads,
    `network` for those with a policy. A drafter without networks has neither.
    """
    config, params = scene.config, scene.params
    state, request = scene.state(drafter), scene.request()
    cache, length = state.cache, state.length
    draft, models, varying = _drafting(scene, drafter, drafter_params)
    tree, drafted = jax.jit(draft)(models, varying)
    whole = TargetView(config, params, cache, length, state.tokens, request.sampling)
    riders = drafter.riders(models[1], whole, state.drafter, tree)

    def read(fixed, tree):
        params, cache = fixed
        tokens, layout = loop.verify_rows(tree, riders, length)
        return forward(config, params, tokens, layout, cache, taps=drafter.taps)

    def judge(_, varying):
        tree, logits = varying
        return verify(tree, logits, request.sampling, request.keys, length, drafter.max_depth)

    def append(_, varying, carry):
        rows, verdict = varying
        text, cache = carry
        after, _ = loop.emit(text, request, verdict.tokens, verdict.drafts)
        cache = commit(cache, rows, verdict.path if drafter.max_depth else None, text.length)
        return dataclasses.replace(after, length=text.length, done=text.done), cache

    def update(fixed, varying, drafter_state):
        params, drafter_params, cache = fixed
        tree, out, verdict, drafted = varying
        taken = {name: jnp.take_along_axis(tap, verdict.path[:, :, None], axis=1) for name, tap in out.taps.items()}
        read = jnp.take_along_axis(tree.tokens, verdict.path, axis=1)
        rows = TrueRows(read, length, verdict.drafts + 1, taken, verdict.path, drafted)
        view = TargetView(config, params, cache, length, state.tokens, request.sampling)
        after = drafter.ingest(drafter_params, view, drafter_state, rows)
        return drafter.observe(drafter_params, view, after, tree, out, verdict, ~state.done)

    # Outputs of zeros depend on nothing, which saves the compilation of another forward.
    out = jax.jit(lambda *inputs: jax.tree.map(jnp.zeros_like, read(*inputs)))((params, cache), tree)
    verdict = jax.jit(judge)((), (tree, out.logits))
    text = dataclasses.replace(state, cache=[], drafter=())
    parts: dict[str, Timed] = {
        "draft": Part.of(lambda fixed, varying: draft(fixed, varying)[0].tokens, models, varying),
        "forward": Part.of(lambda fixed, tree: read(fixed, tree).logits, (params, cache), tree),
        "verdict": Part.of(lambda fixed, varying: judge(fixed, varying).tokens, (), (tree, out.logits)),
        "commit": Part(append, (), (out.rows, verdict), (text, cache)),
        "step": Step(scene, drafter, drafter_params),
    }
    if jax.tree.leaves(state.drafter):
        parts["update"] = Part(update, models, (tree, out, verdict, drafted), state.drafter)
    if isinstance(drafter, HeadDrafter):
        parts["choice"] = choice_part(scene, drafter)
    elif isinstance(drafter, NetworkDrafter):
        parts["network"] = network_part(scene, drafter, drafter_params)
    return parts


def network_ms(timings: dict[str, Timing]) -> float:
    """Milliseconds of the drafter's networks, from the timings of a step's parts."""
    if "network" in timings:
        return timings["network"].median
    return max(0.0, timings["draft"].median - timings["choice"].median) if "choice" in timings else 0.0


class Step:
    """The fused loop, some steps at a time from the same place in the text.

    Attributes:
      first_seconds: the first sample, compilation included, with the cache of compiled programs off; None where the
        loop had been compiled for this bucket before.
    """

    def __init__(self, scene: Scene, drafter: Drafter, drafter_params: Any, steps: int = STEPS_PER_SAMPLE):
        """The loop of `drafter` on `scene`, whose cache must have room for a sample (`Scene.with_room`)."""
        self._call = (scene.config, drafter, scene.params, loop.prepare(drafter, drafter_params))
        self._state, self._request = scene.state(drafter), scene.request(drafter.max_depth)
        self._lengths, self._steps = scene.lengths, steps
        self.first_seconds: float | None = None
        self._sampled = False

    def sample(self) -> float:
        """Seconds per step."""
        fresh = jnp.zeros(self._lengths.shape, bool)
        state = dataclasses.replace(self._state, length=jnp.array(self._lengths), done=fresh)
        jax.block_until_ready(state)
        known = loop.run._cache_size()  # type: ignore[attr-defined]
        cached = cast(Any, jax.config).jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", cached and self._sampled)
        started = time.perf_counter()
        self._state = jax.block_until_ready(loop.run(*self._call, state, self._request, np.int32(self._steps)))
        seconds = time.perf_counter() - started
        jax.config.update("jax_enable_compilation_cache", cached)
        if not self._sampled and loop.run._cache_size() > known:  # type: ignore[attr-defined]
            self.first_seconds = seconds
        self._sampled = True
        return seconds / self._steps
