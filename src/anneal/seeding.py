"""Keyed randomness: one generator a technique, from (seed, technique, epoch, index or microbatch), never a shared stream."""

from __future__ import annotations

import hashlib

import numpy as np


def seed_for(seed: int, technique: str, *key: int | str) -> int:
    """Return a seed in [0, 2**63) that belongs to one technique at one key, independent of all others.

    >>> seed_for(0, "order", 3) == seed_for(0, "order", 3) != seed_for(0, "order", 4)
    True
    """
    text = "\0".join(map(str, (seed, technique, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, technique: str, *key: int | str) -> np.random.Generator:
    """Return a numpy generator seeded by `seed_for`."""
    return np.random.Generator(np.random.PCG64(seed_for(seed, technique, *key)))
