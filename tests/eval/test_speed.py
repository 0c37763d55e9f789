"""eval.speed prints and saves the keys that it promises; its parts read what they say they read."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decoding.drafters.draft_model import DraftModel
from decoding.drafters.token_recycling import TokenRecycling
from decoding.policies import Static
from decoding.trees import chain
from eval import speed
from eval.measure import bandwidth
from eval.measure.lineup import DRAFTERS, draft_shape
from eval.measure.timing import Timing
from eval.peers import text as peer
from models import command_line
from models.transformer import param_shapes
from tests.noise import drawn

MEBIBYTE = 2**20
KEPT: list[int] = []  # Scenes of growth that had been measured, whenever results were kept.


@pytest.fixture(scope="module")
def results() -> dict:
    sections = ("bandwidth", "rows", "plain", "drafters", "replay", "growth")
    # One layer, and trees as small as they can be: how they are timed does not depend on their size.
    shallow = dataclasses.replace(speed.SHAPES["tiny"], num_layers=1)
    table = {
        "token_recycling": lambda target: TokenRecycling(chain(2)),
        "draft_model": lambda target: DraftModel(
            dataclasses.replace(draft_shape(target), num_layers=1), Static(chain(2))
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(speed.SHAPES, "tiny", shallow)
        patch.setattr(speed, "DRAFTERS", table)
        patch.setattr(speed, "ORACLE_TOKENS", 48)
        return speed.run(
            "tiny",
            sections,
            tuple(table),
            rounds=1,
            bandwidth_bytes=MEBIBYTE,
            scale=speed.Scale((1, 8), (1, 3), ((2, 40),)),
            keep=lambda found: KEPT.append(len(found.get("growth", []))),
        )


def test_keys(results: dict) -> None:
    assert set(results) == {
        *("shape", "bandwidth_gb_per_s", "bandwidth_best_gb_per_s", "bandwidth_by_kind_gb_per_s", "rows", "plain"),
        *("drafters", "replay", "growth"),
        "environment",
    }
    assert [set(row) for row in results["rows"]] == [{"rows", "ms", "ms_min"}] * 2
    assert {"ms_per_token", "bandwidth_share"} <= set(results["plain"])
    wanted = {"tree_nodes", "draft_ms", "verify_ms", "commit_ms", "update_ms", "step_ms", "loop_efficiency"}
    nodes = {"token_recycling": 3, "draft_model": 3}
    assert {name: entry["tree_nodes"] for name, entry in results["drafters"].items()} == nodes
    for entry in results["drafters"].values():
        assert wanted <= set(entry) and entry["overhead_share"] > 0 and entry["sampled"]["overhead_share"] > 0
        assert entry["step_ms"] > 0 and entry["update_ms"] > 0
    assert results["drafters"]["draft_model"]["network_ms"] > 0
    assert results["drafters"]["token_recycling"]["network_ms"] == 0, "a table has no network"
    alone, wide = results["replay"]
    assert alone["nodes"] == 1 and alone["acceptance_length"] == 1 and alone["loop_efficiency"] == 1
    # Two candidates, each right four times in five: 1 + 0.8 + 0.64.
    assert wide["nodes"] == 3 and 1.8 < wide["acceptance_length"] < 3 and wide["loop_efficiency"] > 0
    assert [(row["batch"], row["context"]) for row in results["growth"]] == [(2, 40)]
    assert KEPT == [0, 1], "what is known is kept before a scene that may not fit"
    for row in results["growth"]:
        assert set(row["drafters"]) == {"none", "token_recycling"}
        assert all(entry["step_ms"] > 0 and entry["compile_seconds"] >= 0 for entry in row["drafters"].values())
    json.dumps(results, allow_nan=False)


def test_published_drafters_have_their_published_trees() -> None:
    nodes = {name: make(speed.SHAPES["tiny"]).max_nodes for name, make in DRAFTERS.items()}
    assert nodes == {
        **{"medusa": 64, "hydra": 64, "hydra++": 64, "eagle2": 60, "token_recycling": 81, "prompt_lookup": 11},
        **{"lookahead": 29, "draft_model": 5, "rsd-s": 17, "early_exit": 5},
        **{"falcon": 166, "dflash": 16, "dflash-vocabulary": 16, "dflash-shallow": 16, "dflash-tree": 60},
        **{"dspark": 8, "dspark-lattice": 60, "eagle3": 60, "p_eagle": 8},
    }


def test_a_shallow_network_has_its_target_s_layers_by_the_published_share() -> None:
    deep = dataclasses.replace(speed.SHAPES["tiny"], num_layers=36)
    for target, layers in ((deep, 5), (speed.SHAPES["110m"], 2), (speed.SHAPES["tiny"], 1)):
        heads = DRAFTERS["dflash-shallow"](target).heads
        assert (heads.num_layers, len(heads.target_layers)) == (layers, layers)


def test_text_names_every_drafter(results: dict) -> None:
    text = speed.describe(results)
    assert all(
        word in text
        for word in ("bandwidth", "plain decoding", "token_recycling", "draft_model", "loop efficiency", "context")
    )


def test_derived_numbers_follow_their_definitions() -> None:
    ms = {"draft": 3.0, "choice": 1.0, "forward": 20.0, "verdict": 1.0, "commit": 0.5, "update": 0.25, "step": 26.0}
    timings = {f"medusa {name}": Timing(value, value) for name, value in ms.items()}
    timings |= {f"medusa sampled {name}": Timing(2 * ms[name], 0.0) for name in ("verdict", "commit", "step")}
    timings |= {"plain": Timing(11.0, 11.0), "rows 1": Timing(10.0, 10.0)}
    entry = speed._drafter("medusa", 64, timings)
    assert entry["overhead_share"] == pytest.approx(1.75 / 26)
    assert entry["sampled"]["overhead_share"] == pytest.approx(3.0 / 52), "nothing to update counts as no time"
    assert entry["verify_ms"] == 21.0
    assert entry["step_over_forwards"] == pytest.approx(26 / 22)
    assert entry["draft_share"] == pytest.approx(3 / 26)
    # Speed-up per accepted token 11/26, ideal 10/22.
    assert entry["loop_efficiency"] == pytest.approx((11 / 26) / (10 / 22))


def test_medians_are_compared_with_medians_and_best_rounds_with_best_rounds() -> None:
    timings = {"reduction": Timing(9.0, 4.0), "matvec": Timing(3.0, 2.0), "plain": Timing(1.0, 0.5)}
    config = speed.SHAPES["tiny"]
    params = drawn(param_shapes(config), 0.02)
    maker = speed._Maker(config, params, print)
    found = speed._summarise(maker, ("bandwidth", "plain"), (), MEBIBYTE, timings)
    assert found["bandwidth_gb_per_s"] == pytest.approx(MEBIBYTE / 3e-3 / 1e9)
    assert found["bandwidth_best_gb_per_s"] == pytest.approx(MEBIBYTE / 2e-3 / 1e9)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert found["plain"]["bandwidth_share"] == pytest.approx(size / 1e-3 / (MEBIBYTE / 3e-3))
    assert found["plain"]["bandwidth_share_best"] == pytest.approx(size / 0.5e-3 / (MEBIBYTE / 2e-3))


def test_bandwidth_parts_read_the_whole_block() -> None:
    block = np.arange(16, dtype=np.float32).reshape(4, 4)
    for part, expected in (
        (bandwidth.reduction(block), block.max(axis=1)),
        (bandwidth.matrix_vector(block), block.sum(axis=1)),
    ):
        part.sample()
        assert np.array_equal(part._state[1], expected)
    assert bandwidth.bandwidth_block(MEBIBYTE).nbytes == MEBIBYTE


def test_default_shape_has_110_million_parameters() -> None:
    shapes = param_shapes(speed.SHAPES["110m"])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(110e6, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shape", "9t"], "no shape"),
        (["--sections", "rows,speed"], "no section"),
        (["--rounds", "0"], "rounds"),
        (["--rows", "0,2"], "--rows must be numbers of at least 1, got 0, 2"),
        (["--nodes", "2,4"], "--nodes must begin with 1"),
        (["--scenes", "4"], "--scenes must be BATCHxCONTEXT, such as 16x1024, got '4'"),
        (["--sections", "images", "--rounds", "0"], "rounds must be at least 1"),
        (["--sections", "images", "--image_batch", "0"], "--image_batch must be at least 1, got 0"),
        (["--sections", "images", "--image_depths", "16,30"], "the larger first, got (16, 30)"),
        (["--sections", "images", "--image_depths", "16"], "--image_depths must be two depths, the deeper first"),
    ],
)
def test_bad_arguments(arguments: list[str], complaint: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        speed.main(arguments)
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


def test_out_is_checked_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys
) -> None:
    monkeypatch.setattr(speed, "run", lambda *args, **kwargs: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    for out, complaint in (
        (tmp_path, "it is a directory"),
        (tmp_path / "file" / "x.json", "file is not a directory"),
        (tmp_path / "file" / "a" / "x.json", "file is not a directory"),
    ):
        with pytest.raises(SystemExit) as stopped:
            speed.main(["--shape", "tiny", "--out", str(out)])
        assert stopped.value.code == 2 and complaint in capsys.readouterr().err
    monkeypatch.setattr(command_line.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(SystemExit):
        speed.main(["--shape", "tiny", "--out", str(tmp_path / "a" / "x.json")])
    assert f"nothing may be written in {tmp_path}" in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_missing_peer_is_said_and_null(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys) -> None:
    monkeypatch.setattr(peer, "is_installed", lambda: False)
    speed.main(
        ["--shape", "tiny", "--sections", "huggingface", "--rounds", "1", "--out", str(tmp_path / "a" / "x.json")]
    )
    saved = json.loads((tmp_path / "a" / "x.json").read_text())
    assert saved["huggingface"] is None and "environment" in saved
    assert "not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "depths", "batch"),
    [([], (16, 8), 2), (["--image_depths", "30,16", "--image_batch", "64"], (30, 16), 64)],
)
@pytest.mark.parametrize(("backend", "dtype"), [("cpu", jnp.float32), ("gpu", jnp.bfloat16)])
def test_images_of_the_shapes_and_in_the_dtype_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys, arguments, depths, batch, backend, dtype
) -> None:
    """As with texts, what is no CPU computes in bfloat16."""
    seen: list = []
    monkeypatch.setattr(speed, "run_images", lambda *given, progress, **options: seen.append((given, options)) or {})
    monkeypatch.setattr(speed, "describe_images", lambda results: ["described"])
    monkeypatch.setattr(speed, "describe_environment", dict)
    monkeypatch.setattr(speed.jax, "default_backend", lambda: backend)
    speed.main(["--sections", "images", "--rounds", "3", *arguments, "--out", str(tmp_path / "x.json")])
    assert seen == [((3,), {"depths": depths, "draft_scales": (8, 6), "batch": batch, "dtype": dtype})]
    assert "described" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text()) == {"images": {}, "environment": {}}


@pytest.mark.parity
def test_peer_decodes_the_same_shape() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = speed.SHAPES["tiny"]
    other = peer.HuggingFace(config, [1, 2, 3], new_tokens=3)
    ours = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))
    assert sum(weight.numel() for weight in other._model.parameters()) == ours
    assert other._model.config._attn_implementation == "sdpa"
    static = peer.HuggingFace(config, [1, 2, 3], new_tokens=3, static=True)
    assert isinstance(other.sample(), float) and isinstance(static.sample(), float)
