"""Where a hop's transfer takes 0.8 of its compute, the ring takes at most 1.1 times its pure compute.

Every rank is a host of its own: a network namespace with a device whose sending is limited, so that every link of the
ring is slow alike. The limit is set until a hop's transfer alone takes that share of a hop's compute alone, both
measured with all ranks at it; a hop moves all keys and values of a rank, however few of them the ring sends. Pure
compute is the ring itself with exchanges that send nothing.

With as many ranks as the machine has cores the arithmetic is computed. More ranks would take cores from each other, and
one's waiting would look like another's progress. So the second measurement lets the attention operators sleep for as
long as their scores would take, which leaves the processor free as a device of its own does. What is measured then is
the order of sending, waiting and computing, for any number of ranks.

The control is the same ring with exchanges that wait until they are done: it has to miss the bound.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import slow_link
from benchmarks.harness import Options
from benchmarks.ranks import measure
from benchmarks.result import Cell, Result, Samples, Setting, Table
from hydra_dist.errors import RunError

NEEDS_GPU = False
SETTINGS: dict[str, Setting] = {
    "sequence_length": 4096,
    "heads": "8/2",
    "head_dim": 64,
    "rounds": 12,
    "computed_ranks": "2",
    "slept_ranks": "2,4",
    "slept_hop_seconds": 0.06,
    "share": 0.8,
    "aim": 0.86,
    "largest_ratio": 1.1,
    "largest_error": 5e-6,
}
"""``share``: the least that a hop's transfer takes of its compute in the forward pass; a slower link is harder to hide.
``aim``: the share that the links are set for, a little more. ``slept_hop_seconds``: of one hop, forward."""

COLUMNS = ("pass", "transfer of a hop", "pure compute, ms", "ring / pure compute", "quartiles", "waiting at each hop")
PASSES = ("forward", "forward and backward")
TIMEOUT = 900.0


def left_out(device: str) -> str | None:
    """Why this benchmark cannot be run here, or None."""
    if device != "cpu":
        return "it shapes links between processes on a CPU; without --gpu it works"
    return slow_link.left_out()


def run(options: Options) -> Result:
    """Make the hosts, run the ranks in them, and judge. RunError where this machine has no such hosts."""
    reason = left_out(options.device)
    if reason is not None:
        raise RunError(f"overlap: {reason}")
    settings = options.settings
    cases = []
    for kind, ranks in _kinds(settings):
        options.say(f"{ranks} ranks, {kind}")
        with slow_link.hosts(ranks) as hosts:
            measured = measure(
                "benchmarks.overlap_worker",
                {
                    "sequence_length": int(settings["sequence_length"]),
                    "heads": [int(number) for number in str(settings["heads"]).split("/")],
                    "head_dim": int(settings["head_dim"]),
                    "rounds": int(settings["rounds"]),
                    "share": float(settings["aim"]),
                    "slept_hop_seconds": float(settings["slept_hop_seconds"]) if kind == "slept" else 0.0,
                },
                hosts.places,
                hosts.address,
                TIMEOUT,
            )
        cases.append(Case.of(kind, ranks, measured))
    return judge(cases, settings)


@dataclass(frozen=True)
class Case:
    """What one group of ranks measured."""

    kind: str
    """``computed`` or ``slept``."""
    ranks: int
    seconds: Mapping[str, Mapping[str, Sequence[float]]]
    """Pass -> "compute", "ring" or "synchronous" -> one per round."""
    share: Samples
    """A hop's transfer over its compute."""
    bits_per_second: float
    bytes: int
    errors: Mapping[str, float]
    """Of the output against one device, with exchanges as they are named."""

    @classmethod
    def of(cls, kind: str, ranks: int, measured: Mapping[str, Any]) -> "Case":
        """From what ``overlap_worker`` reports."""
        seconds = {name: measured["seconds"][name] for name in PASSES}
        hop = statistics.median(seconds["forward"]["compute"]) / ranks
        share = Samples.of([taken / hop for taken in measured["seconds"]["transfer"]], "1")
        return cls(kind, ranks, seconds, share, measured["bits_per_second"], measured["bytes"], measured["errors"])

    @property
    def name(self) -> str:
        return f"{self.ranks} ranks, {self.kind}"

    def ratio(self, which: str, mode: str) -> Samples:
        """Of a pass to its pure compute, round by round."""
        times = self.seconds[which]
        return Samples.of([a / b for a, b in zip(times[mode], times["compute"], strict=True)], "1")


def judge(cases: Sequence[Case], settings: Mapping[str, Setting]) -> Result:
    """The cases as a result. RunError where a ring's output is wrong, or is right without anything being sent."""
    bound, error = float(settings["largest_ratio"]), float(settings["largest_error"])
    rows: list[tuple[Cell, ...]] = []
    quantities: dict[str, Samples] = {}
    missed: list[str] = []
    for case in cases:
        _check(case, error)
        quantities[f"{case.name}, transfer of a hop over its compute"] = case.share
        if case.share.median < float(settings["share"]):
            missed.append(f"{case.name}: a hop's transfer takes {case.share.median:.2f} of its compute")
        for which in PASSES:
            name = f"{case.name}: {which}"
            ring, waiting = case.ratio(which, "ring"), case.ratio(which, "synchronous")
            quantities |= {f"{name}, ring": ring, f"{name}, waiting at each hop": waiting}
            quantities |= {f"{name}, {mode}, seconds": Samples.of(s, "s") for mode, s in case.seconds[which].items()}
            if ring.median > bound:
                missed.append(f"{name}: {ring.median:.3f}")
            if waiting.median <= bound:
                missed.append(f"{name}: waiting at each hop takes {waiting.median:.3f} and should not pass")
            spread = f"{ring.lower_quartile:.3f} to {ring.upper_quartile:.3f}"
            compute = 1e3 * statistics.median(case.seconds[which]["compute"])
            rows.append((name, f"{case.share.median:.2f} of its compute", compute, ring.median, spread, waiting.median))
    ratios = [case.ratio(which, "ring").median for case in cases for which in PASSES]
    controls = [case.ratio(which, "synchronous").median for case in cases for which in PASSES]
    return Result(
        holds=not missed,
        finding=f"the ring takes at most {max(ratios):.3f} times its pure compute (bound {bound:g}), and at least "
        f"{min(controls):.3f} times where it waits at each hop"
        + (f"; not as claimed: {'; '.join(missed)}" * bool(missed)),
        quantities=quantities,
        counts={
            **{f"{case.name}, bytes of a hop": case.bytes for case in cases},
            **{f"{case.name}, link in bits a second": round(case.bits_per_second) for case in cases},
        },
        table=Table(columns=COLUMNS, rows=tuple(rows)),
    )


def _check(case: Case, bound: float) -> None:
    for mode, error in case.errors.items():
        if (mode == "compute") is (error <= bound):
            said = "although nothing was sent" if mode == "compute" else f"(bound {bound})"
            raise RunError(f"overlap: {case.name}, {mode}: the output differs from one device by {error:.1e} {said}")


def _kinds(settings: Mapping[str, Setting]) -> list[tuple[str, int]]:
    found = []
    for kind in ("computed", "slept"):
        found += [(kind, int(ranks)) for ranks in str(settings[f"{kind}_ranks"]).split(",") if ranks]
    return found
