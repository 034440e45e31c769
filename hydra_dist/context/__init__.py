"""One sequence over many ranks: transports, layouts, strategies of attention, halo, and ranks emulated by threads.

``ContextParallel`` (parallel.py) is what a trainer makes, ``SequencePlan`` (plan.py) what a layer sees. Strategies are
ring.py, gather.py and ulysses.py, and know a transport only (transport.py): between processes (distributed.py) or
threads (emulated.py).
"""

from hydra_dist.context.distributed import DistributedTransport
from hydra_dist.context.emulated import EmulatedMesh, EmulatedTransport, run_ranks
from hydra_dist.context.halo import halo_exchange
from hydra_dist.context.handles import kept_alive
from hydra_dist.context.operator import SAVED_BY_CHECKPOINT
from hydra_dist.context.parallel import STRATEGIES, ContextParallel
from hydra_dist.context.plan import SequencePlan
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
    "halo_exchange",
    "kept_alive",
    "run_ranks",
]
