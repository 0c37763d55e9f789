"""Several devices make the images of one."""


def test_on_eight_devices(run_python) -> None:
    call = "makes_the_images_of_one_device('data=8', 'data=2,tensor=4', 'tensor=2')"
    output = run_python(f"from tests.decoding.images import mesh_checks; mesh_checks.{call}", devices=8)
    assert output.splitlines()[-1] == "done"
