"""Tensors out of files that torch saved, read without torch and without running anything that they contain.

`torch.save` writes a zip archive: one record of bytes per storage, and `data.pkl`, a pickle that says which tensors
look at which storage. A pickle is a program, and unpickling one calls whatever it names. So nothing here unpickles: a
small interpreter walks the operations, which the standard library only parses, and knows those that build tensors and
plain containers. Every other operation, and every other name that a file asks for, ends in a `UserError`.
"""

import contextlib
import dataclasses
import errno
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.errors import UserError

_STORAGES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": jnp.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
    "torch.ComplexFloatStorage": np.complex64,
    "torch.ComplexDoubleStorage": np.complex128,
}
_MAX_DIMS = 64  # NumPy's own limit
# How files begin that are no zip archive although torch, or a download, once made them.
_OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_LFS_POINTER = b"version https://git-lfs"


def read_torch_file(path: str | Path) -> Any:
    """What `torch.save` was given, with NumPy arrays in place of tensors.

    Args:
      path: a `.pt`, `.pth` or `.bin` file in the zip format, the default since torch 1.6.

    Returns:
      Tensors as read-only arrays in their stored dtype (bfloat16 as `jnp.bfloat16`), parameters likewise, in the dicts,
      lists and tuples that held them, beside numbers, strings, booleans and None. An OrderedDict becomes a dict.
      Tensors that share a storage share memory.

    Raises:
      UserError: there is no such file; it is damaged, truncated or of an older format; or it asks for anything but
        tensors and plain containers, which the message names. Nothing of the file is executed in any case.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with contextlib.ExitStack() as stack:
        with _zip_errors(path):
            if not zipfile.is_zipfile(path):
                raise UserError(f"{path} {_what_is_wrong(path)}")
            archive = stack.enter_context(zipfile.ZipFile(path))
        return _Interpreter(_Archive(archive, path)).run()


@contextlib.contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    """The zip library has many ways to say that an archive is damaged, truncated or encrypted."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a place before the file's beginning, which a damaged directory names
            raise
        raise UserError(f"{path} is damaged: its directory leads nowhere") from None
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, OverflowError, struct.error) as error:
        raise UserError(f"{path} is damaged: {_shown(str(error)) or 'it ends early'}") from None


def _what_is_wrong(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(_OLD_PICKLE) or start[257:262] == b"ustar":
        return "was written in the format of torch before 1.6: load it and save it again with a newer torch"
    if start.startswith(_LFS_POINTER):
        return "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    if start.startswith(b"PK"):
        return "is truncated: it begins as a zip archive but has no directory at its end"
    return "is not a torch file: torch writes zip archives"


class _Archive:
    """The records of one file."""

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        self.path = path
        self._archive = archive
        if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
            raise UserError(f"{path} is damaged: its records are larger than the file")
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path} is not a torch file: it holds {len(pickles)} data.pkl records, expected one")
        self._root = pickles[0].removesuffix("data.pkl")
        if f"{self._root}byteorder" in archive.namelist() and self.record("byteorder") != b"little":
            raise UserError(f"{path} was written on a big-endian machine, which is not supported")

    def record(self, name: str) -> bytes:
        """The bytes of one record, checked against their CRC; torch never compresses, so a file cannot swell."""
        try:
            info = self._archive.getinfo(self._root + name)
        except KeyError:
            raise UserError(f"{self.path} is damaged: the record {_shown(name)} is missing") from None
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{self.path} is not a torch file: the record {_shown(name)} is compressed")
        with _zip_errors(self.path):
            return self._archive.read(info)


@dataclasses.dataclass(frozen=True)
class _Storage:
    """One-dimensional array of all that a storage holds."""

    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name that a pickle may ask for; never the object that Python has under it."""

    name: str


class _Arguments(tuple):
    """A tuple that holds something of the machine's own, and so may be an argument but no value."""


# Where the arguments of a later operation begin.
_MARK = object()


class _Interpreter:
    """A stack machine for the pickle operations that `torch.save` writes for tensors and containers."""

    def __init__(self, archive: _Archive):
        self._archive = archive
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[tuple[str, str], _Storage] = {}

    def run(self) -> Any:
        """The object that the pickle describes."""
        content = self._archive.record("data.pkl")
        try:
            for opcode, argument, _ in pickletools.genops(content):
                if opcode.name == "STOP":
                    return self._plain(self._pop())
                step = _OPERATIONS.get(opcode.name)
                if step is None:
                    wanted = f" {argument}" if isinstance(argument, str) else ""
                    raise self._refused(f"the pickle operation {opcode.name}{wanted}")
                step(self, argument)
        except UserError:
            raise
        except ValueError as error:
            # How the parser reports a pickle that is cut short or no pickle.
            raise self._damaged(str(error)) from None
        raise self._damaged("it does not end")

    def _refused(self, what: str) -> UserError:
        return UserError(
            f"{self._archive.path} asks for {_shown(what)}, which is neither a tensor nor a plain container; "
            "nothing in it was executed"
        )

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self._archive.path} is damaged: data.pkl: {_shown(reason)}")

    # The stack

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._damaged("an operation lacks its argument")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if self._stack[at] is _MARK:
                values = self._stack[at + 1 :]
                del self._stack[at:]
                return values
        raise self._damaged("an operation lacks its mark")

    def _top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise self._damaged(f"an operation expects a {kind.__name__}")
        return self._stack[-1]

    def _plain(self, value: Any) -> Any:
        """Values that may stand in a container: not the machine's own."""
        if isinstance(value, _Global):
            raise self._refused(f"{value.name} as a value")
        if isinstance(value, (_Storage, _Arguments)):
            raise self._refused("a storage as a value")
        return value

    # Operations

    def _tuple(self, values: list[Any]) -> None:
        internal = any(isinstance(value, (_Global, _Storage, _Arguments)) for value in values)
        self._push(_Arguments(values) if internal else tuple(values))

    def _tuple_of(self, count: int) -> None:
        self._tuple([self._pop() for _ in range(count)][::-1])

    def _append(self, values: list[Any]) -> None:
        self._top(list).extend(self._plain(value) for value in values)

    def _set_items(self, flat: list[Any]) -> None:
        target = self._top(dict)
        if len(flat) % 2:
            raise self._damaged("a key without a value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # Hashing anything else could run away: a tuple of tuples of tuples, a million deep.
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise self._damaged("a dict whose keys are not strings or numbers")
            target[key] = self._plain(value)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _put(self, key: int) -> None:
        if not self._stack or self._stack[-1] is _MARK:
            raise self._damaged("nothing to remember")
        self._memo[key] = self._stack[-1]

    def _get(self, key: int) -> None:
        if key not in self._memo:
            raise self._damaged(f"nothing is remembered under {key}")
        self._push(self._memo[key])

    def _global(self, name: str) -> None:
        if name not in _CALLS and name not in _STORAGES:
            raise self._refused(name)
        self._push(_Global(name))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise self._damaged("a global whose name is not a string")
        self._global(f"{module}.{name}")

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or function.name not in _CALLS:
            raise self._refused(
                f"a call of {function.name if isinstance(function, _Global) else 'what is no function'}"
            )
        build, counts = _CALLS[function.name]
        if not isinstance(arguments, tuple) or len(arguments) not in counts:
            raise self._damaged(f"{function.name} is called with the wrong arguments")
        self._push(build(self, *arguments))

    def _build(self) -> None:
        """Attributes of a dict: `state_dict` puts the versions of its modules there. They are not data."""
        state = self._pop()
        self._top(dict)
        if type(state) is not dict:
            raise self._damaged("attributes that are not a dict")

    def _storage(self) -> None:
        reference = self._pop()
        if not isinstance(reference, _Arguments) or [type(part) for part in reference] != [str, _Global, str, str, int]:
            raise self._damaged("a reference to something other than a storage")
        what, kind, key, _, count = reference
        if what != "storage" or kind.name not in _STORAGES:
            raise self._damaged("a reference to something other than a storage")
        self._push(self._load(kind.name, key, count))

    def _load(self, kind: str, key: str, count: int) -> _Storage:
        if (kind, key) not in self._storages:
            dtype = np.dtype(_STORAGES[kind])
            content = self._archive.record(f"data/{key}")
            if len(content) != count * dtype.itemsize:
                raise self._damaged(f"storage {key} has {len(content)} bytes, not {count} values of {dtype.name}")
            if dtype == np.bool_ and not set(content) <= {0, 1}:
                raise self._damaged(f"storage {key} holds bytes that are neither true nor false")
            self._storages[kind, key] = _Storage(np.frombuffer(content, dtype))
        return self._storages[kind, key]

    # Calls

    def _tensor(self, storage, offset, size, stride, requires_grad, hooks, metadata=None) -> np.ndarray:
        """`torch._utils._rebuild_tensor_v2`: a strided view of a storage, inside which it must lie."""
        if not isinstance(storage, _Storage):
            raise self._damaged("a tensor without a storage")
        if not _is_empty(hooks) or not (metadata is None or _is_empty(metadata)):
            raise self._refused("a tensor with hooks or metadata")
        if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= _MAX_DIMS:
            raise self._damaged("a tensor whose size and stride do not fit together")
        if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
            raise self._damaged("a tensor whose offset, size and stride are not natural numbers")
        values, count = storage.values, math.prod(size)
        if count == 0:
            empty = np.zeros(size, values.dtype)
            empty.setflags(write=False)
            return empty
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        # A stride of zero could make a few bytes into a tensor larger than any memory, and that of an axis of one entry
        # may be any number at all.
        if last >= len(values) or max(count, offset, *stride) > len(values):
            raise self._damaged(
                f"a tensor of shape {list(size)}, strides {list(stride)} and offset {offset} does not fit its storage "
                f"of {len(values)} values"
            )
        steps = [step * values.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)

    def _parameter(self, data, requires_grad, hooks) -> np.ndarray:
        """`torch._utils._rebuild_parameter`: the tensor itself."""
        if not isinstance(data, np.ndarray) or not _is_empty(hooks):
            raise self._refused("a parameter with hooks or without a tensor")
        return data


# What a file may call, with the numbers of arguments that torch gives it.
_CALLS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "collections.OrderedDict": (lambda machine: {}, (0,)),
    "torch._utils._rebuild_tensor_v2": (_Interpreter._tensor, (6, 7)),
    "torch._utils._rebuild_parameter": (_Interpreter._parameter, (3,)),
}


def _value(machine: _Interpreter, argument: Any) -> None:
    machine._push(argument)


def _nothing(machine: _Interpreter, argument: Any) -> None:
    pass


# Operation name -> its effect, given the argument that stands beside it in the file.
_OPERATIONS: dict[str, Callable[[_Interpreter, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"), _value),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _value),
    "NONE": lambda m, _: m._push(None),
    "NEWTRUE": lambda m, _: m._push(True),
    "NEWFALSE": lambda m, _: m._push(False),
    "MARK": lambda m, _: m._push(_MARK),
    "POP": lambda m, _: m._pop(),
    "EMPTY_TUPLE": lambda m, _: m._tuple([]),
    "TUPLE1": lambda m, _: m._tuple_of(1),
    "TUPLE2": lambda m, _: m._tuple_of(2),
    "TUPLE3": lambda m, _: m._tuple_of(3),
    "TUPLE": lambda m, _: m._tuple(m._pop_mark()),
    "EMPTY_LIST": lambda m, _: m._push([]),
    "APPEND": lambda m, _: m._append([m._pop()]),
    "APPENDS": lambda m, _: m._append(m._pop_mark()),
    "EMPTY_DICT": lambda m, _: m._push({}),
    "SETITEM": lambda m, _: m._set_item(),
    "SETITEMS": lambda m, _: m._set_items(m._pop_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Interpreter._put),
    "MEMOIZE": lambda m, _: m._put(len(m._memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Interpreter._get),
    "GLOBAL": lambda m, name: m._global(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": lambda m, _: m._stack_global(),
    "REDUCE": lambda m, _: m._reduce(),
    "BUILD": lambda m, _: m._build(),
    "BINPERSID": lambda m, _: m._storage(),
}


def _is_empty(value: Any) -> bool:
    return type(value) is dict and not value


def _shown(text: str) -> str:
    """Text of a file as a message can carry it: one short line."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= 150 else f"{line[:150]}..."
