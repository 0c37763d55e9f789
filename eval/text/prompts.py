"""Prompts from files (Spec-Bench, SPEED-Bench and MT-bench questions, HumanEval, GSM8K, plain text) and data sets.

A *question* has one or more turns of a user. What is decoded is a list of *prompts*, one per turn, in tokens; a later
turn's prompt holds the earlier turns with the answers that plain decoding gave, so that every drafter decodes the same
prompts.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import UserError
from models.formats.target import Target
from models.formats.text_files import read_text
from models.formats.tokenizer import Tokenizer
from train.data.chats import REFUSED, SYSTEM, TOOLS, conversation
from train.data.text_sources import fields_of, records

SEPARATOR = "---"  # A line of a text file; with it prompts may span lines, without it every line is one.
_TEXT_KEYS = ("prompt", "question")
_ID_KEYS = ("question_id", "task_id")
# What SPEED-Bench has in place of texts that others own, until its own script has fetched them.
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"

BUILT_IN = (
    "def fibonacci(n: int) -> int:\n",
    "import json\nimport sys\n\n\ndef main():\n",
    "class Stack:\n    def __init__(self):\n",
    "Once upon a time, in a small house by the sea,",
    "The three most important things to know about the sun are",
    "Question: what is the capital of France?\nAnswer:",
)


@dataclasses.dataclass(frozen=True)
class Question:
    """What a person asks.

    Attributes:
      name: its id in the file, or its number from 0.
      turns: one text per turn.
      category: the kind of task, or "".
    """

    name: str
    turns: tuple[str, ...]
    category: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is decoded.

    Attributes:
      tokens: token ids.
      question: name of its question; the turns of one question are averaged together.
      category: of its question.
      text: for people; what `tokens` say, of a chat its turns without the template.
    """

    tokens: tuple[int, ...]
    question: str
    category: str = ""
    text: str = ""


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """Reads a file of questions.

    `.jsonl` and `.json` (`.gz` too) hold one object a line, or an array of them: `{"turns": [...]}` (Spec-Bench,
    SPEED-Bench, MT-bench), `{"messages": [{"role": "user", "content": ...}, ...]}` (SPEED-Bench as prepared),
    `{"prompt": ...}` (HumanEval) or `{"question": ...}` (GSM8K), perhaps with `question_id` or `task_id`, and
    `category`. Any other file is text: prompts are what lies between lines `---`, or, where there are none, its lines.
    Blank prompts are passed over.

    Args:
      path: the file.
      limit: how many questions to keep, spread evenly over the file; None keeps all.

    Raises:
      UserError: no such file, a line that is none of these or holds a placeholder for its text, or no questions.
    """
    path = Path(path)
    if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        questions = [_record(fields_of(row, where), where, str(i)) for i, (_, where, row) in enumerate(records(path))]
    else:
        text = read_text(path)
        lines = text.split("\n")  # As the lines of JSON are: splitlines() knows more ends than these.
        if SEPARATOR in lines:
            lines = [block.strip("\n") for block in f"\n{text}\n".split(f"\n{SEPARATOR}\n")]
        questions = [Question(str(i), (line,)) for i, line in enumerate(x for x in lines if x.strip())]
    if not questions:
        raise UserError(f"{path} holds no prompts")
    return spread(questions, limit)


def document_prompts(data: str, split: str, target: Target, count: int, length: int, start: int = 0) -> list[Prompt]:
    """Tokens `start` to `start + length` of documents of a data set split, spread evenly over the split.

    Args:
      data: a data set directory or `tfds:NAME`.
      split: its split, perhaps a slice.
      target: whose tokenizer the data must come from.
      count: how many, fewer where fewer documents are long enough.
      length: tokens of each prompt.
      start: tokens to pass over at the beginning of a document.

    Raises:
      UserError: no such data, or no document is long enough.
    """
    from train.data.texts import open_split  # TFDS takes seconds to import; prompts files do not need it.

    fingerprint = target.tokenizer.fingerprint if target.tokenizer else None
    documents = open_split(data, split, tokenizer=target.tokenizer, tokenizer_fingerprint=fingerprint)
    long = np.flatnonzero(documents.lengths >= start + length)
    if not len(long):
        raise UserError(f"no document of {data}, split {split}, has {start + length} tokens")
    prompts = []
    for index in spread(long.tolist(), count):
        document = documents[index]
        tokens = tuple(document["tokens"][start : start + length].tolist())
        text = target.tokenizer.decode(tokens) if target.tokenizer else ""
        prompts.append(Prompt(tokens, document["name"], text=text))
    return prompts


def spread(items: Sequence, limit: int | None) -> list:
    """At most `limit` items, evenly spaced: files are often sorted by category.

    Raises:
      UserError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the number of prompts must be at least 1, got {limit}")
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


@dataclasses.dataclass(frozen=True)
class Room:
    """How long a prompt may be, and what becomes of one that is longer.

    Attributes:
      new_tokens: what is to follow a prompt.
      context: what the target can read in all.
      too_long: `error`; `skip`, with all turns of its question, which are averaged together; or `truncate`, to its end.
      told: receives one line about what was left out or cut.
      otherwise: how else to ask, for messages.
      latents: positions that a coprocessor's latents take beside both.
    """

    new_tokens: int
    context: int
    too_long: str = "error"
    told: Callable[[str], None] = lambda line: None
    otherwise: str = ""
    latents: int = 0

    @property
    def tokens(self) -> int:
        """Of the longest prompt that fits. Raises UserError where none does."""
        left = self.context - self.new_tokens - self.latents
        if left < 1:
            beside = f" and {self.latents} latents" if self.latents else ""
            raise UserError(
                f"{self.new_tokens} new tokens{beside} leave no room for a prompt in the target's context of "
                f"{self.context}"
            )
        return left


def encode_questions(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    answer: Callable[[list[int]], list[int]],
    chat: bool = False,
    room: Room | None = None,
) -> list[Prompt]:
    """Prompts for every turn of every question.

    Args:
      questions: what to ask.
      tokenizer: the target's.
      answer: continues a prompt by plain decoding; called for turns that are followed by another, once all questions
        were found to fit as far as that is known without answers.
      chat: put the turns in the tokenizer's chat template; otherwise the texts follow each other as they are.
      room: how long a prompt may be; None is any length.

    Raises:
      UserError: a chat template is asked for and there is none, or a question that is too long, by its name.
    """
    if room is not None:
        questions = _without_long_ones(questions, tokenizer, chat, room)
    prompts: list[Prompt] = []
    left_out = 0
    for question in questions:
        made = _turns(question, tokenizer, answer, chat, room)
        left_out += not made
        prompts += made
    if left_out and room is not None:
        room.told(f"left out {left_out} more questions, whose later turns are too long with the answers before them")
    return prompts


def _turns(question: Question, tokenizer, answer, chat: bool, room: Room | None) -> list[Prompt]:
    """The prompts of a question; none where one of them is too long and such are skipped."""
    prompts: list[Prompt] = []
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(question.turns, 1):
        messages.append({"role": "user", "content": turn})
        text, tokens = _encoded(messages, tokenizer, chat)
        if room is not None and len(tokens) > room.tokens:
            if room.too_long == "skip":
                return []
            if room.too_long == "error":
                raise UserError(_complaint(question, number, len(tokens), room) + room.otherwise)
            # A text begins with its begin token, however much of it is cut.
            begin = tokens[:1] if tokens[0] == tokenizer.bos_id and room.tokens > 1 else []
            tokens = begin + tokens[len(tokens) - room.tokens + len(begin) :]
            text = tokenizer.decode(tokens)
        prompts.append(Prompt(tuple(tokens), question.name, question.category, text))
        if number < len(question.turns):
            messages.append({"role": "assistant", "content": tokenizer.decode(answer(tokens))})
    return prompts


def _encoded(messages: list[dict[str, str]], tokenizer: Tokenizer, chat: bool) -> tuple[str, list[int]]:
    if chat:
        turns = [f"{m['role']}: {m['content']}\n" for m in messages]
        return "".join([*turns, "assistant: "]), tokenizer.encode(tokenizer.apply_chat(messages), bos=False)
    text = "\n".join(m["content"] for m in messages)
    return text, tokenizer.encode(text)


def _without_long_ones(questions: Sequence[Question], tokenizer: Tokenizer, chat: bool, room: Room) -> list[Question]:
    """The questions that fit while their answers are still empty: nothing else is known before any work."""
    long = {}
    for index, question in enumerate(questions):
        messages: list[dict[str, str]] = []
        for number, turn in enumerate(question.turns, 1):
            messages.append({"role": "user", "content": turn})
            count = len(_encoded(messages, tokenizer, chat)[1])
            if count > room.tokens:
                long[index] = _complaint(question, number, count, room)
                break
            messages.append({"role": "assistant", "content": ""})
    if not long:
        return list(questions)
    message = next(iter(long.values())) + (f", and so have {len(long) - 1} more" if len(long) > 1 else "")
    if room.too_long == "skip" and len(long) == len(questions):
        raise UserError(f"{message}: no question is left")
    if room.too_long == "error":
        raise UserError(message + room.otherwise)
    done = "left out" if room.too_long == "skip" else "cut"
    room.told(f"{done} {len(long)} of {len(questions)} questions: {message}")
    return list(questions) if room.too_long == "truncate" else [q for i, q in enumerate(questions) if i not in long]


def _complaint(question: Question, turn: int, count: int, room: Room) -> str:
    which = f", turn {turn}," if len(question.turns) > 1 else ""
    beside = f" and {room.latents} latents" if room.latents else ""
    return (
        f"question {question.name}{which} has {count} tokens, too many with {room.new_tokens} new ones{beside} for the "
        f"target's context of {room.context}"
    )


def _record(record: Mapping[str, Any], where: str, number: str) -> Question:
    held = [key for key in (*_TEXT_KEYS, "turns", "messages") if record.get(key) is not None]
    texts = record[held[0]] if len(held) == 1 else None
    if held == ["messages"]:
        texts = _user_turns(texts, where)
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(
            f"{where} must be an object with one of 'turns' (a list of texts), 'messages' (a list of users' turns), "
            f"'prompt' and 'question' (a text); it holds {', '.join(record) or 'nothing'}"
        )
    if any(PLACEHOLDER in text for text in texts):
        raise UserError(
            f"{where} holds no question but a placeholder, {PLACEHOLDER!r}...: fill the file with the benchmark's own "
            "script first"
        )
    if more := [key for key in (*SYSTEM, *TOOLS, *REFUSED) if record.get(key) not in (None, "", [], {})]:
        raise UserError(f"{where} holds {more[0]!r}, which a question of users' turns alone cannot have")
    name = next((str(record[key]) for key in _ID_KEYS if key in record), number)
    return Question(name, tuple(texts), str(record.get("category") or ""))


def _user_turns(messages: Any, where: str) -> list[str]:
    """Texts of turns that are all a user's: what is said between them, the target says."""
    try:
        turns, _ = conversation({"messages": messages})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for number, turn in enumerate(turns, 1):
        if turn["role"] != "user":
            raise UserError(
                f"{where}: turn {number} has the role {turn['role']!r}, expected users' turns alone: the target answers"
            )
    return [turn["content"] for turn in turns]
