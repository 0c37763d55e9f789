"""How a draft tree grows from an autoregressive draft network; every way by the name that `drafter.json` gives it."""

import ast

from decoding.policies.confidence import Confidence
from decoding.policies.dyspec import DySpec
from decoding.policies.policy import DraftNetwork, TreePolicy
from decoding.policies.rsd import StochasticBeam
from decoding.policies.static import Static
from models.errors import UserError

__all__ = ["POLICIES", "Confidence", "DraftNetwork", "DySpec", "Static", "StochasticBeam", "TreePolicy", "parse_policy"]

POLICIES: dict[str, type[TreePolicy]] = {
    "static": Static,
    "stochastic_beam": StochasticBeam,
    "dyspec": DySpec,
    "confidence": Confidence,
}
TreePolicy.known = POLICIES


def parse_policy(text: str) -> TreePolicy:
    """A policy from a command line: `KIND` or `KIND:name=value,...`, as in `static:tree=chain:4,draws=top`.

    Raises:
      UserError: an unknown kind or name, or a value that does not fit.
    """
    kind, _, rest = text.partition(":")
    record: dict = {"kind": kind}
    for item in filter(None, rest.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--policy {text!r}: expected name=value, got {item!r}")
        try:
            record[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            record[name] = value
    return TreePolicy.from_record(record, "policy", f"--policy {text!r}")
