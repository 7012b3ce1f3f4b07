"""Chance that depends on names alone: numbers drawn for a document by hashing its id with a seed.

A resampling weight or a place in a sample must not depend on the order in which documents arrive, on the process that sees them, or on a
restart. So no generator runs through the documents: each (seed, name) is hashed by BLAKE2b, and the hash is the random number, or the key
of a counter-based generator (Philox) where many are needed. Only raw bits are taken from that generator, since NumPy promises those, and
not its distributions, to stay the same between versions. Where the names are numbers, an array of them is hashed at once by splitmix64.
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int, UInt64
from scipy.stats import poisson

# P(w <= 20) differs from 1 by 2e-20, less than half a unit in the last place of float64
_POISSON_CDF = poisson.cdf(np.arange(21), 1.0)


def stable_hash(seed: int, name: str) -> int:
    """Return a 63-bit number that depends on the seed and the name only.

    63 bits fit a signed integer of any table or tensor file; among a million names two share a number with probability 5e-8.
    """
    return int.from_bytes(_digest(seed, name)[:8], "little") >> 1


def poisson_weights(seed: int, name: str, replicates: int) -> Int[np.ndarray, " replicates"]:
    """Draw one document's bootstrap weights, Poisson with mean 1, one per replicate, from the resampling's seed and the document's id."""
    key = np.frombuffer(_digest(seed, name), dtype="<u8")
    bits = np.random.Philox(key=key).random_raw(replicates)
    uniform = (np.asarray(bits) >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(_POISSON_CDF, uniform, side="right").astype(np.int64)


def drawn(seed: int, *parts: Int[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """Return a hash of numbers, 64 bits each: splitmix64 (Steele et al. 2014) of one after another, for many at once.

    Args:
        seed: Where the hash begins.
        parts: Arrays that fit each other, such as the number of a text and a position in it.
    """
    state = np.full(np.broadcast(*parts).shape, seed, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = (state ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state ^= state >> np.uint64(31)
    return state


def _digest(seed: int, name: str) -> bytes:
    # the seed is closed off by a NUL so that (1, "1x") and (11, "x") differ
    return hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
