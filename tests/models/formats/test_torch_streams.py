"""Files of torch before 1.6: tensors come back, and nothing else does; damage is one sentence."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from models.errors import UserError
from models.formats.torch_files import read_torch_file
from tests.models.formats.torch_archives import Call, Global, Raw, emit, tensor, write_torch
from tests.models.formats.torch_streams import storage, write_old_torch

RNG = np.random.default_rng(0)
WEIGHTS = {
    "a.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "a.bias": RNG.normal(size=4),
    "steps": np.array(7),
    "mask": np.array([True, False, True]),
    "empty": np.zeros((0, 2), np.float32),
}


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        read_torch_file(path)
    message = str(raised.value)
    assert str(path) in message and "\n" not in message
    return message


def test_tensors_come_back(tmp_path: Path) -> None:
    path = write_old_torch(tmp_path / "m.pth", {"state": WEIGHTS, "epoch": 3})
    read = read_torch_file(path)
    assert read["epoch"] == 3 and list(read["state"]) == list(WEIGHTS)
    for name, array in WEIGHTS.items():
        found = read["state"][name]
        assert (found.dtype, found.shape, found.flags.writeable) == (array.dtype, array.shape, False)
        np.testing.assert_array_equal(found, array)


def test_tensors_of_one_storage_share_it(tmp_path: Path) -> None:
    path = write_old_torch(tmp_path / "m.pth", {"w": np.arange(6, dtype=np.float32)})
    content = path.read_bytes()
    reference = storage("Float", "1000", 6)
    views = {"w": tensor(reference, (6,), (1,)), "t": tensor(reference, (2, 2), (1, 3), 1)}
    stored = content[content.index(b"\x80\x02]") :]
    heads = content[: content.index(b"\x80\x02ccollections")]
    path.write_bytes(heads + b"\x80\x02" + emit(views, {}) + b"." + stored)
    read = read_torch_file(path)
    assert read["t"].tolist() == [[1, 4], [2, 5]] and np.shares_memory(read["w"], read["t"])


def test_the_format_is_told_by_the_content(tmp_path: Path) -> None:
    old, new = (write(tmp_path / "m.pth", WEIGHTS).read_bytes() for write in (write_old_torch, write_torch))
    assert old[:2] == b"\x80\x02" and new[:2] == b"PK"
    for content in (old, new):
        (tmp_path / "m.safetensors").write_bytes(content)
        read = read_torch_file(tmp_path / "m.safetensors")
        assert {name: array.tolist() for name, array in read.items()} == {k: v.tolist() for k, v in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (Call(Global("os.system"), ("true",)), "os.system"),
        ({"w": Global("torch.FloatStorage")}, "torch.FloatStorage as a value"),
        (Raw(b"(ios\nsystem\n"), "INST os system"),
        ({"w": storage("Float", "1", 0)}, "a storage as a value"),
    ],
)
def test_nothing_but_tensors_is_made(tmp_path: Path, value, wanted: str) -> None:
    message = complaint(write_old_torch(tmp_path / "m.pth", value))
    assert f"asks for {wanted}" in message or f"asks for the pickle operation {wanted}" in message
    assert "nothing in it was executed" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 1000}, "first pickles are not those"),
        ({"facts": [1]}, "first pickles are not those"),
        ({"facts": {"little_endian": False}}, "big-endian"),
        ({"facts": {}}, "big-endian"),
        ({"keys": ["1000"]}, "its storages are not those of its tensors"),
        ({"keys": ["1000", "999", "1000"]}, "its storages are not those of its tensors"),
        ({"keys": ["1000", "no"]}, "its storages are not those of its tensors"),
        ({"keys": [1000, 999]}, "its list of storages is none"),
        ({"after": b"x"}, "goes on after its last storage"),
    ],
)
def test_streams_that_do_not_fit_together(tmp_path: Path, options: dict, message: str) -> None:
    value = {"w": np.zeros(3, np.float32), "v": np.zeros(2)}
    assert message in complaint(write_old_torch(tmp_path / "m.pth", value, **options))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (storage("Float", "1000", 2**40), "storages larger than the file"),
        (storage("Float", "1000", -1), "storages larger than the file"),
        (storage("Float", "1000", 3, ("1000", 0, 3)), "something other than a storage"),
        (storage("Float", 1000, 3), "something other than a storage"),
        (storage("Float", "1000", 4), "not 4 values of float32"),
        (storage("Double", "1000", 3), "not 3 values of float64"),
        (storage("Bool", "1000", 12), "not 12 values of bool"),
    ],
)
def test_references_that_lie(tmp_path: Path, reference: Raw, message: str) -> None:
    path = write_old_torch(tmp_path / "m.pth", {"w": np.full(3, 2, np.float32)})
    content = path.read_bytes()
    honest = storage("Float", "1000", 3).code
    assert content.count(honest) == 1
    path.write_bytes(content.replace(honest, reference.code))
    assert message in complaint(path)


def test_a_storage_has_one_kind(tmp_path: Path) -> None:
    value = {kind: tensor(storage(kind, "1000", 3), (3,), (1,)) for kind in ("Float", "Int")}
    path = write_old_torch(tmp_path / "m.pth", value)
    assert "storage 1000 is of two kinds" in complaint(path)


@pytest.mark.parametrize("stored", [b"\x80\x02\x8d" + b"\xff" * 7 + b"\x0f", b"\x80\x02X\xff\xff\xff\xff"])
def test_a_length_beyond_the_file_takes_no_memory(tmp_path: Path, stored: bytes) -> None:
    whole = write_old_torch(tmp_path / "m.pth", {}).read_bytes()
    (tmp_path / "m.pth").write_bytes(whole[: whole.index(b"\x80\x02ccollections")] + stored)
    tracemalloc.start()
    assert "is damaged" in complaint(tmp_path / "m.pth")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("seed", range(2))
def test_random_damage_is_one_sentence(tmp_path: Path, seed: int) -> None:
    path = write_old_torch(tmp_path / "m.pth", WEIGHTS)
    whole = path.read_bytes()
    rng = np.random.default_rng(seed)
    for cut in rng.integers(15, len(whole) - 1, 30):
        path.write_bytes(whole[:cut])
        complaint(path)
    for _ in range(200):
        wrong = bytearray(whole)
        for at in rng.integers(0, len(wrong), rng.integers(1, 4)):
            wrong[at] = rng.integers(256)
        path.write_bytes(wrong)
        try:
            read_torch_file(path)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parity
def test_reads_what_torch_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3, bias=False), torch.nn.BatchNorm2d(3))
    table = torch.randn(6, 4)
    saved = {**module.state_dict(), "view": table[1:5:2, 1:3].T, "half": torch.randn(2).bfloat16()}
    path = tmp_path / "m.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    read = read_torch_file(path)
    assert list(read) == list(saved)
    for name, value in saved.items():
        assert read[name].dtype.name == str(value.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(read[name].astype(np.float64), value.double().numpy())
    torch.save(module.state_dict(), path, _use_new_zipfile_serialization=False)
    assert list(read_torch_file(path)) == list(module.state_dict())
    torch.save(module, path, _use_new_zipfile_serialization=False)
    assert "asks for" in complaint(path)
