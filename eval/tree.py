"""Chooses a draft tree for the present device, from measured costs and measured head accuracies.

    python -m eval.tree --target DIR --drafter DIR [--prompts FILE | --data DIR] [--max_nodes 64] [--write]
    python -m eval.tree --target DIR --drafter DIR --tree TREE [--write]
    python -m eval.tree --target DIR --drafter DIR --policy KIND[:NAME=VALUE,...] [--write]
    python -m eval.tree --target DIR --drafter DIR --calibrate [--policy ...] [--prompts FILE | --data DIR] [--write]

1. The target continues the prompts greedily, and the heads, teacher-forced on that text, are asked for the rank of
   every token among their guesses. That gives the accuracy of each rank at each depth.
2. A greedy search grows nested trees from the accuracies (Medusa, section 3.2), once for every limit on the depth.
3. For every tree the loop is walked through the text by the ranks, which gives the acceptance length it would have had.
4. The time of a step is measured here: the target's forward against rows, each level of `draft` against the nodes that
   it expands, and what the loop adds to a forward.
5. The tree with the most tokens per second wins; `--write` puts it into the drafter's directory.

So it is for drafters made of heads, whose levels are timed apart. Others with a budget, such as networks with a policy,
are fitted to 2, 4, .. rows (`eval/text/budget.py`): the acceptance length is expected from counts of a wide tree, or,
where a policy's trees are dynamic, decoded; and of each size a whole step is timed.

`--tree` and `--policy` measure nothing: they check what is given, and `--write` puts it there. Drafters made of heads
have a tree, draft models and EAGLE heads a policy (`decoding/policies`), which a tree makes static.

`--calibrate` makes the confidences mean what they say by which the policy `scheduled` cuts chains: the prompts are
decoded with whole chains, at `--temperature`, and slot by slot a temperature of the confidence is chosen such that the
product up to there is off by the least (`decoding/calibration.py`). Prompts should be none that a drafter learnt from.
With `--speed` forwards of 1 to `--max_nodes` rows are timed too, and the policy then offers no slot that does not pay
for its row.

The module is called `tree` because the command is `python -m eval.tree`. As `eval.tree`, run from the project's root,
it does not shadow the library `tree` that TFDS imports, which a top-level `tree.py` would.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from decoding.calibration import calibration_error, recorded_drafts, sequential_temperatures
from decoding.drafter import Drafter
from decoding.drafters.registry import load_drafter, write_tree
from decoding.generate import bucket, generate
from decoding.policies import TreePolicy, parse_policy
from decoding.stats import Stats
from decoding.tree_search import RANKS, Acceptance, expected_acceptance, nested_trees, walk
from decoding.trees import Topology, load_topology
from eval.measure.parts import Scene, Step, draft_part, rows_forward
from eval.measure.progress import Progress
from eval.measure.timing import Timed, measure
from eval.text.budget import Fitter
from eval.text.metrics import head_ranks
from eval.text.prompts import BUILT_IN, Question, Room, document_prompts, encode_questions, read_questions
from models import command_line, processes
from models.command_line import add_distributed, add_mesh, at_least
from models.errors import UserError, exit_on_user_error
from models.formats.target import Target, load_target
from models.sharding import parse_mesh

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # Of the target's forward, measured; between them interpolated.
HEAD_ROWS = (1, 4, 16)  # That a level of `draft` is timed at.
SIZES = (2, 4, 8, 16, 32, 64)  # Rows of the trees that a drafter with a budget is fitted to.


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A tree with what is expected of it.

    Attributes:
      tree: the candidates, or the policy that makes them; None for a drafter with neither.
      rows: that go through the target.
      depth: of the deepest.
      acceptance: tokens per step on the calibration text.
      forward_ms: the target on its rows.
      draft_ms: the heads on theirs; of a whole step what is neither the target's nor the loop's.
      step_ms: a whole step.
    """

    tree: Topology | TreePolicy | None
    rows: int
    depth: int
    acceptance: float
    forward_ms: float
    draft_ms: float
    step_ms: float

    @property
    def tokens_per_second(self) -> float:
        """What the choice maximises."""
        return 1e3 * self.acceptance / self.step_ms


@dataclasses.dataclass(frozen=True)
class Choice:
    """The outcome of a search.

    Attributes:
      best: the winner.
      plain: plain decoding, the bare root.
      table: the best candidate of each number of rows, in order.
      accuracy: share of places where the rank-k guess of each depth is right, given the true path above it; None where
        that was not counted.
    """

    best: Candidate
    plain: Candidate
    table: list[Candidate]
    accuracy: Float[np.ndarray, "D K"] | None

    @property
    def tree(self) -> Topology | TreePolicy | None:
        """The tree to use."""
        return self.best.tree


def choose_tree(
    target: Target,
    drafter: Drafter,
    drafter_params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    max_nodes: int = 64,
    rows: Sequence[int] = ROWS,
    rounds: int = 7,
    progress: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Searches the tree that decodes fastest here.

    Args:
      target: the model.
      drafter: heads; the tree they have now plays no part.
      drafter_params: their parameters.
      prompts: calibration prompts, token ids; the texts that are judged are their greedy continuations.
      max_new_tokens: of each continuation.
      max_nodes: most rows of the target's forward, root included.
      rows: at which the forward is timed.
      rounds: samples of each timing.
      progress: told what is being done.

    Raises:
      UserError: `max_nodes` leaves no room for a candidate, or the continuations are shorter than the heads reach.
    """
    _check_nodes(max_nodes)
    progress("decoding the calibration prompts")
    ranks = calibration_ranks(target, drafter, drafter_params, prompts, max_new_tokens)
    width = min(RANKS, target.config.vocab_size)
    accuracy = Acceptance.of_ranks(np.concatenate(ranks, axis=1), width).accuracy
    length = int(np.median([len(prompt) for prompt in prompts])) + max_new_tokens // 2
    cost = _measure_cost(target, drafter, drafter_params, length, [*rows, max_nodes], max_nodes, rounds, progress)
    progress("searching")
    candidates = [cost.candidate(tree, walk(ranks, tree)) for tree in nested_trees(accuracy, max_nodes - 1)]
    if not candidates:
        raise UserError("no head guessed a single token of the calibration text: there is no tree to build")
    table = {}
    for candidate in sorted(candidates, key=lambda c: (c.rows, c.tokens_per_second)):
        table[candidate.rows] = candidate
    best = max(candidates, key=lambda candidate: candidate.tokens_per_second)
    return Choice(best, cost.candidate(Topology(()), 1.0), list(table.values()), accuracy)


def choose_size(
    target: Target,
    drafter: Drafter,
    drafter_params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    max_nodes: int = 64,
    rounds: int = 7,
    progress: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Searches the size of the drafter's trees that decodes fastest here; arguments as for `choose_tree`.

    Raises:
      UserError: `max_nodes` leaves no room for a candidate, or the drafter's trees have no size to choose.
    """
    _check_nodes(max_nodes)

    def decode(drafter: Drafter) -> Stats:
        progress(f"decoding the calibration prompts with {drafter.max_nodes - 1} candidates")
        settings = dict(drafter=drafter, drafter_params=drafter_params, max_new_tokens=max_new_tokens)
        made = generate(target, prompts, **settings)
        return sum(made.stats[1:], made.stats[0])

    fitter = Fitter(drafter, None, decode)
    fitted = {rows: one for rows in SIZES if rows <= max_nodes and (one := fitter.fit(rows - 1)) is not None}
    if not fitted:
        raise UserError(f"{drafter.name} has no tree of at most {max_nodes} rows")
    counts = fitter.acceptance
    accuracy = None if counts is None else counts.accuracy
    lengths = {
        rows: decode(one).acceptance_length
        if one.topology is None or accuracy is None
        else expected_acceptance(one.topology, accuracy)
        for rows, one in fitted.items()
    }
    length = int(np.median([len(prompt) for prompt in prompts])) + max_new_tokens // 2
    scene = Scene.with_room(target.config, target.params, length, max(one.max_depth for one in fitted.values()))
    parts: dict[str, Timed] = {f"forward {rows}": rows_forward(scene, rows) for rows in (1, *fitted)}
    parts |= {f"step {rows}": Step(scene, one, drafter_params) for rows, one in fitted.items()}
    parts["plain"] = Step(scene, *load_drafter("none", target))
    ms = {name: timing.median for name, timing in measure(parts, rounds, progress).items()}
    loop = ms["plain"] - ms["forward 1"]
    table = []
    for rows, one in fitted.items():
        forward, step = ms[f"forward {rows}"], ms[f"step {rows}"]
        tree = one.tree_policy or one.topology
        draft = max(0.0, step - forward - loop)
        table.append(Candidate(tree, rows, one.max_depth, lengths[rows], forward, draft, step))
    plain = Candidate(None, 1, 0, 1.0, ms["forward 1"], 0.0, ms["plain"])
    return Choice(max(table, key=lambda candidate: candidate.tokens_per_second), plain, table, accuracy)


def _check_nodes(max_nodes: int) -> None:
    if max_nodes < 2:
        raise UserError(
            f"a draft tree needs the root and at least one candidate: max_nodes must be 2 or more, got {max_nodes}"
        )


def calibration_ranks(
    target: Target, drafter: Drafter, drafter_params: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[Int[np.ndarray, "D N"]]:
    """Per prompt, the ranks of the true tokens at every place of its greedy continuation where a step may start.

    Raises:
      UserError: every continuation is shorter than the heads reach.
    """
    made = generate(target, prompts, max_new_tokens=max_new_tokens)
    texts = [[*prompt, *new] for prompt, new in zip(prompts, made.tokens, strict=True)]
    padded = np.zeros((len(texts), bucket(max(map(len, texts)))), np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    ranks_DBT = head_ranks(target, drafter, drafter_params, padded)
    depth = len(ranks_DBT)
    # The first root is the first new token; the feature that chose it stands one place before.
    spans = [(len(prompt) - 1, len(text) - 1 - depth) for prompt, text in zip(prompts, texts, strict=True)]
    ranks = [ranks_DBT[:, row, first:end] for row, (first, end) in enumerate(spans) if end > first]
    if not ranks:
        raise UserError(
            f"the continuations of the prompts are shorter than the {depth} heads reach: ask for more tokens"
        )
    return ranks


@dataclasses.dataclass(frozen=True)
class _Cost:
    """Measured milliseconds: of the target's forward by rows, of each level of `draft` by rows, of the loop around."""

    forward: dict[int, float]
    levels: list[dict[int, float]]
    overhead: float

    def candidate(self, tree: Topology, acceptance: float) -> Candidate:
        forward = _interpolate(self.forward, tree.size)
        rows = [len(tree.expanded(depth)) for depth in range(tree.max_depth)]
        draft = sum(_interpolate(level, count) for level, count in zip(self.levels, rows, strict=False))
        step = forward + draft + self.overhead
        return Candidate(tree, tree.size, tree.max_depth, acceptance, forward, draft, step)


def _interpolate(points: dict[int, float], rows: int) -> float:
    """Piecewise linear, continued beyond the last point."""
    known = sorted(points)
    if rows > known[-1] and len(known) > 1:
        low, high = known[-2:]
        return points[high] + (points[high] - points[low]) * (rows - high) / (high - low)
    return float(np.interp(rows, known, [points[k] for k in known]))


def probe(level: int, rows: int) -> Topology:
    """A tree whose last level of heads, `level`, is evaluated on `rows` nodes, and every one above it on one node."""
    spine = [(0,) * d for d in range(level)]
    wide = [(*spine[-1], rank) for rank in range(max(2, rows))] if level else [()]
    paths = {(*path, rank) for path in spine[:-1] for rank in range(2)} | {path for path in wide if path}
    expanded = wide[:rows]
    return Topology(tuple(paths | {(*path, 0) for path in expanded} | {(*expanded[0], 1)}))


def _measure_cost(target, drafter, drafter_params, length, rows, max_nodes, rounds, progress) -> _Cost:
    """Times everything in turns: what a level adds to `draft` is a difference, and so is what the loop adds."""
    scene = Scene.with_room(target.config, target.params, length, max_depth=0)
    rows = sorted({1, *(count for count in rows if count <= max_nodes)})
    widest = min(max_nodes // 2, target.config.vocab_size)
    counts = [(1,)] + [tuple(n for n in HEAD_ROWS if n == 1 or n <= widest)] * (drafter.num_heads - 1)
    parts: dict[str, Timed] = {f"forward {count}": rows_forward(scene, count) for count in rows}
    for level, widths in enumerate(counts):
        for count in widths:
            probing = drafter.with_tree(probe(level, count))
            parts[f"draft {level} {count}"] = draft_part(scene, probing, drafter_params)
    parts["plain"] = Step(scene, *load_drafter("none", target))
    ms = {name: timing.median for name, timing in measure(parts, rounds, progress).items()}
    above = [0.0, *(ms[f"draft {level} 1"] for level in range(len(counts) - 1))]
    levels = [
        {count: max(0.0, ms[f"draft {level} {count}"] - above[level]) for count in widths}
        for level, widths in enumerate(counts)
    ]
    forward = {count: ms[f"forward {count}"] for count in rows}
    return _Cost(forward, levels, max(0.0, ms["plain"] - ms["forward 1"]))


def print_choice(choice: Choice) -> None:
    """Accuracies, and the table of trees by rows with the winner marked."""
    if choice.accuracy is not None:
        print("accuracy of the guesses by rank, in percent")
        for depth, row in enumerate(choice.accuracy, 1):
            print(f"  depth {depth}  " + " ".join(f"{100 * share:5.1f}" for share in row))
    head = ("rows", "depth", "forward ms", "draft ms", "step ms", "acceptance", "tokens/s", "speed-up")
    print("".join(name.rjust(12) for name in head))
    for candidate in [choice.plain, *(c for c in choice.table if c.rows in ROWS or c is choice.best)]:
        ratio = candidate.tokens_per_second / choice.plain.tokens_per_second
        cells = (
            f"{candidate.rows}",
            f"{candidate.depth}",
            f"{candidate.forward_ms:.3f}",
            f"{candidate.draft_ms:.3f}",
            f"{candidate.step_ms:.3f}",
            f"{candidate.acceptance:.3f}",
            f"{candidate.tokens_per_second:.1f}",
            f"{ratio:.2f}x",
        )
        print("".join(cell.rjust(12) for cell in cells) + ("  <- best" if candidate is choice.best else ""))


def _calibration_prompts(args: argparse.Namespace, target: Target) -> list[list[int]]:
    if args.data is not None:
        prompts = document_prompts(args.data, args.split, target, args.num_prompts, args.prompt_tokens)
        return [list(prompt.tokens) for prompt in prompts]
    if target.tokenizer is None:
        raise UserError(f"{args.target} has no tokenizer, so it cannot read prompts; give --data")
    if args.prompts is not None:
        questions = [dataclasses.replace(q, turns=q.turns[:1]) for q in read_questions(args.prompts, args.num_prompts)]
    else:
        questions = [Question(str(i), (text,)) for i, text in enumerate(BUILT_IN)]
    room = Room(args.max_new_tokens, target.config.max_position)
    prompts = encode_questions(questions, target.tokenizer, lambda tokens: [], room=room)
    return [list(prompt.tokens) for prompt in prompts]


def calibrate(
    target: Target,
    drafter: Drafter,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    speed: Sequence[float] = (),
) -> TreePolicy:
    """The drafter's policy with the temperatures of its confidences, and `speed`; prints what they are worth.

    Raises:
      UserError: the policy does not go by confidences.
    """
    policy = drafter.tree_policy and drafter.tree_policy.calibrated(())
    if policy is None:
        raise UserError("--calibrate is for the policy scheduled: give --policy scheduled:depth=7,threshold=0.5")
    plain = drafter.with_policy(policy)
    plain.check(target.config)
    logits, survived = recorded_drafts(target, plain, params, prompts, max_new_tokens, temperature)
    if not len(logits):
        raise UserError("every text ended with its first draft: ask for more tokens")
    found = sequential_temperatures(logits, survived)
    print(f"{len(logits)} drafts; how far the product of confidences is off, in percent")
    print("".join(name.rjust(14) for name in ("slot", "survive", "before", "temperature", "after")))
    products = [np.cumprod(1 / (1 + np.exp(-logits / by)), axis=1) for by in (1.0, found)]
    for slot, by in enumerate(found):
        before, after = (100 * calibration_error(each[:, slot], survived[:, slot]) for each in products)
        cells = f"{slot + 1}", f"{100 * survived[:, slot].mean():.1f}", f"{before:.1f}", f"{by:.3f}", f"{after:.1f}"
        print("".join(cell.rjust(14) for cell in cells))
    chosen = policy.calibrated([float(by) for by in found], speed)
    assert chosen is not None
    return chosen


def forward_speed(target: Target, length: int, max_rows: int, rounds: int) -> list[float]:
    """Steps per second of the target's forward over 1, 2, .. `max_rows` rows behind a text of `length` tokens.

    Measured at some, and between them interpolated. Never rising: what was slower on fewer rows was so by chance.
    """
    scene = Scene.with_room(target.config, target.params, length, max_depth=0)
    counts = sorted({count for count in (*ROWS, max_rows) if count <= max_rows})
    with Progress() as progress:
        timings = measure({f"forward {count}": rows_forward(scene, count) for count in counts}, rounds, progress)
    points = {count: timings[f"forward {count}"].median for count in counts}
    milliseconds = [_interpolate(points, rows) for rows in range(1, max_rows + 1)]
    return [float(f"{1e3 / slowest:.5g}") for slowest in np.maximum.accumulate(milliseconds)]


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("eval.tree", __doc__)
    parser.add_argument("--target", required=True, help="target directory")
    parser.add_argument("--drafter", required=True, help="drafter directory")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompts", help="file of calibration prompts; by default a few built-in ones")
    source.add_argument("--data", help="data set directory, whose documents' beginnings are the prompts")
    parser.add_argument("--split", default="train", help="its split; what is measured later is unseen in")
    parser.add_argument("--prompt_tokens", type=at_least(1), default=64, help="length of prompts from a data set")
    parser.add_argument("--num_prompts", type=at_least(1), default=16, help="how many prompts to use")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=128, help="continuation of each prompt")
    parser.add_argument("--max_nodes", type=int, default=64, help="most rows of the tree, root included")
    parser.add_argument("--rounds", type=at_least(1), default=7, help="samples of each timing")
    parser.add_argument(
        "--tree", help="measure nothing and take this tree: a published name, chain:DEPTH or a JSON file"
    )
    parser.add_argument(
        "--policy", "--growth", help="measure nothing and take this policy, as in dyspec:budget=32,depth=5"
    )
    parser.add_argument("--calibrate", action="store_true", help="fit the temperatures of a scheduled chain's cuts")
    parser.add_argument("--speed", action="store_true", help="with --calibrate: time the target's forwards too")
    parser.add_argument("--temperature", type=float, default=0.0, help="that --calibrate decodes at")
    add_mesh(parser)
    add_distributed(parser)
    parser.add_argument("--write", action="store_true", help="put it into the drafter's drafter.json")
    args = parser.parse_args(argv)
    _check_options(args)
    processes.start(args.distributed)
    target = load_target(args.target, mesh=parse_mesh(args.mesh) if args.mesh else None)
    drafter, params = load_drafter(args.drafter, target)
    if args.policy is not None:
        if drafter.tree_policy is None:
            raise UserError(f"the drafter {args.drafter!r} has no policy that --policy could replace")
        policy = parse_policy(args.policy)
        drafter = drafter.with_policy(policy)
        drafter.check(target.config)
    if args.calibrate:
        prompts = _calibration_prompts(args, target)
        length = int(np.median([len(prompt) for prompt in prompts])) + args.max_new_tokens // 2
        speed = forward_speed(target, length, args.max_nodes, args.rounds) if args.speed else []
        policy = calibrate(target, drafter, params, prompts, args.max_new_tokens, args.temperature, speed)
    if args.calibrate or args.policy is not None:
        _write(args, policy, policy.max_nodes)
        return
    if args.tree is not None:
        tree = load_topology(args.tree, "--tree")
        fitted = drafter.with_tree(tree)
        fitted.check(target.config)
        # Drafters with a policy have a tree as a policy that always grows it.
        _write(args, fitted.tree_policy or tree, tree.size)
        return
    choose = choose_tree if drafter.num_heads else choose_size
    with Progress() as progress:
        choice = choose(
            target,
            drafter,
            params,
            _calibration_prompts(args, target),
            max_new_tokens=args.max_new_tokens,
            max_nodes=args.max_nodes,
            rounds=args.rounds,
            progress=progress,
        )
    print_choice(choice)
    if choice.best.tokens_per_second <= choice.plain.tokens_per_second:
        print("plain decoding is expected to be faster than any tree of this drafter on this device")
    _write(args, choice.tree, choice.best.rows)


def _check_options(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together, and where a result could not be written in the end."""
    if not args.calibrate and (args.speed or args.temperature):
        raise UserError("--speed and --temperature go with --calibrate")
    if args.tree is not None and (args.calibrate or args.policy is not None):
        raise UserError("--tree is in place of --policy and --calibrate: give one of them")
    record = Path(args.drafter) / "drafter.json"
    if args.write and not (record.is_file() and os.access(record.parent, os.W_OK)):
        raise UserError(f"--write puts a tree into a drafter directory, and there is no {record} that can be replaced")


def _write(args: argparse.Namespace, tree: Topology | TreePolicy | None, rows: int) -> None:
    if args.write and tree is None:
        raise UserError(f"the tree of {args.drafter!r} cannot be written: it is named by its size, {rows - 1}")
    if args.write and tree is not None:
        processes.on_first(lambda: write_tree(args.drafter, tree))
        print(f"wrote the tree of {rows} rows to {Path(args.drafter) / 'drafter.json'}")


if __name__ == "__main__":
    main()
