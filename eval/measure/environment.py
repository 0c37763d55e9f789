"""Where a number was measured: versions, device, processor, revision and command, as `results.json` records them."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).resolve().parents[2]


def describe_environment() -> dict[str, str | int | bool | None]:
    """The present machine, software and command, as plain values for JSON.

    Returns:
      `python`, `jax`, `jaxlib`, `flax`, `numpy`: versions. `backend`, `device`, `device_count`, `processes`: what JAX
      computes on.
      `platform`, `cpu`: operating system and processor model. `cores`: processors this process may use. `git_sha`: the
      revision, or None outside a repository; `git_dirty`: whether files differ from it. `date`: UTC, ISO 8601, to the
      second. `command`: what to type to run this again, without the interpreter's path.
    """
    devices = jax.devices()
    sha = _git("rev-parse", "HEAD")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "backend": devices[0].platform,
        "device": devices[0].device_kind,
        "device_count": len(devices),
        "processes": jax.process_count(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "git_sha": sha,
        "git_dirty": None if sha is None else bool(_git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    """The processor's marketing name: from /proc on Linux, from sysctl on macOS, else what `platform` knows."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if platform.system() == "Darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return platform.processor() or platform.machine()
