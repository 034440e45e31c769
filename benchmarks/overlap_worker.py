"""One rank of ``overlap``: sets its link, and times the ring as it is, without sending, and with waiting."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.context_peers import Differentiated, Problem
from benchmarks.cpu_flash import sdpa
from benchmarks.ranks import joined, of_all_ranks, report
from benchmarks.slow_link import shape
from hydra_dist.context import ContextParallel, DistributedTransport, Work
from hydra_dist.context.transport import Finished

Mode = Literal["compute", "ring", "synchronous"]
MODES: tuple[Mode, ...] = ("compute", "ring", "synchronous")
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD_OVER_FORWARD = 2.5
"""Five products of the backward over two of the forward."""
CALIBRATIONS, CALIBRATION_ROUNDS, NEAR_ENOUGH = 8, 7, 0.03


def main() -> None:
    """Report seconds {"forward" and "forward and backward": {mode: [one per round]}, "transfer": [one per round]}, the
    link's bits per second, the bytes of a hop, and each mode's largest relative error of the output."""
    with joined() as settings:
        num_ranks = dist.get_world_size()
        mesh = init_device_mesh("cpu", (num_ranks, 1), mesh_dim_names=("ring", "ulysses"))
        heads = tuple(settings["heads"])
        whole = Problem.random(settings["sequence_length"], heads, settings["head_dim"], torch.float32)
        seq = ContextParallel(mesh, strategy="ring", layout="zigzag").plan(whole.length)
        ring = Differentiated("ring", seq.attention, whole, seq.positions)
        local = whole.rows(seq.positions)

        def forward() -> None:
            with torch.no_grad():
                seq.attention(local.q, local.k, local.v)

        exact = sdpa(whole.q, whole.k, whole.v).index_select(1, seq.positions)
        errors = {}
        for mode in MODES:
            with transfers(mode):
                errors[mode] = max(of_all_ranks(float((ring.step()[0] - exact).abs().max() / exact.abs().max())))
        hop = Hop(local)
        works: dict[str, Callable[[], object]] = {"forward": forward, "forward and backward": ring.step}
        pairs_of_hop = whole.length * (whole.length + 1) // 2 / num_ranks**2
        slept = settings["slept_hop_seconds"]
        with sleeping(slept / pairs_of_hop) if slept else nullcontext():
            if slept and timed(forward, "compute") < 0.9 * slept * num_ranks:
                raise AssertionError(f"the ring's arithmetic does not go through torch.ops.aten.{FLASH}")
            bits = calibrate(forward, hop, settings["share"], num_ranks)
            seconds: dict[str, Any] = {name: {mode: [] for mode in MODES} for name in works}
            seconds["transfer"] = []
            for turn in range(settings["rounds"]):
                for name, work in works.items():
                    for mode in MODES if turn % 2 == 0 else MODES[::-1]:
                        seconds[name][mode].append(timed(work, mode))
                seconds["transfer"].append(timed(hop.move, "ring"))
        report({"seconds": seconds, "bits_per_second": bits, "bytes": hop.bytes, "errors": errors})


@contextmanager
def transfers(mode: Mode) -> Iterator[None]:
    """What an exchange between ranks does: ``ring``: goes on meanwhile; ``synchronous``: is over when it returns;
    ``compute``: nothing is sent, and what would have been received is zero."""
    original = DistributedTransport.exchange

    def nothing(self: Any, sends: Any, receives: Any, **labels: Any) -> Work:
        for _, tensor in receives:
            tensor.zero_()  # whatever stood in the memory may take longer to compute with
        return Finished()

    def waiting(self: Any, sends: Any, receives: Any, **labels: Any) -> Work:
        original(self, sends, receives, **labels).wait()
        return Finished()

    replacement = {"ring": original, "synchronous": waiting, "compute": nothing}[mode]
    DistributedTransport.exchange = replacement  # type: ignore[method-assign]
    try:
        yield
    finally:
        DistributedTransport.exchange = original  # type: ignore[method-assign]


@contextmanager
def sleeping(seconds_per_pair: float) -> Iterator[None]:
    """The flash operator and its backward wait instead of computing, in proportion to the scores they would compute,
    as a host waits for a device of its own. What they give back is zero."""

    def forward(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, **rest: Any) -> tuple[Tensor, Tensor]:
        time.sleep(seconds_per_pair * _pairs(q, k, causal))
        return torch.zeros_like(q), torch.zeros(q.shape[:3])

    def backward(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dropout: float,
        causal: bool,
        **_: Any,
    ) -> tuple[Tensor, ...]:
        time.sleep(BACKWARD_OVER_FORWARD * seconds_per_pair * _pairs(q, k, causal))
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    names = (FLASH, f"{FLASH}_backward")
    originals = [getattr(torch.ops.aten, name) for name in names]
    for name, replacement in zip(names, (forward, backward), strict=True):
        setattr(torch.ops.aten, name, replacement)
    try:
        yield
    finally:
        for name, original in zip(names, originals, strict=True):
            setattr(torch.ops.aten, name, original)


def _pairs(q: Tensor, k: Tensor, causal: bool) -> int:
    """Scores of a call for one head; [B, H, S, D]."""
    rows, keys = q.shape[2], k.shape[2]
    return rows * (rows + 1) // 2 if causal else rows * keys


class Hop:
    """Every rank's keys and values to the next rank, as one message, with nothing else going on."""

    def __init__(self, local: Problem) -> None:
        self._here = torch.stack([local.k, local.v])
        self._there = torch.empty_like(self._here)
        self.bytes = self._here.numel() * self._here.element_size()

    def move(self) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        operations = [
            dist.P2POp(dist.isend, self._here, (rank + 1) % size),
            dist.P2POp(dist.irecv, self._there, (rank - 1) % size),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def calibrate(forward: Callable[[], object], hop: Hop, share: float, num_ranks: int) -> float:
    """Set every rank's link so that a hop's transfer alone takes ``share`` of a hop's compute alone; its bits a second.

    Every hop of a causal zigzag ring has the same number of scores to compute.
    """
    bits = 0.0
    for _ in range(CALIBRATIONS):
        hop_compute = statistics.median(timed(forward, "compute") for _ in range(CALIBRATION_ROUNDS)) / num_ranks
        target = share * hop_compute
        if not bits:
            bits = 8 * hop.bytes / target
            shape(bits)
        found = statistics.median(timed(hop.move, "ring") for _ in range(CALIBRATION_ROUNDS))
        if abs(found / target - 1) < NEAR_ENOUGH:
            break
        bits *= found / target
        shape(bits)
    return bits


def timed(work: Callable[[], object], mode: Mode) -> float:
    """Seconds until the slowest rank is done, from a common start; the same number on all ranks."""
    with transfers(mode):
        dist.barrier()
        started = time.perf_counter()
        work()
        passed = time.perf_counter() - started
    return max(of_all_ranks(passed))


if __name__ == "__main__":
    main()
