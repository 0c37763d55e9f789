"""Directories that the tests of image evaluation share; nothing writes into them."""

import pathlib

import pytest

from tests.eval.images import tiny


@pytest.fixture(scope="session")
def image_directories(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What `tiny.write` makes."""
    return tiny.write(tmp_path_factory.mktemp("images"))
