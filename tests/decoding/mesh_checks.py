"""What test_mesh.py runs in a process of its own, with 8 CPU devices."""

import collections
import contextlib
import dataclasses
import functools
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from decoding import loop
from decoding.augment import Augment
from decoding.coprocessors import Coprocessor
from decoding.drafters.draft_model import DraftModel
from decoding.drafters.hydra import Hydra
from decoding.drafters.registry import load_drafter, save_drafter
from decoding.generate import Generation, generate
from decoding.sampling import Sampling
from decoding.trees import Topology
from models import coprocessor, transformer
from models.coprocessor import CoprocessorConfig
from models.errors import UserError
from models.formats.storage import leaves_by_path
from models.formats.target import Target
from models.heads.hydra import HydraHeads
from models.sharding import param_shardings, parse_mesh, place_params
from tests.decoding.battery import programs
from tests.decoding.compiled_text import LINE, computations, inside_loops
from tests.decoding.drafter_cases import CASES, random_target
from tests.noise import drawn, noisy

jax.config.update("jax_enable_x64", True)

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [0, 3, 3, 7, 1], [2], [5, 5], [9, 8, 7], [23]]
# No other size of these networks: what has such a dimension is a cache, or the text.
CAPACITY = 104
SAMPLING = [
    *[Sampling(), Sampling(temperature=2.0), Sampling(temperature=3.0, top_p=0.8), Sampling(temperature=3.0, top_k=5)],
    *[Sampling(), Sampling(temperature=2.0, min_p=0.1), Sampling(), Sampling(temperature=4.0, top_k=9, top_p=0.9)],
]
COLLECTIVES = re.compile(r"(all-|collective-|reduce-scatter|ragged-)")


def apart(target: Target) -> Target:
    """The target as `load_target` leaves it for a mesh."""
    return dataclasses.replace(target, params=transformer.split_projections(target.config, target.params))


def params_on(mesh, drafter, params):
    """A drafter's parameters as `load_drafter` leaves them on a mesh: not fused."""
    if isinstance(drafter, DraftModel):
        params = transformer.split_projections(drafter.model, params)
    return place_params(mesh, params)


def target_on(mesh, target: Target) -> Target:
    """Its parameters placed by the rules."""
    return dataclasses.replace(target, params=place_params(mesh, target.params))


def decode(target: Target, drafter, params, **settings) -> Generation:
    settings = dict(sampling=SAMPLING, seeds=3, max_new_tokens=[12, 9, 11, 7, 13, 8, 10, 9], stop=[]) | settings
    return generate(target, PROMPTS, drafter=drafter, drafter_params=params, capacity=CAPACITY, **settings)


@contextlib.contextmanager
def hlo_of_loop() -> Iterator[list[str]]:
    """Collects the optimised HLO of every call of the loop within."""
    seen: list[str] = []
    run = loop.run

    def watched(*arguments):
        compiled = run.lower(*arguments).compile()
        seen.append(compiled.as_text())
        return compiled(*arguments)

    loop.run = watched
    try:
        yield seen
    finally:
        loop.run = run


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Collectives in the text of one step, by function and kind; `going` is the loop's condition."""
    found: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    everything = computations(text)
    conditions = [everything[name] for name in set(re.findall(r"condition=%?([\w.-]+)", text))]
    for lines in [*inside_loops(text).values(), *conditions]:
        for match in filter(None, map(LINE.match, lines)):
            if COLLECTIVES.match(match[3]):
                scope = re.search(r"while/(?:body/(\w+)|cond)", match[4])
                # One that is combined of several results counts as one: it is one exchange.
                found[(scope[1] or "going") if scope else "elsewhere"][match[3]] += 1
                assert str(CAPACITY) not in re.findall(r"\d+", match[2]), f"exchanges a cache or the text: {match[0]}"
    total = sum(bool(COLLECTIVES.match(match[3])) for match in filter(None, map(LINE.match, text.splitlines())))
    assert total == sum(sum(kinds.values()) for kinds in found.values()), "something is exchanged before the loop"
    return {scope: dict(kinds) for scope, kinds in found.items()}


def decodes_alike(name: str, *meshes: str) -> None:
    """Same text and writers on every mesh; prints the collectives of a step as JSON, one line per mesh."""
    shape = dict(width=256, head_dim=32, num_heads=8, num_kv_heads=4)
    target = apart(random_target(vocab_size=24, scale=6.0, **shape))
    drafter, params = CASES[name](target, jax.random.key(7))
    alone = decode(target, drafter, params)
    assert len({token for tokens in alone.tokens for token in tokens}) > 8
    for axes in meshes:
        mesh = parse_mesh(axes)
        with hlo_of_loop() as texts, warnings.catch_warnings(action="error"):
            spread = decode(target_on(mesh, target), drafter, params_on(mesh, drafter, params), mesh=mesh)
        assert spread.tokens == alone.tokens and spread.writers == alone.writers, (name, axes)
        rows, heads = 8 // mesh.shape["data"], 4 // mesh.shape["tensor"]
        assert f"f64[{rows},{heads},{CAPACITY},32]" in texts[0], "the cache is split"
        print(json.dumps(collectives(texts[0])))


def latents_go_with_their_rows() -> None:
    """At every fifth token, from a coprocessor whose adapters are split as the target's kernels are."""
    target = apart(random_target(vocab_size=24, scale=6.0, width=256, head_dim=32, num_heads=8, num_kv_heads=4))
    config = CoprocessorConfig("lora", num_latents=3, rank=2, z_scale="match_rms", z_base="last_token")
    fresh = jax.jit(coprocessor.init_params, static_argnums=(0, 1))(
        config, target.config, target.params, jax.random.key(5)
    )
    mesh = parse_mesh("data=2,tensor=4")
    own = coprocessor.for_decoding(config, noisy(fresh, 0.5), mesh)

    def augmented(target: Target, params) -> Generation:
        return decode(target, None, None, augment=Augment(Coprocessor(config, params), every=5))

    alone, spread = augmented(target, own), augmented(target_on(mesh, target), place_params(mesh, own))
    assert spread.tokens == alone.tokens and spread.augmentations == alone.augmentations == [3, 2, 3, 2, 3, 2, 2, 2]
    assert alone.tokens != decode(target, None, None).tokens, "latents that change nothing prove nothing"


def small_heads(target: Target) -> tuple[Hydra, Any]:
    """Hydra++ of one head and two candidates: what lies where is that of larger ones."""
    drafter = Hydra(HydraHeads(num_heads=1, prefix=True), Topology(((0,), (1,))))
    shapes = jax.eval_shape(functools.partial(drafter.init_params, target.config), target.params, jax.random.key(7))
    return drafter, drawn(shapes, 0.25)


def streams_with_one_compilation() -> None:
    """What comes back from a block of steps lies where it lay, also in a second request."""
    jax.clear_caches()  # Other checks compiled these functions too.
    target = apart(random_target(vocab_size=24, num_heads=8, num_kv_heads=4))
    drafter, params = small_heads(target)
    mesh = parse_mesh("data=2,tensor=2")
    placed = target_on(mesh, target), drafter, place_params(mesh, params)
    whole = decode(*placed)
    before = programs()
    calls: list[Any] = []
    streamed = decode(*placed, stream_every=3, on_tokens=lambda *call: calls.append(call))
    assert streamed.tokens == whole.tokens and len(calls) > 12
    assert programs() == before
    assert [count for count in before if count] == [1, 1, 1, 1]


def says_what_does_not_fit() -> None:
    """Axes that do not divide are told and decode alike; parameters elsewhere are refused."""
    target = apart(random_target(vocab_size=23, num_heads=4, num_kv_heads=2))
    drafter, params = small_heads(target)
    mesh = parse_mesh("data=2,tensor=4")
    placed, heads = target_on(mesh, target), place_params(mesh, params)
    prompts = PROMPTS[:5]
    alone = generate(target, prompts, drafter=drafter, drafter_params=params, max_new_tokens=20)
    with warnings.catch_warnings(record=True, action="always") as told:
        # The mesh is that of the target.
        spread = generate(placed, prompts, drafter=drafter, drafter_params=heads, max_new_tokens=20)
    assert spread.tokens == alone.tokens
    assert [str(warning.message) for warning in told if "divide" in str(warning.message)] == [
        "5 prompts do not divide over data=2: each device there works on all",
        "2 key-value heads of the target do not divide over tensor=4: each device there works on all",
    ]
    complaints = []
    for model, heads_of, where in (
        (target, heads, mesh),
        (placed, params, mesh),
        (placed, heads, parse_mesh("data=2")),
    ):
        try:
            generate(model, prompts, drafter=drafter, drafter_params=heads_of, mesh=where)
        except UserError as error:
            complaints.append(str(error).split(":")[0])
    assert complaints == [
        "the target's parameters are not on the mesh of 8 devices",
        "the drafter's parameters are not on the mesh of 8 devices",
        "the target's parameters are not on the mesh of 2 devices",
    ], complaints


def loads_drafters_where_the_rules_say() -> None:
    """`load_drafter` places parameters by the rules, on the mesh given or on the target's."""
    target = apart(random_target(vocab_size=24, num_heads=8, num_kv_heads=4))
    drafter, params = small_heads(target)
    mesh = parse_mesh("data=2,tensor=4")
    with tempfile.TemporaryDirectory() as folder:
        save_drafter(f"{folder}/heads", drafter, params, target.fingerprint())
        for model, where in ((target_on(mesh, target), None), (target, mesh)):
            loaded, leaves = load_drafter(f"{folder}/heads", model, mesh=where)
            assert loaded == drafter
            wanted = leaves_by_path(param_shardings(mesh, params))
            for path, leaf in leaves_by_path(params).items():
                assert leaves_by_path(leaves)[path].sharding == wanted[path], path
                assert jnp.array_equal(leaves_by_path(leaves)[path], leaf)
        split = [path for path, place in wanted.items() if "tensor" in place.spec]
        assert {"heads/0/vocab/kernel", "prefix/block/mlp/down/kernel"} <= set(split)
