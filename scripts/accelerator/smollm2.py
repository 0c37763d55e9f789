"""Heads for a chat model within minutes, on its own words: a job of parts, each with a limit (`job.py`).

    python -m scripts.accelerator.smollm2 --target DIR --out DIR [--minutes 8] [--questions FILE.jsonl] [--cache DIR]
        [--chat_minutes 1.5] [--rows 512] [--steps 1500] [--batch_size 8] [--length 512] [--vocabulary 8192]
    python -m scripts.accelerator.smollm2 --rehearse --out DIR [--minutes 2] [--cache DIR]

    1. greedy        the target goes on from "The capital of France is"
    2. chats         scripts.continue_dataset: the target's own prompts and answers, unless --chats holds them
    3. train         the --heads (`chat_heads.py`), side by side on one device
    4. acceptance    eval.acceptance of each and of all its trees, side by side, greedily and at 0.7
    5. decode        eval.main: wall-clock of each with one tree beside plain decoding, alone on the device, likewise
    6. speed         eval.speed on the target's shape
    7. sized         eval.main: drafters named without a number, sized by cost, for 1, 4 and 16 texts at once

`OUT/parts.json` says what became of every part; `OUT/back`, or `--back`, holds what is worth carrying away, in a few
small files: the heads in 4 bits (`unpack.py` makes drafters of them), the chats as uint16, and all results and logs in
one archive. A part that fails or runs out of time stops none that does not need it. This process never touches the
device; the parts share it, so that one compiles while others compute, without reserving its memory.
"""

import argparse
import functools
import json
import os
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from models import command_line
from models.command_line import at_least, listed, positive
from models.errors import UserError, exit_on_user_error
from scripts.accelerator.chat_heads import HEADS, check_heads, methods
from scripts.accelerator.job import Job, Part, end_when_told
from scripts.accelerator.stand_in import rehearsal, stand_in
from scripts.pack_drafter import packed
from train.data.texts import open_split

WARM_UP = 0.04  # Share of the steps.
TIMED_STEPS = 30  # Enough to tell how long a step takes.
KEPT = (".json", ".jsonl", ".html", ".log")
BIGGEST_FILE = 15 * 2**20
BIGGEST_HEAD = 24 * 2**20  # Whole vocabulary maps are more.


def training(
    args: argparse.Namespace, target: Path, data: Path, seconds: dict[str, float], rehearsed: Sequence[str] = ()
) -> list[Part]:
    """Parts that train.

    Args:
      args: of the command.
      target: of the heads.
      data: what they learn from.
      seconds: per step, where they were measured; they say how many steps there is time for.
      rehearsed: heads to compile and time alone; none means to train all.
    """
    parts = []
    for name in rehearsed or args.heads:
        head = HEADS[name]
        workdir = args.out / "rehearsal" / name if rehearsed else args.out / name
        steps = args.steps
        # Another number of steps is another program, so that a little too long is better than one that fits.
        if seconds.get(name, 0.0) * steps > 1.25 * args.train_seconds:
            steps = max(2 * TIMED_STEPS, int(args.train_seconds / seconds[name]))
        options = {
            "objective.target": target,
            "objective.loop_prompts": 0,  # Acceptance is measured afterwards.
            "data.path": data,
            "steps": steps,
            "batch_size": args.batch_size,
            "length": args.length,
            "optimizer.warmup_steps": max(1, int(WARM_UP * steps)),
            "evaluation.every": TIMED_STEPS - 10 if rehearsed else max(1, steps // 6),
            "evaluation.batches": 8,
            "checkpoint.every": TIMED_STEPS - 10 if rehearsed else steps,
            "checkpoint.keep": 1,
            "metrics.every": 10,
            "precision": args.precision,
            **({"objective.vocabulary": args.vocabulary} if head.vocabulary else {}),
            **head.changes,
        }
        command = ["train.main", f"--config=configs/{head.config}", f"--workdir={workdir}"]
        command += [f"--config.{key}={value}" for key, value in options.items()]
        metrics = workdir / "metrics.jsonl"
        done = functools.partial(_timed if rehearsed else _never, metrics)
        label = f"rehearse_{name}" if rehearsed else name
        parts.append(Part(label, command, data / "manifest.json", done))
    return parts


def _timed(metrics: Path) -> bool:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0) >= TIMED_STEPS


def _never(metrics: Path) -> bool:
    return False


def step_seconds(metrics: Path) -> float | None:
    """Of the last line that tells it."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    told = [line["step_seconds"] for line in lines if "step_seconds" in line]
    return told[-1] if told else None


def acceptance(args: argparse.Namespace, target: Path) -> list[Part]:
    """One part per tree and temperature, because each compiles a program per budget; greedy ones first."""
    common = ["eval.acceptance", "--target", str(target), "--prompts", str(args.questions), "--chat"]
    common += ["--num_prompts", str(args.num_prompts), "--max_new_tokens", str(args.new_tokens)]
    parts = []
    for temperature, budgets in (("0", args.budgets), ("0.7", args.sampled_budgets)):
        for name in args.heads if budgets else ():
            for method in methods(name, args.out):
                label = "_".join(
                    ["acceptance", method.partition("=")[0].replace(", ", "_").replace(" ", "_"), temperature]
                )
                own = ["--out", str(args.out / label), "--methods", method, "--temperatures", temperature]
                command = [*common, "--budgets", budgets, *own]
                parts.append(Part(label, command, args.out / name / "drafter" / "drafter.json"))
    return parts


def timed_trees(args: argparse.Namespace, target: Path) -> list[Part]:
    """Parts that give every head the tree with which it is timed."""
    parts = []
    for name in args.heads:
        drafter, policy = args.out / name / "drafter", HEADS[name].timed
        command = ["eval.tree", "--target", str(target), "--drafter", str(drafter), "--policy", policy, "--write"]
        if policy:
            parts.append(Part(f"tree_{name}", command, drafter / "drafter.json"))
    return parts


def decode(args: argparse.Namespace, target: Path) -> list[Part]:
    """The benchmark, of those heads that there are, greedily and at 0.7."""
    drafters = [args.out / name / "drafter" for name in args.heads]
    found = [str(path) for path in drafters if (path / "drafter.json").exists()]
    common = ["eval.main", "--config=configs/eval/decode.py", f"--config.target={target}", "--config.chat=true"]
    common += [f"--config.drafters={','.join(['none', *found])}", f"--config.prompts={args.questions}"]
    common += [f"--config.num_prompts={args.decode_prompts}", f"--config.max_new_tokens={args.new_tokens}"]
    common += ["--config.parts=false"]  # Each would be a program more.
    parts = []
    for label, temperature in (("decode", "0.0"), ("decode_sampled", "0.7")):
        own = [f"--config.sampling.temperature={temperature}", f"--config.out={args.out / label}"]
        parts.append(Part(label, [*common, "--config.repeats=2", *own], quick=False))
    return parts


def decode_sized(args: argparse.Namespace, target: Path) -> list[Part]:
    """The benchmark of drafters whose number of candidates is chosen by what they cost here, batch by batch."""
    command = ["eval.main", "--config=configs/eval/decode.py", f"--config.target={target}", "--config.chat=true"]
    command += [f"--config.drafters=none,{args.sized}", f"--config.prompts={args.questions}"]
    command += [f"--config.max_new_tokens={args.new_tokens}", "--config.repeats=2", "--config.parts=false"]
    parts = []
    for batch in (1, 4, 16):
        label, prompts = f"sized_{batch}", max(batch, args.decode_prompts)
        own = [f"--config.batch={batch}", f"--config.num_prompts={prompts}", f"--config.out={args.out / label}"]
        parts.append(Part(label, [*command, *own], quick=False))
    return parts


def others_rehearsed(args: argparse.Namespace) -> list[Part]:
    """What else the job consists of, as small as it can be, to see that it works."""
    target, out = str(stand_in(args.out / "rehearsal" / "tiny", "tiny")), args.out / "rehearsal"
    write = ["scripts.continue_dataset", "--target", target, "--out", str(out / "chats"), "--documents", "16"]
    parts = [Part("rehearse_chats", [*write, "--valid_documents", "4", "--rows", "32", "--new_tokens", "64"])]
    if args.questions:
        study = [
            "eval.acceptance",
            "--target",
            target,
            "--prompts",
            str(args.questions),
            "--chat",
            "--num_prompts",
            "4",
        ]
        study += ["--budgets", "8", "--temperatures", "0", "--max_new_tokens", "8", "--out", str(out / "acceptance")]
        parts.append(Part("rehearse_acceptance", [*study, "--methods", "recycling=token_recycling"]))
    return parts


def pack(args: argparse.Namespace) -> None:
    """What is worth carrying away, in files below the limit of a small transfer."""
    back = args.back
    back.mkdir(parents=True, exist_ok=True)
    made = [name for name in args.heads if (args.out / name / "drafter" / "drafter.json").exists()]
    if made and not list(back.glob("heads-*")):
        pack_heads({name: args.out / name / "drafter" for name in made}, back)
    if (args.out / "chats" / "manifest.json").exists() and not list(back.glob("chats*")):
        pack_chats(args.out / "chats", back)
        shutil.copy(args.out / "chats" / "manifest.json", args.out / "chats-manifest.json")
    with tarfile.open(args.out / "results.tar.gz", "w:gz") as archive:
        for path in sorted(args.out.rglob("*")):
            inside = path.relative_to(args.out)
            if (
                path.suffix in KEPT
                and path.is_file()
                and inside.parts[0] not in ("back", "rehearsal", "cache", "chats")
            ):
                archive.add(path, str(inside))
    # Whole or not at all, whenever this is ended.
    shutil.copy(args.out / "results.tar.gz", back / ".results")
    os.replace(back / ".results", back / "results.tar.gz")


def pack_heads(directories: Mapping[str, Path], back: Path) -> None:
    """Heads that are small enough, kernels in integers of 4 bits and the rest in bfloat16, several to a file: the
    tensor K of the drafter N is called N/K. `unpack.py` makes drafter directories of them."""
    parts: list[dict[str, np.ndarray]] = [{}]
    for name, directory in directories.items():
        tensors = {f"{name}/{key}": narrow(tensor) for key, tensor in packed(directory, 4, 32).items()}
        if (size := sum(tensor.nbytes for tensor in tensors.values())) > BIGGEST_HEAD:
            print(f"{name} stays here: it takes {size / 2**20:.0f} MiB", flush=True)
            continue
        for key, tensor in tensors.items():
            if sum(other.nbytes for other in parts[-1].values()) + tensor.nbytes > BIGGEST_FILE:
                parts.append({})
            parts[-1][key] = tensor
    for number, tensors in enumerate(parts):
        save_file(tensors, back / f"heads-{number}.safetensors", metadata={"format": "pt"})


def narrow(tensor: np.ndarray) -> np.ndarray:
    """float32 in bfloat16, anything else as it is."""
    return tensor.astype(ml_dtypes.bfloat16) if tensor.dtype == np.float32 else tensor


def pack_chats(directory: Path, back: Path) -> None:
    """Tokens as uint16, end to end, with the lengths of documents and of their answers; as many as fit into a file."""
    for split in ("valid", "train"):
        documents = open_split(directory, split)
        room = 5_500_000 if split == "train" else 500_000
        count = int(np.searchsorted(np.cumsum(documents.lengths), room, side="right"))
        chosen = [documents[index] for index in range(count)]
        np.savez_compressed(
            back / f"chats-{split}.npz",
            tokens=np.concatenate([document["tokens"] for document in chosen]).astype(np.uint16),
            lengths=documents.lengths[:count].astype(np.int32),
            answers=np.array([int(document["mask"].sum()) for document in chosen], np.int32),
        )


def note_timings(args: argparse.Namespace) -> dict[str, float]:
    """Seconds per step of all rehearsals so far, those of earlier calls with this cache among them."""
    path = args.cache / "step_seconds.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    found = {name: step_seconds(args.out / "rehearsal" / name / "metrics.jsonl") for name in HEADS}
    known |= {name: seconds for name, seconds in found.items() if seconds}
    args.cache.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known) + "\n")
    print(f"seconds per step, side by side: {known}", flush=True)
    return known


def everything(args: argparse.Namespace, job: Job) -> None:
    """All parts."""
    target, chats = args.target, args.chats or args.out / "chats"
    prompt = "The capital of France is"
    greedy = ["scripts.generate", "--target", str(target), "--prompt", prompt, "--max_new_tokens", "48"]
    write = ["scripts.continue_dataset", "--target", str(target), "--out", str(chats), "--documents", "1000000"]
    write += ["--valid_documents", str(args.valid_documents), "--minutes", str(args.chat_minutes)]
    write += ["--rows", str(args.rows), "--new_tokens", str(args.chat_tokens), "--temperature", "0,0.5,0.8"]
    write += ["--prompt_temperature", "0.9"]
    known = note_timings(args)
    missing = [name for name in args.heads if name not in known]
    # Compiling takes processors, decoding the device.
    early = training(args, *rehearsal(args.out / "rehearsal", args.shape), {}, missing) if missing else []
    first = [] if args.chats else [Part("greedy", greedy), Part("chats", write)]
    job.run([*first, *early], 60 * args.chat_minutes + 100)
    if not (chats / "manifest.json").exists():
        # Its finished rounds are kept, and by now its programs are compiled.
        job.run([Part("chats_again", write)], 60 * args.chat_minutes + 100)
    job.run(training(args, target, chats, note_timings(args)), args.train_seconds + 120)
    pack(args)
    if args.questions:
        job.run(acceptance(args, target), args.acceptance_seconds)
        pack(args)
        if job.left > 20 and not args.untimed:
            job.run(timed_trees(args, target), job.left - 5)
            for part in decode(args, target):
                job.run([part], job.left - 5)
    if job.left > 20 and not args.untimed:
        speed = ["eval.speed", "--shape", str(target), "--sections", "bandwidth,plain", "--rounds", "5"]
        job.run([Part("speed", [*speed, "--out", str(args.out / "speed.json")], quick=False)], job.left - 5)
    for part in decode_sized(args, target) if args.questions and not args.untimed else ():
        if job.left > 20:
            job.run([part], job.left - 5)
    pack(args)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the module's docstring."""
    args = _parser().parse_args(argv)
    if not args.rehearse and args.target is None:
        raise UserError("give --target, the directory of the target, or --rehearse")
    check_heads(args.heads)
    for path in (args.target, args.questions, args.chats):
        if path is not None and not path.exists():
            raise UserError(f"there is no {path}")
    args.out.mkdir(parents=True, exist_ok=True)
    if any(args.out.iterdir()):
        raise UserError(f"{args.out} is not empty: choose a new directory")
    args.cache, args.back = args.cache or args.out / "cache", args.back or args.out / "back"
    job = Job(args.out, args.minutes, args.cache)
    end_when_told()
    # The parts have the environment as it was; this process must not take the device's memory from them.
    jax.config.update("jax_platforms", "cpu")
    if args.rehearse:
        target, data = rehearsal(args.out / "rehearsal", args.shape)
        job.run([*training(args, target, data, {}, args.heads), *others_rehearsed(args)], job.left)
        note_timings(args)
    else:
        everything(args, job)
    wrong = [name for name, part in job.parts.items() if not part["state"].startswith("ok")]
    print(f"finished; {len(job.parts)} parts, not ok: {', '.join(wrong) or 'none'}")


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("scripts.accelerator.smollm2", __doc__)
    parser.add_argument("--target", type=Path, help="target directory, with a chat template")
    parser.add_argument("--out", required=True, type=Path, help="a new or empty directory for everything")
    parser.add_argument("--minutes", type=positive, default=8.0, help="after which all ends")
    parser.add_argument("--questions", type=Path, help="file of held-out questions, for acceptance and wall-clock")
    parser.add_argument("--cache", type=Path, help="directory of compiled programs (OUT/cache)")
    parser.add_argument("--back", type=Path, help="directory for what is worth carrying away (OUT/back)")
    parser.add_argument(
        "--rehearse", action="store_true", help="compile and time training steps, try the rest in small"
    )
    parser.add_argument("--shape", choices=["smollm2", "tiny"], default="smollm2", help="of a rehearsal's target")
    parser.add_argument("--heads", type=listed, default="eagle3,hydra_pp,medusa", help=f"some of {', '.join(HEADS)}")
    parser.add_argument("--chats", type=Path, help="a data set of chats of the target, where they are written already")
    parser.add_argument("--chat_minutes", type=positive, default=1.5, help="of writing chats")
    parser.add_argument("--chat_tokens", type=at_least(1), default=640, help="most tokens of an answer")
    parser.add_argument("--valid_documents", type=at_least(1), default=256, help="chats held out")
    parser.add_argument("--rows", type=at_least(1), default=512, help="chats written together")
    parser.add_argument("--steps", type=at_least(2), default=1500, help="of training, where there is time for them")
    parser.add_argument("--train_seconds", type=float, default=130.0, help="that the steps may take")
    parser.add_argument("--acceptance_seconds", type=float, default=110.0, help="that acceptance may take")
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="rows of a training step")
    parser.add_argument("--length", type=at_least(2), default=512, help="tokens of a row")
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto", help="of training")
    parser.add_argument("--vocabulary", type=at_least(1), default=8192, help="draft vocabulary of heads that have one")
    parser.add_argument("--num_prompts", type=at_least(1), default=48, help="questions measured for acceptance")
    parser.add_argument("--decode_prompts", type=at_least(1), default=12, help="questions timed")
    parser.add_argument(
        "--sized", default="smollm2,token_recycling", help="drafters sized by cost; smollm2 fits SmolLM2-135M alone"
    )
    parser.add_argument("--new_tokens", type=at_least(1), default=128, help="tokens of each answer measured")
    parser.add_argument("--budgets", default="8,16,32", help="candidates besides the root, greedily")
    parser.add_argument("--sampled_budgets", default="8,16,32", help="the same at a temperature of 0.7; empty is none")
    parser.add_argument("--untimed", action="store_true", help="leave out the parts that need the device to themselves")
    return parser


if __name__ == "__main__":
    main()
