"""What is run on an accelerator: for every part its processes, in turn or side by side, and how long they may take.

Limits are for an H100 or H200. Processes that measure time compile side by side and have the device alone while they
time (`eval/measure/turns.py`); each measures little, so that one that fails or is ended takes nothing else with it.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from eval.measure.lineup import DRAFTERS
from eval.speed import PEERS
from scripts.accelerator.job import Part
from scripts.accelerator.steps import JOBS

Group = tuple[list[Part], float]  # Side by side, and their seconds.
BESIDES = ("grain", "array_record", "tensorflow_datasets", "ml_collections")
_DTYPES = ("float64", "bfloat16")
_AT_ONCE = 3  # Drafters in one process: as many sets of heads as fit beside the target.


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
      shape: of decoding.
      rounds: samples of each timing.
      rows, nodes, scenes: as of `eval.speed`.
      images: depths and batch of each process.
      new_tokens, samples: of the texts that correctness compares, and of the strings that it counts.
      drafters: that take part.
      steps: jobs of `steps.py`, with their options.
      coprocessor: sizes of the step whose cost is measured, as `coprocessor.py` takes them.
      taught: steps, rows and tokens per row of coprocessors' training.
      limit: seconds of a process that times, its wait for others included.
    """

    shape: str
    rounds: int
    rows: str = "1,16,64"
    nodes: str = "1,2,4,8,16,32,64,128"
    scenes: Sequence[str] = ("1x1024,1x4096", "1x32768", "16x1024", "64x1024")
    images: Sequence[tuple[str, str]] = (("16,8", "8"), ("30,16", "8"))
    new_tokens: int = 128
    samples: int = 1024
    drafters: Sequence[str] = tuple(DRAFTERS)
    steps: Sequence[tuple[str, str, str]] = tuple((name, str(job.rows), str(job.length)) for name, job in JOBS.items())
    coprocessor: Sequence[str] = ("--shape", "110m", "--batch_size", "8", "--length", "1024")
    taught: tuple[int, int, int] = (600, 8, 512)
    limit: float = 240

    @classmethod
    def of(cls, shape: str, tiny: bool, rounds: int) -> "Sizes":
        """Of a real run, or of one that only shows that everything works."""
        if not tiny:
            return cls(shape, rounds)
        return cls(
            shape="tiny",
            rounds=1,
            rows="1,4",
            nodes="1,4",
            scenes=("2x64",),
            images=(("2,1", "1"),),
            new_tokens=16,
            samples=512,
            drafters=tuple(DRAFTERS)[:2],
            steps=tuple((name, "2", "32") for name in JOBS),
            coprocessor=("--batch_size", "1", "--length", "64", "--kinds", "pause"),
            taught=(2, 2, 64),
            limit=math.inf,
        )


def speed(args: argparse.Namespace, sizes: Sizes, name: str, sections: str, *options: str) -> Part:
    """A process of `eval.speed`."""
    command = ["eval.speed", "--sections", sections, "--rounds", str(sizes.rounds), *options]
    command += [] if sections == "images" else ["--shape", sizes.shape]
    return Part(name, [*command, "--out", str(args.out / f"{name}.json")], quick=False, seconds=sizes.limit)


def correctness(args: argparse.Namespace, sizes: Sizes, left: float) -> Iterator[Group]:
    """Attention's kernel, texts and distributions, side by side: nothing is timed."""
    length = "24" if sizes.shape == "tiny" else "512"
    kernels = ["scripts.accelerator.kernels", "--length", length, "--out", str(args.out / "kernels.json")]
    yield [Part("kernels", kernels)], 40
    checks = {f"greedy_{dtype}": ["--dtype", dtype, "--new_tokens", str(sizes.new_tokens)] for dtype in _DTYPES}
    checks["chi_square"] = ["--samples", str(sizes.samples), "--batches", "1,16"]
    for kind, options in checks.items():
        parts = []
        for number, names in _groups(sizes.drafters):
            name = f"{kind}_{number}"
            command = ["scripts.accelerator.correctness", "--drafters", names, *options]
            parts.append(Part(name, [*command, "--out", str(args.out / f"{name}.json")]))
        yield parts, 90


def plain(args: argparse.Namespace, sizes: Sizes, left: float) -> Iterator[Group]:
    """Plain decoding."""
    yield [speed(args, sizes, "plain", "bandwidth,rows,plain", "--rows", sizes.rows)], math.inf


def peers(args: argparse.Namespace, sizes: Sizes, left: float) -> Iterator[Group]:
    """The peer beside plain decoding, one kind of cache after the other: two libraries each hold the target."""
    for name in PEERS:
        yield [speed(args, sizes, name, f"plain,{name}")], math.inf


def drafters(args: argparse.Namespace, sizes: Sizes, left: float) -> Iterator[Group]:
    """A few in a process."""
    for number, names in _groups(sizes.drafters):
        yield [speed(args, sizes, f"drafters_{number}", "drafters", "--greedy", "--drafters", names)], math.inf


def _groups(drafters: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Numbers from 1, and a few names each, as commands take them."""
    for first in range(0, len(drafters), _AT_ONCE):
        yield first // _AT_ONCE + 1, ",".join(drafters[first : first + _AT_ONCE])


def replay(args: argparse.Namespace, sizes: Sizes, left: float) -> Iterator[Group]:
    """Loop efficiency."""
    yield [speed(args, sizes, "replay", "replay", "--nodes", sizes.nodes)], math.inf


def growth(args: argparse.Namespace, sizes: Sizes, left: float) -> Iterator[Group]:
    """Scene by scene: the largest may not fit."""
    for number, scenes in enumerate(sizes.scenes, 1):
        options = ("--scenes", scenes, "--drafters", ",".join(sizes.drafters))
        yield [speed(args, sizes, f"growth_{number}", "growth", *options)], 100


def training(args: argparse.Namespace, sizes: Sizes, left: float) -> Iterator[Group]:
    """Job by job."""
    for name, batch, length in sizes.steps:
        command = ["scripts.accelerator.steps", "--job", name, "--batch_size", batch, "--length", length]
        command += ["--tiny"] if sizes.shape == "tiny" else []
        command += ["--rounds", str(sizes.rounds), "--out", str(args.out / f"training_{name}.json")]
        yield [Part(f"training_{name}", command, quick=False)], 100


def images(args: argparse.Namespace, sizes: Sizes, left: float) -> Iterator[Group]:
    """Published shapes, each alone: what the deepest takes to compile is what is asked."""
    for depths, batch in sizes.images:
        options = ("--image_depths", depths, "--image_batch", batch, "--draft_scales", "none")
        yield [speed(args, sizes, f"images_{depths.partition(',')[0]}", "images", *options)], 180


def coprocessor(args: argparse.Namespace, sizes: Sizes, left: float) -> Iterator[Group]:
    """What a step costs; then, on chats that the target writes, `:smollm2` and its baselines side by side, and how they
    change what the target says. Without a target a stand-in learns random tokens."""
    cost = ["scripts.accelerator.coprocessor", *sizes.coprocessor, "--rounds", str(sizes.rounds)]
    yield [Part("coprocessor_cost", [*cost, "--out", str(args.out / "coprocessor_cost.json")], quick=False)], 100
    out = args.out / "coprocessor"
    if args.target is None:
        target, data = out / "target", out / "data"
        make = ["--shape", "tiny" if sizes.shape == "tiny" else "smollm2", "--out", str(out)]
        yield [Part("coprocessor_stand_in", ["scripts.accelerator.stand_in", *make], packages=BESIDES)], 60
    else:
        target, data = args.target, out / "chats"
        write = ["scripts.continue_dataset", "--target", str(target), "--out", str(data), "--documents", "1000000"]
        write += ["--valid_documents", "128", "--minutes", "1.5", "--rows", "512", "--temperature", "0,0.7"]
        yield [Part("coprocessor_chats", write, packages=BESIDES)], 190
    steps, rows, length = sizes.taught
    parts = []
    for kind in ("lora", "soft", "pause"):
        command = ["train.main", "--config=configs/coprocessor.py:smollm2", f"--config.objective.target={target}"]
        command += [f"--config.data.path={data}", f"--config.steps={steps}", f"--config.batch_size={rows}"]
        command += [f"--config.length={length}", f"--config.objective.coprocessor.kind={kind}"]
        if kind == "pause":  # It has no network, whose latents these are about.
            command += [f"--config.objective.coprocessor.{flag}" for flag in ("z_scale=none", "z_tap=post_norm")]
        warmup = max(1, min(50, steps // 10))
        command += [f"--config.{of}.warmup_steps={warmup}" for of in ("optimizer", "objective.soft")]
        command += [f"--config.evaluation.every={max(1, steps // 3)}", f"--workdir={out / kind}"]
        parts.append(Part(f"coprocessor_{kind}", command, data / "manifest.json", packages=BESIDES))
    yield parts, 240
    made = [
        str(out / name / "coprocessor") for name in ("lora", "soft", "pause") if (out / name / "coprocessor").exists()
    ]
    if made:
        command = ["eval.quality", "--target", str(target), "--coprocessors", ",".join(made), "--data", str(data)]
        command += ["--labels", "assistant", "--length", str(length), "--rows", str(8 * rows)]
        yield [Part("coprocessor_quality", [*command, "--out", str(out / "quality")], packages=BESIDES)], 60


def smollm2(args: argparse.Namespace, sizes: Sizes, left: float) -> Iterator[Group]:
    """Takes what time is left, and ends by itself."""
    command = ["scripts.accelerator.smollm2", "--out", str(args.out / "smollm2"), "--cache", str(args.cache)]
    command += ["--back", str(args.back), "--minutes", f"{max(left - 15, 0) / 60:.2f}"]
    command += ["--target", str(args.target)] if args.target is not None else ["--rehearse"]
    command += ["--questions", str(args.questions)] if args.questions is not None else []
    if sizes.shape == "tiny":
        command += ["--shape", "tiny", "--batch_size", "2", "--length", "32", "--vocabulary", "64", "--steps", "40"]
    yield [Part("smollm2", command, packages=BESIDES)], left


# Neighbours of these share a queue. Not the others that time: they take most of a device's memory, or tell how long
# compilation took.
QUEUED = ("plain", "replay", "drafters")
# In order of worth: what has been measured least comes before what takes long.
PARTS: dict[str, Callable[[argparse.Namespace, Sizes, float], Iterator[Group]]] = {
    "correctness": correctness,
    "plain": plain,
    "replay": replay,
    "drafters": drafters,
    "peers": peers,
    "growth": growth,
    "training": training,
    "images": images,
    "coprocessor": coprocessor,
    "smollm2": smollm2,
}
