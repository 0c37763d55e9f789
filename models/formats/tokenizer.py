"""Text to token ids and back: a Hugging Face tokenizer directory, its chat template, streaming decoding and training.

The byte-pair work is done by the `tokenizers` library. What is added here: which tokens begin and end a text, chats
with the tokens that the assistant wrote, a fingerprint that data sets and heads carry, and a decoder that turns a
growing list of ids into a growing text. The definition is kept as it was read, so that saving what was loaded changes
neither the file nor the fingerprint.
"""

import bisect
import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import tokenizers

from models.errors import UserError
from models.formats.chat_template import ChatTemplate, Message
from models.formats.text_files import half_character
from models.formats.tokenizer_files import NAMED_TOKENS, read_tokenizer, token_text

TokenIds = Iterable[SupportsIndex]  # ints, or an integer array
_CONTEXT = 16  # tokens of a prompt that new ones are read behind: a character is no longer
_MOST_ENTRIES = 10_000_000  # The trainer reserves memory for all that it is asked for.


class Tokenizer:
    """A `tokenizers.Tokenizer` with its begin and end tokens and its chat template.

    Attributes:
      core: the wrapped tokenizer.
      config: contents of `tokenizer_config.json`, `chat_template` included.
      vocab_size: number of entries, added tokens included.
      bos_id: token that begins a text, or None.
      eos_ids: tokens that end one; the first is appended to documents.
    """

    def __init__(
        self, core: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None, definition: str | None = None
    ):
        """Wraps `core`.

        Args:
          core: the tokenizer; its truncation and padding are switched off.
          config: what `tokenizer_config.json` holds: `bos_token`, `eos_token` (each a string or `{'content': ...}`),
            `add_bos_token`, `chat_template`.
          definition: text of `tokenizer.json` where `core` was read from one.

        Raises:
          UserError: `bos_token` or `eos_token` is not in the vocabulary.
        """
        core.no_truncation()
        core.no_padding()
        self.core = core
        self.config = dict(config or {})
        self._definition = definition
        self.vocab_size: int = core.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._special_id("bos_token")
        eos_id = self._special_id("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads `tokenizer.json`, or else SentencePiece's `tokenizer.model`, and the files that may lie beside it.

        Those are `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and `chat_template.jinja`.

        Raises:
          UserError: no such directory or file, one that cannot be parsed, or two that contradict each other.
        """
        core, config, definition = read_tokenizer(Path(directory))
        return cls(core, config, definition)

    def save(self, directory: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which transformers loads; each file appears whole."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files = {
            "tokenizer.json": self._definition or self.core.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(self.config, indent=2, ensure_ascii=False) + "\n",
        }
        for name, content in files.items():
            temporary = directory / f".{name}.{os.getpid()}"
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")  # halves of characters, as JSON
            os.replace(temporary, directory / name)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, progress: Callable[[str], None] = lambda line: None
    ) -> "Tokenizer":
        """Trains byte-level BPE with the specials `<bos>` (id 0) and `<eos>` (id 1).

        The same texts in the same order give the same tokenizer. Any Unicode text survives encoding and decoding,
        because every byte is in the vocabulary; few texts may give fewer entries than asked for.

        Args:
          texts: training texts, read once.
          vocab_size: entries, at least 258 (256 bytes and the specials).
          progress: told one line when all texts have been read.

        Raises:
          UserError: `vocab_size` is too small or too large.
        """
        if not 258 <= vocab_size <= _MOST_ENTRIES:
            raise UserError(
                "a byte-level tokenizer needs at least 258 entries (256 bytes, 2 specials) and at most "
                f"{_MOST_ENTRIES:,}, got {vocab_size}"
            )
        core = tokenizers.Tokenizer(tokenizers.models.BPE())
        core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<bos>", "<eos>"],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        core.train_from_iterator(_counted(texts, vocab_size, progress), trainer)
        # Other readers of the directory begin a text as `encode` does.
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 0)]
        )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "clean_up_tokenization_spaces": False,
        }
        return cls(core, config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of `tokenizer.json`, whatever its key order and white space."""
        content = json.loads(self._definition or self.core.to_str())
        # How long inputs are cut or padded is a setting of whoever saved the file, not a property of the tokens.
        content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def encode(self, text: str, bos: bool = True, specials: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
          text: any Unicode text.
          bos: begin with the begin token, where the tokenizer has one and uses it.
          specials: `<eos>` and the like inside `text` become those tokens, as a rendered chat needs; False takes them
            as ordinary characters, which is right for documents: then `decode(encode(x)) == x` for every text.

        Raises:
          UserError: `text` holds half of a surrogate pair, which is no Unicode character.
        """
        core = self.core if specials else self._literal
        with _encoding():
            return [*self._prefix(bos), *core.encode(_checked(text), add_special_tokens=False).ids]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text as one document, in parallel: begin token, the text with specials taken literally, end token."""
        with _encoding():
            encodings = self._literal.encode_batch_fast([_checked(text) for text in texts], add_special_tokens=False)
        return [[*self._prefix(True), *encoding.ids, *self.eos_ids[:1]] for encoding in encodings]

    def decode(self, ids: TokenIds, skip_specials: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        return self.core.decode([int(token) for token in ids], skip_special_tokens=skip_specials)

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template, or None; of several named ones, `default`."""
        template = self.config.get("chat_template")
        if isinstance(template, list):
            return {entry["name"]: entry["template"] for entry in template}.get("default")
        return template

    def with_chat_template(self, template: str) -> "Tokenizer":
        """The same tokenizer with another chat template."""
        return Tokenizer(self.core, {**self.config, "chat_template": template}, self._definition)

    def apply_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Sequence[Any] | None = None
    ) -> str:
        """`messages` as one string; encode it with `bos=False`, since a template writes its own begin token.

        Raises:
          UserError: there is no template, or it fails on these messages.
        """
        return self._chat.render(messages, add_generation_prompt, tools)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Token ids of `messages` in the chat template.

        Raises:
          UserError: there is no template, it fails on these messages, or it leaves out a part of them.
        """
        self._chat.check_complete(messages, tools)
        return self.encode(self.apply_chat(messages, add_generation_prompt, tools), bos=False)

    def encode_chat_with_mask(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[list[int], list[int]]:
        """A whole conversation and which of its tokens the assistant wrote.

        The assistant's spans are the template's `{% generation %}` blocks if it has them; otherwise what each of its
        turns adds to the conversation before it, generation prompt included, up to and with the closing token.

        Args:
          messages: the turns, with all that the template may show of them.
          tools: what the assistant was offered to call.

        Returns:
          Token ids and, for each, 1 if it belongs to an assistant turn or closes one, else 0.

        Raises:
          UserError: no assistant turn, no template, or one that fails, leaves out a part of the conversation, or writes
            an assistant's turn in a way that cannot be told apart from the rest.
        """
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError("the conversation has no assistant turn, so there is nothing to learn from it")
        text, spans = self._chat.spans(messages, tools)
        with _encoding():
            encoding = self.core.encode(_checked(text), add_special_tokens=False)
        starts = [start for start, _ in spans]
        mask = []
        for begin, end in encoding.offsets:
            # Spans are disjoint and ordered, so the only candidate is the last one that starts before the token ends.
            nearest = bisect.bisect_left(starts, end) - 1
            mask.append(int(nearest >= 0 and begin < spans[nearest][1]))
        return encoding.ids, mask

    @functools.cached_property
    def _chat(self) -> ChatTemplate:
        if self.chat_template is None:
            raise UserError("this tokenizer has no chat template: expected chat_template in tokenizer_config.json")
        named = {key: token_text(value) or "" for key, value in self.config.items() if key in NAMED_TOKENS}
        return ChatTemplate(self.chat_template, {"bos_token": "", "eos_token": "", **named}, self.specials)

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A copy that takes special tokens inside a text as ordinary characters."""
        copy = tokenizers.Tokenizer.from_str(self.core.to_str())
        copy.encode_special_tokens = True
        return copy

    @functools.cached_property
    def specials(self) -> frozenset[str]:
        """The special tokens, which `decode` leaves out."""
        return frozenset(token.content for token in self.core.get_added_tokens_decoder().values() if token.special)

    @functools.cached_property
    def _adds_bos(self) -> bool:
        """Whether texts begin with the begin token: some tokenizers name one and never use it."""
        if self.bos_id is None:
            return False
        setting = self.config.get("add_bos_token")
        if setting is not None:
            return bool(setting)
        return self.core.post_processor is None or self.core.encode("").ids[:1] == [self.bos_id]

    def _prefix(self, bos: bool) -> list[int]:
        return [self.bos_id] if bos and self.bos_id is not None and self._adds_bos else []

    def _special_id(self, key: str) -> int | None:
        token = token_text(self.config.get(key))
        if not token:
            return None
        index = self.core.token_to_id(token)
        if index is None:
            raise UserError(f"tokenizer_config.json names {token!r} as {key}, which tokenizer.json does not hold")
        return index


class StreamDecoder:
    """Token ids in, text out, while a sequence is being generated.

    Everything returned, joined, equals `tokenizer.decode` of all the ids behind the context; without one, of all the
    ids. Ids that end inside a character are held back until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, context: TokenIds = ()):
        """Begins behind `context`, of which the last tokens count: some decoders drop the space that begins a text."""
        self._tokenizer = tokenizer
        # A token's text may depend on there being one before it (some decoders drop the space that begins a text), so
        # the ids whose text was returned last are decoded again with those that are pending.
        self._context: list[int] = []
        self._pending: list[int] = []
        self.feed([*context][-_CONTEXT:])
        if self.held:
            self._context, self._pending = self._context + self._pending, []

    def feed(self, ids: TokenIds) -> str:
        """The text that `ids` complete; empty while a character is still incomplete."""
        return "".join(self._next(int(token)) for token in ids)

    def flush(self) -> str:
        """What was held back, incomplete characters as U+FFFD; to be called once, at the end."""
        return self._pending_text()

    @property
    def held(self) -> str:
        """What is held back, where it is complete as it stands."""
        text = self._pending_text() if self._pending else ""
        return "" if text.endswith("\ufffd") else text

    def _next(self, token: int) -> str:
        name = self._tokenizer.core.id_to_token(token)
        if name is None or name in self._tokenizer.specials:
            return ""
        self._pending.append(token)
        text = self._pending_text()
        # A run of `<0xNN>` byte tokens is read as a whole: one bad byte changes the reading of all of them.
        if not text or text.endswith("\ufffd") or (len(name) == 6 and name.startswith("<0x")):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def _pending_text(self) -> str:
        known = len(self._tokenizer.decode(self._context))
        return self._tokenizer.decode(self._context + self._pending)[known:]


def _counted(texts: Iterable[str], vocab_size: int, progress: Callable[[str], None]) -> Iterable[str]:
    count = characters = 0
    for text in texts:
        count += 1
        characters += len(text)
        yield _checked(text)
    progress(f"training a tokenizer of {vocab_size:,} entries on {count:,} texts ({characters / 1e6:.1f}M characters)")


@contextlib.contextmanager
def _encoding() -> Iterator[None]:
    """The library refuses some texts with a bare Exception: where a vocabulary lacks a piece and an unknown token."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the tokenizer cannot encode a text ({error})") from error


def _checked(text: str) -> str:
    at = half_character(text)
    if at is not None:
        raise UserError(f"character {at} of a text is half a surrogate pair, not Unicode text")
    return text
