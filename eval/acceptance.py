"""How many tokens a target forward commits, by method and by budget: one table, trees of equal size.

    python -m eval.acceptance --target DIR --data DIR --out DIR --methods medusa=DIR hydra=DIR \
        eagle-1=DIR@eagle-1 eagle-2=DIR@confidence ... [--budgets 8,16,32,64] [--temperatures 0,1]
    python -m eval.acceptance --target DIR --prompts FILE --chat --out DIR --methods ...

Acceptance length depends on how large a tree is and on how well it was chosen. So methods are compared at equal
*budgets*, candidates besides the root, and every static tree is chosen in the same way (`eval/text/budget.py`), on
calibration prompts, none of which is decoded for the table. Every text is compared with plain decoding's. Greedily all
must be equal; at a temperature those of the rules `match` and `point` must be equal too, token for token, while the
sampled rules promise the distribution alone (`eval/losslessness.py` tests that one).

Prompts are the beginnings of a data set's documents, or the first turns of a file of questions
(`eval/text/prompts.py`), of which every other one calibrates. A document that begins as one of those measured does,
with the same licence perhaps, does not calibrate.

A method is LABEL=SPEC[@POLICY]: SPEC is a drafter directory or the name of a drafter without parameters, and POLICY
says how its tree grows where there is more than one way: by a name of `decoding/policies/published.py`, or written out,
`slots:depth=7` for instance; its size is the budget's.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from decoding.drafter import Drafter
from decoding.drafters.registry import load_drafter
from decoding.generate import Generation
from decoding.sampling import Sampling
from decoding.spread import generate_together
from decoding.stats import Stats
from decoding.trees import SAMPLED_RULES
from eval.measure.intervals import ratio_interval
from eval.measure.progress import Progress
from eval.report.acceptance import print_table, write_report
from eval.report.page import keep_results, write_results
from eval.text.benchmark import distinct_share
from eval.text.budget import Fitter, check_policy, parse_any_policy
from eval.text.prompts import Prompt, document_prompts, encode_questions, read_questions
from eval.text.results import describe_target
from models import command_line, processes
from models.command_line import add_distributed, add_mesh, add_overwrite, at_least, numbers
from models.errors import UserError, exit_on_user_error
from models.formats.target import Target, load_target
from models.sharding import parse_mesh

BUDGETS = (8, 16, 32, 64)
TEMPERATURES = (0.0, 1.0)
_NOT_RECORDED = ("out", "overwrite", "distributed")


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A row of the table.

    Attributes:
      label: what people call it.
      drafter: its static part; tree and depth are fitted to each budget.
      params: its parameters.
      policy: how its tree grows (`eval.text.budget.parse_any_policy`), or "" for the drafter's only way.
      path: the directory it came from.
    """

    label: str
    drafter: Drafter
    params: Any = None
    policy: str = ""
    path: str | None = None


def parse_method(text: str, target: Target) -> Method:
    """A method from LABEL=SPEC[@POLICY].

    Raises:
      UserError: another form, a policy that is not one, or a drafter that cannot be loaded.
    """
    label, _, rest = text.partition("=")
    spec, _, policy = rest.partition("@")
    if not label or not spec:
        raise UserError(f"a method is written LABEL=DRAFTER or LABEL=DRAFTER@POLICY, got {text!r}")
    if policy:
        parse_any_policy(policy)
    drafter, params = load_drafter(spec, target)
    return Method(label, drafter, params, policy, spec if params is not None else None)


def decode(
    target: Target, prompts: Sequence[Prompt], new_tokens: int, temperature: float, drafter=None, params=None
) -> Generation:
    """All prompts in one batch per process; a prompt's draws are keyed by its place in the list, whoever drafts."""
    return generate_together(
        target,
        [prompt.tokens for prompt in prompts],
        drafter=drafter,
        drafter_params=params,
        max_new_tokens=new_tokens,
        sampling=Sampling(temperature),
    )


def study(
    target: Target,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    calibration: Sequence[Prompt],
    *,
    new_tokens: int = 96,
    budgets: Sequence[int] = BUDGETS,
    temperatures: Sequence[float] = TEMPERATURES,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Decodes the prompts by every method, at every budget and temperature.

    Args:
      target: whose text it is.
      methods: the rows of the table; labels are distinct.
      prompts: what is decoded.
      calibration: prompts to choose static trees by.
      new_tokens: most tokens of each text.
      budgets: candidates besides the root.
      temperatures: 0 is greedy.
      progress: told what is being done.

    Returns:
      One entry per method, temperature and budget that fit together; `eval/report/acceptance.py` gives the keys.

    Raises:
      UserError: no prompts, repeated labels, a prompt that is in both lists, a policy for a drafter without, a fitted
        drafter that does not propose exactly as many candidates as its budget, or none that fits any.
    """
    _check_study(methods, prompts, calibration, budgets)
    cells = []
    for temperature in temperatures:
        progress(f"temperature {temperature:g}, plain decoding")
        plain = decode(target, prompts, new_tokens, temperature)
        for place, method in enumerate(methods):

            def calibrate(drafter: Drafter, method=method, temperature=temperature) -> Stats:
                progress(f"temperature {temperature:g}, {method.label}, calibrating")
                made = decode(target, calibration, new_tokens, temperature, drafter, method.params)
                return sum(made.stats[1:], made.stats[0])

            fitter = Fitter(method.drafter, method.policy, calibrate)
            for budget in budgets:
                drafter = fitter.fit(budget)
                if drafter is None:
                    progress(f"temperature {temperature:g}, {method.label}, left out: no tree of {budget} candidates")
                    continue
                if drafter.max_nodes != budget + 1:
                    raise UserError(
                        f"{method.label} proposes {drafter.max_nodes - 1} candidates where the budget is {budget}: "
                        f"methods are compared at equal budgets alone"
                    )
                progress(f"temperature {temperature:g}, {method.label}, {budget} candidates")
                made = decode(target, prompts, new_tokens, temperature, drafter, method.params)
                where = {"method": method.label, "temperature": temperature, "budget": budget}
                sampled = drafter.rule(greedy=temperature == 0) in SAMPLED_RULES
                cells.append(where | _cell(drafter, made, plain, sampled, [prompt.category for prompt in prompts]))
            # Every fit is a program of its own, and the system bounds how much compiled code a process may hold. Other
            # parameters for the same drafter, such as those of another seed, run the same programs.
            following = methods[place + 1] if place + 1 < len(methods) else None
            if following is None or (following.drafter, following.policy) != (method.drafter, method.policy):
                jax.clear_caches()
    if not cells:
        raise UserError(f"no method has a tree of exactly {' or '.join(map(str, budgets))} candidates")
    return cells


def apart(calibration: Sequence[Prompt], prompts: Sequence[Prompt]) -> list[Prompt]:
    """The calibration prompts that are not measured."""
    measured = {prompt.tokens for prompt in prompts}
    return [prompt for prompt in calibration if prompt.tokens not in measured]


def _check_study(methods, prompts, calibration, budgets) -> None:
    if not prompts or not calibration:
        raise UserError("there is no prompt to decode, or none to choose trees by")
    labels = [method.label for method in methods]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"two methods are called {repeated[0]!r}: labels must be distinct")
    if min(budgets) < 1:
        raise UserError(f"a budget counts the candidates besides the root and must be at least 1, got {min(budgets)}")
    for method in methods:  # Whether a drafter and its policy go together, before those in front of it are decoded.
        check_policy(method.drafter, method.policy)
    if len(apart(calibration, prompts)) < len(calibration):
        raise UserError("a prompt is among those to measure and among those to choose trees by: they must be disjoint")


def _cell(
    drafter: Drafter, made: Generation, plain: Generation, sampled: bool, categories: Sequence[str]
) -> dict[str, Any]:
    """Counts of one decode, over all texts and by category, and how its texts compare with plain decoding's."""
    stats = sum(made.stats[1:], made.stats[0])
    counts = np.array([(one.committed, one.steps) for one in made.stats if one.steps])
    by_category = {}
    for category in sorted(set(categories) - {""}):
        own = [one for one, its in zip(made.stats, categories, strict=True) if its == category]
        pairs = np.array([(one.committed, one.steps) for one in own if one.steps])
        by_category[category] = {
            "acceptance_length": sum(own[1:], own[0]).acceptance_length,
            "acceptance_length_interval": ratio_interval(*pairs.T) if len(pairs) else None,
            "texts": len(own),
        }
    different = sum(mine != theirs for mine, theirs in zip(made.tokens, plain.tokens, strict=True))
    conditional = stats.conditional_acceptance
    return {
        "candidates": drafter.max_nodes - 1,
        "depth": drafter.max_depth,
        "acceptance_length": stats.acceptance_length,
        "acceptance_length_interval": ratio_interval(*counts.T) if len(counts) else None,
        "by_category": by_category,
        "steps": stats.steps,
        "committed": stats.committed,
        "accepted_by_depth": stats.accepted_by_depth.tolist(),
        "conditional_acceptance": [None if np.isnan(share) else float(share) for share in conditional],
        "conditional_acceptance_intervals": _by_depth(made.stats),
        "texts": len(made.tokens),
        "distinct_token_share": distinct_share(made.tokens),
        # A sampled rule has draws of its own, so equal texts are neither promised nor expected.
        "identical": None if sampled else different == 0,
        "differing_texts": different,
        "tree": None if drafter.topology is None else drafter.topology.to_record(),
    }


def _by_depth(texts: Sequence[Stats]) -> list[list[float] | None]:
    """Intervals of the conditional acceptance, over the texts that reached the depth; None where none did."""
    accepted_XD = np.array([one.accepted_by_depth for one in texts])
    reached_XD = np.concatenate([np.array([[one.steps] for one in texts]), accepted_XD[:, :-1]], axis=1)
    pairs = [(hits[tries > 0], tries[tries > 0]) for hits, tries in zip(accepted_XD.T, reached_XD.T, strict=True)]
    return [ratio_interval(*pair) if len(pair[0]) else None for pair in pairs]


def question_prompts(path: str, target: Target, count: int, chat: bool) -> tuple[list[Prompt], list[Prompt]]:
    """The first turns of questions spread over a file: `count` to measure and as many, in turn with them, to calibrate.

    Raises:
      UserError: no such file, fewer than two questions, or a target without tokenizer or chat template.
    """
    if target.tokenizer is None:
        raise UserError(f"{target.path} has no tokenizer, which questions need")
    questions = [dataclasses.replace(q, turns=q.turns[:1]) for q in read_questions(path, 2 * count)]
    if len(questions) < 2:
        raise UserError(f"{path} holds one question, but some are measured and others choose trees")
    prompts = encode_questions(questions, target.tokenizer, lambda tokens: [], chat)
    return prompts[::2], prompts[1::2]


def _describe(method: Method, target: Target) -> dict[str, Any]:
    # As many as its directory holds: what is loaded has besides what only decoding wants.
    init = functools.partial(method.drafter.init_params, target.config)
    leaves = jax.tree.leaves(jax.eval_shape(init, target.params, jax.random.key(0)))
    return {
        "label": method.label,
        "drafter": method.drafter.name,
        "growth": method.policy or None,
        "path": method.path,
        # A draft vocabulary's list of tokens is none.
        "parameters": sum(leaf.size for leaf in leaves if np.issubdtype(leaf.dtype, np.floating)),
    }


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("eval.acceptance", __doc__)
    parser.add_argument("--target", required=True, help="target directory")
    parser.add_argument("--methods", required=True, nargs="+", metavar="LABEL=SPEC[@POLICY]", help="rows of the table")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="data set directory; its documents' beginnings are the prompts")
    source.add_argument("--prompts", help="file of questions, whose first turns are the prompts")
    parser.add_argument("--chat", action="store_true", help="put questions in the tokenizer's chat template")
    parser.add_argument("--split", default="valid", help="its split to decode")
    parser.add_argument("--calibration_split", default="train", help="its split to choose trees by")
    parser.add_argument("--num_prompts", type=at_least(1), default=40, help="prompts of each")
    parser.add_argument("--prompt_tokens", type=at_least(1), default=32, help="their length")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=96, help="most tokens of each text")
    parser.add_argument("--budgets", type=numbers(int), default="8,16,32,64", help="candidates besides the root")
    parser.add_argument("--temperatures", type=numbers(float), default="0,1", help="0 is greedy")
    parser.add_argument("--out", required=True, help="directory for results.json and report.html")
    add_overwrite(parser)
    add_mesh(parser)
    add_distributed(parser)
    args = parser.parse_args(argv)
    if args.chat and not args.prompts:
        raise UserError("--chat is for questions: give --prompts, not --data")
    for temperature in args.temperatures:
        Sampling(temperature)  # Or a bad one would be found behind the work for those before it.
    processes.start(args.distributed)
    keep_results(args.out, args.overwrite)
    target = load_target(args.target, mesh=parse_mesh(args.mesh) if args.mesh else None)
    methods = [parse_method(text, target) for text in args.methods]
    if args.prompts:
        prompts, calibration = question_prompts(args.prompts, target, args.num_prompts, args.chat)
    else:
        prompts, calibration = (
            document_prompts(args.data, split, target, args.num_prompts, args.prompt_tokens)
            for split in (args.split, args.calibration_split)
        )
        calibration = apart(calibration, prompts)
    with Progress() as progress:
        cells = study(
            target,
            methods,
            prompts,
            calibration,
            new_tokens=args.max_new_tokens,
            budgets=args.budgets,
            temperatures=args.temperatures,
            progress=progress,
        )
    results = {
        "config": {name: value for name, value in vars(args).items() if name not in _NOT_RECORDED},
        "target": describe_target(target),
        "methods": [_describe(method, target) for method in methods],
        "cells": cells,
    }
    write_results(results, write_report, args.out)
    print_table(results)
    print(f"\nwrote {args.out}/results.json and {args.out}/report.html")


if __name__ == "__main__":
    main()
