"""What every test shares: one CPU device, a persistent compilation cache, and a few fixtures."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Before JAX starts. Tolerances in these tests are those of float32 products on a CPU. A test that needs several devices
# starts its own process (`run_python`), because their number cannot change once the backend runs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped() -> Iterator[None]:
    """Forgets compiled programs after each file: each holds memory mappings, of which a Linux process may have 65,530,
    and the process dies of one too many."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def structs_may_hold_shapes() -> Iterator[None]:
    """`jit(...).lower` rebuilds its arguments and `out_info` with shapes in the place of arrays, which the checks that
    these three structs make of their fields would refuse."""
    from decoding.images.scales import Draws, Sketch
    from decoding.sampling import SamplingParameters

    structs = (Draws, Sketch, SamplingParameters)
    for struct in structs:
        struct.__init__.__no_type_check__ = True
    yield
    for struct in structs:
        del struct.__init__.__no_type_check__


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs the test in float64, and only this test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real data beside the repository (TANDEM_SHARED_DATA, else ../shared/data); skips without one."""
    folder = pathlib.Path(os.environ.get("TANDEM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs the shared data folder: set TANDEM_SHARED_DATA")
    return folder


@pytest.fixture
def run_python() -> Callable[..., str]:
    """`run_python(code, devices=8)` runs code in a fresh process with that many CPU devices and returns its stdout."""

    def run(code: str, devices: int = 1, timeout: float = 300) -> str:
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
