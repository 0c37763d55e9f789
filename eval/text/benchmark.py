"""The speed benchmark: every drafter decodes the same prompts in the same run, taking turns prompt by prompt.

Definitions (`decoding/stats.py` has those of acceptance):

* **tokens/s** of a question is what the loop's steps committed over the seconds they took, all its turns together; the
  prompt's reading and the token it chooses are in neither (prefill is reported apart). A repeat's tokens/s is the mean
  over questions (Spec-Bench's macro-mean), and a drafter's is the median over repeats.
* **speed-up** is tokens/s over that of plain decoding in the same run.
* **acceptance length per turn** is the mean over prompts (turns) of each one's own acceptance length, SPEED-Bench's
  number; acceptance length itself weighs every step alike, so that long texts count more.
* **draft share** is the time of the drafter's `draft` over the time of a step.
* **loop efficiency** is the speed-up over the ideal one, acceptance length x t(plain forward) / (t(target forward on
  the tree's rows) + t(the drafter's networks)).

Texts that are decoded together share the seconds in equal parts. The number of candidates of an open drafter changes
while it decodes (`decoding/sizing.py`) and from repeat to repeat: acceptance is the first's; its tree, as reported and
timed, is the size that most of that repeat's steps had, and shares of a step are left out where a tenth had another.
Plain decoding always takes part. Several processes share the prompts, each on devices of its own; the parts of a step
are those that the process itself timed. What takes longest on an accelerator is compilation. So prompts share caches of
few sizes, and there contenders compile side by side, but for open ones, which measure while they do.
"""

import collections
import dataclasses
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from decoding.augment import Augment, first_pause
from decoding.drafter import Drafter
from decoding.drafters.registry import load_drafter
from decoding.generate import Generation, bucket, cache_sizes, catching_up, chunk_sizes, generate, slots_needed
from decoding.sampling import Sampling
from decoding.stats import Stats
from decoding.trees import Topology
from decoding.verify import Typical
from eval.measure import turns
from eval.measure.intervals import choices, interval, ratio_interval
from eval.measure.parts import Scene, network_ms, step_parts
from eval.measure.timing import Timed, Timing, summary
from eval.text.prompts import Prompt
from models import processes
from models.errors import UserError
from models.formats.target import Target
from models.sharding import mesh_of

WARM_UP_TOKENS = 4
COMPILERS = 8  # Most contenders that compile side by side.
SAMPLES_OF_PARTS = 3  # Of a part alone, per repeat.


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """A drafter that takes part.

    Attributes:
      drafter: its static part.
      params: its parameters.
      path: the directory it came from.
      typical: lossy typical acceptance instead of lossless verification.
    """

    drafter: Drafter
    params: Any = None
    path: str | None = None
    typical: Typical | None = None

    def of_size(self, candidates: int) -> "Contender":
        """The same with so many candidates, if it is open."""
        fitted = self.drafter.with_budget(candidates) if self.drafter.open_sizes else None
        # On a mesh an open drafter keeps the size that it was published with.
        return self if fitted is None else dataclasses.replace(self, drafter=fitted)


@dataclasses.dataclass
class Measured:
    """What one contender did: per repeat and prompt seconds, per prompt its text; `chosen` has its usual size. Texts
    that are not decoded `alone` share a time, which says nothing of the choice of questions."""

    contender: Contender
    generations: list[Generation]
    decode_seconds: list[list[float]]
    prefill_seconds: list[list[float]]
    parts: dict[str, Timing] = dataclasses.field(default_factory=dict)
    chosen: Contender | None = None
    alone: bool = True

    @property
    def drafter(self) -> Drafter:
        """Whose tree decoded."""
        return (self.chosen or self.contender).drafter

    @property
    def candidates(self) -> int:
        """Of the tree that decoded, the root not included; 0 for plain decoding."""
        return self.drafter.max_nodes - 1 if self.drafter.max_depth else 0

    @property
    def mixed(self) -> bool:
        """Whether many steps had another number of candidates than the usual one."""
        return max(self.stats.sizes.values(), default=self.stats.steps) < 0.9 * self.stats.steps

    @property
    def stats(self) -> Stats:
        """Counts over all prompts of one repeat."""
        first, *rest = (generation.stats[0] for generation in self.generations)
        return sum(rest, first)

    def choose(self, plain: Contender) -> Contender:
        """The contender with the size that most steps had so far; plain decoding where that is none."""
        sizes = self.stats.sizes
        usual = max(sizes, key=sizes.__getitem__, default=0)
        self.chosen = self.contender.of_size(usual) if usual else plain
        return self.chosen

    def begin(self) -> None:
        """Another repeat."""
        self.decode_seconds.append([])
        self.prefill_seconds.append([])

    def add(self, generation: Generation) -> None:
        """The next prompts', decoded together; texts are the same in every repeat."""
        each = [_of_row(generation, row) for row in range(len(generation.tokens))]
        self.decode_seconds[-1] += [one.decode_seconds for one in each]
        self.prefill_seconds[-1] += [one.prefill_seconds for one in each]
        if len(self.decode_seconds) == 1:
            self.generations += each

    def gather(self) -> None:
        """Adds what other processes did."""
        mine = [dataclasses.replace(generation, memory=None) for generation in self.generations]
        made, *seconds = zip(*processes.gathered((mine, self.decode_seconds, self.prefill_seconds)), strict=True)
        self.generations = processes.whole(made)
        self.decode_seconds, self.prefill_seconds = (
            [processes.whole(repeat) for repeat in zip(*parts, strict=True)] for parts in seconds
        )


def benchmark(
    target: Target,
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    repeats: int = 3,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch: int = 1,
    parts: bool = True,
    shown: int = 0,
    augment: Augment | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Runs the benchmark.

    Args:
      target: the model whose text it is.
      contenders: drafters; plain decoding joins by itself.
      prompts: what to continue, at most `max_new_tokens` tokens each or to an end token.
      repeats: how often everything is decoded.
      sampling, seed: the same for all contenders; the seed is of the first prompt, the others count up from it.
      batch: prompts that are decoded together.
      parts: also time the parts of a step alone, for draft share and loop efficiency.
      shown: entries have, as `shown`, what became of so many prompts, the first ones: a `Generation` of each.
      augment: whose latents lie in the cache of all contenders, plain decoding's too.
      progress: told what is being done, one line at a time.

    Returns:
      One entry of `runs` per contender (`eval/report/text.py` gives the keys), the baseline first.

    Raises:
      UserError: no prompts, one that does not fit the target's context, or targets that end every text at once.
    """
    _check(prompts, repeats)
    field = [Contender(*load_drafter("none", target)), *(c for c in contenders if c.drafter.max_depth)]
    deepest = max(contender.drafter.max_depth for contender in field)
    mine = processes.share(range(len(prompts)))
    groups = [mine[first : first + batch] for first in range(0, len(mine), batch)]
    longest = [max(len(prompts[index].tokens) for index in group) for group in groups]
    before = [max(len(target.opening(prompts[index].tokens)) for index in group) for group in groups]
    needed, more = zip(before, map(len, groups), strict=True), max(catching_up(one.drafter) for one in field)
    capacities = cache_sizes([slots_needed(n, max_new_tokens, deepest, augment, rows) + more for n, rows in needed])

    def decode(contender: Contender, number: int, limit: int = max_new_tokens) -> Generation:
        return generate(
            target,
            [prompts[index].tokens for index in groups[number]],
            drafter=contender.drafter,
            drafter_params=contender.params,
            max_new_tokens=limit,
            sampling=sampling,
            seeds=[seed + index for index in groups[number]],
            typical=contender.typical,
            capacity=capacities[number],
            augment=augment,
        )

    few = min(WARM_UP_TOKENS + first_pause(augment), max_new_tokens)
    kinds = _kinds(target, groups, longest, capacities)
    _compile(target, field, kinds, lambda contender, number: decode(contender, number, few), progress)
    scene = _scene(target, prompts, max_new_tokens, deepest, batch)
    measured, timed = [Measured(contender, [], [], [], alone=batch == 1) for contender in field], None
    for repeat in range(repeats):
        _take_turns(measured, groups, repeat, decode, progress)
        if repeat == 0 and parts and groups:
            timed = _Parts(scene, [one.choose(field[0]) for one in measured], progress)
        if timed is not None:
            timed.sample()
    if timed is not None:
        timed.finish(measured)
    for one in measured:
        one.gather()
    if not measured[0].stats.steps:
        raise UserError("plain decoding ends every text with its first token, so there is no speed to measure")
    runs = [_run(target, one, measured[0], prompts, sampling.temperature == 0 and augment is None) for one in measured]
    return [
        run | ({"shown": one.generations[:shown]} if shown else {}) for run, one in zip(runs, measured, strict=True)
    ]


def _kinds(
    target: Target, groups: Sequence[Sequence[int]], longest: Sequence[int], capacities: Sequence[int]
) -> list[int]:
    """Groups, by number, that need a compilation each."""
    kinds = {}
    for number, (group, length, capacity) in enumerate(zip(groups, longest, capacities, strict=True)):
        # An encoder reads a prompt whole.
        read = [bucket(length, 16)] if target.config.encoder_layers else chunk_sizes(length, len(group))
        kinds[len(group), frozenset(read), capacity] = number
    return list(kinds.values())


def _check(prompts: Sequence[Prompt], repeats: int) -> None:
    if not prompts:
        raise UserError("there is no prompt to decode")
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}")


def _compile(target: Target, field: Sequence[Contender], kinds: Sequence[int], decode, progress) -> None:
    """Everybody decodes a little of a group of every kind: at first plain decoding, whose programs the others share,
    and last, alone, those that measure what their steps cost."""
    plain, *others = field
    alone = jax.default_backend() == "cpu" or mesh_of(target.params) is not None
    together = [one for one in others if not (alone or one.drafter.open_sizes)]
    apart = [one for one in others if one not in together]

    def compile_all(who: Iterable[Contender], run) -> None:
        jobs = [(contender, number) for contender in who for number in kinds]
        for count, _ in enumerate(run(lambda job: decode(*job), jobs), 1):
            contender = jobs[count - 1][0]
            progress(f"compiled {contender.path or contender.drafter.name}, {count} of {len(jobs)}")

    progress(f"compiling {len(kinds)} sizes of caches and prompts for each of {len(field)}")
    compile_all([plain], map)
    if together:
        with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as pool:
            compile_all(together, pool.map)
    compile_all(apart, map)


def _scene(target: Target, prompts: Sequence[Prompt], new_tokens: int, deepest: int, batch: int) -> Scene:
    """Texts as long as the middle prompt; behind an encoder, which reads the prompt, as half of what is written."""
    middle = sorted(len(prompt.tokens) for prompt in prompts)[len(prompts) // 2]
    read, length = (middle, max(1, new_tokens // 2)) if target.config.encoder_layers else (0, middle)
    room = bucket(slots_needed(length, new_tokens, deepest))
    return Scene(target.config, target.params, length, room, batch, read=read)


@turns.alone()
def _take_turns(measured: Sequence[Measured], groups: Sequence[Sequence[int]], repeat: int, decode, progress) -> None:
    """Everybody decodes every group of prompts once."""
    for one in measured:
        one.begin()
    for number, group in enumerate(groups):
        progress(f"repeat {repeat + 1}, prompt {group[0] + 1}, {number + 1} of {len(groups)}")
        # Nobody is always the first to find the caches as another left them.
        first = (repeat + number) % len(measured)
        for one in [*measured[first:], *measured[:first]]:
            one.add(decode(one.contender, number))


def _of_row(generation: Generation, row: int) -> Generation:
    """What became of one prompt of a batch, with its share of the seconds."""
    lists = ("tokens", "writers", "stats", "augmentations")
    shared = ("prefill_seconds", "decode_seconds", "augment_seconds")
    rows: dict[str, Any] = {name: [getattr(generation, name)[row]] for name in lists}
    seconds = {name: getattr(generation, name) / len(generation.tokens) for name in shared}
    return dataclasses.replace(generation, texts=generation.texts[row : row + 1], memory=None, **rows, **seconds)


class _Parts:
    """The parts of everybody's step, sampled after each repeat so that they see the machine as the decodes do."""

    def __init__(self, scene: Scene, field: Sequence[Contender], progress: Callable[[str], None]):
        self._parts: list[dict[str, Timed]] = []
        for contender in field:
            chosen = step_parts(scene, contender.drafter, contender.params)
            names = ("draft", "choice", "network", "forward") if contender.drafter.max_depth else ("forward",)
            self._parts.append({name: chosen[name] for name in names if name in chosen})
        self._seconds: list[dict[str, list[float]]] = [{name: [] for name in parts} for parts in self._parts]
        for contender, parts in zip(field, self._parts, strict=True):
            for name, part in parts.items():
                progress(f"compiling {contender.drafter.name}, {name} alone")
                part.sample()

    @turns.alone()
    def sample(self) -> None:
        """A few more samples of every part, in turn."""
        for _ in range(SAMPLES_OF_PARTS):
            for parts, seconds in zip(self._parts, self._seconds, strict=True):
                for name, part in parts.items():
                    seconds[name].append(part.sample())

    def finish(self, measured: Sequence[Measured]) -> None:
        """Hands everybody the summary of its samples."""
        for one, seconds in zip(measured, self._seconds, strict=True):
            one.parts = {name: summary(samples) for name, samples in seconds.items()}


def _run(target: Target, one: Measured, baseline: Measured, prompts: Sequence[Prompt], greedy: bool) -> dict[str, Any]:
    """An entry of `runs`."""
    stats = one.stats
    rates, base_rates = _question_rates(one, prompts), _question_rates(baseline, prompts)
    tokens_per_second = _headline(rates)
    speedup = tokens_per_second / _headline(base_rates)
    difference = _first_difference(target, one, baseline, prompts, greedy)
    run = {
        "drafter": one.contender.drafter.name,
        "path": one.contender.path,
        "settings": one.drafter.to_record(),
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_repeats": [statistics.fmean(repeat) for repeat in rates],
        "speedup": speedup,
        "speedup_interval": _speedup_interval(rates, base_rates) if one.alone else [],
        "acceptance_length": stats.acceptance_length,
        "acceptance_length_per_turn": _per_turn([generation.stats[0] for generation in one.generations]),
        "acceptance_length_interval": _acceptance_interval(one, prompts),
        "identical_to_baseline": difference is None,
        "first_difference": difference,
        "lossy": one.contender.typical is not None,
        "new_tokens": sum(len(generation.tokens[0]) for generation in one.generations),
        "distinct_token_share": distinct_share([generation.tokens[0] for generation in one.generations]),
        "steps": stats.steps,
        "candidates": one.candidates,
        "steps_by_candidates": {str(size): steps for size, steps in sorted(stats.sizes.items())},
        "accepted_by_depth": stats.accepted_by_depth.tolist(),
        "accepted_histogram": stats.histogram.tolist(),
        "prefill_seconds": statistics.median(map(sum, one.prefill_seconds)),
        "decode_seconds": statistics.median(map(sum, one.decode_seconds)),
        "categories": _categories(one, baseline, prompts),
    }
    if calls := sum(sum(generation.augmentations) for generation in one.generations):
        seconds = sum(generation.augment_seconds for generation in one.generations)
        run |= {"augmentations": calls, "augmentation_ms": 1e3 * seconds / calls}
    if one.drafter.num_heads and not one.mixed:
        run["tree"] = _tree(one.drafter.ranked_tree, stats)
    if one.parts:
        run |= _efficiency(one, baseline, speedup)
    return run


def _question_rates(one: Measured, prompts: Sequence[Prompt], category: str | None = None) -> list[list[float]]:
    """Tokens/s per repeat and question; questions whose texts end with their first token have none."""
    rates = []
    for seconds in one.decode_seconds:
        committed: dict[str, int] = collections.Counter()
        spent: dict[str, float] = collections.defaultdict(float)
        for prompt, generation, taken in zip(prompts, one.generations, seconds, strict=True):
            if category in (None, prompt.category) and generation.stats[0].steps:
                committed[prompt.question] += generation.stats[0].committed
                spent[prompt.question] += taken
        rates.append([committed[question] / spent[question] for question in committed])
    return rates


def distinct_share(texts: Iterable[Sequence[int]]) -> float:
    """Distinct tokens of a text over all of it, mean over the texts that are not empty: low where text repeats."""
    return statistics.fmean(len(set(text)) / len(text) for text in texts if text)


def _headline(rates: Sequence[Sequence[float]]) -> float:
    return statistics.median(statistics.fmean(repeat) for repeat in rates)


def _speedup_interval(rates: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> list[float]:
    """95% bootstrap interval of the speed-up, as `_headline` has it, over the choice of questions."""
    if len(rates[0]) != len(base[0]):  # Lossy acceptance may end other texts at once.
        return []
    picks = choices(len(rates[0]))
    # By repeat, of every choice the mean over its questions; the median over repeats is that of the whole headline.
    mine, theirs = (np.median([np.asarray(one)[picks].mean(axis=1) for one in of], axis=0) for of in (rates, base))
    return interval(mine / theirs)


def _acceptance_interval(one: Measured, prompts: Sequence[Prompt]) -> list[float]:
    """95% bootstrap interval of the acceptance length over the choice of questions."""
    counts: dict[str, np.ndarray] = collections.defaultdict(lambda: np.zeros(2))
    for prompt, generation in zip(prompts, one.generations, strict=True):
        counts[prompt.question] += (generation.stats[0].committed, generation.stats[0].steps)
    committed, steps = np.stack([count for count in counts.values() if count[1]]).T
    return ratio_interval(committed, steps)


def _first_difference(
    target: Target, one: Measured, baseline: Measured, prompts: Sequence[Prompt], greedy: bool
) -> dict[str, Any] | None:
    """Where a text first leaves the baseline's, and if `greedy` how close the target's two best scores are there."""
    for prompt, mine, theirs in zip(prompts, one.generations, baseline.generations, strict=True):
        ours, base = mine.tokens[0], theirs.tokens[0]
        if ours == base:
            continue
        shorter = min(len(ours), len(base))
        shared = next((i for i, pair in enumerate(zip(ours, base, strict=False)) if pair[0] != pair[1]), shorter)
        place: dict[str, Any] = {
            "question": prompt.question,
            "new_token": shared,
            "token": ours[shared] if shared < len(ours) else None,
            "baseline_token": base[shared] if shared < len(base) else None,
        }
        if greedy:
            logits = target.next_scores(prompt.tokens, base[:shared])
            second, best = np.sort(np.asarray(logits))[-2:]
            place["top_2_margin"] = float(best - second)
        return place
    return None


def _categories(one: Measured, baseline: Measured, prompts: Sequence[Prompt]) -> dict[str, Any] | None:
    names = dict.fromkeys(prompt.category for prompt in prompts)
    if list(names) == [""]:
        return None
    table = {}
    for name in names:
        rates, base = _question_rates(one, prompts, name), _question_rates(baseline, prompts, name)
        if not rates[0] or not base[0]:
            continue
        stats = [g.stats[0] for prompt, g in zip(prompts, one.generations, strict=True) if prompt.category == name]
        total = sum(stats[1:], stats[0])
        table[name or "other"] = {
            "speedup": _headline(rates) / _headline(base),
            "acceptance_length": total.acceptance_length,
            "acceptance_length_per_turn": _per_turn(stats),
            "tokens_per_second": _headline(rates),
            "turns": len(stats),
            "steps": total.steps,
            "accepted_by_depth": total.accepted_by_depth.tolist(),
            "accepted_histogram": total.histogram.tolist(),
        }
    return table


def _per_turn(stats: Sequence[Stats]) -> float:
    """Mean of the acceptance lengths of texts, without those that took no step."""
    return statistics.fmean([one.acceptance_length for one in stats if one.steps] or [1.0])


def _tree(tree: Topology | None, stats: Stats) -> dict[str, Any]:
    """Paths with the steps that accepted each node, and those that accepted its parent (the root: all)."""
    assert tree is not None
    accepted = stats.accepted_by_node[1 : tree.size].tolist()
    reached = [stats.steps, *accepted]
    return {
        "paths": tree.to_record(),
        "accepted": accepted,
        "visits": [reached[parent] for parent in tree.parent[1:]],
    }


def _efficiency(one: Measured, baseline: Measured, speedup: float) -> dict[str, Any]:
    """Draft share, loop efficiency and the milliseconds that they are made of."""
    parts = {f"{name}_ms": timing.median for name, timing in one.parts.items()}
    step_ms = 1e3 * statistics.median(map(sum, one.decode_seconds)) / max(1, one.stats.steps)
    if "draft" not in one.parts or one.mixed:
        return {"parts": {**parts, "step_ms": step_ms}}
    plain = baseline.parts["forward"].median
    network = network_ms(one.parts)
    ideal = one.stats.acceptance_length * plain / (one.parts["forward"].median + network)
    return {
        "parts": {**parts, "network_ms": network, "step_ms": step_ms},
        "draft_share": one.parts["draft"].median / step_ms,
        "loop_efficiency": speedup / ideal,
    }
