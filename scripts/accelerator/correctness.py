"""Is the text right on this device? Every drafter's beside plain decoding's, or counted against the distribution.

    python -m scripts.accelerator.correctness --dtype float64|bfloat16 --out FILE.json [--drafters NAME,...]
    python -m scripts.accelerator.correctness --samples 1024 --batches 1,16 --out FILE.json [--drafters NAME,...]

Greedy texts of a small random target must be equal token for token in float64. In bfloat16 they may part where the
target's two best scores are closer than its rounding, which is then told; behind that place they are not compared.
Sampled strings of a vocabulary of 24 tokens are compared with their exact distribution by chi-square
(`eval/losslessness.py`); a drafter none of whose drafts was ever accepted is right for another's reasons, and `judged`
says so. The file is written anew after each drafter; the exit status is 1 where something is wrong.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from decoding.drafter import Drafter
from decoding.generate import generate
from decoding.sampling import Sampling
from eval.losslessness import check_losslessness, tiny_target
from eval.measure.environment import describe_environment
from eval.measure.lineup import DRAFTERS
from eval.report.files import write_json
from models import command_line
from models.command_line import at_least, listed, numbers
from models.errors import UserError, exit_on_user_error
from models.formats.target import Target

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [0, 3, 3, 7, 1]]
WARM = Sampling(temperature=0.3, top_p=0.95)  # So that 2,048 strings of three tokens fill about eighty cells.
VOCABULARY = 24  # As many as the widest tree asks for, and few enough to count strings of three.
ROUNDING = 2.0**-6  # Of bfloat16's 2**-8, what a few layers make of it; a share of the largest score.


def greedy(target: Target, drafter: Drafter, params: Any, plain: Sequence[Sequence[int]]) -> dict[str, Any]:
    """One drafter's texts of all prompts together, and of the first alone, beside plain decoding's."""
    new = len(plain[0])
    made = generate(target, PROMPTS, drafter=drafter, drafter_params=params, max_new_tokens=new)
    alone = generate(target, PROMPTS[:1], drafter=drafter, drafter_params=params, max_new_tokens=new)
    stats = sum(made.stats[1:], made.stats[0])
    partings = []
    for prompt, ours, theirs in zip(
        [*PROMPTS, PROMPTS[0]], [*made.tokens, *alone.tokens], [*plain, plain[0]], strict=True
    ):
        if (parting := _parting(target, prompt, ours, theirs)) is not None:
            partings.append(parting)
    exact = target.params["embed"]["embedding"].dtype == jnp.float64
    right = not partings if exact else all(one["margin"] <= ROUNDING * one["largest"] for one in partings)
    accepted = stats.acceptance_length
    return {"acceptance_length": accepted, "partings": partings, "judged": accepted > 1, "ok": right}


def _parting(
    target: Target, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]
) -> dict[str, Any] | None:
    """Where two texts part, and how far apart the two best scores are there."""
    if list(ours) == list(theirs):
        return None
    place = next(i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
    logits = np.asarray(target.apply([[*prompt, *theirs[:place]]]).logits[0, -1], np.float64)
    second, best = np.sort(logits)[-2:]
    return {"new_token": place, "margin": float(best - second), "largest": float(np.abs(logits).max())}


def counted(target: Target, drafter: Drafter, params: Any, samples: int, batch: int) -> dict[str, Any]:
    """One drafter's strings, drawn `batch` at a time, against their distribution."""
    (check,) = check_losslessness(target, drafter, params, [1, 2, 3], 3, [WARM], samples, batches=samples // batch)
    found = {
        "rule": check.rule,
        "p": check.test.p_value,
        "degrees": check.test.degrees,
        "acceptance_length": check.acceptance_length,
    }
    return {**found, "ok": check.passed}


def through(names: Sequence[str], target: Target, look: Callable[[Drafter, Any], dict[str, Any]], out: Path) -> bool:
    """Looks at drafter after drafter and writes what was found so far; whether all was well."""
    found: dict[str, Any] = {}
    for name in names:
        drafter = DRAFTERS[name](target.config)
        params = drafter.for_decoding(drafter.init_params(target.config, target.params, jax.random.key(1)))
        found[name] = look(drafter, params)
        verdict = "WRONG" if not found[name]["ok"] else "ok" if found[name]["judged"] else "ok, no draft accepted"
        print(f"{name}: {verdict} {found[name]}", flush=True)
        write_json({"environment": describe_environment(), "drafters": found}, out)
    return all(entry["ok"] for entry in found.values())


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    parser = command_line.parser("scripts.accelerator.correctness", __doc__)
    parser.add_argument("--drafters", type=listed, default=",".join(DRAFTERS), help="comma-separated")
    parser.add_argument("--dtype", choices=["float64", "bfloat16"], help="of greedy texts")
    parser.add_argument("--new_tokens", type=at_least(2), default=128, help="of each text")
    parser.add_argument("--samples", type=at_least(16), help="strings to count, instead of texts")
    parser.add_argument("--batches", type=numbers(int), default="1,16", help="strings drawn together")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    if (args.dtype is None) == (args.samples is None):
        raise UserError("give --dtype, to compare texts, or --samples, to count strings")
    if unknown := [name for name in args.drafters if name not in DRAFTERS]:
        raise UserError(f"there is no drafter {unknown[0]!r}, only {', '.join(DRAFTERS)}")
    if args.samples is not None:
        target = tiny_target(VOCABULARY)

        def look(drafter: Drafter, params: Any) -> dict[str, Any]:
            found = {str(batch): counted(target, drafter, params, args.samples, batch) for batch in args.batches}
            judged = any(entry["acceptance_length"] > 1 for entry in found.values())
            return {"batches": found, "judged": judged, "ok": all(entry["ok"] for entry in found.values())}

    else:
        jax.config.update("jax_enable_x64", args.dtype == "float64")
        target = tiny_target(64, dtype=jnp.dtype(args.dtype), width=64, head_dim=16, mlp_width=96)
        plain = generate(target, PROMPTS, max_new_tokens=args.new_tokens).tokens

        def look(drafter: Drafter, params: Any) -> dict[str, Any]:
            return greedy(target, drafter, params, plain)

    if not through(args.drafters, target, look, args.out):
        sys.exit(1)


if __name__ == "__main__":
    main()
