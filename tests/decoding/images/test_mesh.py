"""Several devices make the images of one."""

import pytest


@pytest.mark.parametrize(
    "check",
    ["makes_the_images_of_one_device('data=8', 'data=2,tensor=4', 'tensor=2')", "rows_stay_on_their_devices()"],
    ids=lambda check: check.split("(")[0],
)
def test_on_eight_devices(check: str, run_on_devices) -> None:
    run_on_devices(f"from tests.decoding.images import mesh_checks; mesh_checks.{check}", devices=8)
