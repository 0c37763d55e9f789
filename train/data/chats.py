"""Rows of chat data as conversations: the forms that people have, one closed set of roles, nothing dropped unsaid.

A row holds its turns in `messages` or `conversations`, each `{'role', 'content'}` or ShareGPT's `{'from', 'value'}`.
It may hold `system`, a text that comes first, and `tools`. Every other field of a turn goes to the chat template as it
is. Null is the same as absent.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from models.errors import UserError
from models.formats.chat_template import Message
from models.formats.text_files import half_character, parse_json

LISTS = ("messages", "conversations")
# What a text model cannot take, and what would change how a template renders the row.
REFUSED = ("images", "image", "audio", "audios", "video", "videos", "documents", "chat_template_kwargs")
SYSTEM, TOOLS = ("system", "system_prompt"), ("tools", "functions")
ROLES = ("system", "developer", "user", "assistant", "tool")
_ALIASES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "claude", "bot", "model", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function", "tool_response", "function_response", "ipython"), "tool"),
}
# Fields that say which turns to learn from, and the values with which they say what is done anyway: all of them.
_WEIGHTS = {"weight": (1, 1.0, True), "train": (True,), "training": (True,), "loss": (True, 1)}
# Halves of characters can come from escapes alone: the file itself is UTF-8.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def conversation(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    """The turns of a row, as chat templates take them, and the tools that it offers.

    Raises:
      UserError: the row has no turns, or one whose role or content is none that a text model can learn; the message
        names the turn and the field.
    """
    _refuse(row, "the row")
    found = {key: row[key] for key in LISTS if row.get(key) is not None}
    for key, turns in found.items():
        if not isinstance(turns, list) or not turns:
            held = "an empty list" if isinstance(turns, list) else _kind(turns)
            raise UserError(f"expected a list of turns in {key!r}, which is {held}")
    if not found:
        raise UserError(
            f"expected a list of turns in 'messages' or 'conversations'; the row holds {', '.join(row) or 'nothing'}"
        )
    first, *others = [tuple(_turn(turn, number) for number, turn in enumerate(turns, 1)) for turns in found.values()]
    if others and others[0] != first:
        raise UserError("'messages' and 'conversations' differ, so which of them counts is not known")
    return _with_system(row, first), _tools(row)


def other_fields(row: Mapping[str, Any]) -> list[str]:
    """Fields of a row that say nothing to the model: ids, sources, scores."""
    known = (*LISTS, *SYSTEM, *TOOLS)
    return [key for key, value in row.items() if key not in known and value not in (None, "", [], {})]


def may_hold_halves(line: str) -> bool:
    """Whether JSON has an escape that could be half of a surrogate pair; whole pairs look the same."""
    return _HALF.search(line) is not None


def check_characters(value: Any) -> None:
    """Raises UserError where a text in `value` holds half of a surrogate pair."""
    for field, text in _texts(value, ""):
        at = half_character(text)
        if at is not None:
            where = f"field {field!r}: " if field else ""
            raise UserError(f"{where}character {at} is half a surrogate pair, not Unicode text")


def _refuse(fields: Mapping[str, Any], what: str) -> None:
    for key in REFUSED:
        if fields.get(key) not in (None, "", [], {}):
            raise UserError(f"{what} holds {key!r}, which a data set of texts cannot take")


def _turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise UserError(f"expected every turn to be an object, turn {number} is {_kind(turn)}")
    _refuse(turn, f"turn {number}")
    fields = {key: value for key, value in turn.items() if value is not None}
    role, content = (_either(fields, keys, number) for keys in (("role", "from"), ("content", "value")))
    if not isinstance(role, str):
        raise UserError(f"turn {number} has no role: expected a text in 'role' or 'from'; it holds {', '.join(turn)}")
    name = role.strip().lower()
    name = _ALIASES.get(name, name)
    if name not in ROLES:
        raise UserError(f"turn {number} has the role {role!r}, which is none of {', '.join([*ROLES, *_ALIASES])}")
    for key, harmless in _WEIGHTS.items():
        if fields.pop(key, True) not in harmless:
            raise UserError(f"turn {number} has {key} {turn[key]!r}: which turns are learnt cannot be chosen per turn")
    text = _content(content, number, bool(fields.get("tool_calls") or fields.get("function_call")))
    more = {key: value for key, value in fields.items() if key not in ("role", "from", "content", "value")}
    if role.strip().lower() == "function_call" and (calls := _calls(text)):
        text, more = "", {**more, "tool_calls": calls}
    return {"role": name, "content": text, **more}


def _either(fields: Mapping[str, Any], keys: tuple[str, str], number: int) -> Any:
    values = [fields[key] for key in keys if key in fields]
    if len(values) == 2 and values[0] != values[1]:
        raise UserError(f"turn {number} has a {keys[0]!r} and another {keys[1]!r}, so which counts is not known")
    return values[0] if values else None


def _content(content: Any, number: int, calls: bool) -> str:
    """A turn's text; parts of a text are joined, as templates of models that see join them."""
    if content is None and calls:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(
            f"expected every turn to hold a text in 'content' or 'value', turn {number} holds {_kind(content)}"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
            raise UserError(f"turn {number} holds a part of the type {kind!r}, expected texts alone")
        texts.append(text)
    return "".join(texts)


def _calls(text: str) -> list[dict[str, Any]]:
    """Calls that a turn of the role `function_call` spells in JSON; none where it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in values):
        return []
    return [{"type": "function", "function": call} for call in values]


def _with_system(row: Mapping[str, Any], turns: tuple[Message, ...]) -> tuple[Message, ...]:
    for key in SYSTEM:
        text = row.get(key)
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise UserError(f"expected a text in {key!r}, got {_kind(text)}")
        if turns[0]["role"] != "system":
            turns = ({"role": "system", "content": text}, *turns)
        elif turns[0]["content"] != text:
            raise UserError(f"{key!r} differs from the system turn, so which of them counts is not known")
    return turns


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...]:
    found = [row[key] for key in TOOLS if row.get(key) not in (None, "", [])]
    if not found:
        return ()
    tools = parse_json(found[0], "'tools'") if isinstance(found[0], str) else found[0]
    if len(found) > 1 or not isinstance(tools, list) or not all(isinstance(tool, dict | str) for tool in tools):
        raise UserError(f"expected one list of tools in {' or '.join(map(repr, TOOLS))}")
    return tuple(tools)


def _texts(value: Any, field: str):
    """Every text in a JSON value with the field at its top."""
    rest = [(field, value)]
    while rest:
        name, item = rest.pop()
        if isinstance(item, str):
            yield name, item
        elif isinstance(item, Mapping):
            rest += [(name or key, part) for key, part in item.items()] + [("", key) for key in item]
        elif isinstance(item, list):
            rest += [(name, part) for part in item]


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
