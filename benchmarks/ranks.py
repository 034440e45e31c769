"""The processes of one group on this machine: started by a benchmark, measured inside, reported by rank 0.

``measure`` runs a module once per rank, ``python -m MODULE SETTINGS FILE``. In the module, ``joined`` makes the process
group and gives the settings, and ``slowest`` and ``report`` bring back what was measured.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.machine import ROOT
from hydra_dist.errors import RunError

SHOWN_LINES = 30
SECONDS_TO_END = 5.0
"""How long a rank that is asked to end may take before it is killed."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    prefix: tuple[str, ...] = ()
    """What its command is put behind, such as ``ip netns exec NAME``."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's."""


def measure(module: str, settings: Mapping[str, Any], places: Sequence[Place], address: str, timeout: float) -> Any:
    """What rank 0 of ``module`` reported, after all ranks ended well.

    Args:
        settings: handed to every rank; anything that JSON holds.
        places: one per rank.
        address: of rank 0, as all ranks reach it.
        timeout: seconds for the whole run.

    Raises RunError where a rank fails, with the last of what it wrote, or where the time runs out. No rank outlives the
    call.
    """
    with tempfile.TemporaryDirectory(prefix="hydra-dist-ranks-") as folder:
        report = Path(folder) / "report.json"
        logs = [Path(folder) / f"rank{rank}.txt" for rank in range(len(places))]
        shared = {"MASTER_ADDR": address, "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(len(places))}
        processes: list[subprocess.Popen[bytes]] = []
        files: list[IO[bytes]] = []
        try:
            for rank, place in enumerate(places):
                files.append(logs[rank].open("wb"))
                processes.append(
                    subprocess.Popen(
                        [*place.prefix, sys.executable, "-m", module, json.dumps(dict(settings)), str(report)],
                        cwd=ROOT,
                        env={**os.environ, "OMP_NUM_THREADS": "1", **shared, **_names(rank), **place.environment},
                        stdout=files[rank],
                        stderr=subprocess.STDOUT,
                    )
                )
            failed = _wait(processes, timeout)
        finally:
            _end(processes)
            for file in files:
                file.close()
        if failed is not None:
            raise RunError(f"{module}: {_why(failed, processes, timeout)}:\n{_last_lines(logs[max(failed, 0)])}")
        return json.loads(report.read_text(encoding="utf-8"))


@contextmanager
def joined() -> Iterator[dict[str, Any]]:
    """The settings, within a gloo group of all ranks; one thread for each rank's arithmetic."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        yield json.loads(sys.argv[1])
    finally:
        dist.destroy_process_group()


def of_all_ranks(value: Any) -> list[Any]:
    """``value`` of every rank, on every rank."""
    import torch.distributed as dist

    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def report(result: Any) -> None:
    """Leave ``result`` for ``measure``. Called by all ranks; that of rank 0 counts."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


def _names(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout: float) -> int | None:
    """None when all ended well; else the first rank that failed, or -1 where the time ran out."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        if time.monotonic() > deadline:
            return -1
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _why(failed: int, processes: Sequence[subprocess.Popen[bytes]], timeout: float) -> str:
    if failed < 0:
        return f"not done after {timeout:.0f} s; rank 0 wrote"
    return f"rank {failed} of {len(processes)} ended with exit code {processes[failed].returncode}"


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:])
