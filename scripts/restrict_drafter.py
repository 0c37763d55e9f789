"""Gives a trained drafter a draft vocabulary, without training: it scores the most frequent tokens of a data set alone.

    python -m scripts.restrict_drafter --src DIR --target DIR --data DIR --size 8192 --out DIR [--labels all]

For drafters that score all tokens though their network could do with fewer (DFlash, JetSpec, DSpark, Domino, Falcon,
EAGLE-3), their own or released ones. The head over the vocabulary is that part of the target's head, or of the
drafter's own, and so are the outputs of a serial head; nothing else changes. Tokens outside are never proposed, so less
is accepted, and a draft costs less: measure both with eval.acceptance and eval.main. A drafter that is trained with
`objective.vocabulary` has a head that learnt it.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from decoding.drafters.registry import build, save_drafter
from models import command_line
from models.command_line import at_least
from models.errors import UserError, exit_on_user_error
from models.formats.beside import check_base
from models.formats.scaled import read_scaled, whole_tensors
from models.formats.storage import FLOATS, leaves_by_path, open_tensors
from models.formats.target import Target, load_target
from models.formats.text_files import read_json
from models.heads.medusa import vocab_kernel
from train.data.texts import open_split
from train.objectives.draft_vocabulary import count_labels, most_frequent


def restricted(source: Path, target: Target, known: np.ndarray) -> tuple[Any, Any, dict[str, Any]]:
    """A drafter that scores the tokens `known`, its parameters, and the record that it was made from.

    Raises:
      UserError: a damaged directory, another base, or a drafter that cannot have a draft vocabulary or has one.
    """
    path = source / "drafter.json"
    record = read_json(path)
    drafter: Any = build(record, str(path))
    check_base(path, record, target)
    heads: Any = getattr(drafter, "heads", None)
    if getattr(heads, "vocab_size", None) != 0:
        why = "cannot have a draft vocabulary" if not hasattr(heads, "vocab_size") else "has a draft vocabulary already"
        raise UserError(f"{source}: {drafter.name} {why}")
    few = dataclasses.replace(drafter, heads=dataclasses.replace(heads, vocab_size=len(known)))
    few.check(target.config)
    shapes = jax.eval_shape(functools.partial(few.init_params, target.config), target.params, jax.random.key(0))
    wanted = {path.replace("/", "."): shape for path, shape in leaves_by_path(shapes).items()}
    made: dict[str, np.ndarray] = {"draft_vocab": known}
    with contextlib.ExitStack() as stack:
        files = open_tensors(source, stack)
        for name in whole_tensors(files):
            if name not in wanted:
                raise UserError(f"{source}: tensor {name} is unknown to its drafter.json")
            host = np.asarray(read_scaled(files, name, source, (*FLOATS, "I32")), wanted[name].dtype)
            if host.shape not in (wanted[name].shape, (*wanted[name].shape[:-1], target.config.vocab_size)):
                raise UserError(f"{source}: tensor {name} is {list(host.shape)}, which is not of this target's shape")
            made[name] = host if host.shape == wanted[name].shape else host[..., known]
    if "vocab.kernel" not in made:
        made["vocab.kernel"] = np.asarray(vocab_kernel(target.params))[:, known]
    if missing := sorted(set(wanted) - set(made)):
        raise UserError(f"{source}: tensor {missing[0]} is missing")
    return few, jax.tree.unflatten(jax.tree.structure(shapes), [made[name] for name in wanted]), record


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command: reads, counts, writes."""
    args = _parser().parse_args(argv)
    if args.out.exists():  # Said before the counting; what writes the directory holds to it again.
        raise UserError(f"{args.out} already exists")
    target = load_target(args.target)
    size = target.config.vocab_size
    if args.size >= size:
        raise UserError(f"--size must be less than the {size} tokens of the target, got {args.size}")
    spoken = target.tokenizer
    documents = open_split(
        args.data, args.split, tokenizer=spoken, tokenizer_fingerprint=spoken.fingerprint if spoken else None
    )
    counts = count_labels(documents, size, args.labels)
    known = most_frequent(counts, args.size)
    drafter, params, record = restricted(args.src, target, known)
    share = counts[known].sum() / max(counts.sum(), 1)
    made = {"restricted_to": args.size, "of_data": str(args.data), "labels_held": round(float(share), 4)}
    origin = {**record.get("provenance", {}), **made}
    save_drafter(args.out, drafter, params, target.fingerprint(), provenance=origin)
    print(f"wrote {args.out}: {args.size} of {size} tokens, which are {share:.1%} of the data set's labels")


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("scripts.restrict_drafter", __doc__)
    parser.add_argument("--src", required=True, type=Path, help="drafter directory")
    parser.add_argument("--target", required=True, help="target directory")
    parser.add_argument("--data", required=True, type=Path, help="data set whose tokens are counted")
    parser.add_argument("--split", default="train", help="its split")
    parser.add_argument("--labels", choices=["assistant", "all"], default="assistant", help="which of its tokens")
    parser.add_argument("--size", required=True, type=at_least(1), help="tokens of the draft vocabulary")
    parser.add_argument("--out", required=True, type=Path, help="drafter directory to write")
    return parser


if __name__ == "__main__":
    main()
