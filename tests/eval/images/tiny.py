"""Image models, a classifier and a data set, as small as they can be."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from models.formats import image_models as files
from models.images import classifier
from models.images.classifier import ClassifierConfig
from models.images.config import VARConfig, VQVAEConfig
from scripts import build_dataset
from tests import image_reference as reference
from tests.noise import drawn

SIDE, CHARACTERS = 8, "ABC"
VQVAE = VQVAEConfig(vocab_size=11, latent_channels=4, width=8, multipliers=(1, 2), blocks=1, scales=(1, 2, 4), phis=2)
LARGE = VARConfig(2, 16, 2, num_classes=3, vocab_size=11, latent_channels=4, scales=VQVAE.scales)
SMALL = dataclasses.replace(LARGE, depth=1, width=8)


def write(folder: Path) -> Path:
    """Directories `data`, `tokenizer`, `large`, `small`, `tuned` and `classifier` in `folder`."""
    arguments = ["--images", "glyphs", "--size", str(SIDE), "--characters", CHARACTERS, "--max_documents", "36"]
    build_dataset.main([*arguments, "--valid_documents", "9", "--out", str(folder / "data")])
    models = {
        "tokenizer": (VQVAE, reference.random_vqvae(VQVAE)),
        "large": (LARGE, reference.random_var(LARGE)),
        "small": (SMALL, reference.random_var(SMALL)),
        "tuned": (SMALL, reference.random_var(SMALL, seed=9)),
    }
    for name, (config, params) in models.items():
        files.save(folder / name, config, jax.device_put(jax.tree.map(np.float32, params)))
    judge = ClassifierConfig(len(CHARACTERS), SIDE, width=4, multipliers=(1, 2))
    files.save(folder / "classifier", judge, drawn(classifier.param_shapes(judge), 0.3))
    return folder
