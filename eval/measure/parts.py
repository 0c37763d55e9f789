"""The parts of a decoding step, each as a function that can be timed alone (`eval/measure/timing.py`).

Nothing can be timed inside the fused loop, so its five functions are called as the loop calls them
(`decoding/loop.py`), on a text in mid-decode: `draft` (the drafter's networks and the choice of candidates), `forward`
(read: the target on the tree's rows), `verdict` (judge: which candidates become text), `commit` (tokens and cache) and
`update` (learn: what the drafter makes of it). `step` is the fused loop itself. The drafter's networks alone are what a
loop without any overhead would still pay for: `draft` without `choice` for heads, `network` for drafters with a policy.

The state is synthetic, random tokens over an empty cache: how long a step takes depends on shapes, and on how many
candidates are accepted only through the verdict, which looks at one more node for each. All of it lies where
`decoding/generate.py` puts it, on the target's mesh where that has one.
"""

import dataclasses
import functools
import time
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from decoding import loop
from decoding.cache import init_cache
from decoding.drafter import Drafter
from decoding.generate import bucket
from decoding.request import Request
from decoding.sampling import Sampling, batch_sampling
from eval.measure.timing import Part, Timed, Timing
from models.config import TransformerConfig
from models.encoder_decoder import Memory, beside
from models.layout import Layout
from models.linear import MOST_ROWS, whole, whole_table
from models.sharding import mesh_of, on_mesh, place_rows
from models.transformer import Params, forward

T = TypeVar("T")

STEPS_PER_SAMPLE = 16
GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Scene:
    """Texts in mid-decode: `batch` rows of `length` committed tokens in a cache of `capacity` slots; those of an
    encoder-decoder behind prompts of `read` tokens."""

    config: TransformerConfig
    params: Params
    length: int
    capacity: int
    batch: int = 1
    sampling: Sampling = GREEDY
    read: int = 0

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

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """Of the parameters."""
        return mesh_of(self.params)

    def placed(self, tree: T) -> T:
        """Arrays whose first axis is the batch, on the devices of their rows."""
        return tree if self.mesh is None else place_rows(self.mesh, tree)

    @property
    def lengths(self) -> Int[Array, "B"]:
        """Committed tokens of every row."""
        return self.placed(jnp.full(self.batch, self.length, jnp.int32))

    def params_for(self, rows: int) -> Params:
        """The target's as the loop has them for forwards on so many rows a text: a kernel that these read whole
        (`models/linear.py`) is put together once a call, for which a part that runs once a sample would pay always."""
        return self.params if rows * self.batch <= MOST_ROWS else self._whole_params

    @functools.cached_property
    def _whole_params(self) -> Params:
        def put_together(path, leaf):
            name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else ""
            return {"kernel": whole, "embedding": whole_table}.get(name, lambda leaf: leaf)(leaf)

        return jax.tree.map_with_path(put_together, self.params)

    def request(self, max_depth: int = 0) -> Request:
        """A request that no stop sequence and no limit ends within a sample."""
        request = Request(
            prompt_length=self.lengths,
            limit=jnp.full(self.batch, self.capacity - max_depth, jnp.int32),
            stops=jnp.full((self.batch, 1, 1), -1, jnp.int32),
            keys=jax.vmap(jax.random.key)(jnp.arange(self.batch, dtype=jnp.uint32)),
            sampling=jax.tree.map(jnp.asarray, batch_sampling([self.sampling] * self.batch)),
            memory=self.memory,
        )
        return self.placed(request)

    @functools.cached_property
    def memory(self) -> Memory | None:
        """The prompts, where an encoder reads them."""
        if not self.read:
            return None
        lengths = jnp.full(self.batch, self.read, jnp.int32)
        read = self.placed((jnp.asarray(self.tokens(self.read)), lengths))
        with on_mesh(self.mesh):
            return loop.encode_prompt(self.config, self.params, *read)

    def state(self, drafter: Drafter, drafter_params: Any = None) -> loop.DecodeState:
        """The loop's carry."""
        text = self.tokens(self.capacity)
        state = loop.init_state(self.config, drafter, self.batch, self.capacity, self.dtype, text, self.mesh)
        state = _at(state, self.lengths)
        if self.memory is None or not drafter.begins:
            return state
        models = self.models(drafter, drafter_params)
        with on_mesh(self.mesh):
            made = drafter.begin(models.drafter_params, models.view(state, self.request()), state.drafter)
        return dataclasses.replace(state, drafter=made)

    def models(self, drafter: Drafter, drafter_params: Any) -> loop.Models:
        """The target and a drafter."""
        return loop.Models(self.config, drafter, self.params, drafter.for_decoding(drafter_params, self.mesh))


def _at(state: loop.DecodeState, length: Int[Array, "B"]) -> loop.DecodeState:
    """The state with `length` committed tokens in every row, none of them finished."""
    text = dataclasses.replace(state.text, length=jnp.array(length), done=jnp.zeros(length.shape, bool))
    return dataclasses.replace(state, text=text, slots=jnp.array(length))


def rows_forward(scene: Scene, rows: int) -> Part:
    """The target's forward on `rows` new rows in causal order, logits included."""
    cache = init_cache(scene.config, scene.batch, scene.capacity, scene.dtype, mesh=scene.mesh)
    length = scene.lengths

    def run(fixed, tokens):
        params, cache, length, memory = fixed
        return forward(scene.config, params, tokens, *beside(memory, Layout.extend(length, rows), cache)).logits

    return Part.of(run, (scene.params_for(rows), cache, length, scene.memory), scene.tokens(rows))


def draft_part(scene: Scene, drafter: Drafter, drafter_params: Any) -> Part:
    """The drafter's `draft`: its networks and the choice of candidates."""
    draft, fixed, varying = _drafting(scene, drafter, drafter_params)
    return Part.of(lambda fixed, varying: draft(fixed, varying)[0].tokens, fixed, varying)


def _drafting(scene: Scene, drafter: Drafter, drafter_params: Any):
    """`loop.draft` as a function of (fixed, varying), and these arguments: what is large, and what changes."""
    request, state = scene.request(), scene.state(drafter, drafter_params)

    def draft(fixed, varying):
        models, state = fixed
        drafter_state, tokens = varying
        text = dataclasses.replace(state.text, tokens=tokens)
        return loop.draft(models, dataclasses.replace(state, drafter=drafter_state, text=text), request)

    fixed = scene.models(drafter, drafter_params), dataclasses.replace(state, drafter=())
    return draft, fixed, (state.drafter, state.text.tokens)


def _cost_parts(scene: Scene, drafter: Drafter, fixed: Any, varying: Any) -> dict[str, Timed]:
    """What the drafter says is to be timed alone (`Drafter.cost_parts`)."""
    request = scene.request()

    def timed(part):
        def run(fixed, varying):
            models, state = fixed
            (drafter_state, tokens), inputs = varying
            view = models.view(state, request)
            return part.run(models.drafter_params, view, drafter_state, tokens[:, scene.length], inputs)

        return Part.of(run, fixed, (varying, part.inputs))

    return {name: timed(part) for name, part in drafter.cost_parts(scene.config, scene.batch).items()}


def step_parts(scene: Scene, drafter: Drafter, drafter_params: Any) -> dict[str, Timed]:
    """One step: `draft`, `forward`, `verdict`, `commit` and `update` alone, and the whole as `step`.

    These are the five functions of `decoding/loop.py`. What tells the drafter's networks from the rest of `draft`,
    `choice` or `network`, is there too where the drafter has networks.
    """
    state, request = scene.state(drafter, drafter_params), scene.request()
    draft, fixed, varying = _drafting(scene, drafter, drafter_params)
    models, without = fixed
    with on_mesh(scene.mesh):
        tree, kept = jax.jit(draft)(fixed, varying)

    def read(fixed, tree):
        models, state = fixed
        return loop.read(models, state, request, tree)

    def judge(fixed, varying):
        models, state = fixed
        tree, logits = varying
        return loop.judge(models, state, request, tree, logits)

    def commit(fixed, varying, carry):
        models, state = fixed
        cache, text, counters = carry
        before = dataclasses.replace(state, cache=cache, text=text, counters=counters)
        after, _ = loop.commit(models, before, request, *varying)
        return after.cache, dataclasses.replace(after.text, length=text.length, done=text.done), after.counters

    def update(fixed, step, drafter_state):
        models, before, after = fixed
        return loop.learn(models, dataclasses.replace(before, drafter=drafter_state), after, request, step).drafter

    # Outputs of zeros depend on nothing, which saves the compilation of another forward.
    in_loop = dataclasses.replace(models, params=scene.params_for(drafter.max_nodes + drafter.num_riders))
    reading = in_loop, state
    shallow = dataclasses.replace(without, cache=[])
    small = dataclasses.replace(models, params={}, drafter_params=None), shallow
    with on_mesh(scene.mesh):
        out = jax.jit(lambda *inputs: jax.tree.map(jnp.zeros_like, read(*inputs)))(reading, tree)
        verdict = jax.jit(judge)(small, (tree, out.logits))
        after, emitted = jax.jit(lambda *inputs: loop.commit(models, without, request, *inputs))(out.rows, verdict)
    parts: dict[str, Timed] = {
        "draft": Part.of(lambda fixed, varying: draft(fixed, varying)[0].tokens, fixed, varying),
        "forward": Part.of(lambda fixed, tree: read(fixed, tree).logits, reading, tree),
        "verdict": Part.of(lambda fixed, varying: judge(fixed, varying).tokens, small, (tree, out.logits)),
        "commit": Part(commit, small, (out.rows, verdict), (state.cache, state.text, state.counters)),
        "step": Step(scene, drafter, drafter_params),
    }
    if jax.tree.leaves(state.drafter):
        step = loop.Step(tree, kept, out, verdict, emitted)
        parts["update"] = Part(update, (models, without, after), step, state.drafter)
    return parts | _cost_parts(scene, drafter, fixed, varying)


def network_ms(timings: dict[str, Timing]) -> float:
    """Milliseconds of the drafter's networks, from the timings of a step's parts."""
    if "network" in timings:
        return timings["network"].median
    return max(0.0, timings["draft"].median - timings["choice"].median) if "choice" in timings else 0.0


class Step:
    """The fused loop, some steps at a time from the same place in the text.

    Attributes:
      first_seconds: the first sample, compilation included, or reading, where a cache of compiled programs is kept and
        holds the loop; None where it had been compiled for this bucket before.
    """

    def __init__(self, scene: Scene, drafter: Drafter, drafter_params: Any, steps: int = STEPS_PER_SAMPLE):
        """The loop of `drafter` on `scene`, whose cache must have room for a sample (`Scene.with_room`)."""
        self._models = scene.models(drafter, drafter_params)
        self._state, self._request = scene.state(drafter, drafter_params), scene.request(drafter.max_depth)
        self._lengths, self._steps, self._mesh = scene.lengths, steps, scene.mesh
        self.first_seconds: float | None = None
        self._sampled = False

    def prepare(self) -> None:
        """Compiles the loop, by a first sample."""
        self.sample()

    def sample(self) -> float:
        """Seconds per step."""
        state = jax.block_until_ready(_at(self._state, self._lengths))
        known = loop.run._cache_size()  # type: ignore[attr-defined]
        started = time.perf_counter()
        with on_mesh(self._mesh):
            self._state = jax.block_until_ready(loop.run(self._models, state, self._request, np.int32(self._steps)))
        seconds = time.perf_counter() - started
        if not self._sampled and loop.run._cache_size() > known:  # type: ignore[attr-defined]
            self.first_seconds = seconds
        self._sampled = True
        return seconds / self._steps
