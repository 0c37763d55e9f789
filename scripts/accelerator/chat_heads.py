"""The heads that `smollm2.py` trains and compares: what each differs in from its own config, and by which trees.

All learn from the same chats in as many steps of as many tokens. A head that is measured with several trees is trained
once.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class Head:
    """One drafter.

    Attributes:
      config: its file in `configs/`, with a variant behind a colon or without.
      changes: what differs from it.
      trees: of each way to grow its tree the name and the policy, as `eval.acceptance` takes it.
      timed: the policy with which it decodes by the clock, as `eval.tree` takes it; "" is the tree it was trained with.
      vocabulary: whether it has a draft vocabulary.
    """

    config: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    trees: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"": ""})
    timed: str = ""
    vocabulary: bool = False


_MUON = {"optimizer.learning_rate": 4e-3}
# As many layers of the target are read as the network has, or as EAGLE-3 reads.
_BLOCKS = {"optimizer.learning_rate": 3e-3, "objective.anchors": 128, "objective.taps": 3}
# As in the published comparison (docs/results.md), which was made before there were draft vocabularies.
_WHOLE = {**_BLOCKS, "objective.taps": 5}
_SPARK = {"objective.rank": 128, "objective.candidates": 64}
# The paper's 2 x 2 is with and without glancing, with the tree of several passes and with a chain.
_FALCON = {"tree": "top", "chain": "chain"}
_SLOTS = {"chain": "chain", "tree": "slots:depth=7"}
_JETSPEC = {"tree": "accum_logp:depth=7", "best_tree": "slots:depth=7"}
_DSPARK = {
    "chain": "chain",
    "scheduled": "scheduled:threshold=0.3,draws=top",
    "lattice": "confidence:top_k=4,depth=7",
}
# By the clock all have 16 candidates.
_EAGLE_TIMED = "confidence:top_k=8,depth=5,total=17"
_PASSES_TIMED = "confidence:top_k=4,depth={},total=17"
_SLOTS_TIMED = "slots:depth=7,total=17"

HEADS: dict[str, Head] = {
    "eagle3": Head("eagle3.py", _MUON, {"": "confidence", "chain": "chain"}, _EAGLE_TIMED, vocabulary=True),
    "eagle31": Head("eagle3.py:eagle31", _MUON, {"": "confidence", "chain": "chain"}, _EAGLE_TIMED, vocabulary=True),
    "eagle3_adamw": Head(
        "eagle3.py",
        {"optimizer.name": "adamw", "optimizer.learning_rate": 1e-3, "optimizer.weight_decay": 0.01},
        {"": "confidence"},
        _EAGLE_TIMED,
        vocabulary=True,
    ),
    "hydra_pp": Head("hydra_pp.py"),
    # As many heads as its tree is deep where few candidates pay: every head has a vocabulary map.
    "hydra_pp_2": Head("hydra_pp.py", {"objective.heads.num_heads": 2}),
    "medusa": Head("medusa.py", _MUON),
    "falcon": Head("falcon.py", _MUON, _FALCON, _PASSES_TIMED.format(4)),
    "falcon_unglanced": Head("falcon.py", {**_MUON, "objective.glancing": "off"}, _FALCON, _PASSES_TIMED.format(4)),
    "falcon_3": Head("falcon.py", {**_MUON, "objective.block": 3}, {"tree": "top"}, _PASSES_TIMED.format(3)),
    "falcon_4": Head("falcon.py", {**_MUON, "objective.block": 4}, {"tree": "top"}, _PASSES_TIMED.format(4)),
    "dflash": Head("dflash.py", _BLOCKS, _SLOTS, _SLOTS_TIMED, vocabulary=True),
    "dflash2": Head("dflash.py:dflash2", _BLOCKS, _SLOTS, _SLOTS_TIMED, vocabulary=True),
    "dflash_whole": Head("dflash.py", _WHOLE, _SLOTS, _SLOTS_TIMED),
    "dspark": Head("dspark.py", {**_BLOCKS, **_SPARK}, _DSPARK, _PASSES_TIMED.format(7), vocabulary=True),
    "domino": Head("domino.py", _BLOCKS, {"chain": "chain"}, vocabulary=True),
    "p_eagle": Head("p_eagle.py", _MUON, {"chain": "chain", "tree": "slots:depth=5"}, vocabulary=True),
    "dspark_whole": Head("dspark.py", {**_WHOLE, **_SPARK}, _DSPARK, _PASSES_TIMED.format(7)),
    "jetspec": Head("jetspec.py", _BLOCKS, _JETSPEC, _SLOTS_TIMED, vocabulary=True),
    "jetspec_1": Head("jetspec.py", {**_BLOCKS, "objective.num_layers": 1}, _JETSPEC, _SLOTS_TIMED, vocabulary=True),
    "jetspec_whole": Head("jetspec.py", _WHOLE, _JETSPEC, _SLOTS_TIMED),
}


def check_heads(names: list[str]) -> None:
    """Raises UserError where a name is none of these."""
    if unknown := [name for name in names if name not in HEADS]:
        raise UserError(f"there is no head {unknown[0]!r}, only {', '.join(HEADS)}")


def methods(name: str, out: Path) -> list[str]:
    """A trained head's rows of the table of `eval.acceptance`, one for each of its trees."""
    rows = []
    for tree, policy in HEADS[name].trees.items():
        label = f"{name}_{tree}" if tree else name
        rows.append(f"{label}={out / name / 'drafter'}" + (f"@{policy}" if policy else ""))
    return rows
