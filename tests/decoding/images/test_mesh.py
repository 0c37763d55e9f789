"""Several devices make the images of one."""


def test_on_eight_devices(run_python) -> None:
    call = "makes_the_images_of_one_device('data=8', 'data=2,tensor=4', 'tensor=2')"
    output = run_python(f"from tests.decoding.images import mesh_checks; mesh_checks.{call}", devices=8)
    assert output.splitlines()[-1] == "done"


def test_rows_stay_on_their_devices(run_python) -> None:
    output = run_python(
        "from tests.decoding.images import mesh_checks; mesh_checks.rows_stay_on_their_devices()", devices=8
    )
    assert output.splitlines()[-1] == "done"
