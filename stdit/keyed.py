"""Keyed randomness: the same key gives the same numbers on any rank, at any time, in any order.

Noise, noise levels, tasks, captions, crops and start times of a run are each seeded by SHA-256 of (seed, purpose, …).
So a run that is resumed, or has another number of ranks, draws the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed_seed(seed: int, purpose: str, *key: int | str) -> int:
    """A 63-bit seed from SHA-256 of (seed, purpose, key…). The key includes types: 1 and "1" differ."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, purpose, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def keyed_generator(seed: int, purpose: str, *key: int | str) -> torch.Generator:
    """A CPU generator seeded with `keyed_seed`."""
    import torch

    return torch.Generator().manual_seed(keyed_seed(seed, purpose, *key))


def keyed_uniform(seed: int, purpose: str, *key: int | str) -> float:
    """A number in [0, 1) with 53 random bits, without a generator."""
    return (keyed_seed(seed, purpose, *key) >> 10) / 2**53
