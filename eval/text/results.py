"""`results.json` and the report beside it, from the runs of a benchmark (`eval/report/text.py` gives the keys)."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from decoding.generate import generate
from eval.measure.environment import describe_environment
from eval.report.text import write_report
from eval.text.benchmark import Contender
from eval.text.prompts import Prompt
from models.errors import UserError
from models.formats.target import Target
from models.formats.tokenizer import StreamDecoder, Tokenizer


def describe_target(target: Target, **facts: Any) -> dict[str, Any]:
    """The entry `target`: where it is, how large, and whatever else is known of it."""
    config = target.config
    return {
        "path": str(target.path) if target.path else None,
        "family": config.family,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(target.params)),
        "layers": config.num_layers,
        "width": config.width,
        "vocab_size": config.vocab_size,
        "dtype": str(target.params["embed"]["embedding"].dtype),
        **facts,
    }


def samples(
    target: Target, contenders: Sequence[Contender], prompts: Sequence[Prompt], max_new_tokens: int, **options: Any
) -> list[dict[str, Any]]:
    """The entry `samples`: texts with the writer of every token, each prompt by each contender.

    Args:
      target: the model; without a tokenizer there are no texts to show.
      contenders: who decodes.
      prompts: what is continued.
      max_new_tokens: of each text.
      **options: further arguments of `decoding.generate.generate`.
    """
    if target.tokenizer is None:
        return []
    entries = []
    for prompt in prompts:
        for contender in contenders:
            made = generate(
                target,
                [prompt.tokens],
                drafter=contender.drafter,
                drafter_params=contender.params,
                typical=contender.typical,
                max_new_tokens=max_new_tokens,
                **options,
            )
            text = prompt.text or target.tokenizer.decode(prompt.tokens)
            pieces = text_pieces(target.tokenizer, made.tokens[0], made.writers[0])
            entries.append({"prompt": text, "drafter": contender.drafter.name, "pieces": pieces})
    return entries


def text_pieces(tokenizer: Tokenizer, tokens: Sequence[int], writers: Sequence[int]) -> list[tuple[str, int]]:
    """Per token its text and its writer; a character made of several tokens is the text of the last of them."""
    decoder = StreamDecoder(tokenizer)
    pieces = [(decoder.feed([token]), writer) for token, writer in zip(tokens, writers, strict=True)]
    if pieces and (rest := decoder.flush()):
        pieces[-1] = (pieces[-1][0] + rest, pieces[-1][1])
    return pieces


def write_results(results: Mapping[str, Any], directory: str | Path) -> None:
    """Writes `results.json` and `report.html` into `directory`, each whole or not at all.

    Args:
      results: `runs` and whatever else the report shows; the environment is added.
      directory: made where it does not exist.

    Raises:
      UserError: the directory cannot be made.
    """
    directory = make_directory(directory)
    environment = describe_environment()
    full = {"environment": environment, "command": environment["command"], **results}
    write_json(full, directory / "results.json")
    write_report(full, directory / "report.html")


def make_directory(directory: str | Path) -> Path:
    """The directory for results, made where it does not exist.

    Raises:
      UserError: it cannot be made.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot write results to {directory}: {error.strerror}") from None
    return directory


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Writes JSON, whole or not at all; raises as `write_text` does."""
    write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Writes a file, whole or not at all.

    Raises:
      UserError: the path is a directory, or lies where nothing can be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except (IsADirectoryError, NotADirectoryError, FileNotFoundError, PermissionError) as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
