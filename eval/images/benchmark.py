"""Making the images that are judged, with the clock running: everybody makes a batch, then everybody the next one.

Image i has the class i mod C and the seed `seed + i`, whoever makes it, so that the same request can be looked at in
everybody's pictures. What is made goes to disk batch by batch: 50,000 images need no more memory than two batches.

Several processes share each batch, and its seconds are those of the slowest. Definitions:

* **images/s** is a batch over the seconds of its transformer stages, the decoder of the VQ-VAE apart, as the papers
  measure it; **end to end** includes the decoder. Both are medians over batches, compilation excluded.
* **speed-up** is the one over that of the larger model alone in the same run.
"""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from decoding.images.generate import Generated, Tokenizer
from decoding.spread import generate_images_together
from eval.images.contenders import Contender
from eval.images.samples import write_images
from models import processes


@dataclasses.dataclass(frozen=True)
class Requests:
    """Which images are made.

    Attributes:
      count: how many that count; the last batch is filled up with more.
      batch: images made together.
      classes: their number, C.
      seed: of image 0.
      decoded_at_once: images per call of the decoder.
      shown: images whose pixels are kept for the report.
    """

    count: int
    batch: int
    classes: int
    seed: int
    decoded_at_once: int
    shown: tuple[int, ...]

    @property
    def rounds(self) -> int:
        """Batches."""
        return -(-self.count // self.batch)

    def numbers(self, turn: int) -> range:
        """The images of batch `turn`."""
        return range(turn * self.batch, (turn + 1) * self.batch)


@dataclasses.dataclass
class Made:
    """What one contender did.

    Attributes:
      samples: the file with its images.
      stage_seconds: per batch, per stage.
      decode_seconds: per batch.
      shown: the pixels that were asked for, by number.
      first: codes of the first image shown, per scale.
    """

    samples: Path
    stage_seconds: list[tuple[float, ...]] = dataclasses.field(default_factory=list)
    decode_seconds: list[float] = dataclasses.field(default_factory=list)
    shown: dict[int, UInt8[np.ndarray, "H W 3"]] = dataclasses.field(default_factory=dict)
    first: list[Int[np.ndarray, "1 _"]] = dataclasses.field(default_factory=list)


def benchmark(
    tokenizer: Tokenizer,
    field: Sequence[Contender],
    requests: Requests,
    folder: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Made]:
    """Makes everybody's images, taking turns batch by batch.

    Args:
      tokenizer: the VQ-VAE of all.
      field: who takes part.
      requests: what to make.
      folder: receives one `.npz` of samples per contender.
      progress: told what is being done.

    Returns:
      By name of the contender what it did.
    """

    def make(contender: Contender, turn: int) -> Generated:
        numbers = requests.numbers(turn)
        return generate_images_together(
            tokenizer,
            contender.stages,
            [number % requests.classes for number in numbers],
            seeds=requests.seed + numbers.start,
            decoded_at_once=requests.decoded_at_once,
        )

    for contender in field:
        progress(f"compiling {contender.name}")
        make(contender, 0)
    made = {contender.name: Made(folder / f"{file_name(contender.name)}.npz") for contender in field}
    side = tokenizer.config.image_size
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(_on_disk(one.samples, requests.count, side)) for name, one in made.items()}
        for turn in range(requests.rounds):
            # Nobody is always the first to find the machine as another left it.
            ahead = turn % len(field)
            for contender in (*field[ahead:], *field[:ahead]):
                progress(f"batch {turn + 1} of {requests.rounds}, {contender.name}")
                _keep(made[contender.name], files[contender.name], make(contender, turn), requests, turn)
    return made


def rates(made: Made, batch: int) -> dict[str, Any]:
    """The speed of one contender: entries of its run, without the comparison."""
    stages = [batch / sum(seconds) for seconds in made.stage_seconds]
    turns = zip(made.stage_seconds, made.decode_seconds, strict=True)
    whole = [batch / (sum(seconds) + decoder) for seconds, decoder in turns]
    return {
        "images_per_second": statistics.median(stages),
        "images_per_second_repeats": stages,
        "end_to_end_images_per_second": statistics.median(whole),
        "stage_seconds": [statistics.median(column) for column in zip(*made.stage_seconds, strict=True)],
        "decode_seconds": statistics.median(made.decode_seconds),
    }


def speedups(entry: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float]:
    """How many times as fast as the baseline."""
    return {
        "speedup": entry["images_per_second"] / baseline["images_per_second"],
        "end_to_end_speedup": entry["end_to_end_images_per_second"] / baseline["end_to_end_images_per_second"],
    }


def file_name(name: str) -> str:
    """A contender's name as that of a file."""
    return name.lower().replace("=", "").replace(" ", "-")


def _keep(made: Made, pixels: np.ndarray | None, batch: Generated, requests: Requests, turn: int) -> None:
    numbers = requests.numbers(turn)
    made.stage_seconds.append(batch.stage_seconds)
    made.decode_seconds.append(batch.decode_seconds)
    if pixels is not None:
        pixels[numbers.start : numbers.stop] = batch.pixels[: max(0, len(pixels) - numbers.start)]
    made.shown |= {number: batch.pixels[number - numbers.start] for number in requests.shown if number in numbers}
    if requests.shown and requests.shown[0] in numbers:
        row = requests.shown[0] - numbers.start
        made.first = [index[row : row + 1] for index in batch.indices]


@contextlib.contextmanager
def _on_disk(path: Path, count: int, side: int) -> Iterator[np.ndarray | None]:
    """An array of images in a file, of which leaving the block well makes an `.npz`; None where another one writes."""
    if not processes.is_first():
        yield None
        return
    raw = path.with_name(f".{path.name}.raw")
    try:
        pixels = np.lib.format.open_memmap(raw, "w+", np.uint8, (count, side, side, 3))
        yield pixels
        write_images(path, pixels)
    finally:
        raw.unlink(missing_ok=True)
