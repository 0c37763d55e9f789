"""Conversations that a chat model writes alone: text of its own to train draft heads on, with no data set at all.

An instruction-tuned target, given its chat template up to an empty user turn, goes on as a user would: it writes a
prompt. The prompt is put into the template and answered, and both are one document whose answer is marked as label.
Prompts that do not end, say nothing or were seen before are dropped, and so are answers that loop or, unless their
beginnings are wanted, do not end. Both kinds of text are decoded in full batches of one shape. Prompts of a person that
say what an earlier one says are dropped too.

What is finished is kept in a file of rounds, from which an interrupted run goes on; the same seed gives the same text
whether or not it was interrupted, as long as the shape of a batch is the same.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from decoding.drafter import Drafter
from decoding.sampling import Sampling
from decoding.spread import generate_together
from models import processes
from models.errors import UserError
from models.formats.target import Target
from models.formats.tokenizer import Message
from train.data.texts import Document
from train.fingerprint import fingerprint

_MARK = "\ufdd2"  # A noncharacter, which no template writes.
_GRAM = 4
_LEAST_YIELD = 16  # Batches in a row without one text that can be used, of prompts or of answers, before giving up.


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """How conversations are written.

    Attributes:
      prompt_tokens: most tokens of a prompt that the target writes.
      new_tokens: most tokens of an answer.
      prompt_temperature: of prompts.
      temperatures: of answers, which rows take in turn.
      max_repetition: answers are dropped where a larger share of their runs of four tokens has occurred before in them.
      keep_unended: keep the beginnings of answers that do not end within `new_tokens`.
      rows: texts decoded together.
      seed: of all draws.
    """

    prompt_tokens: int = 64
    new_tokens: int = 512
    prompt_temperature: float = 1.0
    temperatures: tuple[float, ...] = (0.7,)
    max_repetition: float = 0.3
    keep_unended: bool = False
    rows: int = 32
    seed: int = 0


def repetition(tokens: Sequence[int]) -> float:
    """Share of the runs of four tokens that occurred before in the same text."""
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(tokens: Sequence[int], size: int) -> float:
    """Share of different ones among the runs of `size` tokens."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _of_user(prompt: str) -> list[Message]:
    return [{"role": "user", "content": prompt}]


def _said(messages: Sequence[Message]) -> str:
    """The same for conversations that differ in spaces and capitals alone."""
    return json.dumps([{**turn, "content": " ".join(turn["content"].lower().split())} for turn in messages])


class SelfChat:
    """Conversations of one target, round by round.

    Attributes:
      documents: what is finished: `prompt`, `tokens`, and `answer`, how many of the tokens are the answer's.
      counts: of prompts and answers by what became of them, and of tokens decoded.
      seconds: spent decoding, compilation included.
    """

    def __init__(
        self,
        target: Target,
        settings: ChatSettings,
        rounds: Path,
        *,
        prompts: Sequence[Sequence[Message]] | None = None,
        drafter: Drafter | None = None,
        drafter_params: Any = None,
        progress: Callable[[str], None] = lambda line: None,
    ):
        """Takes up what `rounds` holds.

        Args:
          target: the model; its tokenizer has a chat template.
          settings: how it writes.
          rounds: the file of finished rounds; it may not be there yet.
          prompts: conversations that end with a user's turn, to be answered instead of prompts of its own.
          drafter: speeds up decoding; it changes no distribution.
          drafter_params: its parameters.
          progress: told a line per batch.

        Raises:
          UserError: there is no chat template, `rounds` was written with other settings, or prompt and answer do not
            fit into the target's context.
        """
        if target.tokenizer is None or target.tokenizer.chat_template is None:
            raise UserError(f"{target.path} has no chat template, so it cannot write conversations: give --data")
        longest = settings.new_tokens + (settings.prompt_tokens if prompts is None else 0)
        if target.config.max_position <= longest:
            own = f"--prompt_tokens {settings.prompt_tokens} and " if prompts is None else ""
            raise UserError(
                f"{own}--new_tokens {settings.new_tokens} leave no room for the chat template in the "
                f"{target.config.max_position} tokens that {target.path} can read: give fewer"
            )
        self._target, self._tokenizer, self._settings = target, target.tokenizer, settings
        self._rounds, self._progress = rounds, progress
        self._decoding = {"drafter": drafter, "drafter_params": drafter_params}
        self._given = prompts is not None
        self.documents: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self._round = 0
        self._seen: set[str] = set()
        self._waiting: list[list[Message]] = [list(prompt) for prompt in prompts or () if self._is_new(prompt)]
        if twice := len(prompts or ()) - len(self._waiting):
            self.counts["prompts seen"] = twice
        asked = hashlib.sha256(json.dumps(self._waiting).encode()).hexdigest()[:16] if self._given else "own"
        # The whole directory: another finetuning of the target, or another template, may have the same embedding.
        base = fingerprint([target.path]) if target.path else target.fingerprint()["embedding"]
        self._header = {**dataclasses.asdict(settings), "target": base, "prompts": asked}
        self._take_up()

    def write(self, wanted: int, seconds: float = float("inf")) -> None:
        """Goes on until `wanted` documents are finished, prompts run out, or so many seconds are over."""
        end = time.monotonic() + seconds
        barren = {"prompts": 0, "answers": 0}
        while len(self.documents) < wanted and processes.on_first(lambda: time.monotonic() < end):
            if not self._given and len(self._waiting) < self._settings.rows:
                kind, before = "prompts", len(self._waiting)
                self._ask()
                fruitless = len(self._waiting) == before
            elif self._waiting:
                kind, before = "answers", len(self.documents)
                self._answer()
                # Prompts of a person run out by themselves.
                fruitless = len(self.documents) == before and not self._given
            else:
                break
            barren[kind] = barren[kind] + 1 if fruitless else 0
            if barren[kind] == _LEAST_YIELD:
                self._give_up(kind)

    def _give_up(self, kind: str) -> NoReturn:
        advice = {"prompts": "give more --prompt_tokens, or prompts with --prompts"}
        advice["answers"] = "give more --new_tokens or a larger --max_repetition, or --keep_unended"
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(self.counts.items()) if name != "tokens")
        raise UserError(
            f"{self._target.path} wrote {_LEAST_YIELD} batches of {self._settings.rows} {kind} in a row of which none "
            f"can be used ({counts}): {advice[kind]}"
        )

    def statistics(self) -> dict[str, Any]:
        """What became of all texts, how fast they were decoded, and how much the answers repeat themselves."""
        answers = [document["tokens"][-document["answer"] :] for document in self.documents]
        means = {f"distinct_{n}": float(np.mean([distinct(a, n) for a in answers] or [0])) for n in (1, 2, 4)}
        return {
            "counts": dict(sorted(self.counts.items())),
            "tokens_per_second": self.counts["tokens"] / self.seconds if self.seconds else 0.0,
            "repetition": {"mean": float(np.mean([repetition(a) for a in answers] or [0])), **means},
        }

    def document(self, index: int) -> Document:
        """A finished conversation, as data sets hold it."""
        made = self.documents[index]
        context = len(made["tokens"]) - made["answer"]
        mask = np.array([0] * context + [1] * made["answer"], np.uint8)
        return {"name": f"conversation {index}", "tokens": np.array(made["tokens"], np.int32), "mask": mask}

    def _ask(self) -> None:
        """One batch of prompts of the target's own."""
        opening = self._tokenizer.apply_chat([{"role": "user", "content": _MARK}], False).partition(_MARK)[0]
        tokens = self._tokenizer.encode(opening, bos=False)
        s = self._settings
        texts = self._decode([tokens] * s.rows, s.prompt_tokens, [s.prompt_temperature] * s.rows, "prompt")
        for text in texts:
            prompt = self._tokenizer.decode(text).strip()
            messages = _of_user(prompt)
            fate = "unended" if not self._ended(text) else "empty" if not prompt else ""
            fate = fate or ("kept" if self._is_new(messages) else "seen")
            self.counts[f"prompts {fate}"] += 1
            if fate == "kept":
                self._waiting.append(messages)
        self._finish_round([])

    def _answer(self) -> None:
        """One batch of answers."""
        s = self._settings
        room = self._target.config.max_position - s.new_tokens
        asked, self._waiting = self._waiting[: s.rows], self._waiting[s.rows :]
        contexts = [(messages, self._tokenizer.encode_chat(messages)) for messages in asked]
        fitting = [(messages, tokens) for messages, tokens in contexts if len(tokens) <= room]
        self.counts["prompts too long"] += len(contexts) - len(fitting)
        temperatures = [s.temperatures[row % len(s.temperatures)] for row in range(len(fitting))]
        answers = self._decode([tokens for _, tokens in fitting], s.new_tokens, temperatures, "answer")
        made = []
        for (messages, tokens), answer in zip(fitting, answers, strict=True):
            fate = "kept" if self._ended(answer) else "cut" if s.keep_unended else "unended"
            if fate != "unended" and repetition(answer) > s.max_repetition:
                fate = "looping"
            self.counts[f"answers {fate}"] += 1
            if fate in ("kept", "cut"):
                made.append({"prompt": messages[-1]["content"], "tokens": [*tokens, *answer], "answer": len(answer)})
        self._finish_round(made)

    def _decode(self, prompts: list[list[int]], limit: int, temperatures: list[float], kind: str) -> list[list[int]]:
        """Decodes one batch; rows that are missing are filled up, so that no other shape is compiled."""
        if not prompts:
            return []
        s, missing = self._settings, self._settings.rows - len(prompts)
        seeds = np.random.SeedSequence([s.seed, self._round]).generate_state(s.rows, np.uint32)
        decoded = generate_together(
            self._target,
            prompts + [prompts[0]] * missing,
            max_new_tokens=[limit] * len(prompts) + [1] * missing,
            sampling=[Sampling(t) for t in temperatures] + [Sampling(temperatures[0])] * missing,
            seeds=seeds,
            **self._decoding,
        )
        texts = decoded.tokens[: len(prompts)]
        took, tokens = decoded.prefill_seconds + decoded.decode_seconds, sum(map(len, texts))
        self.seconds += took
        self.counts["tokens"] += tokens
        self._progress(f"{len(texts)} {kind}s, {tokens / took:,.0f} tokens/s; {len(self.documents)} documents before")
        return texts

    def _is_new(self, messages: Sequence[Message]) -> bool:
        """Whether nothing that says the same was asked about before; from now on it was."""
        before = len(self._seen)
        self._seen.add(_said(messages))
        return len(self._seen) > before

    def _ended(self, text: Sequence[int]) -> bool:
        return text[-1] in self._target.config.eos_ids

    def _finish_round(self, made: list[dict[str, Any]]) -> None:
        self.documents += made
        self._round += 1
        waiting = len(self._waiting) if self._given else self._waiting
        state = {"documents": made, "waiting": waiting, "counts": self.counts, "seconds": self.seconds}
        if not processes.is_first():
            return
        new = not self._rounds.exists()
        with self._rounds.open("a", encoding="utf-8") as file:
            if new:
                file.write(json.dumps(self._header) + "\n")
            file.write(json.dumps(state) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _object(self, line: str) -> dict[str, Any]:
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(found := json.loads(line), dict):
                return found
        raise UserError(f"{self._rounds}, which is to be gone on from, is damaged: remove it to start over")

    def _take_up(self) -> None:
        whole = processes.on_first(lambda: self._rounds.read_bytes() if self._rounds.exists() else b"")
        if not whole:
            return
        # A last line without an end was being written when the run was killed.
        lines = whole[: whole.rfind(b"\n") + 1].decode(errors="replace").splitlines()
        if not lines:
            processes.on_first(self._rounds.unlink)
            return
        header, *states = [self._object(line) for line in lines]
        wanted = json.loads(json.dumps(self._header))
        if other := [name for name in wanted if header.get(name) != wanted[name]]:
            raise UserError(
                f"{self._rounds} holds an unfinished run with another {', '.join(other)}: take the same, or remove it"
            )
        processes.on_first(lambda: os.truncate(self._rounds, whole.rfind(b"\n") + 1))
        for state in states:
            self.documents += state["documents"]
            self._round += 1
            if self._given:
                self._waiting = self._waiting[len(self._waiting) - state["waiting"] :]
            else:
                self._waiting = state["waiting"]
                self._seen |= {_said(messages) for messages in self._waiting}
            self.counts, self.seconds = Counter(state["counts"]), state["seconds"]
        if not self._given:
            self._seen |= {_said(_of_user(document["prompt"])) for document in self.documents}
        self._progress(f"taking up {len(self.documents)} documents of {self._rounds}")
