"""How a draft tree grows from an autoregressive draft network; every way by the name that `drafter.json` gives it."""

import ast

from decoding.growth.confidence import Confidence
from decoding.growth.dyspec import DySpec
from decoding.growth.network import DraftNetwork, Growth
from decoding.growth.rsd import StochasticBeam
from decoding.growth.static import Static
from models.errors import UserError

__all__ = ["GROWTHS", "Confidence", "DraftNetwork", "DySpec", "Growth", "Static", "StochasticBeam", "parse_growth"]

GROWTHS: dict[str, type[Growth]] = {
    "static": Static,
    "stochastic_beam": StochasticBeam,
    "dyspec": DySpec,
    "confidence": Confidence,
}
Growth.known = GROWTHS


def parse_growth(text: str) -> Growth:
    """A growth from a command line: `KIND` or `KIND:name=value,...`, as in `static:tree=chain:4,draws=top`.

    Raises:
      UserError: an unknown kind or name, or a value that does not fit.
    """
    kind, _, rest = text.partition(":")
    record: dict = {"kind": kind}
    for item in filter(None, rest.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--growth {text!r}: expected name=value, got {item!r}")
        try:
            record[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            record[name] = value
    return Growth.from_record(record, "growth", f"--growth {text!r}")
