"""Random numbers by position: the same for a seed, a tensor, a task and a place in it, wherever they are made.

A counter is hashed with the key: two rounds of a 32-bit mixer of two multiplications (found by C. Wellons' search for
low bias), with key words before, between and after. It passes what DARE and DELLA ask of it (tests/test_draws.py) at an
eighth of the cost of Philox, and vectorises.
"""

from __future__ import annotations

import hashlib

from plait.lazy import np


def key_of(seed: int, tensor: str, purpose: str) -> tuple[int, int, int]:
    """Three 32-bit words that stand for (seed, tensor, purpose)."""
    digest = hashlib.blake2b(f"{seed}\0{tensor}\0{purpose}".encode(), digest_size=12).digest()
    return tuple(int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8))  # type: ignore[return-value]


def uniform(key: tuple[int, int, int], start: int, stop: int) -> np.ndarray:
    """float32 numbers in [0, 1), multiples of 2⁻²⁴, of positions [start, stop)."""
    position = np.arange(start, stop, dtype=np.uint64)
    first, second, third = (np.uint32(word) for word in key)
    x = _mix(position.astype(np.uint32) ^ first)
    x = _mix(x ^ (second ^ (position >> np.uint64(32)).astype(np.uint32) * np.uint32(0x9E3779B9))) + third
    return (x >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
