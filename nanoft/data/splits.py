"""Which records are held out for validation.

A split depends on a hash of the seed and of what a record opens with, never on its place in the file: the same seed
holds out the same records in any order, and a larger share holds out more of them, not others.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from nanoft.batches import Array


def split_key(value: Any, seed: int) -> int:
    """64 bits: the place of a prompt, or of a group, in the order in which records are held out."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{value}".encode()).digest()[:8], "big")


def hold_out(keys: Array, strata: Array, size: int) -> Array:
    """(n,) bool: about `size` records, those with the smallest keys of their stratum.

    Records with equal keys stay together; a group larger than what is still wanted is passed over.

    Args:
        keys: (n,) uint64, of the prompt or the group.
        strata: (n,) int: each stratum gives its share; a key belongs to the smallest stratum that it occurs in.
    """
    unique, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    home = np.full(len(unique), np.iinfo(np.int64).max)
    np.minimum.at(home, inverse, strata)
    chosen = np.zeros(len(unique), dtype=np.bool_)
    members = {stratum: np.flatnonzero(home == stratum) for stratum in np.unique(home).tolist()}  # sorted by key
    for stratum, left in _allot(size, {s: int(counts[m].sum()) for s, m in members.items()}).items():
        for group in members[stratum].tolist():
            if left and counts[group] <= left:
                chosen[group] = True
                left -= counts[group]
    return chosen[inverse]


def hold_out_newest(times: Array, keys: Array, size: int) -> Array:
    """(n,) bool: the newest records; of those with equal times, the ones with the smaller keys."""
    held = np.zeros(len(times), dtype=np.bool_)
    held[np.lexsort((keys, -times))[:size]] = True
    return held


def _allot(size: int, available: dict[int, int]) -> dict[int, int]:
    """The whole numbers that add up to `size` and are nearest to each part's share (largest remainder)."""
    total = sum(available.values())
    exact = {part: size * count / total for part, count in available.items()}
    shares = {part: int(share) for part, share in exact.items()}
    by_remainder = sorted(exact, key=lambda part: (shares[part] - exact[part], part))
    for part in by_remainder[: size - sum(shares.values())]:
        shares[part] += 1
    return shares
