"""Pieces of code share a process, and each has its own output, verdict and end."""

import pytest


def test_pieces_share_a_process_and_nothing_they_say(run_on_devices) -> None:
    same = "import os\nprint(os.getpid())\n"
    first = run_on_devices(same + "import jax\nprint(jax.device_count())\nmine = 1", devices=2)
    assert first.splitlines()[1:] == ["2"]
    with pytest.raises(AssertionError, match=r"(?s)said so.*NameError: name 'mine' is not defined"):
        run_on_devices("import sys\nprint('said so', file=sys.stderr)\nmine", devices=2)
    assert run_on_devices(same, devices=2) == first.splitlines()[0] + "\n"


def test_the_end_of_the_process_is_the_failure_of_one(run_on_devices) -> None:
    with pytest.raises(AssertionError, match=r"(?s)exit status -9.*last words"):
        run_on_devices("print('last words', flush=True)\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)", 2)
    with pytest.raises(AssertionError, match=r"took over 0\.1 s"):
        run_on_devices("import time\ntime.sleep(60)", devices=2, timeout=0.1)
    assert run_on_devices("print('another')", devices=2) == "another\n"


def test_a_fresh_process_may_exit_and_must_exit_well(run_python) -> None:
    assert run_python("print(1)\nraise SystemExit(0)\n") == "1\n"
    with pytest.raises(AssertionError, match="SystemExit: one sentence"):
        run_python("raise SystemExit('one sentence')")
    with pytest.raises(AssertionError, match="after its last piece of code the process ended with exit status 3"):
        run_python("import atexit, os\natexit.register(os._exit, 3)")
