"""Speculative decoding against Hugging Face's assisted generation: the same two models, prompts and run.

    python -m eval.assisted --target DIR --draft DIR --data DIR [--draft_length 4] [--out FILE.json]

`--target` and `--draft` are Hugging Face directories of one tokenizer. Four ways to the same greedy text take turns on
held-out prompts: each library with the target alone, and with a chain of a constant `draft_length` candidates from the
draft model. Tokens per second are new tokens over the whole call, prefill included, as a user of `generate` sees it;
medians over rounds, compilation and first calls left out. Needs torch and transformers.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decoding.drafters.registry import build
from decoding.generate import bucket, generate, slots_needed
from decoding.policies import Static
from decoding.trees import chain
from eval.measure.environment import describe_environment
from eval.measure.progress import Progress
from eval.peers import text as peer
from eval.report.files import write_json
from eval.text.prompts import document_prompts
from eval.text.results import describe_target
from models import command_line, load_target, processes, schema
from models.command_line import add_distributed, add_overwrite, at_least, keep_files
from models.errors import UserError, exit_on_user_error

# One way of decoding: prompt tokens -> new tokens, and target forwards where they are counted.
Way = Callable[[list[int]], tuple[list[int], int | None]]


def run(
    target_directory: Path,
    draft_directory: Path,
    data: str,
    *,
    split: str = "valid",
    draft_length: int = 4,
    prompts: int = 8,
    prompt_length: int = 64,
    new_tokens: int = 128,
    rounds: int = 3,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures all four ways.

    Args:
      target_directory: the target.
      draft_directory: the draft model.
      data: data set that prompts are taken from.
      split: of it.
      draft_length: candidates per step.
      prompts: how many.
      prompt_length: tokens of each.
      new_tokens: tokens to decode after each.
      rounds: times that every prompt is decoded every way.
      progress: told what is being done.

    Returns:
      `ways`: name -> tokens_per_s (median over rounds), acceptance_length where it is counted, identical (texts equal
      to plain decoding's, out of `prompts`); the ratios that the README quotes; and what was measured on what.

    Raises:
      UserError: torch or transformers missing, or models that do not fit each other.
    """
    if not peer.is_installed():
        raise UserError(
            "eval.assisted compares with transformers: install torch and transformers (requirements-parity)"
        )
    for name, count in (("rounds", rounds), ("prompts", prompts), ("new_tokens", new_tokens)):
        if count < 1:
            raise UserError(f"{name} must be at least 1, got {count}")
    target, draft = load_target(target_directory), load_target(draft_directory)
    policy = Static(chain(draft_length), "top").to_record()
    drafter = build(
        {"method": "draft_model", "model": schema.resolved(draft.config), "policy": policy}, "the draft model"
    )
    drafter.check(target.config)
    texts = [list(prompt.tokens) for prompt in document_prompts(data, split, target, prompts, prompt_length)]
    capacity = bucket(max(slots_needed(len(text), new_tokens, draft_length) for text in texts))
    settings: dict[str, Any] = dict(max_new_tokens=new_tokens, stop=[], capacity=capacity)

    def ours(**more) -> Way:
        def decode(text: list[int]):
            made = generate(target, [text], **settings, **more)
            return made.tokens[0], made.stats[0].steps

        return decode

    progress("making the transformers models")
    theirs = peer.Assisted(target_directory, draft_directory, new_tokens, draft_length)
    ways: dict[str, Way] = {
        "plain": ours(),
        "draft_model": ours(drafter=drafter, drafter_params=draft.params),
        "transformers": lambda text: (theirs.plain(text), None),
        "transformers_assisted": lambda text: (theirs.assisted(text), None),
    }
    made, seconds = _race(ways, texts, rounds, progress)
    rates = _rates(seconds, len(texts) * new_tokens)
    return {
        "ways": {name: _way(made[name], made["plain"], rates[name]) for name in ways},
        "draft_model_over_assisted": rates["draft_model"] / rates["transformers_assisted"],
        "plain_over_transformers": rates["plain"] / rates["transformers"],
        "draft_length": draft_length,
        "prompts": len(texts),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "target": describe_target(target),
        "draft": describe_target(draft),
        "environment": describe_environment(),
    }


def _race(ways: dict[str, Way], texts: list[list[int]], rounds: int, progress: Callable[[str], None]):
    """What every way made of the texts, and its seconds per round; a round that is not counted comes first."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    made: dict[str, list[tuple[list[int], int | None]]] = {}
    for turn in range(rounds + 1):
        progress(f"round {turn} of {rounds}" if turn else "compiling and warming up")
        spent = dict.fromkeys(ways, 0.0)
        made = {name: [] for name in ways}
        for text in texts:
            for name, way in ways.items():
                started = time.perf_counter()
                made[name].append(way(text))
                spent[name] += time.perf_counter() - started
        for name in ways if turn else ():
            seconds[name].append(spent[name])
    return made, seconds


def _rates(seconds: dict[str, list[float]], tokens: int) -> dict[str, float]:
    """Tokens per second of every way, in the median over rounds of so many tokens each."""
    return {name: tokens / statistics.median(spent) for name, spent in seconds.items()}


def _way(made: Sequence[tuple[list[int], int | None]], plain, rate: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"tokens_per_s": rate}
    if made[0][1] is not None:
        # The first token comes from prefill.
        steps = np.sum([count for _, count in made])
        entry["acceptance_length"] = float(np.sum([len(tokens) - 1 for tokens, _ in made]) / steps)
    entry["identical"] = sum(tokens == reference for (tokens, _), (reference, _) in zip(made, plain, strict=True))
    return entry


def describe(results: dict[str, Any]) -> str:
    """The results as text for a terminal."""
    lines = [f"{'':<22} tokens/s  identical to plain"]
    for name, way in results["ways"].items():
        tau = f"  acceptance length {way['acceptance_length']:.2f}" if "acceptance_length" in way else ""
        lines.append(f"{name:<22} {way['tokens_per_s']:8.1f}  {way['identical']} of {results['prompts']}{tau}")
    lines.append(f"draft model over assisted generation: {results['draft_model_over_assisted']:.2f}x")
    return "\n".join(lines)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("eval.assisted", __doc__)
    parser.add_argument("--target", type=Path, required=True, help="Hugging Face directory of the target")
    parser.add_argument("--draft", type=Path, required=True, help="Hugging Face directory of the draft model")
    parser.add_argument("--data", required=True, help="data set to take prompts from")
    parser.add_argument("--split", default="valid", help="of the data set")
    parser.add_argument("--draft_length", type=at_least(1), default=4, help="candidates per step")
    parser.add_argument("--prompts", type=at_least(1), default=8, help="how many prompts")
    parser.add_argument("--new_tokens", type=at_least(1), default=128, help="tokens per prompt")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="times that every prompt is decoded every way")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    add_overwrite(parser)
    add_distributed(parser)
    args = parser.parse_args(argv)
    processes.start(args.distributed)
    keep_files([args.out], args.overwrite)
    with Progress() as progress:
        results = run(
            args.target,
            args.draft,
            args.data,
            split=args.split,
            draft_length=args.draft_length,
            prompts=args.prompts,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
            progress=progress,
        )
    print(describe(results))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(results, args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
