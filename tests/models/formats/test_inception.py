"""A reader of Inception weights that lets no tensor pass unseen."""

import pathlib

import jax
import numpy as np
import pytest

from models.errors import UserError
from models.formats.inception import params_of, read_inception
from models.formats.release import Release
from models.formats.weights import as_stored
from tests.models.formats.torch_archives import write_torch
from tests.models.formats.torch_streams import write_old_torch
from tests.models.images.inception_cases import port_tensors, random_params


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params()


def test_weights_come_back_from_a_torch_file(params: dict, tmp_path: pathlib.Path) -> None:
    tensors = {**port_tensors(params), "Mixed_5b.branch1x1.bn.num_batches_tracked": np.zeros((), np.int64)}
    for write in (write_torch, write_old_torch):
        path = write(tmp_path / "inception.pth", tensors)
        jax.tree.map(np.testing.assert_array_equal, read_inception(path), params)
    with pytest.raises(UserError, match="entry 'state_dict' is not a tensor but a dict"):
        read_inception(write_old_torch(path, {"state_dict": {"w": np.zeros(3)}}))


BLOCK = "Mixed_7c.branch_pool.conv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(BLOCK), f"tensor {BLOCK} is missing"),
        (lambda tensors: tensors.pop("fc.bias"), "tensor fc.bias is missing"),
        (
            lambda tensors: tensors.update({BLOCK: np.zeros((192, 2048, 3, 3), np.float32)}),
            rf"tensor {BLOCK} has shape \[192, 2048, 3, 3\], .* implies \[192, 2048, 1, 1\]",
        ),
        (
            lambda tensors: tensors.update({"fc.weight": np.zeros((1000, 2048), np.float32)}),
            r"tensor fc.weight has shape \[1000, 2048\]",
        ),
        (
            lambda tensors: tensors.update({"AuxLogits.conv0.conv.weight": np.zeros(3, np.float32)}),
            "tensor AuxLogits.conv0.conv.weight is unknown",
        ),
    ],
)
def test_other_networks_are_refused(params: dict, change, message: str) -> None:
    tensors = port_tensors(params)
    change(tensors)
    release = Release(pathlib.Path("w.pth"), as_stored(tensors, pathlib.Path("w.pth")), {}, {})
    with pytest.raises(UserError, match=message):
        params_of(release)
