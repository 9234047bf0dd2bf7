"""A counter-based hash of 64-bit integers on tensors: the same numbers in every process and on every device."""

from __future__ import annotations

from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def finalise(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of int64 that looks random; 0 stays 0."""
    x = (x ^ shift_right(x, 30)) * _FIRST
    x = (x ^ shift_right(x, 27)) * _SECOND
    return x ^ shift_right(x, 31)


def scramble(x: Tensor) -> Tensor:
    """`finalise` after one step of SplitMix64's counter, so that small integers, 0 among them, go far apart."""
    return finalise(x + _GAMMA)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own copies the sign bit of an int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
