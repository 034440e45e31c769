"""One rank of ``context_speed``: makes the candidates, compares each with one device, and times them in turns."""

import random
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import context_peers as peers
from benchmarks.context_peers import Candidate, Problem
from benchmarks.ranks import joined, of_all_ranks, report

TENSORS = ("out", "dq", "dk", "dv")


def main() -> None:
    """Report errors {name: {tensor: error}}, seconds and processor {name: [one per round]}, and absent {name: why}."""
    with joined() as settings:
        num_ranks = dist.get_world_size()
        whole = Problem.random(
            settings["sequence_length"], tuple(settings["heads"]), settings["head_dim"], torch.float32
        )
        candidates, absent = gather(whole, settings["ours"], settings["peers"])
        exact = peers.OneDevice(whole.to(torch.float64), num_ranks).step()
        errors = {}
        for candidate in candidates:
            found = candidate.step()
            if candidate.positions is not None:
                errors[candidate.name] = _worst(of_all_ranks(relative_errors(found, exact, candidate.positions)))
        seconds, processor = in_turns(candidates, settings["rounds"])
        report({"errors": errors, "seconds": seconds, "processor": processor, "absent": absent})


def gather(whole: Problem, ours: Sequence[str], others: Sequence[str]) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates that this machine has, and why it lacks the other peers; the same on all ranks."""
    group = dist.group.WORLD
    assert group is not None
    makers: dict[str, Callable[[], Candidate]] = {
        "torch-alltoall": lambda: peers.torch_ring(whole, group, "alltoall"),
        "torch-allgather": lambda: peers.torch_ring(whole, group, "allgather"),
        "deepspeed-ulysses": lambda: peers.deepspeed_ulysses(whole, group),
        "ring-flash-attention": lambda: peers.ring_flash_attention(whole, group),
    }
    found: list[Candidate] = [
        peers.OneDevice(whole, dist.get_world_size()),
        peers.TilesAlone(whole, dist.get_rank(), dist.get_world_size()),
        *(peers.ours(whole, way) for way in ours),
    ]
    absent: dict[str, str] = {}
    for name in others:
        try:
            found.append(makers[name]())
        except ImportError as error:
            absent[name] = str(error)
    return found, absent


def relative_errors(found: Sequence[Tensor], exact: Sequence[Tensor], positions: Tensor) -> dict[str, float]:
    """Largest difference over the largest exact value, for out and the three gradients; inf for what is not finite."""
    errors = {}
    for name, have, want in zip(TENSORS, found, exact, strict=True):
        difference = float((have.to(want.dtype) - want.index_select(1, positions)).abs().max() / want.abs().max())
        errors[name] = difference if difference == difference else float("inf")
    return errors


def _worst(by_rank: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: max(errors[name] for errors in by_rank) for name in TENSORS}


def in_turns(candidates: Sequence[Candidate], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(seconds, processor seconds) of each round, times the candidate's share; in another order each round, the same on
    all ranks, because what runs before leaves its mark on caches and memory.

    A round's seconds end when the slowest rank is done. Its processor seconds are the mean of the ranks', with what
    their transports' threads took: without waiting, and hardly changed by others who use the machine.
    """
    taken: dict[str, list[tuple[float, float]]] = {candidate.name: [] for candidate in candidates}
    for turn in range(rounds):
        for candidate in random.Random(turn).sample(candidates, len(candidates)):
            dist.barrier()
            worked, started = time.process_time(), time.perf_counter()
            candidate.step()
            passed = time.perf_counter() - started, time.process_time() - worked
            taken[candidate.name].append((candidate.share * passed[0], candidate.share * passed[1]))
    by_rank: list[dict[str, list[tuple[float, float]]]] = of_all_ranks(taken)
    wall, busy = {}, {}
    for name in taken:
        of_round = list(zip(*(rank[name] for rank in by_rank), strict=True))
        wall[name] = [max(passed for passed, _ in ranks) for ranks in of_round]
        busy[name] = [sum(worked for _, worked in ranks) / len(ranks) for ranks in of_round]
    return wall, busy


if __name__ == "__main__":
    main()
