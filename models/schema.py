"""Strict reading of nested data, from config files, command lines and JSON, into frozen dataclasses.

Whatever a dataclass does not know is refused: an unknown key, a wrong type, a missing value, a broken rule between
fields. Each refusal is one sentence with the dotted place, what was found, what was expected and the nearest match.

A class that says for itself how it is written down has `from_record(raw, where, place)` and `to_record()`; of one that
only a table of its subclasses can read, `parse` is given the reader.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from models.errors import UserError

T = TypeVar("T")
Readers = Mapping[Any, Callable[[Any, str, str], Any]]


def parse(
    kind: type[T],
    raw: Mapping[str, Any],
    where: str = "",
    place: str = "the config",
    given: Mapping[str, Any] | None = None,
    readers: Readers = MappingProxyType({}),
) -> T:
    """A section as its dataclass.

    Args:
      kind: a dataclass; its annotations are the schema.
      raw: nested dicts.
      where: dotted place of the section; empty for the whole.
      place: how messages call the whole, for instance the file's name.
      given: annotations to use instead of those of `kind`, by field name.
      readers: of classes that have several kinds of subclass: functions of (raw, where, place), by class.

    Raises:
      UserError: one sentence that names the key, what was found and what was expected.
    """
    return _record(kind, raw, where, place, {**typing.get_type_hints(kind), **(given or {})}, readers)


def require(holds: bool, sentence: str, value: object) -> None:
    """Raises UserError with `sentence` and the value found, unless `holds`."""
    if not holds:
        raise UserError(f"{sentence}, got {value}")


def require_weights(section: Any, *names: str, where: str = "objective") -> None:
    """Raises UserError where one of these fields of a section is negative, infinite or no number."""
    for name in names:
        value = getattr(section, name)
        require(0 <= value < math.inf, f"{where}.{name} must be 0 or more, and finite", value)


def require_defaults(section: Any, *names: str, why: str, where: str = "objective") -> None:
    """Raises UserError where one of these fields of a section is not its default; `why` says what it is for."""
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    for name in names:
        value = getattr(section, name)
        require(value == defaults[name], f"{where}.{name} {why}: leave it at {defaults[name]!r}", repr(value))


def nearest(name: object, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for a message, or nothing when no known name is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def resolved(config: Any) -> Any:
    """A dataclass as plain nested data, for printing, saving and comparing; tuples become lists."""
    if hasattr(config, "to_record"):
        return config.to_record()
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: resolved(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: resolved(value) for key, value in config.items()}
    return [resolved(item) for item in config] if isinstance(config, tuple) else config


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `{'a.b': value}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _record(
    kind: type[T], raw: Mapping[str, Any], where: str, place: str, types_of: Mapping[str, Any], readers: Readers
) -> T:
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in raw:
        if key not in fields:
            raise UserError(f"{place} has an unknown key {prefix}{key}{nearest(key, fields)}")
    values = {}
    for name, field in fields.items():
        if name in raw:
            values[name] = _value(types_of[name], raw[name], f"{prefix}{name}", place, readers)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{place} lacks {prefix}{name} ({_describe(types_of[name])})")
    try:
        return kind(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _value(annotation: Any, raw: Any, where: str, place: str, readers: Readers) -> Any:
    kind, optional = without_none(annotation)
    if raw is None and optional:
        return None
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and raw in args and isinstance(raw, str):
        return raw
    if origin is Literal:
        raise UserError(f"{place}: {where} must be {_describe(kind)}, got {raw!r}{nearest(raw, args)}")
    if kind in readers:
        return readers[kind](raw, where, place)
    if hasattr(kind, "from_record"):
        return kind.from_record(raw, where, place)
    if origin is tuple and isinstance(raw, tuple):
        return tuple(_value(args[0], item, f"{where}[{i}]", place, readers) for i, item in enumerate(raw))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(raw, Mapping):
        return parse(kind, raw, where, place, readers=readers)
    if origin is not None and issubclass(origin, Mapping) and isinstance(raw, Mapping):
        return raw
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if optional and raw == "":  # Nearly always a shell's variable that is not set.
        raise UserError(f"{place}: {where} must not be empty: give {_describe(kind)}, or leave it out")
    if isinstance(kind, type) and type(raw) is kind:
        return raw
    found = "nothing" if raw is None else f"{type(raw).__name__} {raw!r}"
    raise UserError(f"{place}: {where} must be {_describe(annotation)}, got {found}")


def without_none(annotation: Any) -> tuple[Any, bool]:
    """`T | None` as (T, True), any other annotation as (itself, False)."""
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return annotation, False
    (kind,) = (arg for arg in typing.get_args(annotation) if arg is not type(None))
    return kind, True


def _describe(kind: Any) -> str:
    """A type in words for messages."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("None" if arg is type(None) else _describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        return f"a tuple of {_describe(args[0])}"
    if dataclasses.is_dataclass(kind) or (origin is not None and issubclass(origin, Mapping)):
        return "a section"
    return getattr(kind, "__name__", str(kind))
