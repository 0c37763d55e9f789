"""Makes images of classes, or new content in a given image, and writes them as one PNG.

    python -m scripts.generate_images --tokenizer DIR --var DIR --classes 0-9 --rows 4 --out grid.png
    python -m scripts.generate_images --tokenizer DIR --var DIR --refiner DIR --draft_scales 3 --classes 7 --out 7.png
    python -m scripts.generate_images --tokenizer DIR --var DIR --classes 7 --edit a.png --mask 8,8,24,24 --out b.png

With a refiner the larger model makes the first N scales and the refiner the others (CoDe). One column per class, and
`--rows` images of each; image i has the seed `--seed` + i. `--edit` takes a given image, of which the box of `--mask`
(left, top, right and bottom edge in pixels) is made anew as an image of the class, or all but the box of `--keep`.
"""

import argparse
import collections
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from decoding.images.generate import Generated, Stage, Tokenizer, code_stages, generate_images, keep
from decoding.images.scales import Drawing
from decoding.spread import generate_images_together
from eval.images.flags import add_drawing, drawings
from eval.images.pictures import png, tiled
from eval.report.files import write_bytes
from models import command_line, processes
from models.command_line import add_distributed, add_overwrite, at_least, keep_files
from models.errors import UserError, exit_on_user_error
from models.formats import image_models as files
from models.images.config import VARConfig, VQVAEConfig
from train.data.pixels import decoded

_SMALLEST_SIDE = 96  # Of an image on the page; smaller ones are enlarged to this or more.


def stages(args: argparse.Namespace) -> list[Stage]:
    """The models that the arguments name, in turn.

    Raises:
      UserError: a directory is missing or broken, or only one of `--refiner` and `--draft_scales` is given.
    """
    if (args.refiner is None) != (args.draft_scales is None):
        raise UserError("--refiner and --draft_scales belong together: who refines, and after how many scales")
    drafting, refining = drawings(args, args.smooth)
    var = files.load(args.var, VARConfig)
    if args.refiner is None:
        return [Stage(*var, var[0].num_scales, drafting)]
    return code_stages(var, files.load(args.refiner, VARConfig), args.draft_scales, drafting, refining)


def class_numbers(text: str) -> list[int]:
    """Classes as people write them: `3,5,7-9`.

    Raises:
      UserError: anything else.
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if found is None or (found[2] and int(found[2]) < int(found[1])):
            raise UserError(f"--classes must be numbers and ranges such as 3,5,7-9, got {text!r}")
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    return numbers


def box(text: str, side: int) -> np.ndarray:
    """A bool array `[side, side]`, true inside the box `left,top,right,bottom`.

    Raises:
      UserError: the text is no box, or it lies outside the image or holds nothing.
    """
    if not re.fullmatch(r"\d+,\d+,\d+,\d+", text):
        raise UserError(f"a box must be left,top,right,bottom in pixels, such as 8,8,24,24, got {text!r}")
    left, top, right, bottom = (int(edge) for edge in text.split(","))
    if not (left < right <= side and top < bottom <= side):
        raise UserError(f"{text} is no box within an image of {side} x {side} pixels")
    inside = np.zeros((side, side), bool)
    inside[top:bottom, left:right] = True
    return inside


def make(args: argparse.Namespace) -> tuple[Generated, int]:
    """The images, row by row, and how many columns they have.

    Raises:
      UserError: something that the arguments name is missing or does not fit.
    """
    if (args.edit is not None) != (args.mask is not None or args.keep is not None):
        raise UserError("--edit and --mask or --keep belong together: which image, and which part of it is made anew")
    columns = class_numbers(args.classes)
    tokenizer = Tokenizer(*files.load(args.tokenizer, VQVAEConfig))
    labels = columns * args.rows
    if args.edit is not None:
        side = tokenizer.config.image_size
        given = np.repeat(_read(args.edit, side)[None], len(labels), axis=0)
        kept = keep(tokenizer, given, ~box(args.keep, side) if args.mask is None else box(args.mask, side))
        if bool(kept.mask.all()):
            cell = side // tokenizer.config.scales[-1]
            raise UserError(f"nothing of the image stays: cells of {cell} x {cell} pixels are made anew as a whole")
        return generate_images(tokenizer, stages(args), labels, seeds=args.seed, kept=kept), len(columns)
    return generate_images_together(tokenizer, stages(args), labels, seeds=args.seed), len(columns)


def _read(path: Path, side: int) -> np.ndarray:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"there is no image {path} to be read ({error.strerror})") from None
    changes: collections.Counter[str] = collections.Counter()
    pixels = decoded(content, side, str(path), changes)
    for change in +changes:
        print(f"{path}: {change}", file=sys.stderr)
    return pixels


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    args = _parser().parse_args(argv)
    processes.start(args.distributed)
    out = Path(args.out)
    if not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: there is no directory {out.parent}")
    keep_files([out], args.overwrite)
    made, columns = make(args)
    enlarged = -(-_SMALLEST_SIDE // made.pixels.shape[1])
    write_bytes(png(tiled(made.pixels, columns, enlarged=enlarged)), out)
    seconds = " + ".join(f"{part:.2f}" for part in (*made.stage_seconds, made.decode_seconds))
    print(f"{out}: {len(made.pixels)} images, {seconds} s (models in turn and decoder, compilation included)")


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("scripts.generate_images", __doc__)
    parser.add_argument("--tokenizer", required=True, help="the VQ-VAE's directory")
    parser.add_argument("--var", required=True, help="a VAR model's directory")
    parser.add_argument("--refiner", help="a smaller one's, which makes the scales after --draft_scales")
    parser.add_argument("--draft_scales", type=int, help="N, scales that --var makes when there is a --refiner")
    parser.add_argument("--classes", required=True, help="numbers and ranges, such as 3,5,7-9: the columns")
    parser.add_argument("--rows", type=at_least(1), default=1, help="images of each class")
    parser.add_argument("--out", required=True, help="the PNG to write")
    add_overwrite(parser)
    add_distributed(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the others count up from it")
    add_drawing(parser, Drawing(guidance=4.0, top_p=0.95))
    parser.add_argument("--smooth", action="store_true", help="mix codes for smoother pictures")
    parser.add_argument("--edit", type=Path, metavar="IMAGE", help="an image of which only a part is made")
    part, box_of = parser.add_mutually_exclusive_group(), "LEFT,TOP,RIGHT,BOTTOM"
    part.add_argument("--mask", metavar=box_of, help="a box that is made, in pixels of the model's images")
    part.add_argument("--keep", metavar=box_of, help="or one that stays, the rest being made")
    return parser


if __name__ == "__main__":
    main()
