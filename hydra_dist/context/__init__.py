"""One sequence over many ranks: transport, plan, ring attention, halo, and ranks emulated by threads."""

from hydra_dist.context.distributed import DistributedTransport
from hydra_dist.context.emulated import EmulatedMesh, EmulatedTransport, run_ranks
from hydra_dist.context.operator import SAVED_BY_CHECKPOINT
from hydra_dist.context.plan import STRATEGIES, ContextParallel, SequencePlan
from hydra_dist.context.transport import Traffic, Transport, TransportTimeoutError, Work

__all__ = [
    "SAVED_BY_CHECKPOINT",
    "STRATEGIES",
    "ContextParallel",
    "DistributedTransport",
    "EmulatedMesh",
    "EmulatedTransport",
    "SequencePlan",
    "Traffic",
    "Transport",
    "TransportTimeoutError",
    "Work",
    "run_ranks",
]
