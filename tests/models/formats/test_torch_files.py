"""Torch's archives read without torch: what is saved comes back, and nothing in a file is ever run."""

import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from models.errors import UserError
from models.formats.torch_files import read_torch_file
from tests.models.formats.torch_archives import (
    EMPTY,
    STORAGES,
    Call,
    Global,
    Raw,
    Storage,
    emit,
    tensor,
    write_archive,
    write_torch,
)

FLOAT = Global("torch.FloatStorage")


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_torch_file(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 400 + len(str(path))
    return message


def test_everything_that_is_admitted(tmp_path: Path) -> None:
    arrays = {name: np.arange(-2, 4).reshape(2, 3).astype(jnp.dtype(name)) for name in STORAGES}
    plain = {"epoch": 3, "big": -(2**70), "rate": 0.5, "name": "ä\n", "none": None, "on": True, 7: [1, [2], (3, "x")]}
    saved = {"weights": arrays, "scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.int64), **plain}
    read = read_torch_file(write_torch(tmp_path / "m.pt", saved))
    assert list(read) == list(saved) and {key: read[key] for key in plain} == plain
    assert type(read) is dict and type(read[7][2]) is tuple
    for name, array in {**arrays, "scalar": saved["scalar"], "empty": saved["empty"]}.items():
        found = read["weights"][name] if name in arrays else read[name]
        assert found.dtype == array.dtype and found.shape == array.shape and not found.flags.writeable
        np.testing.assert_array_equal(found, array)


def test_strides_offsets_and_sharing(tmp_path: Path) -> None:
    base = np.arange(12, dtype=np.float32)
    storage = Storage(FLOAT, "0", 12)
    views = {
        "rows": tensor(storage, (2, 3), (3, 1), 6),
        "transposed": tensor(storage, (4, 3), (1, 4)),
        "every_other": tensor(storage, (6,), (2,), 1),
        "last": tensor(storage, (), (), 11),
        "parameter": Call(Global("torch._utils._rebuild_parameter"), (tensor(storage, (12,), (1,)), True, EMPTY)),
    }
    read = read_torch_file(write_torch(tmp_path / "m.pt", views, {"data/0": base.tobytes()}))
    np.testing.assert_array_equal(read["rows"], base[6:].reshape(2, 3))
    np.testing.assert_array_equal(read["transposed"], base.reshape(3, 4).T)
    np.testing.assert_array_equal(read["every_other"], base[1::2])
    assert read["last"].shape == () and read["last"] == 11
    np.testing.assert_array_equal(read["parameter"], base)
    assert np.shares_memory(read["parameter"], read["rows"])


# Hostile files


class Runs:
    """Pickles into a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
@pytest.mark.parametrize("function", ["system", "eval", "getattr"])
def test_a_malicious_pickle_is_refused_by_name(tmp_path: Path, protocol: int, nested: bool, function: str) -> None:
    marker = tmp_path / "marker"
    hostile = {
        "system": Runs(os.system, f"touch {marker}"),
        "eval": Runs(eval, f"open({str(marker)!r}, 'w').close()"),
        "getattr": Runs(getattr, Runs(__import__, "os"), "system"),
    }[function]
    code = pickle.dumps({"weight": [1, {"deep": hostile}]} if nested else hostile, protocol)
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("archive/data.pkl", code)
    message = complaint(tmp_path / "m.pt")
    assert not marker.exists()
    name = {"system": f"{os.system.__module__}.system", "eval": "eval", "getattr": "getattr"}[function]
    assert "asks for" in message and "nothing in it was executed" in message
    # The oldest protocols write dicts with operations that torch never uses; those are met first.
    assert name in message or (nested and protocol == 0)
    if function == "system":
        pickle.loads(code)
        assert marker.exists(), "the pickle does what it says, for who unpickles it"


def stack_global(name: str) -> Raw:
    """A global as protocol 4 asks for it, where dots in the name reach into objects."""
    return Raw(emit(name.rsplit(".", 1)[0], {}) + emit(name.rsplit(".", 1)[1], {}) + b"\x93")


REBUILD = Global("torch._utils._rebuild_tensor_v2")
GOOD = Storage(FLOAT, "0", 4)
HOSTILE = {
    "numpy": (Call(Global("numpy.core.multiarray._reconstruct"), ()), "numpy.core.multiarray._reconstruct"),
    "torch class": (Call(Global("torch.nn.modules.linear.Linear"), (1, 2)), "torch.nn.modules.linear.Linear"),
    "global of protocol 4": (Call(stack_global("os.system"), ("true",)), "os.system"),
    "attribute of the admitted": (
        Raw(emit("torch._utils", {}) + emit("_rebuild_tensor_v2.__globals__", {}) + b"\x93"),
        "torch._utils._rebuild_tensor_v2.__globals__",
    ),
    "global as a value": ([REBUILD], "_rebuild_tensor_v2 as a value"),
    "global as the content": (REBUILD, "_rebuild_tensor_v2 as a value"),
    "global in a tuple": ({"x": (1, (REBUILD,))}, "as a value"),
    "global as a key": ({REBUILD: 1}, "keys are not strings or numbers"),
    "storage as a value": ({"x": GOOD}, "a storage as a value"),
    "call of a storage class": (Call(FLOAT, (10**9,)), "a call of torch.FloatStorage"),
    "call of a value": (Call({}, ()), "a call of what is no function"),
    "call without a tuple": (Call(REBUILD, []), "wrong arguments"),
    "OrderedDict of something": (Call(Global("collections.OrderedDict"), ([["a", 1]],)), "wrong arguments"),
    "too few arguments": (Call(REBUILD, (GOOD, 0, (4,))), "wrong arguments"),
    "attributes of a function": (Raw(emit(REBUILD, {}) + emit({"__defaults__": 1}, {}) + b"b"), "expects a dict"),
    "attributes that are no dict": (Raw(emit({}, {}) + emit("x", {}) + b"b"), "attributes that are not a dict"),
    "instance": (Raw(b"(S'true'\nios\nsystem\n"), "STRING"),
    "old instance": (Raw(b"(ios\nsystem\n"), "INST os system"),
    "object": (Raw(b"(" + emit(Global("collections.OrderedDict"), {}) + b"o"), "OBJ"),
    "new object": (Raw(emit(Global("collections.OrderedDict"), {}) + b")\x81"), "NEWOBJ"),
    "extension": (Raw(b"\x82\x01"), "EXT1"),
    "textual storage": (Raw(b"Pstorage\n"), "PERSID"),
    "hooks": (tensor(GOOD, (4,), (1,), hooks={"x": 1}), "hooks"),
    "hooks that are a tensor": (tensor(GOOD, (4,), (1,), hooks=tensor(GOOD, (4,), (1,))), "hooks"),
    "metadata": (Call(REBUILD, (GOOD, 0, (4,), (1,), False, EMPTY, {"neg": True})), "metadata"),
    "parameter of text": (Call(Global("torch._utils._rebuild_parameter"), ("x", True, EMPTY)), "a parameter"),
    "tensor of text": (tensor("x", (4,), (1,)), "without a storage"),
    "beyond the storage": (tensor(GOOD, (5,), (1,)), r"shape [5], strides [1] and offset 0 does not fit its storage"),
    "offset beyond": (tensor(GOOD, (2, 2), (2, 1), 1), "does not fit its storage"),
    "stride beyond": (tensor(GOOD, (2, 2), (3, 1)), "does not fit its storage"),
    "negative offset": (tensor(GOOD, (1,), (1,), -1), "natural numbers"),
    "stride of nothing": (tensor(GOOD, (1,), (2**61,)), "does not fit its storage"),
    "stride past all numbers": (tensor(GOOD, (1,), (10**30,)), "does not fit its storage"),
    "negative stride": (tensor(GOOD, (2,), (-1,), 3), "natural numbers"),
    "negative size": (tensor(GOOD, (-1, -4), (1, 1)), "natural numbers"),
    "sizes that are no numbers": (tensor(GOOD, ("a",), (1,)), "natural numbers"),
    "sizes that are no tuple": (tensor(GOOD, [4], (1,)), "do not fit together"),
    "sizes without strides": (tensor(GOOD, (2, 2), (1,)), "do not fit together"),
    "too many dimensions": (tensor(GOOD, (1,) * 65, (1,) * 65), "do not fit together"),
    "endless repetition": (tensor(GOOD, (2**40, 2**40), (0, 0)), "does not fit its storage"),
    "empty beyond all size": (tensor(GOOD, (0, 2**80), (1, 1)), "is damaged"),
    "another count": (tensor(Storage(FLOAT, "0", 5), (4,), (1,)), "storage 0 has 16 bytes, not 5 values of float32"),
    "another kind": (tensor(Storage(Global("torch.DoubleStorage"), "0", 4), (4,), (1,)), "not 4 values of float64"),
    "negative count": (tensor(Storage(FLOAT, "0", -4), (4,), (1,)), "not -4 values"),
    "missing storage": (tensor(Storage(FLOAT, "9", 4), (4,), (1,)), "the record data/9 is missing"),
    "path for a storage": (tensor(Storage(FLOAT, "../../x", 4), (4,), (1,)), "data/../../x is missing"),
    "storage of no kind": (tensor(Storage("x", "0", 4), (4,), (1,)), "something other than a storage"),
    "storage of a function": (tensor(Storage(REBUILD, "0", 4), (4,), (1,)), "something other than a storage"),
    "storage of a tensor": (Storage(FLOAT, tensor(GOOD, (4,), (1,)), 4), "something other than a storage"),
    "bools of other bytes": (tensor(Storage(Global("torch.BoolStorage"), "0", 16), (16,), (1,)), "neither true nor"),
    "list as a key": ({(): 1}, "keys are not strings or numbers"),
    "nothing on the stack": (Raw(b"R"), "lacks its argument"),
    "no mark": (Raw(b"u"), "lacks its mark"),
    "half a pair": (Raw(b"}(K\x01u"), "a key without a value"),
    "items of a list": (Raw(b"](K\x01K\x02u"), "expects a dict"),
    "unknown memory": (Raw(b"h\x07"), "nothing is remembered under 7"),
    "memory of a mark": (Raw(b"(q\x00h\x00"), "nothing to remember"),
    "no operation": (Raw(b"\xff"), "opcode"),
    "control characters": (Global("evil.\x1b[2Jname\r"), "evil.?[2Jname?"),
}


@pytest.mark.parametrize(("content", "says"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_operations(tmp_path: Path, content: Any, says: str) -> None:
    values = np.array([1, 2, 3, 4], np.float32)
    assert says in complaint(write_torch(tmp_path / "m.pt", content, {"data/0": values.tobytes()}))


def test_very_many_nested_tuples_do_no_harm(tmp_path: Path) -> None:
    deep = b")" + b"\x85" * 20_000
    message = complaint(write_archive(tmp_path / "key.pt", b"}" + deep + b"K\x01s", {}))
    assert "keys are not strings or numbers" in message
    assert isinstance(read_torch_file(write_archive(tmp_path / "value.pt", deep, {})), tuple)


def test_a_small_file_stays_small(tmp_path: Path) -> None:
    zeros, pickled = bytes(50_000_000), emit(tensor(Storage(FLOAT, "0", 12_500_000), (12_500_000,), (1,)), {})
    squeezed = write_archive(tmp_path / "m.pt", pickled, {"data/0": zeros}, compression=zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    assert "records are larger than the file" in complaint(squeezed)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    small = write_archive(tmp_path / "n.pt", b"N", {"pad": os.urandom(2000)}, compression=zipfile.ZIP_DEFLATED)
    assert "data.pkl is compressed" in complaint(small)


# Damaged and foreign files


def test_damaged_files(tmp_path: Path) -> None:
    def damaged(content: bytes) -> str:
        (tmp_path / "bad.pt").write_bytes(content)
        return complaint(tmp_path / "bad.pt")

    good = write_torch(tmp_path / "m.pt", {"w": np.arange(400, dtype=np.float32)}).read_bytes()
    assert "truncated" in damaged(good[:-30]) and "truncated" in damaged(good[:100])
    assert "CRC" in damaged(good.replace(struct.pack("<f", 399), struct.pack("<f", 398)))
    assert "not a torch file" in damaged(b"") and "not a torch file" in damaged(b"weights")
    assert "Git LFS pointer" in damaged(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    before_1_6 = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1002, 2) + pickle.dumps({}, 2)
    assert "before 1.6" in damaged(before_1_6)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "before 1.6" in damaged(buffer.getvalue())
    with pytest.raises(UserError, match="there is no file"):
        read_torch_file(tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match="there is no file"):
        read_torch_file(tmp_path)


def test_archives_that_are_not_of_torch(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "0 data.pkl records" in complaint(tmp_path / "a.pt")
    twice = write_archive(tmp_path / "b.pt", b"N", {"x/data.pkl": b"N."})
    assert "2 data.pkl records" in complaint(twice)
    assert "big-endian" in complaint(write_torch(tmp_path / "c.pt", None, {"byteorder": b"big"}))
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}X\x05")
    assert "is damaged: data.pkl" in complaint(tmp_path / "d.pt")


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_one_sentence(tmp_path: Path, seed: int) -> None:
    content = {"w": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.ones(2, bool), "x": [1, 2.5, ("a", None)]}
    storages: dict[str, bytes] = {}
    code = emit(content, storages)
    whole = write_torch(tmp_path / "m.pt", content).read_bytes()
    rng = np.random.default_rng(seed)
    path = tmp_path / "bad.pt"
    for trial in range(150):
        wrong = bytearray(code if trial % 2 else whole)
        for at in rng.integers(0, len(wrong), rng.integers(1, 4)):
            wrong[at] = rng.integers(256)
        if trial % 2:
            write_archive(path, bytes(wrong), {f"data/{key}": data for key, data in storages.items()})
        else:
            path.write_bytes(wrong)
        try:
            read_torch_file(path)
        except UserError as error:
            assert "\n" not in str(error)


# Torch itself


@pytest.mark.parity
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_writes(tmp_path: Path, protocol: int) -> None:
    torch = pytest.importorskip("torch")
    linear = torch.nn.Linear(5, 3)
    table = torch.randn(6, 4)
    saved = {
        "module": linear.state_dict(),
        "parameter": torch.nn.Parameter(torch.randn(3).bfloat16()),
        "half": torch.randn(2, 2).half(),
        "transposed": table.T,
        "slice": table[1:5:2, 1:3],
        "shared": table,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "step": 7,
        "betas": [0.9, 0.95],
    }
    torch.save(saved, tmp_path / "m.pt", pickle_protocol=protocol)
    read = read_torch_file(tmp_path / "m.pt")
    assert list(read) == list(saved) and (read["step"], read["betas"]) == (7, [0.9, 0.95])
    assert np.shares_memory(read["shared"], read["transposed"])
    flat = {**saved.pop("module"), **{name: value for name, value in saved.items() if torch.is_tensor(value)}}
    assert len(flat) == 11
    for name, value in flat.items():
        found = {**read, **read["module"]}[name]
        assert found.dtype.name == str(value.dtype).removeprefix("torch.") and found.shape == tuple(value.shape)
        np.testing.assert_array_equal(found.astype(np.float64), value.detach().double().numpy())


@pytest.mark.parity
def test_refuses_what_torch_writes_beside_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    assert "torch.nn.modules.linear.Linear" in complaint(tmp_path / "module.pt")
    torch.save({"dtype": torch.float32}, tmp_path / "dtype.pt")
    assert "torch.float32" in complaint(tmp_path / "dtype.pt")
    torch.save({"w": torch.zeros(1).expand(10)}, tmp_path / "expanded.pt")
    assert "does not fit its storage" in complaint(tmp_path / "expanded.pt")
