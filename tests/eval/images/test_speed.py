"""The images section: counted operations against the published ratios, and a run on tiny shapes."""

import pytest

from decoding.images.scales import Drawing
from eval.images import peer, speed
from models.images.config import SCHEDULES, VARConfig, VQVAEConfig

TINY = VQVAEConfig(vocab_size=16, latent_channels=4, width=32, multipliers=(1, 1), blocks=1, scales=(1, 2, 3, 4))
FULL = VQVAEConfig()


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


@pytest.fixture(scope="module")
def results() -> dict:
    return speed.run_images(1, depths=(2, 1), tokenizer=TINY, draft_scales=(2,), with_torch=False)


def test_keys(results: dict) -> None:
    assert set(results["models"]) == {"var-d2", "var-d1", "code-2"} and set(results["code"]) == {"2"}
    entry = results["models"]["code-2"]
    assert entry["peak_share"] == pytest.approx(entry["gflop"] / entry["seconds"] / results["peak_gflop_per_s"])
    assert entry["images_per_s"] == pytest.approx(results["batch"] / entry["seconds"])
    code = results["code"]["2"]
    assert code["speedup_over_flop_ratio"] == pytest.approx(code["speedup"] / code["flop_ratio"])
    assert results["torch"] is None


def test_description(results: dict) -> None:
    text = "\n".join(speed.describe(results))
    for word in ("matrix products", "var-d2", "CoDe, N = 2", "decoder"):
        assert word in text
    torch = {"var-d2": {"seconds": 1.0, "speedup": 3.0}}
    assert "ours is 3.00x as fast" in "\n".join(speed.describe({**results, "torch": torch}))


@pytest.mark.parity
def test_the_peer_runs_the_same_shapes() -> None:
    torch = pytest.importorskip("torch")
    config = VARConfig(2, 16, 2, 3, vocab_size=16, latent_channels=4, scales=TINY.scales)
    model = peer.TorchVAR(TINY, config, 2, Drawing(top_k=3))
    with torch.inference_mode():
        assert model._generate().shape == (2, 4, 4, 4)
    assert model.sample() > 0 and peer.TorchDecoder(TINY, 1).sample() > 0
    assert SCHEDULES["256"] == FULL.scales
