"""How codes are drawn, as command-line flags: one set for the first model, and where the refiner differs, another."""

import argparse
import dataclasses
from typing import Any

from decoding.images.scales import Drawing
from models.errors import UserError


def add_drawing(parser: Any, defaults: Drawing) -> None:
    """Adds `--guidance`, `--top_k`, `--top_p`, `--temperature`, each with a `--refiner_...` beside it.

    Args:
      parser: the parser, or a group of its arguments.
      defaults: what holds where nothing is given.
    """
    told = {
        "guidance": "extra weight of the class at the last scale, growing from 0 at the first",
        "top_k": "codes kept; 0 means all",
        "top_p": "probability mass kept of those",
        "temperature": "of what is left, one for all or comma-separated one per scale; 0 takes the best code",
    }
    kinds: dict[str, Any] = {"guidance": float, "top_k": int, "top_p": float, "temperature": _temperature}
    for name, text in told.items():
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=kinds[name], default=default, help=text)
    for name in told:
        parser.add_argument(f"--refiner_{name}", type=kinds[name], help=f"the same for the refiner (--{name})")


def drawings(args: argparse.Namespace, smooth: bool = False) -> tuple[Drawing, Drawing]:
    """How the first model draws, and how the refiner does.

    Raises:
      UserError: a value outside its range, or settings of a refiner where `args.refiner` is None.
    """
    first = Drawing(args.guidance, args.top_k, args.top_p, args.temperature, smooth)
    own = {name: getattr(args, f"refiner_{name}") for name in ("guidance", "top_k", "top_p", "temperature")}
    values: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    if values and args.refiner is None:
        raise UserError(f"--refiner_{next(iter(values))} is for a refiner, and there is no --refiner")
    return first, dataclasses.replace(first, **values)


def _temperature(text: str) -> float | tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        told = f"must be a number, or one per scale separated by commas, got {text!r}"
        raise argparse.ArgumentTypeError(told) from None
    return values if len(values) > 1 else values[0]
