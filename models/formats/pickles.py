"""The pickles of torch's files, interpreted without running anything that they contain.

A pickle is a program, and unpickling one calls whatever it names. So nothing here unpickles: a small stack machine
walks the operations, which the standard library only parses, and knows those that build tensors and plain containers.
Every other operation, and every other name that a pickle asks for, is `Refused`.
"""

import dataclasses
import math
import mmap
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import jax.numpy as jnp
import numpy as np

from models.errors import UserError

_STORAGES: dict[str, Any] = {
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

# Dtype, key and length of a storage -> its values, one-dimensional; asked once for each pair of dtype and key.
StorageReader = Callable[[np.dtype, str, int], np.ndarray]


class Refused(Exception):
    """A pickle asks for something that is neither a tensor nor a plain container; the text says for what."""


class Damaged(Exception):
    """A pickle, or what it refers to, does not hold together; the text says where."""


def no_storages(dtype: np.dtype, key: str, count: int) -> np.ndarray:
    """The `StorageReader` of pickles that hold no tensors."""
    raise Damaged("a storage where none belongs")


def read_pickle(source: bytes | BinaryIO | mmap.mmap, read_storage: StorageReader = no_storages) -> Any:
    """What one pickle describes; a file stands behind it afterwards.

    Args:
      source: the pickle. Of a file, `read(n)` must not set aside more memory than the file has left.
      read_storage: gives the values of the storages that its tensors look at.

    Returns:
      Tensors as read-only arrays in their stored dtype, parameters likewise, in the dicts, lists and tuples that held
      them, beside numbers, strings, booleans and None. An OrderedDict becomes a dict.

    Raises:
      Refused: it asks for anything else.
      Damaged: it is no pickle, cut short, or does not fit its storages.
    """
    return _Interpreter(read_storage).run(source)


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

    def __init__(self, read_storage: StorageReader):
        self._read_storage = read_storage
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[tuple[str, str], _Storage] = {}

    def run(self, source: bytes | BinaryIO | mmap.mmap) -> Any:
        """The object that the pickle describes."""
        try:
            for opcode, argument, _ in pickletools.genops(cast(Any, source)):
                if opcode.name == "STOP":
                    return self._plain(self._pop())
                step = _OPERATIONS.get(opcode.name)
                if step is None:
                    wanted = f" {argument}" if isinstance(argument, str) else ""
                    raise Refused(f"the pickle operation {opcode.name}{wanted}")
                step(self, argument)
        except UserError:
            raise
        except ValueError as error:
            # How the parser reports a pickle that is cut short or no pickle, and NumPy sizes beyond its limits.
            raise Damaged(str(error)) from None
        raise Damaged("it does not end")

    # The stack

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise Damaged("an operation lacks its argument")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        for at in range(len(self._stack) - 1, -1, -1):
            if self._stack[at] is _MARK:
                values = self._stack[at + 1 :]
                del self._stack[at:]
                return values
        raise Damaged("an operation lacks its mark")

    def _top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise Damaged(f"an operation expects a {kind.__name__}")
        return self._stack[-1]

    def _plain(self, value: Any) -> Any:
        """Values that may stand in a container: not the machine's own."""
        if isinstance(value, _Global):
            raise Refused(f"{value.name} as a value")
        if isinstance(value, (_Storage, _Arguments)):
            raise Refused("a storage as a value")
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
            raise Damaged("a key without a value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # Hashing anything else could run away: a tuple of tuples of tuples, a million deep.
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise Damaged("a dict whose keys are not strings or numbers")
            target[key] = self._plain(value)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _put(self, key: int) -> None:
        if not self._stack or self._stack[-1] is _MARK:
            raise Damaged("nothing to remember")
        self._memo[key] = self._stack[-1]

    def _get(self, key: int) -> None:
        if key not in self._memo:
            raise Damaged(f"nothing is remembered under {key}")
        self._push(self._memo[key])

    def _global(self, name: str) -> None:
        if name not in _CALLS and name not in _STORAGES:
            raise Refused(name)
        self._push(_Global(name))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise Damaged("a global whose name is not a string")
        self._global(f"{module}.{name}")

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or function.name not in _CALLS:
            raise Refused(f"a call of {function.name if isinstance(function, _Global) else 'what is no function'}")
        build, counts = _CALLS[function.name]
        if not isinstance(arguments, tuple) or len(arguments) not in counts:
            raise Damaged(f"{function.name} is called with the wrong arguments")
        self._push(build(*arguments))

    def _build(self) -> None:
        """Attributes of a dict: `state_dict` puts the versions of its modules there. They are not data."""
        state = self._pop()
        self._top(dict)
        if type(state) is not dict:
            raise Damaged("attributes that are not a dict")

    def _storage(self) -> None:
        """A reference in five parts. Torch before 1.6 wrote a sixth, for views of storages, of which it had none."""
        reference = self._pop()
        kinds = [type(part) for part in reference] if isinstance(reference, _Arguments) else []
        if kinds[:5] != [str, _Global, str, str, int] or kinds[5:] not in ([], [type(None)]):
            raise Damaged("a reference to something other than a storage")
        what, kind, key, _, count = reference[:5]
        if what != "storage" or kind.name not in _STORAGES:
            raise Damaged("a reference to something other than a storage")
        if (kind.name, key) not in self._storages:
            values = self._read_storage(np.dtype(_STORAGES[kind.name]), key, count)
            self._storages[kind.name, key] = _Storage(values)
        self._push(self._storages[kind.name, key])


def _tensor(storage, offset, size, stride, requires_grad, hooks, metadata=None) -> np.ndarray:
    """`torch._utils._rebuild_tensor_v2`: a strided view of a storage, inside which it must lie."""
    if not isinstance(storage, _Storage):
        raise Damaged("a tensor without a storage")
    if not _is_empty(hooks) or not (metadata is None or _is_empty(metadata)):
        raise Refused("a tensor with hooks or metadata")
    if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= _MAX_DIMS:
        raise Damaged("a tensor whose size and stride do not fit together")
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise Damaged("a tensor whose offset, size and stride are not natural numbers")
    values, count = storage.values, math.prod(size)
    if count == 0:
        empty = np.zeros(size, values.dtype)
        empty.setflags(write=False)
        return empty
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # A stride of zero could make a few bytes into a tensor larger than any memory, and that of an axis of one entry may
    # be any number at all.
    if last >= len(values) or max(count, offset, *stride) > len(values):
        raise Damaged(
            f"a tensor of shape {list(size)}, strides {list(stride)} and offset {offset} does not fit its storage "
            f"of {len(values)} values"
        )
    steps = [step * values.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False)


def _parameter(data, requires_grad, hooks) -> np.ndarray:
    """`torch._utils._rebuild_parameter`: the tensor itself."""
    if not isinstance(data, np.ndarray) or not _is_empty(hooks):
        raise Refused("a parameter with hooks or without a tensor")
    return data


def _is_empty(value: Any) -> bool:
    return type(value) is dict and not value


# What a file may call, with the numbers of arguments that torch gives it.
_CALLS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "collections.OrderedDict": (dict, (0,)),
    "torch._utils._rebuild_tensor_v2": (_tensor, (6, 7)),
    "torch._utils._rebuild_parameter": (_parameter, (3,)),
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
