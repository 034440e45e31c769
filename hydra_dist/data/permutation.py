"""A keyed shuffle of 0..n-1 that needs no memory: where each index goes is computed, not looked up.

A balanced Feistel network permutes the integers of an even number of bits; walking the cycle until the value lies
below n restricts that permutation to 0..n-1. The walk takes fewer than 4 steps on average, as the power of 4 above n
is at most 4 n.

Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4 (cycle walking) and 5 (Feistel).
"""

import hashlib

_ROUNDS = 8


class Permutation:
    """A bijection of 0..size-1 that is a function of (size, seed, epoch) alone.

    Raises:
        ValueError: an empty range, or an index outside of it.
    """

    def __init__(self, size: int, seed: int, epoch: int):
        if size < 1:
            raise ValueError(f"size {size} < 1")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        self._key = hashlib.sha256(f"hydra_dist rows {seed} {epoch}".encode()).digest()

    def __call__(self, index: int) -> int:
        """Where ``index`` goes."""
        if not 0 <= index < self.size:
            raise ValueError(f"index {index} is not within 0..{self.size - 1}")
        value = self._encrypt(index)
        while value >= self.size:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (self._round(number, right) & self._mask)
        return left << self._half_bits | right

    def _round(self, number: int, value: int) -> int:
        message = number.to_bytes(1, "big") + value.to_bytes(8, "big")
        return int.from_bytes(hashlib.blake2b(message, digest_size=8, key=self._key).digest(), "big")
