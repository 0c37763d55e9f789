"""Directories that the tests of eval share; nothing writes into them."""

import pathlib

import pytest

from models.formats.target import Target, load_target
from tests.eval import tiny


@pytest.fixture(scope="session")
def target_directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny random target."""
    return tiny.write_target(tmp_path_factory.mktemp("eval") / "target")


@pytest.fixture(scope="session")
def target(target_directory: pathlib.Path) -> Target:
    """The same, loaded."""
    return load_target(target_directory)


@pytest.fixture(scope="session")
def drafter_directories(tmp_path_factory: pytest.TempPathFactory, target_directory: pathlib.Path):
    """Name -> directory of random heads for it."""
    return tiny.write_drafters(tmp_path_factory.mktemp("drafters"), target_directory)
