"""Several devices make the images of one."""

import re

import pytest


@pytest.mark.parametrize(
    "check",
    [
        "makes_the_images_of_one_device('data=2,tensor=4')",
        pytest.param("makes_the_images_of_one_device('data=8', 'tensor=2')", marks=pytest.mark.slow),
        "rows_stay_on_their_devices()",
    ],
    ids=lambda check: re.sub(r"[^\w,]+", " ", check).strip(),
)
def test_on_eight_devices(check: str, run_on_devices) -> None:
    run_on_devices(f"from tests.decoding.images import mesh_checks; mesh_checks.{check}", devices=8)
