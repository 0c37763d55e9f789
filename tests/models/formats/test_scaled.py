"""Kernels in small integers: what is packed is what is read, exactly, and nothing else is taken for it."""

import contextlib
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from models.errors import UserError
from models.formats.scaled import quantise, read_scaled, unpack, whole_tensors
from models.formats.storage import open_tensors

KERNEL = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)


def read(directory: pathlib.Path, name: str, **tensors: np.ndarray) -> np.ndarray:
    save_file({key.replace("__", "."): tensor for key, tensor in tensors.items()}, directory / "model.safetensors")
    with contextlib.ExitStack() as stack:
        return np.array(read_scaled(open_tensors(directory, stack), name, directory))


def test_integers_times_their_scale(tmp_path: pathlib.Path) -> None:
    """By hand: two groups of two rows, of one column and another."""
    integers = np.array([[1, -2], [127, 0], [3, 4], [-128, 5]], np.int8)
    scale = np.array([[0.5, 2.0], [0.25, -1.0]], np.float16)
    expected = np.array([[0.5, -4.0], [63.5, 0.0], [0.75, -4.0], [-32.0, -5.0]], np.float32)
    found = read(tmp_path, "a.kernel", a__kernel=integers, a__kernel__scale=scale)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32
    halves = np.array([[0x0F, 0x80], [0x7C, 0x91]], np.uint8)  # Low halves 15 0 12 1, high halves 0 8 7 9.
    np.testing.assert_array_equal(unpack(halves), np.array([[7, -8], [-8, 0], [4, -7], [-1, 1]]))
    found = read(tmp_path, "a.kernel", a__kernel=halves, a__kernel__scale=np.ones((1, 2), np.float32))
    np.testing.assert_array_equal(found, unpack(halves))


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 2), (8, 64)])
def test_round_trip(bits: int, group: int, tmp_path: pathlib.Path) -> None:
    integers, scale = quantise(KERNEL, bits, group)
    assert integers.shape == ((32, 6) if bits == 4 else (64, 6)) and scale.shape == (64 // group, 6)
    assert integers.dtype == (np.uint8 if bits == 4 else np.int8) and scale.dtype == np.float16
    found = read(tmp_path, "kernel", kernel=integers, kernel__scale=scale)
    step = np.abs(np.repeat(scale.astype(np.float32), group, axis=0))
    # Half a step, or two where a factor of 0.7 cut the largest entry off: 0.3 of half the range.
    assert np.all(np.abs(found - KERNEL) <= step * (0.5 + 0.45 * 2 ** (bits - 1)))
    assert np.linalg.norm(found - KERNEL) < 1.3 * 2.0**-bits * np.linalg.norm(KERNEL) * (2 if bits == 4 else 3)
    again, same = quantise(found, bits, group)
    np.testing.assert_allclose(read(tmp_path, "kernel", kernel=again, kernel__scale=same), found, atol=2e-3)


def test_zeros_stay_zeros(tmp_path: pathlib.Path) -> None:
    integers, scale = quantise(np.zeros((4, 3)), 4, 2)
    np.testing.assert_array_equal(read(tmp_path, "k", k=integers, k__scale=scale), np.zeros((4, 3)))


def test_scales_of_norms_are_tensors_of_their_own(tmp_path: pathlib.Path) -> None:
    assert whole_tensors({"norm.scale": 0, "a.kernel": 0, "a.kernel.scale": 0}) == ["norm.scale", "a.kernel"]
    np.testing.assert_array_equal(read(tmp_path, "norm.scale", norm__scale=KERNEL[0]), KERNEL[0])


@pytest.mark.parametrize(
    ("integers", "scale", "complaint"),
    [
        (np.zeros((4, 2), np.int16), np.ones((1, 2), np.float32), "tensor k is stored as I16, expected one of I8, U8"),
        (np.zeros((4, 2), np.float32), np.ones((1, 2), np.float32), "tensor k is stored as F32, expected one of I8"),
        (np.zeros((4, 2), np.int8), np.ones((1, 2), np.int8), r"tensor k\.scale is stored as I8, expected one of F64"),
        (np.zeros((4, 2), np.int8), np.ones((3, 2), np.float32), r"scale of k has shape \[3, 2\], which does not"),
        (np.zeros((4, 2), np.int8), np.ones((1, 1), np.float32), r"shape \[1, 1\], which does not divide \[4, 2\]"),
        (np.zeros((4, 2), np.int8), np.ones((0, 2), np.float32), r"shape \[0, 2\], which does not divide"),
        (np.zeros(4, np.int8), np.ones(2, np.float32), "which does not divide"),
        (np.zeros((4, 2), np.int8), None, "tensor k is stored as I8, expected one of F64, F32, F16, BF16"),
    ],
)
def test_what_does_not_belong_together(integers, scale, complaint: str, tmp_path: pathlib.Path) -> None:
    tensors = {"k": integers} if scale is None else {"k": integers, "k__scale": scale}
    with pytest.raises(UserError, match=complaint):
        read(tmp_path, "k", **tensors)
