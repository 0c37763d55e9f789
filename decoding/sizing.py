"""How many candidates pay, none at all included: chosen while a text is decoded, by measured cost and by acceptance.

An *open* drafter (`Drafter.opened`) comes with the acceptance lengths that its trees of several sizes had elsewhere.
What their steps cost here is measured once (`decoding/costs.py`). Of these sizes the few that may pay at all are the
drafter's *widths*. Between segments of the loop a `Pace` says which of them comes next, or that nothing is drafted for
a while, and for how many steps:

* drafts accepted so far, by depth, say how long each width's steps are expected to be, and the one with the most
  tokens per second is taken; what was counted fades, so that a change in the text is followed;
* what drafting has cost beyond what it brought is kept in an account, in plain steps. Every step pays a little into it,
  and nothing is drafted that it could not bear if all of it were rejected. So drafting cannot lose more than that
  little, whatever is expected of it; and where plain decoding seems better, the account fills until drafts are tried
  again;
* costs that were measured once, of steps in a row, are what is believed at first. The clock then says what segments
  took, those who change from one width to another included, and is believed the more it has seen of both.

A `Pace` outlives its request: the next one of the same kind, with the same parameters, begins with what is known by
then.
"""

import dataclasses
import functools
import statistics
import weakref
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from decoding import costs
from decoding.costs import HOPE, Costs
from decoding.drafter import Drafter
from decoding.stats import Stats
from models.formats.target import Target

TREES = 2  # Most widths beside none: each is a compilation.
MARGIN = 1.03  # What a tree must promise, over plain decoding or another tree, to take its place.
WEIGHT = 4.0  # Drafts that what is expected at a depth is worth beside those that are counted.
MEMORY = 64  # Steps in which what was counted fades to a third.
SEGMENT = 32  # Most steps until the next look.
TRIAL = 4  # Steps of one text in a trial, or of as many texts at once.
SHARE = 0.005  # Of a plain step, that every step pays into the account.
START, MOST = 2.0, 6.0  # Plain steps in the account, to begin with and at most.
BELIEVED = 4.0  # Steps by which the clock has seen enough to be believed as much as what was measured before.
SEGMENTS = 9  # Of which the clock remembers how long they took: the one in the middle counts, so that no pause does.
FORGOTTEN = 256  # Other steps after which what was seen of a width is worth half.
LOOK = 8  # Plain steps that the clock wants to see now and then, where drafts do not promise `MUCH` anyway.
MUCH = 1.5

_paces: dict[tuple, "Pace"] = {}


@dataclasses.dataclass(frozen=True)
class Width:
    """A size of a drafter.

    Attributes:
      drafter: with so many candidates.
      length: acceptance length that it is known to have.
      ratio: seconds of its step over those of a plain one.
    """

    drafter: Drafter
    length: float
    ratio: float

    @functools.cached_property
    def conditional(self) -> float:
        """How often a draft is accepted given the one above, if equally often at every depth: known from the length."""
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            drafts = sum(middle ** (depth + 1) for depth in range(self.drafter.max_depth))
            low, high = (middle, high) if 1 + drafts < self.length else (low, middle)
        return low

    def rate(self, share: float) -> float:
        """Tokens per plain step's time, if `share` times as many drafts as expected are accepted."""
        return min(1 + (self.length - 1) * share, 1 + self.drafter.max_depth) / self.ratio


def widths(drafter: Drafter, measured: Costs, batch: int = 1) -> tuple[Width, ...]:
    """The sizes of an open drafter that pay if acceptance is as expected, or far above or below it; perhaps none.

    What many texts at once accept on average is closer to what is expected than what one of them does, and a width that
    never pays costs its trials, and looking on between them, for all.
    """
    hope = 1 + (HOPE - 1) / batch
    fitted = ((drafter.with_budget(size), length) for size, length in drafter.open_sizes)
    every = [Width(one, length, measured.ratio(costs.rows_of(one))) for one, length in fitted if one is not None]
    found: list[Width] = []
    for share in (1.0, hope, 1 / hope):
        best = max(every, key=lambda width: width.rate(share))
        if best.rate(share) > MARGIN and best not in found:
            found.append(best)
    return tuple(found[:TREES])


class Running:
    """How often drafts were accepted, by depth, beside how often that was expected."""

    def __init__(self, depth: int):
        self._hits, self._expected = np.zeros((2, depth))

    def add(self, width: Width, accepted: Int[np.ndarray, "d"], steps: int) -> None:
        """Steps of a width and, by depth, how many of them accepted a draft."""
        depth = len(accepted)
        self._hits[:depth] += accepted
        self._expected[:depth] += width.conditional * np.array([steps, *accepted[:-1]])

    def fade(self, steps: int) -> None:
        """Makes what was counted worth less."""
        for counts in (self._hits, self._expected):
            counts *= (1 - 1 / MEMORY) ** steps

    def length(self, width: Width) -> float:
        """Acceptance length to expect of a width; of depths that were seldom reached what those above them say."""
        length = reached = factor = 1.0
        for depth in range(width.drafter.max_depth):
            factor = (WEIGHT * factor + self._hits[depth]) / (WEIGHT + self._expected[depth])
            reached *= min(1.0, factor * width.conditional)
            length += reached
        return length


class Clock:
    """How long steps of every width took, and plain ones, which are those of None."""

    def __init__(self) -> None:
        self._seen: dict[Width | None, list[tuple[float, int]]] = {}
        self._others: dict[Width | None, int] = {}

    def add(self, width: Width | None, seconds: float, steps: int) -> None:
        """What a segment took."""
        self._others = {one: since + steps for one, since in self._others.items()} | {width: 0}
        self._seen[width] = [*self._seen.get(width, []), (seconds / steps, steps)][-SEGMENTS:]

    def steps(self, width: Width | None) -> float:
        """How many it has seen; what is long ago counts for little."""
        seen = sum(steps for _, steps in self._seen.get(width, []))
        return seen * 0.5 ** (self._others.get(width, 0) / FORGOTTEN)

    def ratio(self, width: Width) -> float:
        """Seconds of its step over those of a plain one: as measured before, as far as too little was seen."""
        believed = min(self.steps(width), self.steps(None))
        if not believed:
            return width.ratio
        ours, plain = (statistics.median_low([took for took, _ in self._seen[one]]) for one in (width, None))
        return (BELIEVED * width.ratio + believed * ours / plain) / (BELIEVED + believed)


class Pace:
    """Says what comes next, and is told what came of it."""

    def __init__(self, widths: Sequence[Width], batch: int):
        """Of at least one width, for so many texts at once."""
        self.widths = tuple(widths)
        self.account = START
        self._running = Running(max(width.drafter.max_depth for width in widths))
        self._clock = Clock()
        self._least = max(1, TRIAL // batch)
        self._present: Width | None = None
        self._may_try = True

    @property
    def widest(self) -> Width:
        """The one whose state serves all."""
        return max(self.widths, key=lambda width: width.drafter.max_nodes)

    def next(self) -> tuple[Width | None, int]:
        """The width of the next segment, None for no drafts, and its most steps."""
        expected = {width: self._running.length(width) / self._clock.ratio(width) for width in self.widths}
        best = max(self.widths, key=expected.__getitem__)
        if self._present is not None and expected[best] <= MARGIN * expected[self._present]:
            best = self._present
        pays = expected[best] > (1.0 if best is self._present else MARGIN)
        if pays and expected[best] < MUCH and self._clock.steps(None) < LOOK / 2:
            return None, LOOK
        loss = self._clock.ratio(best) - 1
        bearable = int(min(SEGMENT, self.account / loss)) if loss > 0 else SEGMENT
        if bearable >= self._least and (pays or self._may_try):
            return best, bearable if pays else self._least
        missing = max(0.0, self._least * loss - self.account) / SHARE
        return None, int(min(SEGMENT, np.ceil(missing))) or SEGMENT

    def count(self, width: Width | None, texts: Sequence[Stats], seconds: float) -> None:
        """What came of a segment, text by text, and how long it took."""
        both, steps = sum(texts[1:], texts[0]), max(text.steps for text in texts)
        self._running.fade(steps)
        if steps:
            self._clock.add(width, seconds, steps)
        gained = 0.0
        if width is not None:
            self._running.add(width, both.accepted_by_depth, both.steps)
            gained = steps * (both.acceptance_length - self._clock.ratio(width))
        self._present, self._may_try = width, width is None or gained > 0
        most = max([MOST, *(self._least * (self._clock.ratio(width) - 1) for width in self.widths)])
        self.account = float(np.clip(self.account + gained + SHARE * steps, -MOST, most))


def pace(
    target: Target, drafter: Drafter, params: Any, batch: int, greedy: bool, latents: Hashable = None
) -> Pace | None:
    """What paces requests of an open drafter; None where no number of candidates can pay.

    Args:
      target: the model, on one device.
      drafter: with `open_sizes`.
      params: its parameters.
      batch: texts at once.
      greedy: all of them; what is counted of greedy and of sampled texts is kept apart.
      latents: what stands in the cache beside the text (`Augment.kind`), which other texts come of.
    """
    # Costs are the same for two trainings of one network. What they accept is not.
    learnt = jax.tree.leaves(params)
    key = (costs.key_of(target, drafter, batch), drafter, tuple(map(id, learnt)), greedy, latents)
    if key not in _paces:
        found = widths(drafter, costs.measured(target, drafter, params, batch), batch)
        if not found:
            return None
        _paces[key] = Pace(found, batch)
        for leaf in learnt:  # Its id may be another's once it is gone.
            weakref.finalize(leaf, _paces.pop, key, None)
    return _paces[key]
