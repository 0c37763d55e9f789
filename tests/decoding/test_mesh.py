"""Several devices write the text of one, split every cache, and exchange what tensor parallelism needs and no more."""

import collections
import json

import pytest

from tests.decoding.drafter_cases import BUSHY

Exchanges = dict[str, dict[str, int]]  # How many of each kind, by function of a step.

LAYERS = 2
# The logits of the visited node, whose distribution takes all of the vocabulary: per level, in one loop over these.
JUDGED = {"all-gather": 1}


def forward(layers: int = LAYERS) -> dict[str, int]:
    """Rows of an embedding table split by token are added up; so are the partial products of attention and MLP."""
    return {"all-reduce": 1 + 2 * layers}


def drafted(depth: int, layers: int = 1) -> dict[str, int]:
    """Per level, the network's forward and, for what is ranked or drawn, all of its logits."""
    return {"all-reduce": depth * forward(layers)["all-reduce"], "all-gather": depth}


HYDRA_DRAFT = {
    # Embeddings of every level's parents; where one child each is wanted, the maximum and its first place.
    "all-reduce": BUSHY.max_depth + 2,
    # A head's logits where the best few are wanted.
    "all-gather": BUSHY.max_depth - 1,
}
# The prefix block, over features that are there already.
HYDRA = {"draft": HYDRA_DRAFT, "read": forward(), "judge": JUDGED, "learn": {"all-reduce": 2}}
NEEDED: dict[str, Exchanges] = {
    "none": {"read": forward(), "judge": JUDGED},
    "hydra++": HYDRA,
    # Rows that ran while drafting are kept: nothing is left to exchange after verification.
    "draft rsd-s": {"draft": drafted(3), "read": forward(), "judge": JUDGED},
    # The layer reads the target's features together with the embeddings of what became text. Its keys and values are
    # kept, which are made before anything of the layer is exchanged; its output nobody reads.
    "eagle2": {"draft": drafted(3), "read": forward(), "judge": JUDGED, "learn": {"all-reduce": 1}},
    # Of the riders' logits only the best token is wanted: the maximum and its first place.
    "lookahead": {"read": forward(), "judge": JUDGED, "learn": {"all-reduce": 2}},
    "prompt_lookup+hydra++": HYDRA,
}


def across_rows(name: str) -> Exchanges:
    """Agreements between rows that lie apart: per step on whether any is still going, per level of a tree on whether
    any goes on, and in a combination on whether any needs the second drafter."""
    functions = ["going", *(["judge"] if name != "none" else []), *(["draft"] if "+" in name.rstrip("+") else [])]
    return {function: {"all-reduce": 1} for function in functions}


def together(*parts: Exchanges) -> Exchanges:
    """Sums by function and kind."""
    found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for part in parts:
        for function, kinds in part.items():
            found[function].update(kinds)
    return {function: dict(kinds) for function, kinds in found.items()}


def call(function: str) -> str:
    return f"from tests.decoding import mesh_checks; mesh_checks.{function}"


def decodes_alike(name: str, meshes: dict[str, Exchanges], run_on_devices) -> None:
    lines = run_on_devices(call(f"decodes_alike({name!r}, *{[*meshes]})"), devices=8).splitlines()
    assert dict(zip(meshes, map(json.loads, lines), strict=True)) == meshes


# What these exchange is nearly all exchanged by the others too. They run with `-m slow`.
LATER = ("eagle2", "lookahead", "prompt_lookup+hydra++")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LATER else []) for n in NEEDED])
def test_meshes_decode_alike_and_exchange_no_more_than_needed(name: str, run_on_devices) -> None:
    decodes_alike(name, {"data=2,tensor=4": together(NEEDED[name], across_rows(name))}, run_on_devices)


# Heads with a cache; of what others do, rows that lie apart have no part.
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "hydra++" else [pytest.mark.slow]) for n in NEEDED])
def test_rows_apart_exchange_whether_any_goes_on(name: str, run_on_devices) -> None:
    decodes_alike(name, {"data=8": across_rows(name)}, run_on_devices)


@pytest.mark.parametrize("name", ["none", pytest.param("hydra++", marks=pytest.mark.slow)])
def test_tensor_parallelism_alone_exchanges_the_same_but_for_agreements_between_rows(name: str, run_on_devices) -> None:
    decodes_alike(name, {"tensor=2": NEEDED[name]}, run_on_devices)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param("latents_go_with_their_rows", marks=pytest.mark.slow),
        "streams_with_one_compilation",
        "says_what_does_not_fit",
        "loads_drafters_where_the_rules_say",
    ],
)
def test_on_eight_devices(check: str, run_on_devices) -> None:
    run_on_devices(call(f"{check}()"), devices=8)
