"""Several processes that do one job: how they find each other, who of them writes, how what each made becomes whole.

`start` is the first thing that a command does, before it asks JAX for a device. Where nothing was asked for and no
cluster is there it does nothing, and everything below answers for a process that is alone. Whether one is there is read
off the environment; no machine that is not a TPU worker is asked over the network.

One process, the first, writes: files go through `eval/report/files.py`, which asks `is_first`, and what the others
print goes nowhere. Whatever only the first may do (a lock, an export) is done within `on_first`, for which the others
wait, so that all of them end with its complaint.
"""

import glob
import importlib.util
import os
import pickle
import re
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from models.errors import UserError

TIMEOUT = 300  # Seconds in which all processes must have come.
_LAST_GOODBYE = 60  # Seconds that a process which has ended waits for the others to end.
_FORM = "--distributed must be HOST:PORT,N,I, as in 10.0.0.1:8476,4,0, or off"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
T = TypeVar("T")


def parse(text: str) -> tuple[str, int, int] | None:
    """The parts of `HOST:PORT,N,I`, None for `off`.

    Raises:
      UserError: another form, a port above 65,535, or no such process.
    """
    if text == "off":
        return None
    found = re.fullmatch(r"((?:\[[^\[\],]+\]|[^\[\]:,\s]+):(\d+)),(\d+),(\d+)", text)
    if found is None:
        raise UserError(f"{_FORM}: the address of process 0, their number, and which one this is; got {text!r}")
    address, port, count, index = found[1], int(found[2]), int(found[3]), int(found[4])
    if not 1 <= port <= 65535:
        raise UserError(f"{_FORM}: PORT must be 1 to 65535, got {port}")
    if not 0 <= index < count:
        raise UserError(f"{_FORM}: I counts the N processes from 0, got N = {count} and I = {index}")
    return address, count, index


def start(asked: str | None = None) -> None:
    """Joins the processes of this job; to be called before anything asks JAX for a device.

    Waits until all have come, `TIMEOUT` seconds at most; whoever waited in vain ends with one sentence and status 2.

    Args:
      asked: what `--distributed` says; None asks whether this process belongs to a cluster's job.

    Raises:
      UserError: `asked` is of another form, or the first process cannot listen at its port.
    """
    options: dict[str, Any] = {}
    if asked is not None:
        given = parse(asked)
        if given is None:
            return
        names = ("coordinator_address", "num_processes", "process_id")
        options = {**dict(zip(names, given, strict=True)), "cluster_detection_method": "deactivate"}
        what = f"process {given[2]} of the {given[1]} at {given[0]}"
    elif (cluster := detected(os.environ)) is not None:
        what = f"this process of the {cluster} job"
    else:
        return
    failed: list[BaseException] = []

    def join() -> None:
        try:
            # Of the two limits ours must be the first: the library's ends a process by SIGABRT.
            limits: dict[str, Any] = {"initialization_timeout": 2 * TIMEOUT, "shutdown_timeout_seconds": _LAST_GOODBYE}
            jax.distributed.initialize(**options, **limits)
        except Exception as error:
            failed.append(error)

    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    joining.join(TIMEOUT)
    if joining.is_alive():
        _give_up(f"{what} waited {TIMEOUT} s in vain: {_missing(options)}")
    if failed and "start RPC server" in str(failed[0]):
        raise UserError(f"{what} cannot listen there: is the port in use, or the address another machine's?")
    if failed:
        raise failed[0]
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for as long as the process lives)


def detected(environ: Mapping[str, str]) -> str | None:
    """Which kind of cluster has started this process as one of several; None where it is alone."""
    # A shell within an allocation has its number of tasks, and is a step of one task.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", ""))
    if all(name in environ for name in _SLURM) and _more_than_one(tasks):
        return "SLURM"
    if "OMPI_MCA_orte_hnp_uri" in environ and _more_than_one(environ.get("OMPI_COMM_WORLD_SIZE", "")):
        return "Open MPI"
    if importlib.util.find_spec("libtpu") is None or "tpu" not in (environ.get("JAX_PLATFORMS") or "tpu"):
        return None
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is None and "TPU_SKIP_MDS_QUERY" not in environ and _has_tpu_chips():
        hosts = _workers(environ.get("GCE_METADATA_IP", "metadata.google.internal"))
    several = "," in (hosts or "") or _more_than_one(environ.get("MEGASCALE_NUM_SLICES", ""))
    return "TPU pod" if several else None


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def count() -> int:
    """How many processes do the job."""
    return jax.process_count()


def share(items: Sequence[T]) -> list[T]:
    """This process's part: every so-many-th item."""
    return list(items[jax.process_index() :: count()])


def gathered(value: T) -> list[T]:
    """What every process has, by their index; all must call it, and each may pickle what it likes."""
    if count() == 1:
        return [value]
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(content)], np.int32)).reshape(-1)
    # A power of two, so that few sizes are compiled for.
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def whole(parts: Sequence[Any]) -> list[Any]:
    """What was made of the items of `share`, one list or array per process, in the order of the items."""
    made: list[Any] = [None] * sum(map(len, parts))
    for index, part in enumerate(parts):
        made[index :: len(parts)] = part
    return made


def on_first(function: Callable[[], T]) -> T:
    """What `function` returns in the first process, in all of them; they wait for it, and fail as it does.

    Raises:
      UserError: `function` did.
    """
    if count() == 1:
        return function()
    made: Any = None
    if is_first():
        try:
            made = function()
        except UserError as error:
            made = error
    made = gathered(made)[0]
    if isinstance(made, UserError):
        raise made
    return made


def _give_up(message: str) -> NoReturn:
    """Ends the process as `exit_on_user_error` would, but at once: JAX's own end waits for those who did not come."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def _missing(options: Mapping[str, Any]) -> str:
    """Who has not come, as far as one can see from here."""
    address = options.get("coordinator_address")
    if address is None or options["process_id"] == 0:
        return "not all of the others have come"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return f"nobody answers at {address} ({error.strerror or error})"
    return f"{address} answers, but not all of the others have come"


def _more_than_one(number: str) -> bool:
    return number.isdecimal() and int(number) > 1


def _has_tpu_chips() -> bool:
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def _workers(metadata: str) -> str | None:
    """The workers of the TPU that this machine belongs to, with commas between them; None where nobody knows."""
    address = f"http://{metadata}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as got:
            return got.read().decode()
    except OSError:
        return None
