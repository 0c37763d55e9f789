"""A tiny random target directory with a tokenizer and drafter directories for it, as the commands of eval read."""

import dataclasses
import pathlib

import jax

from decoding.drafters.hydra import Hydra
from decoding.drafters.medusa import Medusa
from decoding.drafters.registry import save_drafter
from decoding.trees import from_child_counts
from models import transformer
from models.config import TransformerConfig
from models.formats.hf import save_target
from models.formats.target import load_target
from models.formats.tokenizer import Tokenizer
from models.heads.hydra import HydraHeads
from models.heads.medusa import MedusaHeads

TREE = from_child_counts({(): 3, (0,): 2, (0, 0): 1})
DRAFTERS = {
    "medusa": Medusa(MedusaHeads(num_heads=3), TREE),
    "hydra": Hydra(HydraHeads(num_heads=3, num_layers=2, prefix=True), TREE),
}


def write_target(directory: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """A target directory; other seeds are other models of the same shape."""
    texts = ["def f(x):\n    return x + 1\n"] * 50 + ["once upon a time there was a small house by the sea"] * 20
    tokenizer = Tokenizer.train(texts, 300)
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=48,
        max_position=512,
        tied_embeddings=True,
        bos_id=tokenizer.bos_id,
        eos_ids=tokenizer.eos_ids,
    )
    init = jax.jit(lambda key: jax.tree.map(lambda leaf: 4 * leaf, transformer.init(config, key)))
    params = init(jax.random.key(seed))
    save_target(directory, config, params, tokenizer)
    return directory


def write_drafters(directory: pathlib.Path, target_directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Directories of random Medusa and Hydra++ heads, by name."""
    target = load_target(target_directory)
    for name, drafter in DRAFTERS.items():
        params = jax.jit(drafter.heads.init, static_argnums=0)(target.config, target.params, jax.random.key(1))
        save_drafter(directory / name, dataclasses.replace(drafter), params, target.fingerprint())
    return {name: directory / name for name in DRAFTERS}
