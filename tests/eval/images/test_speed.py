"""The images section: counted operations against the published ratios, a run on tiny shapes, the peer against ours."""

import dataclasses
import json
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.images import generate
from decoding.images.generate import Stage, Tokenizer, code_stages, generate_images
from decoding.images.scales import Drawing
from eval.images import speed
from eval.measure.timing import Timing, measure
from eval.peers import images as peer
from models.errors import UserError
from models.images import quantiser
from models.images.config import VARConfig, VQVAEConfig
from tests import image_reference as reference

TINY = VQVAEConfig(vocab_size=16, latent_channels=4, width=32, multipliers=(1, 1), blocks=1, scales=(1, 2, 3, 4))
LEAST = dataclasses.replace(TINY, scales=(1, 2))
FULL = VQVAEConfig()
TINY_RUN: dict[str, Any] = {"depths": (2, 1), "tokenizer": LEAST, "draft_scales": (1,), "with_torch": False}

pytestmark = pytest.mark.usefixtures("structs_may_hold_shapes")


@pytest.mark.parametrize(
    ("depths", "ratios"), [((30, 16), (1.29, 1.90, 2.63, 3.47)), ((16, 8), (1.33, 2.00, 2.81, 3.76))], ids=str
)
def test_operations_fall_as_counted_for_the_published_pairs(depths, ratios) -> None:
    drafter, refiner = (speed.var_shape(depth, FULL) for depth in depths)
    whole = speed.flop(drafter, 0, 10)
    found = [whole / (speed.flop(drafter, 0, n) + speed.flop(refiner, n, 10)) for n in (9, 8, 7, 6)]
    assert found == pytest.approx(ratios, rel=0.01)
    assert speed.flop(drafter, 0, 10, guided=False) == whole / 2


@pytest.mark.parametrize(("depth", "tera"), [(16, 0.30), (30, 1.88)])
def test_operations_of_an_image(depth: int, tera: float) -> None:
    assert speed.flop(speed.var_shape(depth, FULL), 0, 10, guided=False) / 1e12 == pytest.approx(tera, rel=0.02)


def test_operations_by_hand() -> None:
    config = VARConfig(1, 2, 1, num_classes=3, vocab_size=5, latent_channels=4, scales=(1, 2, 3), mlp_ratio=1)
    # Scale 2 after a prefix of scales 0 and 1: 14 rows in one pass, 9 of which go through the head.
    kernels, attention, head = 14 * 6 * 4, 2 * 14 * 14 * 2, 9 * 2 * 5
    assert speed.flop(config, 2, 3, guided=False) == 2 * (kernels + attention + head)


def on_device(params, dtype):
    """Cast by NumPy, or every shape would be a program."""
    return jax.device_put(jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params))


@pytest.fixture(scope="module", autouse=True)
def weights_from_numpy() -> Iterator[None]:
    """Each leaf drawn by JAX would be a program of its own, a hundred and eighty in all."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed.var, "init", lambda config, key, dtype: on_device(reference.random_var(config), dtype))
        patch.setattr(speed.vqvae, "init", lambda config, key: on_device(reference.random_vqvae(config), jnp.float32))
        yield


class Measured(NamedTuple):
    """What one small run found, and the parts that it timed."""

    results: dict
    parts: dict


@pytest.fixture(scope="module")
def measured() -> Measured:
    """In bfloat16 and batches of three, which nothing takes by default."""
    parts: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "PEAK_SIDE", 64)
        patch.setattr(speed, "PEAK_PRODUCTS", 2)
        patch.setattr(speed, "measure", lambda given, *rest: (parts.update(given), measure(given, *rest))[1])
        found = speed.run_images(1, **TINY_RUN, batch=3, dtype=jnp.bfloat16)
    return Measured(found, parts)


def test_keys(measured: Measured) -> None:
    results = measured.results
    assert set(results["models"]) == {"var-d2", "var-d1", "code-1"} and set(results["code"]) == {"1"}
    assert (results["batch"], results["depths"], results["dtype"]) == (3, [2, 1], "bfloat16")
    assert all(entry["compile_seconds"] > 0 < entry["temporary_megabytes"] for entry in results["models"].values())
    assert results["torch"] is None
    json.dumps(results, allow_nan=False)


def test_description(measured: Measured) -> None:
    results = measured.results
    text = "\n".join(speed.describe(results))
    for word in (
        "matrix products",
        "in bfloat16",
        "var-d2",
        "CoDe, N = 1",
        "decoder",
        "not installed, or not for this",
    ):
        assert word in text
    torch = {"var-d2": {"seconds": 1.0, "speedup": 3.0}}
    assert "ours is 3.00x as fast" in "\n".join(speed.describe({**results, "torch": torch}))


def dtypes(tree) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def test_dtype_is_that_of_transformers_decoder_and_products(measured: Measured) -> None:
    parts = measured.parts
    assert dtypes(parts["peak"]._fixed) == {"bfloat16"}
    tokenizer = parts["var-d2 end to end"]._tokenizer
    assert dtypes([tokenizer.params[name] for name in ("decoder", "post_quant")]) == {"bfloat16"}
    assert dtypes([tokenizer.params[name] for name in ("codebook", "phi")]) == {"float32"}
    for name, programs in (("var-d2", 1), ("code-1", 2)):
        matrices = [
            leaf
            for leaves in parts[name]._given
            for leaf in jax.tree.leaves(leaves)
            if leaf.ndim == 2 and leaf.size >= 64
        ]
        # Beside those of the transformers there is only the codebook, once for each program.
        assert sum(leaf.dtype == jnp.float32 for leaf in matrices) == programs and len(matrices) > 5 * programs
        f_hat = parts[name].run().f_hat
        assert f_hat.dtype == jnp.float32 and f_hat.shape == (3, 2, 2, 4)
    assert parts["var-d2 end to end"].pixels().shape == (3, 4, 4, 3)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Fills up with what `run_images` would time, of which nothing is compiled; part i takes i s, at best half."""
    seen: dict = {}

    def fake(parts, rounds, progress):
        seen.update(parts)
        return {name: Timing(1e3 * number, 0.5e3 * number) for number, name in enumerate(parts, start=1)}

    monkeypatch.setattr(speed, "measure", fake)
    monkeypatch.setattr(speed, "compile_stages", lambda codes, params, stages, batch: [program(len(stages))])
    return seen


def program(size: int) -> types.SimpleNamespace:
    memory = types.SimpleNamespace(temp_size_in_bytes=size * 10**6)
    return types.SimpleNamespace(seconds=size, compiled=types.SimpleNamespace(memory_analysis=lambda: memory))


def test_numbers_follow_from_times(parts: dict) -> None:
    found = speed.run_images(1, **TINY_RUN)
    assert (found["batch"], found["depths"], found["dtype"]) == (2, [2, 1], "float32"), "by default"
    names = ["var-d2", "var-d1", "code-1"]
    wholes = [f"{name} end to end" for name in names]
    assert list(parts) == ["peak", *(part for pair in zip(names, wholes, strict=True) for part in pair), "decoder"]
    # Sixteen products of 2 x 2048^3 operations in a second; batches of two images in 2, 4 and 6 seconds.
    peak = 16 * 2 * 2048**3 / 1e9
    assert found["peak_gflop_per_s"] == pytest.approx(peak)
    assert [found["models"][name]["seconds"] for name in names] == [2, 4, 6]
    assert [found["models"][name]["seconds_min"] for name in names] == [1, 2, 3]
    assert [found["models"][name]["images_per_s"] for name in names] == [1, 0.5, pytest.approx(1 / 3)]
    assert [found["models"][name]["compile_seconds"] for name in names] == [1, 1, 2]
    assert [found["models"][name]["temporary_megabytes"] for name in names] == [1, 1, 2]
    deep, shallow = (speed.var_shape(depth, LEAST) for depth in (2, 1))
    work = [speed.flop(deep, 0, 2), speed.flop(shallow, 0, 2), speed.flop(deep, 0, 1) + speed.flop(shallow, 1, 2)]
    for name, operations, seconds in zip(names, work, (2, 4, 6), strict=True):
        assert found["models"][name]["gflop"] == pytest.approx(2 * operations / 1e9)
        assert found["models"][name]["peak_share"] == pytest.approx(2 * operations / 1e9 / seconds / peak)
    ratio = work[0] / work[2]
    wanted = {"speedup": 1 / 3, "flop_ratio": ratio, "speedup_over_flop_ratio": 1 / 3 / ratio}
    assert found["code"] == {"1": pytest.approx(wanted)}
    # End to end is timed as a whole: 3, 5 and 7 seconds.
    assert found["decoder"]["end_to_end"] == {"var-d2": 2 / 3, "var-d1": 2 / 5, "code-1": 2 / 7}
    assert found["decoder"]["seconds_per_image"] == 4


def test_whole_makes_what_generation_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, stages = in_jax(LEAST, 1, Drawing(top_k=5))
    made = speed.Made(LEAST, {name: vae.params[name] for name in ("codebook", "phi")}, stages, 6)
    calls: list[int] = []
    once = generate.pixels_of
    monkeypatch.setattr(generate, "pixels_of", lambda *given: (calls.append(len(given[2])), once(*given))[1])
    whole = speed.Whole(vae, made)
    wanted = generate_images(vae, stages, range(6)).pixels
    calls.clear()
    np.testing.assert_array_equal(whole.pixels(), wanted)
    assert calls == [generate.DECODED_AT_ONCE] * 2
    assert whole.sample() > 0 and len(calls) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"batch": 0}, "the batch of images must be at least 1, got 0"),
        ({"depths": (8, 16)}, r"image depths must be two numbers of 1 or more, the larger first, got \(8, 16\)"),
        ({"depths": (8, 8)}, "the larger first"),
        ({"depths": (8, 0)}, "of 1 or more"),
    ],
)
def test_what_cannot_be_measured(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        speed.run_images(**{"rounds": 1, **options})


def test_torch_is_left_out_where_it_lacks_our_device(monkeypatch: pytest.MonkeyPatch, parts: dict) -> None:
    fake = types.ModuleType("torch")
    fake.cuda = types.SimpleNamespace(is_available=lambda: False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: fake)
    monkeypatch.setattr(peer.jax, "default_backend", lambda: "gpu")
    assert peer.device() is None
    found = speed.run_images(1, **{**TINY_RUN, "with_torch": True})
    assert found["torch"] is None and not any("torch" in name for name in parts)
    fake.cuda.is_available = lambda: True
    assert peer.device() == "cuda"
    monkeypatch.setattr(peer.jax, "default_backend", lambda: "tpu")
    assert peer.device() is None
    monkeypatch.setattr(peer.jax, "default_backend", lambda: "cpu")
    assert peer.device() == "cpu"
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    assert peer.device() is None


def in_jax(tokenizer: VQVAEConfig, n: int, drawing: Drawing, dtype="float32") -> tuple[Tokenizer, list[Stage]]:
    """Models with every tensor drawn, the transformers in `dtype`: CoDe with N = n, or VAR if that is 0."""
    at_least = jnp.promote_types(dtype, jnp.float32)
    params = on_device(reference.random_vqvae(tokenizer), at_least)
    models = []
    for width in (16, 8):
        # Two layers, for what a prefix is masked from shows in the second.
        config = VARConfig(2, width, 2, 12, vocab_size=16, latent_channels=4, scales=tokenizer.scales)
        models.append((config, on_device(reference.random_var(config, seed=width), dtype)))
    alone = [Stage(*models[0], tokenizer.num_scales, drawing)]
    return Tokenizer(tokenizer, params), code_stages(*models, n, drawing, drawing) if n else alone


def in_torch(vae: Tokenizer, stages: Sequence[Stage], batch: int, where: str = "cpu") -> peer.TorchImages:
    turn = [(peer.TorchVAR(vae.config, vae.params, stage.config, stage.params, where), stage.last) for stage in stages]
    assert isinstance(stages[0].drawing, Drawing)
    return peer.TorchImages(turn, stages[0].drawing, batch)


teacher_inputs = jax.jit(quantiser.teacher_inputs, static_argnums=0)


@pytest.mark.parity
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_peer_does_the_same_work(n: int) -> None:
    """Greedy, in float64: every code, what the transformers read, and f_hat; VAR, and CoDe at every N."""
    pytest.importorskip("torch")
    tokenizer = dataclasses.replace(TINY, scales=(1, 2, 3))
    vae, stages = in_jax(tokenizer, n, Drawing(top_k=1), "float64")
    ours = generate_images(vae, stages, range(12))
    f_hat, read, indices = in_torch(vae, stages, 12).make()
    assert len({tuple(row) for row in np.concatenate(ours.indices, axis=1)}) == 12
    for mine, theirs in zip(ours.indices, indices, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(f_hat.permute(0, 2, 3, 1), ours.f_hat, atol=1e-10)
    wanted = teacher_inputs(tokenizer, vae.params, ours.indices)
    np.testing.assert_allclose(read, wanted, atol=1e-10)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peer_runs_on_one_device_and_in_our_dtype(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    vae, stages = in_jax(TINY, 2, Drawing(top_k=3), dtype)
    for where in ("cpu", "meta"):
        # On `meta`, which computes nothing, a tensor of another device would be refused.
        f_hat, _, _ = in_torch(vae, stages, 2, where).make()
        assert f_hat.shape == (2, 4, 4, 4) and f_hat.dtype == torch.float32 and f_hat.device.type == where
    assert in_torch(vae, stages, 2)._stages[0][0]._layers[0]["qkv"][0].dtype == getattr(torch, dtype)
    decoder = peer.TorchDecoder(TINY, 1, "cpu", dtype)
    assert decoder.sample() > 0 and {p.dtype for p in decoder._decoder.parameters()} == {getattr(torch, dtype)}


@pytest.mark.slow
@pytest.mark.parity
def test_everybody_is_timed_in_torch_too() -> None:
    pytest.importorskip("torch")
    found = speed.run_images(1, depths=(2, 1), tokenizer=LEAST, draft_scales=(1,))
    assert set(found["torch"]) == {"var-d2", "var-d1", "code-1", "decoder"}
    entry = found["torch"]["code-1"]
    assert entry["speedup"] == pytest.approx(entry["seconds"] / found["models"]["code-1"]["seconds"])
