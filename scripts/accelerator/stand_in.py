"""What takes the place of a chat model where none is at hand: random weights of its shape, and random tokens as text.

    python -m scripts.accelerator.stand_in --shape smollm2|tiny --out DIR

Everything about them is slow or fast as the real ones are, and nothing that they say means anything.
"""

import argparse
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models import command_line
from models.config import TransformerConfig
from models.errors import exit_on_user_error
from models.formats.hf import load_config, save_target
from models.formats.storage import leaves_by_path
from models.formats.tokenizer import Tokenizer
from models.transformer import param_shapes
from train.data.text_building import write_dataset
from train.data.texts import Document

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": dict(vocab_size=49_152, width=576, num_layers=30, num_heads=9, num_kv_heads=3, mlp_width=1536),
    "tiny": dict(vocab_size=258, width=192, num_layers=6, num_heads=3, num_kv_heads=1, mlp_width=64),
}


def stand_in(directory: Path, shape: str) -> Path:
    """A target of random weights that ends a text once in about 50 tokens and has a chat template."""
    size = SHAPES[shape]
    ends = tuple(range(1, size["vocab_size"], 50))
    config = TransformerConfig(
        head_dim=64, max_position=8192, rope_theta=1e5, tied_embeddings=True, bos_id=0, eos_ids=ends, **size
    )
    rng, shapes = np.random.default_rng(0), param_shapes(config)
    leaves = [
        np.ones(leaf.shape, np.float32)
        if path.endswith("scale")
        else 0.02 * rng.standard_normal(leaf.shape, np.float32)
        for path, leaf in leaves_by_path(shapes).items()
    ]
    tokenizer = Tokenizer.train(["a rehearsal"], 258).with_chat_template(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    save_target(directory, config, jax.tree.unflatten(jax.tree.structure(shapes), leaves), tokenizer)
    return directory


def rehearsal(out: Path, shape: str) -> tuple[Path, Path]:
    """A stand-in for the target, `OUT/target`, and a data set of random tokens, `OUT/data`."""
    target, data = stand_in(out / "target", shape), out / "data"
    tokenizer, size = Tokenizer.load(target), load_config(target).vocab_size
    counts = {"train": 600, "valid": 300}

    def documents(split: str) -> Iterator[Document]:
        rng = np.random.default_rng(counts[split])
        for index in range(counts[split]):
            tokens = rng.integers(3, size, 300).astype(np.int32)
            yield {"name": str(index), "tokens": tokens, "mask": np.array([0] * 50 + [1] * 250, np.uint8)}

    totals = {name: {"documents": n, "tokens": 300 * n, "labels": 250 * n} for name, n in counts.items()}
    about = {"kind": "random", "source": "rehearsal", "chat_template": None, "splits": totals}
    write_dataset(data, tokenizer, {name: functools.partial(documents, name) for name in counts}, lambda: about)
    return target, data


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    args = _parser().parse_args(argv)
    rehearsal(args.out, args.shape)


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("scripts.accelerator.stand_in", __doc__)
    parser.add_argument("--shape", choices=list(SHAPES), required=True, help="of the target")
    parser.add_argument("--out", required=True, type=Path, help="directory for `target` and `data`")
    return parser


if __name__ == "__main__":
    main()
