"""Chat templates: conversations rendered with Jinja in a sandbox, and what of the text the assistant wrote.

Templates are those of transformers and get what it gives them: messages with all their fields, tools, the begin and end
tokens. A conversation is refused where the template leaves out what somebody said or called, so that nothing of a data
set vanishes without a word.
"""

import datetime
import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from models.errors import UserError

Message = Mapping[str, Any]  # {'role': 'system' | 'user' | 'assistant' | 'tool', 'content': str} and perhaps more
Span = tuple[int, int]

# Unicode noncharacters, reserved for a program's own use: around what `{% generation %}` blocks produce, and in place
# of a message's content.
_OPEN, _CLOSE, _PROBE = "\ufdd0", "\ufdd1", "\ufdd2"
# What a turn says besides its content. A template that does not show one of these loses something.
SPOKEN = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "thought")


class ChatTemplate:
    """A Jinja chat template with the tokens that it writes."""

    def __init__(self, template: str, tokens: Mapping[str, str], specials: Collection[str]):
        """`tokens` are those that have names (`bos_token`, ...), `specials` all special ones, which may end turns."""
        self._template, self._tokens, self._specials = template, tokens, specials

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Any] | None = None
    ) -> str:
        """A conversation as one string.

        Raises:
          UserError: the template fails on it.
        """
        return _unmarked(self._render(messages, add_generation_prompt, tools))

    def check_complete(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> None:
        """Raises UserError where the template fails, or leaves out a part of the conversation."""
        render = functools.partial(self._render, tools=tools)
        _check_complete(render, messages, tools, _unmarked(render(messages, False)))

    def spans(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> tuple[str, list[Span]]:
        """A conversation as one string, and where in it the assistant wrote, closing tokens included.

        Raises:
          UserError: the template fails, leaves out a part of the conversation, or writes an assistant's turn in a way
            that cannot be told apart from the rest.
        """
        if any(mark in _all_text([messages, tools]) for mark in (_OPEN, _CLOSE, _PROBE)):
            raise UserError("the conversation holds one of the Unicode noncharacters U+FDD0 to U+FDD2")
        render = functools.partial(self._render, tools=tools)
        whole = render(messages, False)
        _check_complete(render, messages, tools, _unmarked(whole))
        if _OPEN in whole:
            return _unmark(whole)
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start, stop = self._turn(render, messages, index, whole)
                if spans and start < spans[-1][1]:
                    raise UserError(_entangled(index))
                spans.append((start, stop))
        return whole, spans

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Any] | None = None
    ) -> str:
        try:
            return _compiled(self._template).render(
                messages=list(messages),
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except Exception as error:  # A template is input: whatever goes wrong inside it is its author's to mend.
            raise UserError(f"the chat template failed on {len(messages)} messages: {error}") from error

    def _turn(self, render: Callable[..., str], messages: Sequence[Message], index: int, whole: str) -> Span:
        """Where turn `index` stands in the whole text.

        Most templates only append: the turn is what it adds to the conversation before it. Some write a turn otherwise
        once others follow (they drop earlier thinking, say); it is then found by its content.
        """
        before = _or_none(render, messages[:index], True)
        after = _or_none(render, messages[: index + 1], False)
        start = len(before) if before is not None and whole.startswith(before) else None
        if start is not None and after is not None and after.startswith(before or "") and whole.startswith(after):
            return start, start + self._closed(after[start:])
        return self._found(render, messages, index, whole, start)

    def _found(
        self, render: Callable[..., str], messages: Sequence[Message], index: int, whole: str, start: int | None
    ) -> Span:
        """Where turn `index` stands by a mark in its place: what then stands before and behind it is not its own."""
        turn = messages[index]
        # First without its calls, which belong to what it says; some templates want them where results follow.
        for probe in ({"role": turn["role"], "content": _PROBE}, {**turn, "content": _PROBE}):
            probed = [*messages[:index], probe]
            text = _or_none(render, [*probed, *messages[index + 1 :]], False) or ""
            head, mark, tail = text.partition(_PROBE)
            end = len(whole) - len(tail)
            common = _common(head, whole)
            if mark and _PROBE not in tail and whole.endswith(tail) and end >= max(common, start or 0):
                break
        else:
            raise UserError(_entangled(index))
        if start is None:
            # Where the text parts before the mark, as with thinking that stands in the content itself; and back to the
            # words that ask the assistant to speak.
            prompt = self._prompt(render, messages[:index])
            asked = whole.rfind(prompt, 0, common) if prompt else -1
            start = common if asked < 0 else asked + len(prompt)
        rest = whole[end:]
        alone = (_or_none(render, probed, False) or "").partition(_PROBE)[2]
        closings = (alone, alone.rstrip(), *self._specials)
        closing = next((text for text in closings if text and rest.startswith(text)), "")
        return start, start + self._closed(whole[start:end] + closing)

    def _prompt(self, render: Callable[..., str], messages: Sequence[Message]) -> str:
        """What the template adds to ask the assistant for a turn."""
        plain, asking = (_or_none(render, messages, ask) or "" for ask in (False, True))
        return asking[len(plain) :] if asking.startswith(plain) else ""

    def _closed(self, turn: str) -> int:
        """Length of a turn; white space after the closing token separates turns, and nobody generates it."""
        closed = turn.rstrip()
        return len(closed) if any(closed.endswith(token) for token in self._specials) else len(turn)


def _check_complete(
    render: Callable[..., str], messages: Sequence[Message], tools: Sequence[Any] | None, whole: str
) -> None:
    """Raises UserError for a part of the conversation that the template does not show."""
    if tools and whole == _unmarked(render(messages, False, tools=None)):
        raise UserError("the chat template does not show 'tools', which the conversation has")
    marked = [{**m, "content": f"{_PROBE}{i}{_PROBE}"} if m.get("content") else m for i, m in enumerate(messages)]
    probed = _or_none(render, marked, False)
    for index, message in enumerate(messages):
        content = message.get("content")
        if content and (f"{_PROBE}{index}{_PROBE}" not in probed if probed else str(content).strip() not in whole):
            raise UserError(f"the chat template leaves out turn {index + 1}, of the role {message['role']!r}")
        for field in SPOKEN:
            # What a template shows of a turn while it is the last, it may drop on purpose when others follow.
            if message.get(field) and _is_lost(render, messages, index, field, whole):
                raise UserError(f"the chat template does not show {field!r} of turn {index + 1}")


def _is_lost(render: Callable[..., str], messages: Sequence[Message], index: int, field: str, whole: str) -> bool:
    without = {name: value for name, value in messages[index].items() if name != field}
    if _or_none(render, [*messages[:index], without, *messages[index + 1 :]], False) != whole:
        return False
    shown = _or_none(render, messages[: index + 1], False)
    return shown is None or shown == _or_none(render, [*messages[:index], without], False)


def _entangled(index: int) -> str:
    return (
        f"the chat template writes assistant turn {index + 1} so that its tokens cannot be told apart from others: "
        "give one that only appends, or that marks them with {% generation %}"
    )


def _or_none(render: Callable[..., str], messages: Sequence[Message], ask: bool) -> str | None:
    """A part of a conversation, which a template may refuse although it takes the whole."""
    try:
        return _unmarked(render(messages, ask))
    except UserError:
        return None


def _common(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    if other.startswith(one):
        return len(one)
    return next(i for i, (a, b) in enumerate(zip(one, other + "\0", strict=False)) if a != b)


def _all_text(value: Any) -> str:
    """Every string in a JSON value."""
    strings, rest = [], [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            strings.append(item)
        elif isinstance(item, Mapping):
            rest += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            rest += item
    return "\n".join(strings)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote, put between two marks."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return _OPEN + caller() + _CLOSE


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As transformers has it; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _unmarked(text: str) -> str:
    return text.replace(_OPEN, "").replace(_CLOSE, "")


def _unmark(marked: str) -> tuple[str, list[Span]]:
    """The text without marks, and the spans that lay between them."""
    text, spans = "", []
    for piece in marked.split(_OPEN):
        inside, closed, outside = piece.partition(_CLOSE)
        if closed:
            spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans
