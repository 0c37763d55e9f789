"""Meshes and the rules from path to place."""

import inspect
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from models import transformer
from models.config import TransformerConfig
from models.errors import UserError
from models.formats.storage import leaves_by_path
from models.heads.eagle import Eagle3Heads, EagleHeads
from models.heads.hydra import HydraHeads
from models.sharding import (
    AXES,
    by_process,
    make_mesh,
    mesh_of,
    owners_of_a_row,
    param_shardings,
    param_specs,
    parse_mesh,
    place_params,
    row_wise,
    with_whole_rows,
)

CONFIG = TransformerConfig(
    vocab_size=18,
    width=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_width=12,
    qkv_bias=True,
    qk_norm=True,
)
P = PartitionSpec


def specs(tree) -> dict[str, PartitionSpec]:
    found = param_specs(tree)
    return leaves_by_path(jax.tree.map(lambda spec: [spec], found, is_leaf=lambda x: isinstance(x, P)))


def test_rules_by_path() -> None:
    found = {path.removesuffix("/0"): spec for path, spec in specs(transformer.param_shapes(CONFIG)).items()}
    layer = "layers/1"
    assert found["embed/embedding"] == P("tensor", "fsdp") and found["head/kernel"] == P("fsdp", "tensor")
    for name in ("q", "k", "v"):
        assert found[f"{layer}/attention/{name}/kernel"] == P("fsdp", "tensor")
        assert found[f"{layer}/attention/{name}/bias"] == P("tensor")
    assert found[f"{layer}/attention/o/kernel"] == found[f"{layer}/mlp/down/kernel"] == P("tensor", "fsdp")
    assert found[f"{layer}/mlp/gate/kernel"] == found[f"{layer}/mlp/up/kernel"] == P("fsdp", "tensor")
    replicated = [path for path, spec in found.items() if spec == P()]
    assert all("norm" in path for path in replicated) and len(replicated) == 2 * 4 + 1


def test_stacked_layers_keep_their_leading_axis_whole() -> None:
    stacked = jax.eval_shape(transformer.stack_layers, transformer.param_shapes(CONFIG))
    found = param_specs(stacked)["layers"]
    assert found["attention"]["q"]["kernel"] == P(None, "fsdp", "tensor")
    assert found["attention"]["q"]["bias"] == P(None, "tensor") and found["mlp_norm"]["scale"] == P()


def test_heads_follow_the_same_rules() -> None:
    heads = HydraHeads(2, prefix=True)
    shapes = transformer.param_shapes(CONFIG), jax.eval_shape(lambda: jax.random.key(1))
    found = param_specs(jax.eval_shape(lambda target, key: heads.init(CONFIG, target, key), *shapes))
    assert found["heads"][0]["vocab"]["kernel"] == P("fsdp", "tensor") and found["heads"][0]["vocab"]["bias"] == P()
    assert found["heads"][1]["blocks"][0]["residual"]["kernel"] == P("fsdp", None)
    assert found["prefix"]["block"]["attention"]["o"]["kernel"] == P("tensor", "fsdp")


def test_eagle_follows_the_same_rules() -> None:
    shapes = transformer.param_shapes(CONFIG), jax.eval_shape(lambda: jax.random.key(1))
    for heads in (EagleHeads(), Eagle3Heads(0, 1, 1, 8)):
        found = specs(jax.eval_shape(lambda target, key, heads=heads: heads.init(CONFIG, target, key), *shapes))
        found = {path.removesuffix("/0"): spec for path, spec in found.items()}
        for name in ("attention/q", "attention/k", "attention/v", "mlp/gate", "mlp/up"):
            assert found[f"layer/{name}/kernel"] == P("fsdp", "tensor")
        assert found["layer/attention/o/kernel"] == found["layer/mlp/down/kernel"] == P("tensor", "fsdp")
        # Whole features go in, and whole features come out.
        assert found["fc/kernel"] == P()
    assert found["vocab/kernel"] == P("fsdp", "tensor") and found["draft_vocab"] == P()


def test_a_row_of_the_batch_lies_in_one_process_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the library lays axes over a network of chips, if it can at all."""
    chips = [SimpleNamespace(id=i, process_index=i % 2) for i in range(4)]
    assert owners_of_a_row(np.array(chips).reshape(2, 1, 2)) == 2
    assert owners_of_a_row(by_process(chips).reshape(2, 1, 2)) == 1
    across: Any = SimpleNamespace(devices=by_process(chips).reshape(1, 1, 4))
    with pytest.raises(UserError, match=r"mesh\.tensor \(4\) spreads a row of the batch over 2 processes"):
        inspect.unwrap(with_whole_rows)(across)

    def none(*_, **__):
        raise NotImplementedError("Failed to find assignment")

    usual = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(jax, "make_mesh", none)
    assert with_whole_rows(make_mesh(devices=jax.devices()[:1])) == usual


def test_heads_and_rows_stay_where_they_are(run_on_devices) -> None:
    """What a training step does head by head, as attention's kernel on a TPU does, is split over all axes."""
    run_on_devices(
        """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from models.sharding import BATCH, head_wise, make_mesh

mesh = make_mesh(data=2, fsdp=2, tensor=2)
place, by_row = NamedSharding(mesh, P(BATCH, "tensor")), NamedSharding(mesh, P(BATCH))
heads, rows = np.arange(4 * 2 * 3.0).reshape(4, 2, 3), np.arange(4.0)
given = jax.device_put(heads, place), jax.device_put(rows, by_row)

def halves(heads, rows):  # The devices' own shares.
    assert heads.shape == (1, 1, 3) and rows.shape == (1,)
    return heads * rows[:, None, None]

with jax.set_mesh(mesh):
    program = jax.jit(lambda heads, rows: head_wise(halves, (heads,), rows)).lower(*given).compile()
    made = program(*given)
assert "all-gather" not in program.as_text() and made.sharding.is_equivalent_to(place, 3)
np.testing.assert_array_equal(made, heads * rows[:, None, None])
with jax.set_mesh(mesh):  # Three heads are not split over two devices, nor six rows over four.
    odd = jax.jit(lambda heads, rows: head_wise(lambda h, r: h * r[:, None, None], (heads,), rows))
    np.testing.assert_array_equal(odd(np.ones((6, 3, 1)), np.ones(6)), np.ones((6, 3, 1)))
""",
        devices=8,
    )


def test_mesh_axes() -> None:
    mesh = make_mesh()
    assert mesh.axis_names == AXES and mesh.shape == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert make_mesh(data=1, tensor=-1, devices=jax.devices()[:1]).shape["tensor"] == 1


@pytest.mark.parametrize(
    ("axes", "complaint"),
    [
        (dict(data=-1, fsdp=-1), "at most one mesh axis may be -1, got data=-1, fsdp=-1, tensor=1"),
        (dict(data=2), "mesh data=2, fsdp=1, tensor=1 does not cover the 1 devices"),
        (dict(tensor=3), "mesh data=-1, fsdp=1, tensor=3 does not cover the 1 devices"),
    ],
)
def test_wrong_meshes_are_one_sentence(axes: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        make_mesh(**axes, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    "text", ["data", "data=", "data=0", "data=2,data=1", "model=2", "tensor=two", "", "data=2;tensor=4"]
)
def test_meshes_on_a_command_line(text: str) -> None:
    assert parse_mesh("tensor=1, data=1").shape == parse_mesh("data=-1").shape == make_mesh().shape
    with pytest.raises(UserError, match=f"mesh {text!r} is not a list of sizes of data, fsdp, tensor, such as data=2"):
        parse_mesh(text)
    with pytest.raises(UserError, match="mesh data=1, fsdp=1, tensor=2 does not cover the 1 devices present"):
        parse_mesh("tensor=2")


def test_one_device_needs_no_mesh() -> None:
    params = {"head": {"kernel": jnp.ones((4, 4))}}
    assert mesh_of(params) is None and mesh_of(place_params(make_mesh(), params)) is None and mesh_of(None) is None
    assert row_wise(lambda x, y: x + y, jnp.ones((3, 2)), jnp.ones((1, 2))).shape == (3, 2)


def test_several_devices_place_split_and_decode_alike(run_on_devices) -> None:
    """On 8 devices: axes that do not divide stay whole, sharded decoding gives the same text and gathers no cache."""
    code = """
import re
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import PartitionSpec as P
from decoding import loop
from decoding.generate import generate, _pack_stops
from decoding.request import Request
from decoding.sampling import Sampling, batch_sampling
from models import transformer
from models.config import TransformerConfig
from models.sharding import make_mesh, param_shardings
from models.formats.target import Target
from tests.noise import drawn

config = TransformerConfig(vocab_size=18, width=8, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=12)
params = drawn(transformer.param_shapes(config, jnp.float64), 0.5)
mesh = make_mesh(data=2, fsdp=2, tensor=2)
places = param_shardings(mesh, params)
assert places["head"]["kernel"].spec == P("fsdp", "tensor")
odd = make_mesh(data=2, fsdp=1, tensor=4)
# 18 tokens are not a multiple of 4.
assert param_shardings(odd, params)["head"]["kernel"].spec == P("fsdp", None)
prompts = [[1, 2, 3], [4], [5, 6], [7]]
alone = generate(Target(config, params), prompts, max_new_tokens=20)
spread = generate(Target(config, jax.device_put(params, places)), prompts, max_new_tokens=20, mesh=mesh)
assert alone.tokens == spread.tokens, (alone.tokens, spread.tokens)

from decoding.drafters.plain import Plain
state = loop.init_state(config, Plain(), 4, 96, jnp.float64, mesh=mesh)
keys, sampling = jax.vmap(jax.random.key)(jnp.arange(4)), batch_sampling([Sampling()] * 4)
request = Request(jnp.ones(4, jnp.int32), jnp.full(4, 9), _pack_stops([], 4), keys, sampling)
models = loop.Models(config, Plain(), jax.device_put(params, places), None)
arguments = (models, state, request, np.int32(3))
text = loop.run.lower(*arguments).compile().as_text()
assert "f64[2,1,96,4]" in text, "the cache is split"
gathered = [line for line in text.splitlines() if re.search(r"f64\\[[^ ]*96[^ ]* all-gather", line)]
assert not gathered, gathered
"""
    run_on_devices(code, devices=8)


def test_axes_that_the_mesh_does_not_divide_decode_alike(run_on_devices) -> None:
    """One row and one key-value head on data=2, tensor=2; Hydra++ has a cache of its own."""
    code = """
import jax, jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
from jax.sharding import PartitionSpec as P
from decoding.drafters.hydra import Hydra
from decoding.generate import generate
from decoding.trees import chain
from models import transformer
from models.config import TransformerConfig
from models.heads.hydra import HydraHeads
from models.sharding import fitted, make_mesh, param_shardings
from models.formats.target import Target
from tests.noise import drawn

config = TransformerConfig(vocab_size=18, width=8, num_layers=2, num_heads=4, num_kv_heads=1, head_dim=4, mlp_width=12)
params = drawn(transformer.param_shapes(config, jnp.float64), 0.5)
mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
assert fitted(mesh, P("data", "tensor"), (1, 4)).spec == P(None, "tensor")
drafter = Hydra(HydraHeads(num_heads=2, prefix=True), chain(2))
heads = drawn(jax.eval_shape(lambda p: drafter.heads.init(config, p, jax.random.key(1)), params), 0.3, 1)
for batch, spec in ((1, P(None, None, None, None)), (2, P("data", None, None, None))):
    buffer = drafter.init(config, batch, 32, jnp.float64, mesh)["cache"][0]["k"]
    assert buffer.sharding.spec == spec and len(buffer.sharding.device_set) == 4, buffer.sharding
settings = dict(drafter=drafter, drafter_params=heads, max_new_tokens=12)
alone = generate(Target(config, params), [[1, 2, 3]], **settings)
placed = jax.device_put(params, param_shardings(mesh, params))
heads = jax.device_put(heads, param_shardings(mesh, heads))
spread = generate(Target(config, placed), [[1, 2, 3]], **{**settings, "drafter_params": heads}, mesh=mesh)
assert alone.tokens == spread.tokens, (alone.tokens, spread.tokens)
"""
    run_on_devices(code, devices=8)


def test_shardings_cover_every_leaf() -> None:
    shapes = transformer.param_shapes(CONFIG, jnp.bfloat16)
    places = param_shardings(make_mesh(devices=jax.devices()[:1]), shapes)
    assert jax.tree.structure(places) == jax.tree.structure(shapes)
