"""Which weights dropout keeps: `csrc/abi/score_rule.h` in NumPy, and it says why."""

from __future__ import annotations

from typing import Any

import numpy as np

_MASK = np.uint64(0xFFFFFFFF)


def kept_weights(
    rate: float,
    seed: Any,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    q_offset: int = 0,
) -> np.ndarray:
    """The weights that dropout keeps, the same for every device and tile.

    >>> kept_weights(0.5, [3, 5], 1, 1, 2, 8).astype(int)[0, 0]
    array([[1, 1, 1, 1, 1, 1, 0, 1],
           [1, 0, 1, 0, 1, 1, 1, 1]])

    Args:
      rate: The probability with which a weight is dropped, in [0, 1).
      seed: int64 [2].
      batch, heads, q_len, kv_len: Sizes.
      q_offset: What is added to the row of a query.

    Returns:
      bool [batch, heads, q_len, kv_len]; True = kept.
    """
    seed = np.asarray(seed, np.int64).astype(np.uint64)
    b, h = (x.astype(np.uint64) for x in np.ogrid[:batch, :heads])
    counter = seed[1] & _MASK, seed[1] >> np.uint64(32), b, h
    c0, c1, s0, s1 = philox(counter, (seed[0] & _MASK, seed[0] >> np.uint64(32)))
    c0, c1, s0, s1 = (x[:, :, None] for x in (c0, c1, s0, s1))
    i = (np.arange(q_len) + q_offset).astype(np.uint64) & _MASK
    a, add, _, _ = philox((i, np.uint64(0), c0, c1), (s0, s1))
    g = philox((np.arange(kv_len, dtype=np.uint64), np.uint64(1), c0, c1), (s0, s1))[0]
    multiplier = (a | np.uint64(1))[..., None]
    bits = (multiplier * g[:, :, None] + add[..., None]) & _MASK
    return bits >= threshold(rate)


def threshold(rate: float) -> np.uint64:
    """Weights whose bits are at least that are kept."""
    return np.uint64(float(np.float32(rate)) * 2.0**32)


def philox(counter: tuple, key: tuple) -> tuple:
    """Philox 4x32-10: four uint64 arrays of 32 random bits each.

    Reference: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    w0, w1, w2, w3 = counter
    key0, key1 = key
    for _ in range(10):
        first = w0 * np.uint64(0xD2511F53)
        second = w2 * np.uint64(0xCD9E8D57)
        w0, w1 = (second >> np.uint64(32)) ^ w1 ^ key0, second & _MASK
        w2, w3 = (first >> np.uint64(32)) ^ w3 ^ key1, first & _MASK
        key0 = (key0 + np.uint64(0x9E3779B9)) & _MASK
        key1 = (key1 + np.uint64(0xBB67AE85)) & _MASK
    return w0, w1, w2, w3
