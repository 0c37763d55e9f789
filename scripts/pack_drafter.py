"""Makes a trained drafter small enough to be carried around: its kernels as integers of 4 or 8 bits.

    python -m scripts.pack_drafter --src DIR --out DIR [--bits 4] [--group 32] [--policy confidence:total=16,...]

Every kernel becomes integers with a scale for `--group` rows of each column (`models/formats/scaled.py`); biases, norms
and tables of tokens stay as they are. What comes out is a drafter directory as any other, at 4 bits with groups of 32
two sevenths of the same in bfloat16. Its guesses are worse for it: measure with eval.acceptance how much.
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from decoding.drafters.registry import build
from decoding.policies import parse_policy
from models import command_line
from models.command_line import at_least
from models.errors import UserError, exit_on_user_error
from models.formats.scaled import SUFFIX, quantise, read_scaled, whole_tensors
from models.formats.storage import FLOATS, new_directory, open_tensors, save_tensors, write_json
from models.formats.text_files import read_json


def packed(source: Path, bits: int, group: int) -> dict[str, np.ndarray]:
    """The tensors of a drafter directory, kernels in integers.

    Raises:
      UserError: a file is missing or damaged, or `group` does not divide the rows of a kernel.
    """
    tensors = {}
    with contextlib.ExitStack() as stack:
        files = open_tensors(source, stack)
        for name in whole_tensors(files):
            host = read_scaled(files, name, source, (*FLOATS, "I32"))
            if not name.endswith(".kernel"):
                tensors[name] = np.array(host)
                continue
            if len(host) % group:
                raise UserError(f"--group must divide the {len(host)} rows of {name}, got {group}")
            tensors[name], tensors[name + SUFFIX] = quantise(np.asarray(host, np.float32), bits, group)
    return tensors


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command: reads, packs, writes."""
    args = _parser().parse_args(argv)
    if args.group % 2:
        raise UserError(f"--group must be even, got {args.group}")
    record = read_json(args.src / "drafter.json")
    drafter = build(record, str(args.src / "drafter.json"))
    if args.policy is not None:
        if drafter.tree_policy is None:
            raise UserError(
                f"the drafter {str(args.src)!r} has no policy: --policy is for draft models and EAGLE heads"
            )
        record["policy"] = parse_policy(args.policy).to_record()
    tensors = packed(args.src, args.bits, args.group)
    with new_directory(args.out, "drafter.json") as partial:
        save_tensors(partial / "model.safetensors", tensors)
        write_json(partial / "drafter.json", record)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"wrote {args.out}: {size / 1e6:.1f} MB, kernels in {args.bits} bits")


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("scripts.pack_drafter", __doc__)
    parser.add_argument("--src", required=True, type=Path, help="drafter directory")
    parser.add_argument("--out", required=True, type=Path, help="drafter directory to write")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4, help="of an integer")
    parser.add_argument("--group", type=at_least(2), default=32, help="rows of a column that share a scale; even")
    parser.add_argument("--policy", help="how its tree shall grow, as in confidence:top_k=4,depth=4,total=8")
    return parser


if __name__ == "__main__":
    main()
