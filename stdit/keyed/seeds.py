"""Seeds and single numbers from SHA-256 of a key. Imports neither torch nor numpy before they are used."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed_bits(seed: int, purpose: str, *key: int | str) -> int:
    """The 256 bits of SHA-256 of (seed, purpose, key…). The key includes types: 1 and "1" differ."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, purpose, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "little")


def keyed_seed(seed: int, purpose: str, *key: int | str) -> int:
    """63 bits of `keyed_bits`, for generators that use all bits of their seed, such as numpy's."""
    return keyed_bits(seed, purpose, *key) % 2**64 >> 1


def keyed_uniform(seed: int, purpose: str, *key: int | str) -> float:
    """A number in [0, 1) with 53 random bits, without a generator."""
    return (keyed_seed(seed, purpose, *key) >> 10) / 2**53


def keyed_generator(seed: int, purpose: str, *key: int | str) -> torch.Generator:
    """torch's CPU generator with a keyed seed, for sampling and for autoencoders, which take such generators.

    It uses 32 bits of a seed, so one pair of keys in 2³² draws the same numbers. `keyed_stream` has all 128.
    """
    import torch

    return torch.Generator().manual_seed(keyed_seed(seed, purpose, *key) % 2**32)


def random_seed() -> int:
    """A 63-bit seed from torch's global generator, which `torch.manual_seed` seeds."""
    import torch

    return int(torch.randint(2**63 - 1, (), device="cpu"))
