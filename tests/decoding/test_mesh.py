"""Several devices write the text of one, split every cache, and exchange what tensor parallelism needs and no more."""

import json

import pytest

from tests.decoding.drafter_cases import BUSHY

LAYERS = 2
# One agreement per step on whether any row is still going.
DATA_ONLY = {"going": {"all-reduce": 1}}


def forward(layers: int = LAYERS) -> dict[str, int]:
    """Rows of an embedding table split by token are added up; so are the partial products of attention and MLP."""
    return {"all-reduce": 1 + 2 * layers}


def verify(depth: int) -> dict[str, int]:
    """The logits of the visited node, per level: its distribution takes all of the vocabulary."""
    return {"all-gather": depth + 1}


def drafted(depth: int, layers: int = 1) -> dict[str, int]:
    """Per level, the network's forward and, for what is ranked or drawn, all of its logits."""
    return {"all-reduce": depth * forward(layers)["all-reduce"], "all-gather": depth}


HYDRA_DRAFT = {
    # Embeddings of every level's parents; where one child each is wanted, the maximum and its first place.
    "all-reduce": BUSHY.max_depth + 2,
    # A head's logits where the best few are wanted.
    "all-gather": BUSHY.max_depth - 1,
}
NEEDED = {
    "none": {"target": forward(), "verify": verify(0)},
    "hydra++": {
        "draft": HYDRA_DRAFT,
        "target": forward(),
        "verify": verify(BUSHY.max_depth),
        # The prefix block, over features that are there already.
        "ingest": {"all-reduce": 2},
    },
    # Rows that ran while drafting are kept: nothing is left to exchange after verification.
    "draft rsd-s": {"draft": drafted(3), "target": forward(), "verify": verify(3)},
    # The layer reads the target's features together with the embeddings of what became text.
    "eagle2": {"draft": drafted(3), "target": forward(), "verify": verify(3), "ingest": forward(1)},
    # Of the riders' logits only the best token is wanted: the maximum and its first place.
    "lookahead": {"target": forward(), "verify": verify(3), "ingest": {"all-reduce": 2}},
    "prompt_lookup+hydra++": {
        # As many, and an agreement on whether any row needs the second drafter.
        "draft": HYDRA_DRAFT | {"all-reduce": HYDRA_DRAFT["all-reduce"] + 1},
        "target": forward(),
        "verify": verify(BUSHY.max_depth),
        "ingest": {"all-reduce": 2},
    },
}
ACROSS_ROWS = {"prompt_lookup+hydra++": {"draft": {"all-reduce": 1}}}


def call(function: str) -> str:
    return f"from tests.decoding import mesh_checks; mesh_checks.{function}"


# What these exchange is nearly all exchanged by the others too. They run with `-m slow`.
LATER = ("eagle2", "lookahead")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LATER else []) for n in NEEDED])
def test_meshes_decode_alike_and_exchange_no_more_than_needed(name: str, run_on_devices) -> None:
    # Where tensor parallelism is alone nothing differs from where it is not, but for the agreement between rows.
    meshes = {"data=8": DATA_ONLY | ACROSS_ROWS.get(name, {}), "data=2,tensor=4": NEEDED[name] | DATA_ONLY}
    if name in ("none", "hydra++"):
        meshes["tensor=2"] = NEEDED[name]
    lines = run_on_devices(call(f"decodes_alike({name!r}, *{[*meshes]})"), devices=8).splitlines()
    assert dict(zip(meshes, map(json.loads, lines), strict=True)) == meshes


@pytest.mark.parametrize(
    "check", ["streams_with_one_compilation", "says_what_does_not_fit", "loads_drafters_where_the_rules_say"]
)
def test_on_eight_devices(check: str, run_on_devices) -> None:
    run_on_devices(call(f"{check}()"), devices=8)
