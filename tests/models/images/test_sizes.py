"""The published shapes have the published numbers of parameters; nothing is allocated."""

import jax
import pytest

from models.images import var, vqvae
from models.images.config import SCHEDULES, VARConfig, VQVAEConfig


def millions(tree) -> float:
    return sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6


@pytest.mark.parametrize(
    ("depth", "schedule", "expected"),
    [(16, "256", 310.3), (20, "256", 600.9), (24, "256", 1033.4), (30, "256", 2010.0), (36, "512", 2353.9)],
)
def test_transformers(depth: int, schedule: str, expected: float) -> None:
    # The model of 512 pixels shares one modulation among its blocks.
    config = VARConfig(depth, 64 * depth, depth, 1000, scales=SCHEDULES[schedule], shared_modulation=schedule == "512")
    assert millions(var.param_shapes(config)) == pytest.approx(expected, abs=0.05)


def test_tokenizer() -> None:
    shapes = vqvae.param_shapes(VQVAEConfig())
    assert len(jax.tree.leaves(shapes)) == 323  # the file has one more, counts of how often codes were used
    assert millions(shapes) == pytest.approx(108.95, abs=0.005)
    parts = {"encoder": ("encoder",), "decoder": ("decoder",), "quantiser": ("codebook", "phi")}
    found = {name: millions([shapes[part] for part in names]) for name, names in parts.items()}
    assert found == pytest.approx({"encoder": 44.1, "decoder": 64.65, "quantiser": 0.168}, abs=0.05)
    assert found["quantiser"] == pytest.approx(0.168, abs=5e-4)
