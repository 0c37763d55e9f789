"""Decoding with an augmented cache: at points of a text a coprocessor's latents go into the cache beside it.

A point lies behind token t - 1: the cache holds `tokens[:t]`, then the latents, and token t is drawn from what the
target says at the last of them (arXiv 2412.17747). That is the *augmented model*; drafters work on top of it and are
lossless with respect to it, for the loop between two points is the usual one. Latents take slots and positions and no
text (`decoding/place.py`). A coprocessor never sees those of earlier points, which its training knows nothing of.

The loop stops at a point by the limit that it stops at anyway: a request is decoded to its next point, whose last token
is then pending as at any limit; `resume` reads it, lets the coprocessor answer, and decoding goes on. A row of a batch
waits at its point until all others are at theirs, or done. What is compiled for users without latents is what it was.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from decoding import loop
from decoding.cache import commit
from decoding.coprocessors import Coprocessor, load_coprocessor
from decoding.place import Place
from decoding.request import Request
from decoding.sampling import draw
from decoding.text import Text, emit
from models import coprocessor
from models.attention import Sources
from models.config import TransformerConfig
from models.coprocessor import CoprocessorConfig, Points
from models.errors import UserError
from models.formats.target import Target
from models.layout import Layout
from models.sharding import check_placed, keep_rows, place_rows
from models.transformer import Cache, Params, forward, head

NEVER = 2**31 - 1  # More tokens than any text has.


@dataclasses.dataclass(frozen=True, eq=False)
class Augment:
    """Whose latents, and where.

    Attributes:
      coprocessor: what it is, and its parameters, as `load_coprocessor` returns them.
      every: tokens of text from one point to the next, of which the first lies at the end of the prompt; None is that
        one alone.
      lag: latents come so many tokens behind the text that the coprocessor has read, as where it works beside the
        target and is late.
    """

    coprocessor: Coprocessor | Any  # Anything may arrive, and is checked.
    every: int | None = None
    lag: int = 0

    def __post_init__(self):
        if not isinstance(self.coprocessor, Coprocessor):
            raise UserError(
                f"augment needs a coprocessor as load_coprocessor returns it, got a {type(self.coprocessor).__name__}: "
                "Augment.load(DIR, target) reads one"
            )
        counts = {"lag": (self.lag, 0)} | ({} if self.every is None else {"every": (self.every, 1)})
        for name, (value, least) in counts.items():
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole or not least <= value < 2**31:
                raise UserError(f"augment needs {name} of at least {least}, and less than 2^31, got {value!r}")
        if self.every is not None and self.lag >= self.every:
            raise UserError(
                f"augment needs a lag below the {self.every} tokens between two points, got {self.lag}: latents would "
                "come after those of the next point"
            )
        if self.every is not None and self.coprocessor.config.needs_features:
            raise UserError(
                "a coprocessor that reads the features of the last layer answers once, at the end of the prompt: leave "
                "out every"
            )

    @property
    def kind(self) -> tuple[CoprocessorConfig, int | None, int]:
        """What tells texts with these latents from others, parameters apart."""
        return self.coprocessor.config, self.every, self.lag

    def calls(self, new_tokens: int) -> int:
        """Points that a row of so many new tokens meets at most."""
        if self.lag >= new_tokens:
            return 0
        return 1 if self.every is None else 1 + (new_tokens - 1 - self.lag) // self.every

    def refuse_unreached(self, new_tokens: int) -> None:
        """Raises UserError where a row of so many new tokens ends before its first point."""
        if not self.calls(new_tokens):
            raise UserError(
                f"augment needs a lag below the {new_tokens} new tokens, got {self.lag}: latents would never come"
            )

    def slots(self, new_tokens: int) -> int:
        """Cache slots that latents take in a row of so many new tokens."""
        return self.calls(new_tokens) * self.coprocessor.config.num_latents

    def positions(self, new_tokens: int) -> int:
        """Positions that they take."""
        return self.calls(new_tokens) * self.coprocessor.config.shift

    @classmethod
    def load(cls, directory: str | Path, target: Target, every: int | None = None, lag: int = 0) -> "Augment":
        """With the coprocessor in a directory. Raises UserError as `load_coprocessor` and `check` do."""
        augment = cls(load_coprocessor(directory, target), every, lag)
        augment.check(target.config, None)
        return augment

    def check(self, config: TransformerConfig, mesh) -> None:
        """Raises UserError where a target of that shape, or a mesh, cannot have such latents."""
        if config.encoder_layers:
            raise UserError("latents go into the cache of a decoder, and the target is an encoder-decoder")
        self.coprocessor.config.check_target(config)
        found = self.coprocessor.params["soft"]["embedding"].shape
        expected = (self.coprocessor.config.num_latents, config.width)
        if tuple(found) != expected:
            raise UserError(f"the coprocessor's soft tokens are {list(found)}, this target needs {list(expected)}")
        if mesh is not None:
            check_placed(mesh, self.coprocessor.params, "the coprocessor's parameters")


def refuse_times_without(latents: bool, every: int | None, lag: int, option: str) -> None:
    """Raises UserError where a command is told when latents come, but not whose, which `option` would say."""
    if not latents and (every is not None or lag):
        raise UserError(f"augment_every and augment_lag say when latents come, and there are none: give {option} too")


def first_pause(augment: Augment | None) -> int:
    """New tokens after which the loop first stops for latents; 0 where it never does."""
    return 0 if augment is None else augment.lag or augment.every or 0


def step_runs(augment: Augment | None, writers: Sequence[int]) -> list[Sequence[int]]:
    """Who wrote a text's new tokens, in runs between those that the prompt or latents, and no step, chose."""
    every = augment.every if augment else None
    points = range(first_pause(augment) or NEVER, len(writers), every or NEVER)
    return [writers[first + 1 : last] for first, last in itertools.pairwise([0, *points, len(writers)])]


class Schedule:
    """When the loop stops for latents, of one batch; never where there are none.

    Attributes:
      augment: whose latents, and where; None is nowhere.
      request: what is asked of the loop: to stop at every row's next point, if that comes before its end.
      calls: int `[B]`, points met so far.
      seconds: what they took: the pending token's reading, the coprocessor, and the target's reading of its latents.
    """

    def __init__(
        self, models: loop.Models, request: Request, augment: Augment | None, stops: Sequence[Sequence[int]], mesh
    ):
        """Of a request for all of the text, which `stops` end."""
        self._models, self._whole, self.augment, self._mesh = models, request, augment, mesh
        self._stops = [list(stop) for stop in stops]
        self._prompt, self._limit = np.asarray(request.prompt_length), np.asarray(request.limit)
        self._points = np.full_like(self._prompt, NEVER) if augment is None else self._prompt + augment.lag
        self.calls, self.seconds = np.zeros_like(self._prompt), 0.0
        self.request = self._until_points()

    def room(self, state: loop.DecodeState) -> loop.DecodeState:
        """An empty state that counts what latents hold."""
        if self.augment is None or self.augment.coprocessor.config.shift:
            return state
        return dataclasses.replace(state, held=self._placed(np.zeros(len(self._prompt), np.int32)))

    def begin(self, state: loop.DecodeState, hidden: Float[Array, "B H"]) -> loop.DecodeState:
        """The state that has read the prompts, with the first token chosen, from latents where these are not late."""
        if self.augment is None or self.augment.lag:
            return loop.choose_root(self._models, state, hidden, self.request)
        state, started = jax.block_until_ready(state), time.perf_counter()
        state = self._answered(self.augment, state, np.ones(len(self._points), bool))
        self.seconds += time.perf_counter() - started
        return loop.begin_drafter(self._models, state, self.request)

    def due(self, state: loop.DecodeState, ended: Collection[int]) -> np.ndarray:
        """`[B]`: of rows that all stand still, those that do so at a point; `ended` ones have met a stop text."""
        if self.augment is None:
            return np.zeros(len(self._points), bool)
        tokens, length = np.asarray(state.text.tokens), np.asarray(state.text.length)
        due = (length + 1 == self._points) & (self._points < self._limit)
        for row in np.flatnonzero(due):
            new = tokens[row, self._prompt[row] : length[row] + 1].tolist()
            due[row] = row not in ended and not any(new[-len(stop) :] == stop for stop in self._stops)
        return due

    def resume(self, state: loop.DecodeState, due: np.ndarray) -> loop.DecodeState:
        """The state in which rows that are `due` have read their pending token and latents, and may go on."""
        assert self.augment is not None
        started = time.perf_counter()
        length = np.asarray(state.text.length)
        pending = np.take_along_axis(np.asarray(state.text.tokens), length[:, None], axis=1)
        hidden = np.zeros((len(length), self._models.config.width), state.cache[0]["k"].dtype)
        pending, hidden, ends = self._placed((pending, hidden, (length + due).astype(np.int32)))
        request = dataclasses.replace(self._whole, prompt_length=ends)
        state, _ = loop.read_prompt(self._models, state, hidden, request, pending, "target")
        state = self._answered(self.augment, state, due)
        self.seconds += time.perf_counter() - started
        return state

    def _answered(self, augment: Augment, state: loop.DecodeState, due: np.ndarray) -> loop.DecodeState:
        """The state behind latents, with the next root chosen from the last of them."""
        models = self._models
        self.calls = self.calls + due
        self._points = np.where(due, self._points + augment.every if augment.every else NEVER, self._points)
        self.request = self._until_points()
        any_mode = self._whole.sampling.of_any_mode
        cache, text, place = _read_latents(
            models.config,
            augment.coprocessor.config,
            augment.every is not None,
            (np.int32(augment.every or 0), np.int32(augment.lag)),
            models.params,
            augment.coprocessor.params,
            state.cache,
            state.text,
            state.place,
            dataclasses.replace(self.request, sampling=any_mode, attention="dense", typical=None),
            self._placed(due),
        )
        state = dataclasses.replace(state, cache=cache, text=text, slots=place.slots, held=place.held)
        return jax.block_until_ready(state)

    def _until_points(self) -> Request:
        """The request, of which the loop does all up to every row's next point."""
        if self.augment is None:
            return self._whole
        return dataclasses.replace(self._whole, limit=self._placed(np.minimum(self._limit, self._points)))

    def _placed(self, tree: Any) -> Any:
        tree = jax.tree.map(jnp.asarray, tree)
        return tree if self._mesh is None else place_rows(self._mesh, tree)


@functools.partial(jax.jit, static_argnames=("config", "network", "again"), donate_argnames=("cache",))
def _read_latents(
    config: TransformerConfig,
    network: CoprocessorConfig,
    again: bool,
    when: tuple[Int[Array, ""], Int[Array, ""]],
    params: Params,
    network_params: Params,
    cache: Cache,
    text: Text,
    place: Place,
    request: Request,
    due: Bool[Array, "B"],
) -> tuple[Cache, Text, Place]:
    """Cache, text and place once rows that are `due` have latents behind their text, and a root chosen from them.

    `when` is (every, lag); `again` says whether there is an `every`, and so whether there may be earlier latents.
    """
    number, (every, lag) = network.num_latents, when
    seen = place.back(lag)
    points = Points((seen.position - 1)[:, None], seen.slots[:, None])
    read, hidden_BS = cache, None
    if network.needs_features:
        read = _features(config, network, params, network_params, text)
    elif again:
        # From the first latents on, their slots and those of `every` tokens take turns.
        behind_BS = jnp.arange(cache[0]["v"].shape[2], dtype=jnp.int32) - (request.prompt_length + lag)[:, None]
        hidden_BS = (behind_BS >= 0) & (behind_BS % (every + number) < number)
    last = jnp.take_along_axis(text.tokens, text.length[:, None] - 1, axis=1)
    unread = None if hidden_BS is None else ~hidden_BS
    z_BNH = coprocessor.latents(network, network_params, config, params, read, points, last, prefix_seen=unread)[:, 0]
    positions = network.latent_positions((place.position - 1)[:, None])[:, 0].astype(jnp.int32)
    layout = Layout(positions, place.slots[:, None], network.order(number, network.suffix_attn))
    out = forward(config, params, z_BNH, layout, Sources(cache))
    cache = commit(cache, out.rows, None, place.slots, after=out.hidden[:, 0])

    drawn = draw(head(config, params, out.hidden[:, -1]), request.sampling, request.keys, text.length)
    # The root goes to `tokens[length]`, one place before where a step's tokens go.
    before = dataclasses.replace(text, length=text.length - 1, done=jnp.zeros_like(text.done))
    written = emit(before, request, drawn[:, None], jnp.zeros_like(text.length))[0]
    text = jax.tree.map(lambda new, old: jnp.where(due.reshape(-1, *(1,) * (old.ndim - 1)), new, old), written, text)
    return keep_rows((cache, text, place.behind_latents(jnp.where(due, number, 0).astype(jnp.int32))))


def _features(config, network, params, network_params, text: Text):
    """What a coprocessor that reads features of the last layer makes of the text's, which are in no cache: the target
    makes them once more."""
    batch, rows = text.tokens.shape
    layout = Layout.causal(batch, rows, attention="blocks")
    features = forward(config, params, text.tokens, layout).hidden
    return coprocessor.read_features(network, network_params, config, params, features, layout)
