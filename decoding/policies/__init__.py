"""How a draft tree grows from a draft network; every way by the name that `drafter.json` gives it."""

import ast
import re
from typing import Any

from decoding.policies.confidence import Confidence
from decoding.policies.dyspec import DySpec
from decoding.policies.policy import DraftNetwork, Scores, TreePolicy
from decoding.policies.rsd import StochasticBeam
from decoding.policies.scheduled import Scheduled
from decoding.policies.slots import Expanding, Slots
from decoding.policies.static import Static
from models import schema
from models.errors import UserError

__all__ = [
    "POLICIES",
    "Confidence",
    "DraftNetwork",
    "DySpec",
    "Expanding",
    "Scheduled",
    "Scores",
    "Slots",
    "Static",
    "StochasticBeam",
    "TreePolicy",
    "parse_policy",
    "read_policy",
]

POLICIES: dict[str, type[TreePolicy]] = {
    "static": Static,
    "stochastic_beam": StochasticBeam,
    "dyspec": DySpec,
    "confidence": Confidence,
    "scheduled": Scheduled,
    "slots": Slots,
    "accum_logp": Expanding,
}


def parse_policy(text: str) -> TreePolicy:
    """A policy from a command line: `KIND` or `KIND:name=value,...`, as in `static:tree=chain:4,draws=top`; several
    values of one name stand in parentheses.

    Raises:
      UserError: an unknown kind or name, or a value that does not fit.
    """
    kind, _, rest = text.partition(":")
    record: dict = {"kind": kind}
    for item in filter(None, re.split(r",(?![^(]*\))", rest)):
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--policy {text!r}: expected name=value, got {item!r}")
        try:
            record[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            record[name] = value
    return read_policy(record, "policy", f"--policy {text!r}")


def read_policy(raw: Any, where: str, place: str) -> TreePolicy:
    """A policy of any kind from its record (`TreePolicy.to_record`), the entry `where` of `place`.

    Raises:
      UserError: what does not fit.
    """
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in POLICIES:
        raise UserError(f"{place}: {where}.kind must be one of {', '.join(POLICIES)}, got {kind!r}")
    return schema.parse(POLICIES[kind], {key: value for key, value in raw.items() if key != "kind"}, where, place)
