"""Directories that the tests of image evaluation share; nothing writes into them."""

import pathlib
from collections.abc import Iterator

import jaxtyping
import pytest

from tests.eval.images import tiny


@pytest.fixture(scope="session")
def image_directories(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What `tiny.write` makes."""
    return tiny.write(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def unchecked() -> Iterator[None]:
    """Suspends the checking of annotations: lowering a program puts descriptions where arrays are declared."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
