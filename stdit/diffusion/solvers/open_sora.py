"""Open-Sora 1.2's sampler, RFLOW. Kept by hand: no library has it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Generator, Tensor

from stdit.diffusion.noise_levels import shift_noise_level
from stdit.diffusion.solvers.base import Solver


class OpenSora(Solver):
    """Euler over 1, (S−1)/S, …, 1/S, shifted once; the network puts out x_0 − ε."""

    def __init__(self, steps: int, shift: float) -> None:
        times = np.array([1 - i / steps for i in range(steps)], dtype=np.float32)
        self.levels = [min(float(t), 1.0) for t in shift_noise_level(times, shift)]  # rounding may pass 1
        self.lengths = [start - end for start, end in pairwise([*self.levels, 0.0])]

    def step(self, index: int, output: Tensor, x: Tensor, generators: Sequence[Generator] = ()) -> Tensor:
        return x + self.lengths[index] * output
