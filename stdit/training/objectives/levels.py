"""Parts of the range of noise levels, for losses that are told by noise level."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stdit.diffusion.noise_levels import NoiseLevelConfig

PARTS = 4  # equal ones


def level_edges(levels: NoiseLevelConfig) -> list[float]:
    """Where the parts of the trained noise levels begin, and where the last one ends."""
    low, high = levels.range or (0.0, 1.0)
    return [low + (high - low) * part / PARTS for part in range(PARTS + 1)]


def level_names(levels: NoiseLevelConfig) -> list[str]:
    """The parts' names, such as "0.25-0.5"."""
    return [f"{a:.4g}-{b:.4g}" for a, b in pairwise(level_edges(levels))]


def sums_by_level(values: Tensor, levels: Tensor, edges: Sequence[float]) -> Tensor:
    """Sums (V, PARTS) of values (V, N) over the tokens whose noise level, of levels (N,), lies in each part."""
    part = sum(((levels >= edge).long() for edge in edges[1:-1]), torch.zeros_like(levels, dtype=torch.long))  # (N,)
    return torch.stack([torch.where(part == number, values, 0.0).sum(1) for number in range(PARTS)], 1)
