"""What a measurement ran on: processor, memory, GPUs, versions, commit."""

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import psutil

from benchmarks.result import Commit, Machine

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "triton", "deepspeed", "numpy")
RESULTS = "benchmarks/results"


def describe_machine() -> Machine:
    """This machine. Loads torch only to name GPUs, and only where there is a driver for one."""
    driver = _gpu_driver()
    return Machine(
        processor=_processor(),
        cores=available_cores(),
        memory_gib=psutil.virtual_memory().total / 2**30,
        gpus=gpu_names() if driver else (),
        gpu_driver=driver,
        system=platform.platform(),
    )


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_names() -> tuple[str, ...]:
    """The GPUs that torch can use, by name."""
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def device_tag(names: tuple[str, ...]) -> str:
    """GPU names as part of a file name: ``nvidia-h200``, or ``8x-nvidia-h200``."""
    slug = re.sub(r"[^a-z0-9]+", "-", names[0].lower()).strip("-")
    return slug if len(names) == 1 else f"{len(names)}x-{slug}"


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that the numbers depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def describe_commit(root: Path = ROOT) -> Commit | None:
    """The commit that is checked out at ``root``, and whether files other than results differ from it."""
    found = _git(root, "rev-parse", "HEAD")
    if found is None:
        return None
    changes = _git(root, "status", "--porcelain", "--", ".", f":(exclude){RESULTS}")
    return Commit(hash=found, dirty=bool(changes))


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^(?:model name|Model|Processor)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _gpu_driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split("\n") if done.returncode == 0 else []
    return lines[0].strip() or None if lines else None
