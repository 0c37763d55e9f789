"""Measures drafters against plain decoding, and the target itself.

    python -m eval.main --config=configs/eval/decode.py --config.target=DIR --config.drafters=none,DIR,DIR
        [--config.prompts=FILE ...] [--distributed=HOST:PORT,N,I]

Prints the table of runs and writes `results.json` and `report.html` to `--config.out`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

from absl import app, flags, logging
from ml_collections import config_flags

from decoding.augment import Augment, refuse_times_without
from decoding.drafters.registry import load_drafter, split_names
from decoding.generate import generate
from decoding.sampling import Sampling
from decoding.verify import Typical
from eval.measure import turns
from eval.measure.progress import Progress
from eval.report.page import keep_results, write_results
from eval.report.text import print_augmented, print_categories, print_table, write_report
from eval.text.benchmark import Contender, benchmark
from eval.text.metrics import head_accuracy, perplexity, rows_of_text
from eval.text.prompts import (
    BUILT_IN,
    Prompt,
    Question,
    Room,
    document_prompts,
    encode_questions,
    read_questions,
    spread,
)
from eval.text.results import describe_target, samples
from models import processes, schema
from models.errors import UserError, exit_on_user_error
from models.formats.target import Target, load_target
from models.schema import require
from models.sharding import parse_mesh
from train.command_line import DISTRIBUTED, read_flags

DOCUMENTS = 16

_CONFIG = config_flags.DEFINE_config_file("config", None, "The job: a file, perhaps with :variant.")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """The schema of a decode benchmark.

    Attributes:
      target: a target directory.
      drafters: drafter directories, comma-separated; `none` may be among them and runs in any case.
      out: directory that receives the results.
      overwrite: replace results that are there.
      prompts: a file of prompts (`eval/text/prompts.py`). Where there is none, prompts are the beginnings of documents
        of `data`, or, without that too, a few built-in ones.
      num_prompts: questions or documents to take, evenly spread; None takes all questions, or 16 documents.
      prompt_tokens: length of a prompt from `data`.
      chat: put prompts from a file in the tokenizer's chat template.
      too_long: what becomes of a question that does not fit the target's context: `error`, `skip` or `truncate`.
      max_new_tokens: most tokens per prompt.
      batch: prompts that are decoded together.
      repeats: how often everything is decoded.
      parts: also time the parts of a step alone, for draft share and loop efficiency; each is a program of its own.
      seed: of the draws when the temperature is above 0.
      typical: lossy typical acceptance for all drafters.
      sampling: temperature, top_k, top_p and min_p.
      data: a data set directory or `tfds:NAME`; perplexity and head accuracies are measured on it.
      split: its split.
      text: a text file to measure those on instead.
      length: tokens per row of what is measured on.
      rows: how many rows, the first ones.
      samples: prompts whose continuation the report shows.
      mesh: devices of each process that share its work, such as `tensor=4`; None is one device.
      augment: a coprocessor directory: everything is decoded once more with its latents in the cache.
      augment_every: tokens of text from latents to the next; None is once, at the end of the prompt.
      augment_lag: latents come so many tokens late.
    """

    target: str | None = None
    drafters: str = "none"
    out: str = "results"
    overwrite: bool = False
    prompts: str | None = None
    num_prompts: int | None = None
    prompt_tokens: int = 64
    chat: bool = False
    too_long: Literal["error", "skip", "truncate"] = "error"
    max_new_tokens: int = 128
    batch: int = 1
    repeats: int = 3
    parts: bool = True
    seed: int = 0
    typical: bool = False
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    data: str | None = None
    split: str = "valid"
    text: str | None = None
    length: int = 256
    rows: int = 64
    samples: int = 2
    mesh: str | None = None
    augment: str | None = None
    augment_every: int | None = None
    augment_lag: int = 0

    def __post_init__(self):
        if self.target is None:
            raise UserError("which target? Give --config.target=DIR")
        require(bool(self.drafters.strip(" ,")), "drafters must name at least one, such as none", repr(self.drafters))
        for name in ("prompt_tokens", "max_new_tokens", "batch", "repeats", "rows"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(self.length >= 2, "length must be at least 2", self.length)
        require(self.samples >= 0, "samples must not be negative", self.samples)
        refuse_times_without(self.augment is not None, self.augment_every, self.augment_lag, "augment")


def run(config: DecodeConfig) -> dict[str, Any]:
    """The whole evaluation.

    Returns:
      What it wrote to `results.json`, the environment apart.

    Raises:
      UserError: something that the config names is missing or does not fit.
    """
    keep_results(config.out, config.overwrite, "--config.overwrite")
    with Progress() as progress:
        turns.join()
        progress(f"loading {config.target}")
        target = load_target(str(config.target), mesh=parse_mesh(config.mesh) if config.mesh else None)
        contenders = _contenders(config, target)
        augment = _augment(config, target)
        prompts = _prompts(config, target, augment, progress)
        if config.batch > len(prompts):
            raise UserError(
                f"batch ({config.batch}) is more than the {len(prompts)} prompts: give more of them, or less"
            )
        quality = _quality(config, target, contenders)
        measure = functools.partial(
            benchmark,
            target,
            contenders,
            prompts,
            max_new_tokens=config.max_new_tokens,
            repeats=config.repeats,
            sampling=config.sampling,
            seed=config.seed,
            batch=config.batch,
            progress=progress,
        )
        runs = measure(parts=config.parts, shown=config.samples)
        augmented = None
        if augment is not None:
            about = schema.resolved(augment.coprocessor.config)
            augmented = {**about, "runs": measure(augment=augment, parts=False)}
        for entry, accuracy in zip(runs, quality["head_accuracy"], strict=True):
            entry["head_accuracy"] = accuracy
        progress("writing the report")
        shown = [entry.pop("shown", []) for entry in runs]
        results = {
            "config": schema.resolved(config),
            "target": describe_target(target, perplexity=quality["perplexity"]),
            "averages": "tokens/s: mean over questions, median over repeats; acceptance length: over all steps, "
            "and per turn: mean over texts",
            "runs": runs,
            "augmented": augmented,
            "samples": samples(target, contenders, prompts, shown),
        }
        write_results(results, write_report, config.out)
    print_table(results)
    print_categories(results)
    print_augmented(results)
    print(f"\nwrote {config.out}/results.json and {config.out}/report.html")
    return results


def _contenders(config: DecodeConfig, target: Target) -> list[Contender]:
    """Plain decoding, then every other drafter in the order given."""
    names = dict.fromkeys(["none", *split_names(config.drafters)])
    typical = Typical() if config.typical else None
    contenders = []
    for name in names:
        drafter, params = load_drafter(name, target)
        plain = drafter.max_depth == 0
        contenders.append(Contender(drafter, params, None if plain else name, None if plain else typical))
    return contenders


def _augment(config: DecodeConfig, target: Target) -> Augment | None:
    if config.augment is None:
        return None
    augment = Augment.load(config.augment, target, config.augment_every, config.augment_lag)
    augment.refuse_unreached(config.max_new_tokens)
    return augment


def _prompts(config: DecodeConfig, target: Target, augment: Augment | None, progress: Progress) -> list[Prompt]:
    if target.tokenizer is None:
        raise UserError(f"{config.target} has no tokenizer, so it cannot read prompts")
    otherwise = ": --config.too_long=skip leaves such questions out, truncate keeps their ends"
    latents = augment.positions(config.max_new_tokens) if augment else 0
    room = Room(config.max_new_tokens, target.config.max_position, config.too_long, progress.note, otherwise, latents)
    if config.prompts is None and config.data is not None:
        if config.prompt_tokens > room.tokens:
            beside = f" and {latents} latents" if latents else ""
            raise UserError(
                f"prompt_tokens must be at most {room.tokens}, what {config.max_new_tokens} new ones{beside} leave of "
                f"the target's context, got {config.prompt_tokens}"
            )
        count = config.num_prompts or DOCUMENTS
        return document_prompts(config.data, config.split, target, count, config.prompt_tokens)
    if config.prompts is None:
        questions = spread([Question(str(i), (text,)) for i, text in enumerate(BUILT_IN)], config.num_prompts)
    else:
        questions = read_questions(config.prompts, config.num_prompts)

    def answer(tokens: list[int]) -> list[int]:
        return generate(target, [tokens], max_new_tokens=config.max_new_tokens).tokens[0]

    return encode_questions(questions, target.tokenizer, answer, config.chat, room)


def _quality(config: DecodeConfig, target: Target, contenders: Sequence[Contender]) -> dict[str, Any]:
    """Perplexity, and per contender the accuracy of its heads; None where there is nothing to measure (on)."""
    if config.data is None and config.text is None:
        return {"perplexity": None, "head_accuracy": [None] * len(contenders)}
    data = None if config.text else config.data
    batches = rows_of_text(target, data, config.split, config.text, config.length, config.rows)
    accuracies = [
        head_accuracy(target, contender.drafter, contender.params, batches) if contender.drafter.num_heads else None
        for contender in contenders
    ]
    return {"perplexity": perplexity(target, batches), "head_accuracy": accuracies}


def eval_command(argv: list[str]) -> None:
    """The command, once its flags are parsed."""
    logging.set_verbosity(logging.ERROR)
    if len(argv) > 1:
        raise UserError(f"{argv[1]!r} is not a flag; options are written --name=value")
    if _CONFIG.value is None:
        raise UserError("what to measure? Give --config=configs/eval/decode.py")
    source = flags.FLAGS["config"].config_filename  # type: ignore[attr-defined]
    config = schema.parse(DecodeConfig, _CONFIG.value.to_dict(), place=source)
    processes.start(DISTRIBUTED.value)
    run(config)


@exit_on_user_error
def main() -> None:
    """Parses the flags and runs the command."""
    app.run(eval_command, flags_parser=read_flags)


if __name__ == "__main__":
    main()
