"""Which strategy of context parallelism should take the least time, from the bytes that each one sends.

One layer's attention, forward and backward, on one rank:

    ring        the keys of P - 1 ranks go by, hidden behind computing but for the hop that comes first
    all_gather  the keys that a rank's queries see, hidden but for the first slice of heads
    ulysses     rows exchanged for heads, before and after computing, so not hidden
    hybrid      Ulysses within a group, a ring across groups

The bytes are closed forms for the zigzag and contiguous layouts under a causal mask or a window, without documents:
within a few per cent of ``ring_traffic``, ``gather_traffic`` and ``ulysses_traffic``, which count exactly but look at
all pairs of ranks. What is compared is time that is not hidden; computing is the same for all.
"""

from dataclasses import dataclass

from hydra_dist.config import Config, ModelConfig
from hydra_dist.config.context import ContextConfig, shares_heads
from hydra_dist.costs.flops import score_pairs
from hydra_dist.costs.gather import heads_of_slices
from hydra_dist.costs.rotation import Heads, cheaper_backward, travelling_bytes
from hydra_dist.costs.ulysses import ulysses_traffic

MESSAGE_SECONDS = 20e-6
"""What a message costs beside its bytes: launching it and waiting for the peer, on NCCL."""
ATTENTION_FLOPS = 4e14
"""Operations a second that a rank's attention is taken to reach: published figures of FlashAttention in bf16 on an H100
lie between 4e14 and 6e14. It only decides how much of a transfer is hidden."""


@dataclass(frozen=True)
class Candidate:
    """A strategy over a grid of ranks.

    Attributes:
        strategy, ring, ulysses, inner_ring: as for ``ContextParallel``.
        sent: bytes that a rank sends in all layers of one step's forward and backward pass (one micro-batch).
        seconds: that transfers are not hidden behind computing, in all layers.
    """

    strategy: str
    ring: int
    ulysses: int
    inner_ring: int | None
    sent: float
    seconds: float

    @property
    def grid(self) -> str:
        """The strategy with the shape of its grid, ring x Ulysses."""
        inner = f" in rings of {self.inner_ring}" if self.inner_ring else ""
        return f"hybrid {self.ring} x {self.ulysses}{inner}" if self.strategy == "hybrid" else self.strategy + inner

    def describe(self) -> str:
        return f"{self.grid}: {self.sent / 2**20:.4g} MiB a rank, {self.seconds * 1e3:.3g} ms not hidden"


@dataclass(frozen=True)
class Choice:
    """What a configuration comes to, and why."""

    chosen: Candidate
    others: tuple[Candidate, ...]
    why: str


def resolve(config: Config) -> Choice:
    """The grid and strategy of a configuration: as it says, or for ``auto`` what should take the least time."""
    context, model = config.context, config.model
    options = candidates(
        context,
        model,
        config.data.sequence_length,
        batch_size=config.train.micro_batch_size,
        element_bytes=4 if config.train.precision == "fp32" or config.train.device == "cpu" else 2,
    )
    allowed = [option for option in options if _is_allowed(option, context)]
    best, *others = sorted(allowed, key=lambda option: option.seconds)
    if context.size == 1:
        why = "one rank holds whole sequences"
    elif len(allowed) == 1:
        why = "as configured"
    else:
        why = f"the least time that is not hidden; {'; '.join(other.describe() for other in others[:3])}"
        if not any(option.strategy == "ulysses" for option in allowed) and context.strategy == "auto":
            why += f"; ulysses cannot deal the heads of every layer to {context.size} ranks"
    return Choice(best, tuple(others), why)


def candidates(
    context: ContextConfig, model: ModelConfig, sequence_length: int, *, batch_size: int, element_bytes: int
) -> list[Candidate]:
    """All strategies that the heads of the model allow over ``context.size`` ranks."""
    size = context.size
    found = []
    for ulysses in range(1, size + 1):
        if size % ulysses or not shares_heads(model, ulysses):
            continue
        ring = size // ulysses
        names = ["hybrid"] if 1 < ulysses < size else ["ulysses"] if ulysses > 1 else ["ring", "all_gather"]
        for name in names:
            links = _Links(context, ring, ulysses, name)
            sent = seconds = 0.0
            for layer in model.layers:
                one = _Layer(layer, sequence_length, context.layout, ring, ulysses, batch_size, element_bytes)
                exchange = one.exchange_bytes()
                moved = one.gathered_bytes() if name == "all_gather" else one.rotated_bytes()
                sent += exchange + moved
                seconds += links.exchange_seconds(exchange) + links.exposed_seconds(moved, one)
            found.append(Candidate(name, ring, ulysses, links.inner, sent, seconds))
    return found


def _is_allowed(option: Candidate, context: ContextConfig) -> bool:
    if context.size == 1:
        return option.strategy == "ring"
    if context.strategy == "hybrid":
        wanted = context.ulysses_size
        if wanted is None:
            return option.strategy == "hybrid"
        return option.ulysses == wanted and option.strategy != "all_gather"
    return context.strategy in ("auto", option.strategy)


@dataclass(frozen=True)
class _Layer:
    """The attention of one layer on one rank of a ring x Ulysses grid."""

    model: ModelConfig
    sequence_length: int
    layout: str
    ring: int
    ulysses: int
    batch_size: int
    element_bytes: int

    @property
    def heads(self) -> Heads:
        """That a rank works on."""
        queries, keys = self.model.num_query_heads, self.model.num_key_heads
        return Heads(queries // self.ulysses, max(1, keys // self.ulysses), self.model.head_dim)

    @property
    def slices(self) -> int:
        whole = self.batch_size * self.sequence_length * travelling_bytes("keys", self.heads, self.element_bytes)[0]
        return len(heads_of_slices(self.heads.key, whole // self.heads.key))

    def seconds(self) -> float:
        """Of computing, forward and backward."""
        pairs = score_pairs(self.sequence_length, self.model.window)
        flops = 3.5 * 4 * self.model.query_size * pairs * self.batch_size
        return flops / (self.ring * self.ulysses) / ATTENTION_FLOPS

    def exchange_bytes(self) -> float:
        """Of rows for heads and back."""
        rows = [self.sequence_length // (self.ring * self.ulysses)] * self.ulysses
        heads = Heads(self.model.num_query_heads, self.model.num_key_heads, self.model.head_dim)
        sent = ulysses_traffic(rows, heads, batch_size=self.batch_size, element_bytes=self.element_bytes)[0]
        return sent.forward_bytes + sent.backward_bytes

    def rotated_bytes(self) -> float:
        """Of a ring: its keys forward, and what is cheaper with its gradient backward."""
        side = cheaper_backward(self.heads, self.element_bytes)
        forward = travelling_bytes("keys", self.heads, self.element_bytes)[0]
        return self.batch_size * self._rotated_rows() * (forward + sum(self._travelling(side)))

    def gathered_bytes(self) -> float:
        """Of gathering keys twice, and of their gradients."""
        keys, gradients = self._travelling("keys")
        return self.batch_size * self._gathered_rows() * (2 * keys + gradients)

    def _travelling(self, side: str) -> tuple[int, int]:
        return travelling_bytes("queries" if side == "queries" else "keys", self.heads, self.element_bytes)

    @property
    def _rows_of_edges(self) -> float:
        """Rows of a rank that the window of a following chunk reaches."""
        reach = self.sequence_length if self.model.window is None else self.model.window - 1
        return reach if self.layout == "contiguous" else 2 * reach

    def _rotated_rows(self) -> float:
        """That a rank passes on in one round; contiguous keys go to later ranks only."""
        own, hops = self.sequence_length / self.ring, self.ring - 1
        if self.layout == "contiguous":
            reach = self.sequence_length if self.model.window is None else self.model.window - 1
            return min(own, reach) * min(hops / 2, -(-reach // own))
        # The last piece of all, with the first rank, is wanted by none.
        return min(own * (1 - 0.5 / self.ring), self._rows_of_edges) * hops

    def _gathered_rows(self) -> float:
        """That a rank sends to others: in zigzag an early piece to all of them, a late one to half of them."""
        own, hops = self.sequence_length / self.ring, self.ring - 1
        share = 0.5 if self.layout == "contiguous" else 0.75
        return min(share * own * hops, self._rows_of_edges)


class _Links:
    """How fast the wires are that a strategy uses."""

    def __init__(self, context: ContextConfig, ring: int, ulysses: int, strategy: str) -> None:
        self.strategy = strategy
        self.ring, self.ulysses = ring, ulysses
        near, far = context.intra_node_bandwidth * 1e9, context.inter_node_bandwidth * 1e9
        places = max(1, context.ranks_per_node // ulysses)  # ranks of the ring that share a node
        self.inner = context.inner_ring
        if self.inner is None and context.strategy == "auto" and places < ring and ring % places == 0 and places > 1:
            self.inner = places
        nodes = -(-ring // places)
        if strategy == "all_gather":
            remote = 1 - (min(places, ring) - 1) / max(1, ring - 1) if ring > 1 else 0.0
            self.ring_rate = 1 / ((1 - remote) / near + remote / far)
        elif nodes == 1:
            self.ring_rate = near
        elif self.inner:
            remote = (nodes - 1) / (ring - 1)
            self.ring_rate = 1 / ((1 - remote) / near + remote / far)
        else:
            self.ring_rate = far  # each hop waits for the rank at the node's edge
        remote = max(0, ulysses - context.ranks_per_node) / ulysses
        self.ulysses_rate = 1 / ((1 - remote) / near + remote / far)

    def exchange_seconds(self, moved: float) -> float:
        """Of rows for heads: four exchanges, none hidden."""
        return 0.0 if self.ulysses == 1 else moved / self.ulysses_rate + 4 * (self.ulysses - 1) * MESSAGE_SECONDS

    def exposed_seconds(self, moved: float, layer: _Layer) -> float:
        """Of keys on their way, what computing does not hide."""
        if self.ring == 1:
            return 0.0
        parts = layer.slices if self.strategy == "all_gather" else self.ring
        moving = moved / self.ring_rate + 3 * (self.ring - 1) * MESSAGE_SECONDS
        return moving / parts + max(0.0, moving * (parts - 1) / parts - layer.seconds() * (parts - 1) / parts)
