"""What every test shares: one CPU device, a persistent compilation cache, and a few fixtures."""

import contextlib
import functools
import gc
import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Before JAX starts. Tolerances in these tests are those of float32 products on a CPU. A test that needs several devices
# starts another process (`run_on_devices`), because their number cannot change once the backend runs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(ROOT / ".cache" / "hypothesis"))
# Tests compile thousands of programs and run each for moments, so XLA compiles them in the cheapest way, and where a
# file says that its programs `RUN_LONG`, in the cheapest that does not make them slow. What is compiled by default is
# tested by `XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0 bash scripts/test.sh`.
CHEAP = ["--xla_backend_optimization_level=1", "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # Later ones refuse to start with a flag that they lost.
    CHEAP.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(CHEAP))
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax

from tests import schedule
from tests.interpreter import Interpreter
from tests.tally import Tally


def pytest_configure(config: pytest.Config) -> None:
    """Starts counting what each file costs, and sees to the order of groups."""
    config.pluginmanager.register(Tally(), "tally")
    config.pluginmanager.register(schedule, "schedule")
    # Tracing makes many objects that stay; looking through them all time and again takes a twentieth of a run.
    gc.set_threshold(100_000, 20, 100)


def pytest_collection_finish() -> None:
    """Has the collector pass over what was imported, which stays."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def programs_run_long(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles better where a file asks for it."""
    usual = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] not in ("", "0")
    jax.config.update("jax_disable_most_optimizations", usual and not getattr(request.module, "RUN_LONG", False))
    yield
    jax.config.update("jax_disable_most_optimizations", usual)


MAPPINGS = 5_000  # Of memory: three of each small program. A Linux process may have 65,530, and dies of one more.


# Whether a program may hold what is patched in here. The rest is the host's: commands, timers, files.
IN_PROGRAMS = ("models", "decoding", "train", "jax", "flax", "optax")
patched: list[str] = []  # By whatever has run since programs were last looked at.


def seen(change: Callable[..., None]) -> Callable[..., None]:
    """`MonkeyPatch.setattr` or `delattr`, telling `patched` whose attribute it is."""

    @functools.wraps(change)
    def changed(self: pytest.MonkeyPatch, target, *arguments, **settings) -> None:
        owner = target if isinstance(target, str) else getattr(target, "__module__", None) or target.__name__
        patched.append(owner.partition(".")[0])
        change(self, target, *arguments, **settings)

    return changed


pytest.MonkeyPatch.setattr = seen(pytest.MonkeyPatch.setattr)  # type: ignore[method-assign]
pytest.MonkeyPatch.delattr = seen(pytest.MonkeyPatch.delattr)  # type: ignore[method-assign]


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped() -> Iterator[None]:
    """Forgets compiled programs after a file when they hold many memory mappings, and those that a patch may be in.

    Otherwise they stay: files share many small ones, and dropping and reading them again costs seconds per file.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    many = maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS
    if many or not set(IN_PROGRAMS).isdisjoint(patched):
        jax.clear_caches()
    patched.clear()


@pytest.fixture(scope="module")
def structs_may_hold_shapes() -> Iterator[None]:
    """`jit(...).lower` rebuilds its arguments and `out_info` with shapes in the place of arrays, which the checks that
    these three structs make of their fields would refuse."""
    from decoding.images.scales import Draws, Sketch
    from decoding.sampling import SamplingParameters
    from tests.decoding.compiled_text import shapes_for_arrays

    with shapes_for_arrays(Draws, Sketch, SamplingParameters):
        yield


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
        __tracebackhide__ = True
        with Interpreter(devices) as python:
            return python.run(code, timeout)

    return run


@pytest.fixture(scope="module")
def run_on_devices() -> Iterator[Callable[..., str]]:
    """`run_on_devices(code, devices=8)`: as `run_python`, in one process for all of a file's checks on so many devices.

    Imports, flags of JAX and compiled programs stay from one to the next. A check that ends the process fails alone:
    the next one starts another.
    """
    started: dict[int, Interpreter] = {}
    with contextlib.ExitStack() as processes:

        def run(code: str, devices: int, timeout: float = 300) -> str:
            __tracebackhide__ = True
            if devices not in started or started[devices].ended:
                started[devices] = processes.enter_context(Interpreter(devices))
            return started[devices].run(code, timeout)

        yield run
