"""What a rank sends: the numbers that closed forms give and runs count."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankTraffic:
    """Bytes and messages that one rank sends in one call."""

    forward_bytes: int
    forward_messages: int
    backward_bytes: int
    backward_messages: int


def accumulator_bytes(element_bytes: int) -> int:
    """Of one element of a sum over ranks: fp32, and fp64 for fp64."""
    return max(4, element_bytes)
