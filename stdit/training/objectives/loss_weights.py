"""How much clips and noise levels count in the loss. A new weighting of noise levels is a function in LEVEL_WEIGHTS."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stdit.data.load.loader import Example
from stdit.diffusion.paths import Path


def clip_weight(example: Example, tokens: int, power: float) -> float:
    """w_c: the weight of the clip's source × tokens^power; 0 for a clip that could not be read.

    tokens: those that count in the loss. The step's loss is divided by the sum of these weights.
    """
    return example.weight * tokens**power


def uniform(t: Tensor, path: Path) -> Tensor:
    """Every noise level counts alike."""
    return torch.ones_like(t)


def cosmap(t: Tensor, path: Path) -> Tensor:
    """The density of CosMap (Esser et al. 2024, section 3.1): 4/π for t = ½, falling to 2/π at both ends."""
    return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


# By name, for `objective.flow.level_weight`: from noise levels t in [0, 1] of a path (stdit/diffusion/paths.py) to the
# factors of a clip's error, of equal shape. They are not part of the sum that the loss is divided by.
LEVEL_WEIGHTS: dict[str, Callable[[Tensor, Path], Tensor]] = {"uniform": uniform, "cosmap": cosmap}
