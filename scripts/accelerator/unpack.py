"""Drafter directories of what came back from a job of `smollm2.py`.

    python -m scripts.accelerator.unpack --back DIR --out DIR

Writes OUT/NAME for every head in `BACK/heads-*.safetensors`, with its record out of `BACK/results.tar.gz`.
"""

import argparse
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from models import command_line
from models.errors import UserError, exit_on_user_error
from models.formats.storage import new_directory, save_tensors, write_json


def unpack(back: Path, out: Path) -> list[str]:
    """Writes all drafters and returns their names.

    Raises:
      UserError: a file is missing, or a directory exists.
    """
    heads: dict[str, dict[str, np.ndarray]] = {}
    for path in sorted(back.glob("heads-*.safetensors")):
        for key, tensor in load_file(path).items():
            name, _, inside = key.partition("/")
            heads.setdefault(name, {})[inside] = tensor
    results = back / "results.tar.gz"
    if not heads or not results.exists():
        raise UserError(f"{back} must hold results.tar.gz and heads-*.safetensors, which the job leaves in OUT/back")
    with tarfile.open(results) as archive:
        for name, tensors in heads.items():
            record = archive.extractfile(f"{name}/drafter/drafter.json")
            assert record is not None
            with new_directory(out / name, "drafter.json") as directory:
                save_tensors(directory / "model.safetensors", tensors)
                write_json(directory / "drafter.json", json.load(record))
    return list(heads)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser: argparse.ArgumentParser = command_line.parser("scripts.accelerator.unpack", __doc__)
    parser.add_argument("--back", required=True, type=Path, help="what the job left in OUT/back")
    parser.add_argument("--out", required=True, type=Path, help="directory of the drafters")
    args = parser.parse_args(argv)
    for name in unpack(args.back, args.out):
        print(f"wrote {args.out / name}")


if __name__ == "__main__":
    main()
