"""What optimised HLO says about a loop: what it runs, whether it talks to the host, and what it copies."""

import contextlib
import re
from collections.abc import Iterator

import numpy as np

HOST = re.compile(r"(?<![\w-])(infeed|outfeed|send|recv|send-done|recv-done)\(|callback")
# Handing a buffer on, or writing some rows into it, is not copying it.
IN_PLACE = {"parameter", "get-tuple-element", "tuple", "while", "call", "conditional", "bitcast"}
IN_PLACE |= {"dynamic-update-slice", "scatter"}
LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")


@contextlib.contextmanager
def shapes_for_arrays(*structs: type) -> Iterator[None]:
    """Lowering rebuilds arguments with shapes in the place of arrays, which checked structs would refuse."""
    for struct in structs:
        struct.__init__.__no_type_check__ = True  # type: ignore[misc]
    yield
    for struct in structs:
        del struct.__init__.__no_type_check__  # type: ignore[misc]


def computations(text: str) -> dict[str, list[str]]:
    """Name -> lines of every computation of an HLO module."""
    found: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if opened := re.match(r"^(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            name = opened[1]
            found[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found


def inside_loops(text: str) -> dict[str, list[str]]:
    """The computations that a while loop runs, directly or through others; the insides of fusions left out."""
    everything = computations(text)
    waiting = re.findall(r"body=%?([\w.-]+)", text)
    reached: dict[str, list[str]] = {}
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached[name] = everything[name]
        for line in everything[name]:
            if " fusion(" not in line:
                waiting += re.findall(r"(?:to_apply|body|calls|true_computation|false_computation)=%?([\w.-]+)", line)
                for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
                    waiting += re.findall(r"[\w.-]+", group.replace("%", " "))
    return reached


def whole_copies(text: str, dtype: str, size: int) -> list[str]:
    """Lines inside loops that make a new buffer of `size` elements."""
    everything = computations(text)

    def large(shape: str) -> bool:
        return size in [
            np.prod([int(d) for d in dims.split(",") if d]) for dims in re.findall(rf"{dtype}\[([\d,]*)\]", shape)
        ]

    def results(fusion: str) -> list[str]:
        """Kinds of the large operations that a fusion writes out: its root, or what its root gathers in a tuple."""
        lines = {match[1]: match for line in everything[fusion] if (match := LINE.match(line))}
        root = LINE.match(next(line for line in everything[fusion] if "ROOT" in line))
        written = re.findall(r"%([\w.-]+)", root[4]) if root[3] == "tuple" else [root[1]]
        return [lines[name][3] for name in written if name in lines and large(lines[name][2])]

    made = []
    for lines in inside_loops(text).values():
        for match in filter(None, map(LINE.match, lines)):
            _, shape, kind, rest = match.groups()
            kinds = results(re.search(r"calls=%?([\w.-]+)", rest)[1]) if kind == "fusion" else [kind]
            if large(shape) and not set(kinds) <= IN_PLACE:
                made.append(match[0].strip())
    return made
