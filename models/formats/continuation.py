"""The text of new tokens, as it stands behind a prompt, and where a text that ends it is complete.

Tokens are no text: SentencePiece drops the space that begins one, so new tokens must be read behind the prompt's last;
and what ends a text may begin in the middle of a token and end in that of another, so it is looked for in the text.
Everything that shows or searches generated text does it here.
"""

from collections.abc import Sequence
from typing import Any

from models.errors import UserError
from models.formats.tokenizer import StreamDecoder, TokenIds, Tokenizer


class Continuation:
    """Tokens in, text out, up to and with the first of some texts.

    Attributes:
      text: what was returned so far.
      ended: a stop text is complete; `text` ends with it, and nothing more comes.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: TokenIds = (), stops: Sequence[str] = ()):
        """Begins behind `prompt`, which holds none of what is looked for."""
        self._decoder, self._stops = StreamDecoder(tokenizer, prompt), stops
        self._overlap = max(map(len, stops), default=1) - 1
        self.text, self.ended = "", False

    def feed(self, token: int) -> str:
        """The text that `token` completes; empty while a character is still incomplete, and once all has ended."""
        if self.ended:
            return ""
        made = self._decoder.feed([token])
        # What is held back is searched too: it is what the text says if it ends here.
        known = max(0, len(self.text) - self._overlap)
        seen = self.text[known:] + made + (held := self._decoder.held) if self._stops else ""
        ends = [at + len(stop) for stop in self._stops if (at := seen.find(stop)) >= 0]
        if ends:
            made, self.ended = (made + held)[: known + min(ends) - len(self.text)], True
        self.text += made
        return made

    def flush(self) -> str:
        """What was held back, incomplete characters as U+FFFD; to be called once, at the end."""
        made = "" if self.ended else self._decoder.flush()
        self.text += made
        return made


def text_behind(tokenizer: Tokenizer, prompt: TokenIds, tokens: TokenIds, stops: Sequence[str] = ()) -> str:
    """The text of `tokens` behind `prompt`, up to and with the first of `stops`."""
    made = Continuation(tokenizer, prompt, stops)
    for token in tokens:
        made.feed(int(token))
    made.flush()
    return made.text


def split_stops(tokenizer: Tokenizer, stops: Any) -> tuple[list[list[int]], list[str]]:
    """Special tokens among the texts that end a text, as token sequences, and the other texts.

    A decoded text holds no special tokens, so these are to be looked for among the tokens.

    Raises:
      UserError: an empty text, something else than a text, or a special token inside of one.
    """
    if isinstance(stops, str):
        raise UserError(f"stop texts must be a list of texts, got the text {stops!r}: put it in a list")
    if not isinstance(stops, Sequence):
        raise UserError(f"stop texts must be a list of texts, got {stops!r}")
    sequences: list[list[int]] = []
    texts: list[str] = []
    for stop in stops:
        if not isinstance(stop, str):
            raise UserError(f"a stop text must be a text, got {stop!r}")
        if not stop:
            raise UserError("a stop text must not be empty")
        if stop in tokenizer.specials:
            sequences.append(tokenizer.encode(stop, bos=False))
        elif inside := next((special for special in tokenizer.specials if special in stop), None):
            raise UserError(
                f"the stop text {stop!r} can never occur: a decoded text holds no special tokens such as {inside}; "
                "give that one alone"
            )
        else:
            texts.append(stop)
    return sequences, texts
