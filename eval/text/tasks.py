"""Tasks with a right answer: exact match of a number that is written (GSM8K), and the likeliest of several choices.

Files are JSONL or a JSON array. A task's prompt may show solved examples first, *shots*: the first records of a file of
examples or, without one, of the file itself, which are then not asked.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decoding.augment import Augment, first_pause
from decoding.coprocessors import Coprocessor
from decoding.generate import Generation, bucket, generate, slots_needed
from eval.text.behind import scored
from eval.text.prompts import spread
from models.errors import UserError
from models.formats.target import Target
from models.formats.tokenizer import Tokenizer
from train.data.text_sources import fields_of, records

NEXT = "\nQuestion:"  # What ends an answer: a base model goes on to ask.
# Whole, not what is left of one: of `5-7` and `3,4` the last is 7 and 4.
_NUMBER = re.compile(r"(?<!\d)(?<!\d\.)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with a worked answer.

    Attributes:
      question, answer: texts; the answer ends with `#### N`.
      number: N.
    """

    question: str
    answer: str
    number: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """A question with several answers, of which number `answer` is right."""

    question: str
    choices: tuple[str, ...]
    answer: int


def number_in(text: str, marked: bool) -> str | None:
    """The number behind the first `####`, or else, unless it must be so `marked`, the last one; None without.

    Commas between digits and zeros behind a point say nothing.
    """
    if "####" in text:
        found = _NUMBER.match(text.partition("####")[2].lstrip(" $"))
    elif marked:
        return None
    else:
        every = list(_NUMBER.finditer(text))
        found = every[-1] if every else None
    if found is None:
        return None
    digits = found[0].replace(",", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def read_problems(path: str | Path) -> list[Problem]:
    """Records `{"question": ..., "answer": "... #### N"}`. Raises UserError for others, by line."""
    problems = []
    for _, where, row in records(path):
        record = fields_of(row, where)
        question, answer = record.get("question"), record.get("answer", "")
        number = number_in(answer, marked=True) if isinstance(answer, str) else None
        if not isinstance(question, str) or number is None:
            raise UserError(f"{where} must have a text 'question' and a text 'answer' that ends with '#### N'")
        problems.append(Problem(question.strip(), answer.strip(), number))
    return _some(problems, path)


def read_choices(path: str | Path) -> list[Choice]:
    """Records `{"question": ..., "choices": [...], "answer": ...}`.

    Choices are texts, or `{"text": [...], "label": [...]}` (ARC); the answer, or `answerKey`, is a label or letter, a
    number from 0, or the right text itself. Also `{"ctx": ..., "endings": [...], "label": ...}` (HellaSwag) and
    `{"goal": ..., "sol1": ..., "sol2": ..., "label": ...}` (PIQA), whose labels count from 0.

    Raises:
      UserError: another record, by line.
    """
    return _some([_choice(fields_of(row, where), where) for _, where, row in records(path)], path)


def _choice(record: Mapping[str, Any], where: str) -> Choice:
    question, choices, answer = _told(record)
    labels: Any = None
    if isinstance(choices, dict):
        labels = choices.get("label")
        choices = choices.get("text")
    texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(x, str) and x.strip() for x in choices)
    if not isinstance(question, str) or not texts:
        raise UserError(
            f"{where} must have a text 'question' and at least two texts as 'choices', or ctx and endings, or goal, "
            "sol1 and sol2"
        )
    given = list(map(str, labels)) if isinstance(labels, list) else []
    if isinstance(answer, int) and not isinstance(answer, bool):
        # Labels may be numbers too, from 1 on. Choices that are numbers are never meant: of 0, 4, 2 and 6 the answer 2
        # is the third, and 1 the second.
        right = given.index(str(answer)) if str(answer) in given else answer
    else:
        letters = given or [chr(ord("A") + i) for i in range(len(choices))]
        right = next((known.index(answer) for known in (letters, choices) if answer in known), -1)
    if not 0 <= right < len(choices):
        raise UserError(
            f"{where}: the answer must be a number from 0 to {len(choices) - 1}, a label or one of the choices, got "
            f"{answer!r}"
        )
    return Choice(question.strip(), tuple(text.strip() for text in choices), right)


def _told(record: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The question, the choices and the answer, each as the record's shape has it."""
    if "endings" in record:
        question, choices = record.get("ctx"), record["endings"]
    elif "goal" in record:
        question, choices = record["goal"], [record.get("sol1"), record.get("sol2")]
    else:
        given = (record[name] for name in ("answer", "answerKey") if record.get(name) is not None)
        return record.get("question"), record.get("choices"), next(given, None)
    label = record.get("label")
    return question, choices, int(label) if isinstance(label, str) and re.fullmatch("[0-9]{1,9}", label) else label


def _some(items: list, path: str | Path) -> list:
    if not items:
        raise UserError(f"{path} holds no questions")
    return items


def split_shots(items: Sequence, examples: Sequence | None, shots: int, limit: int | None) -> tuple[list, list]:
    """The examples to show, and what is asked: at most `limit`, spread evenly.

    Raises:
      UserError: fewer examples than shots, or none left to ask.
    """
    shown, asked = (items[:shots], items[shots:]) if examples is None else (examples[:shots], items)
    if len(shown) < shots or not asked:
        held = len(items if examples is None else examples)
        raise UserError(f"{shots} shots and a question to ask need more than the {held} records there are")
    return list(shown), spread(asked, limit)


def solved(problems: Sequence[Problem | Choice]) -> str:
    """Examples as they are shown."""
    answers = (p.answer if isinstance(p, Problem) else p.choices[p.answer] for p in problems)
    return "".join(f"Question: {p.question}\nAnswer: {answer}\n\n" for p, answer in zip(problems, answers, strict=True))


def problem_prompts(
    tokenizer: Tokenizer, problems: Sequence[Problem], shots: Sequence[Problem], chat: bool
) -> list[list[int]]:
    """A prompt for every problem, examples before it; in a `chat` template as turns."""
    return [_question(tokenizer, shots, problem, chat) for problem in problems]


def exact_match(
    target: Target,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    augment: Augment | None,
    *,
    stop_texts: Sequence[str] = (NEXT,),
    max_new_tokens: int = 256,
    batch: int = 8,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Answers written greedily.

    Args:
      target: who answers; it has a tokenizer.
      problems: what is asked.
      prompts: `problem_prompts` of them.
      augment: whose latents stand behind the prompt; None is the target as it is.
      stop_texts: what ends an answer beside the target's end tokens.
      max_new_tokens: of an answer.
      batch: answers that are written together.
      progress: told what is being done.

    Returns:
      `marked` and `last`, per problem whether the number behind `####`, or else the last one, is right; `answers`, the
      texts; with latents `augmentation_ms`.
    """
    longest = max(len(target.opening(prompt)) for prompt in prompts)
    room = bucket(slots_needed(longest, max_new_tokens, 0, augment))
    answers: list[str] = []
    seconds, calls = 0.0, 0

    def write(some: Sequence[list[int]], limit: int) -> Generation:
        return generate(target, some, max_new_tokens=limit, stop_texts=stop_texts, capacity=room, augment=augment)

    if augment is not None:  # Or the time of latents would be the compiler's.
        write([prompts[0]] * min(batch, len(prompts)), min(2 + first_pause(augment), max_new_tokens))
    for first in range(0, len(prompts), batch):
        progress(f"question {first + 1} of {len(prompts)}")
        some = list(prompts[first : first + batch])
        # A last batch that is smaller would be one more compilation.
        padded = some + some[:1] * (min(batch, len(prompts)) - len(some))
        made = write(padded, max_new_tokens)
        answers += [text.removesuffix(NEXT).strip() for text in made.texts[: len(some)]]
        seconds, calls = seconds + made.augment_seconds, calls + sum(made.augmentations)
    right = {
        name: [number_in(text, marked) == problem.number for text, problem in zip(answers, problems, strict=True)]
        for name, marked in (("marked", True), ("last", False))
    }
    timed = {"augmentation_ms": 1e3 * seconds / calls} if calls else {}
    return {**right, "answers": answers, **timed}


def _question(tokenizer: Tokenizer, shots: Sequence[Problem], problem: Problem, chat: bool) -> list[int]:
    if not chat:
        return tokenizer.encode(f"{solved(shots)}Question: {problem.question}\nAnswer:")
    turns = [
        {"role": role, "content": text}
        for shot in shots
        for role, text in (("user", shot.question), ("assistant", shot.answer))
    ]
    return tokenizer.encode_chat([*turns, {"role": "user", "content": problem.question}])


Pair = tuple[list[int], list[int]]  # Tokens up to `Answer:`, and those of a choice.


def choice_pairs(target: Target, questions: Sequence[Choice], shots: Sequence[Choice], latents: int = 0) -> list[Pair]:
    """Of every choice of every question.

    Args:
      target: who is asked; it has a tokenizer.
      questions: what is asked.
      shots: examples before every question.
      latents: positions that are to be left for them.

    Raises:
      UserError: a question longer than the target's context.
    """
    assert target.tokenizer is not None
    pairs = [_encoded(target.tokenizer, shots, one, text) for one in questions for text in one.choices]
    longest = max(len(before) + len(after) for before, after in pairs)
    if longest + latents > target.config.max_position:
        raise UserError(
            f"a question and a choice have {longest} tokens{f' and {latents} latents' if latents else ''}, more than "
            f"the target's context of {target.config.max_position}"
        )
    return pairs


def choice_scores(
    target: Target,
    pairs: Sequence[Pair],
    network: Coprocessor | None,
    *,
    lag: int = 0,
    batch: int = 8,
    progress: Callable[[str], None] = lambda line: None,
) -> np.ndarray:
    """Sums of the log-likelihoods of choices behind `Answer:`, where latents stand if there are any; their coprocessor
    has not read the last `lag` tokens."""
    longest = max(len(before) + len(after) for before, after in pairs)
    size, ahead = bucket(longest), bucket(max(len(after) for _, after in pairs), 8)
    sums = np.zeros(len(pairs))
    for first in range(0, len(pairs), batch):
        progress(f"choice {first + 1} of {len(pairs)}")
        tokens, segments, at = np.zeros((batch, size)), np.zeros((batch, size)), np.zeros((batch, 1))
        for row, (before, after) in enumerate(pairs[first : first + batch]):
            tokens[row, : len(before) + len(after)] = [*before, *after]
            segments[row, : len(before) + len(after)] = 1
            at[row] = len(before) - 1
        found, there = scored(target, network, tokens, segments, at, ahead, lag=lag)
        rows = min(batch, len(pairs) - first)
        sums[first : first + rows] = np.where(there, found, 0).sum(axis=(1, 2))[:rows]
    return sums


def likeliest(questions: Sequence[Choice], sums: np.ndarray) -> dict[str, list[bool]]:
    """Per question, whether the right choice is the likeliest: `plain` by `choice_scores`, and `normalised` by these
    over the choice's bytes."""
    plain, normalised, first = [], [], 0
    for one in questions:
        scores = sums[first : first + len(one.choices)]
        sizes = np.array([len(text.encode()) for text in one.choices])
        plain.append(bool(np.argmax(scores) == one.answer))
        normalised.append(bool(np.argmax(scores / sizes) == one.answer))
        first += len(one.choices)
    return {"plain": plain, "normalised": normalised}


def _encoded(tokenizer: Tokenizer, shots: Sequence[Choice], one: Choice, text: str) -> Pair:
    """Tokens of the choice are what the whole has beyond them, or else the choice alone."""
    opening = f"{solved(shots)}Question: {one.question}\nAnswer:"
    before, whole = tokenizer.encode(opening), tokenizer.encode(f"{opening} {text}")
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, tokenizer.encode(f" {text}", bos=False)
