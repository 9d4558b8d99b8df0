"""Euler in the coordinates σ_d·x_0 + σ·ε of Karras et al. (2022), as Cosmos-Predict 1 and 2 are sampled."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from stdit.diffusion.paths import EdmPath, FlowPath
from stdit.diffusion.solvers.base import Solver


class EdmEuler(Solver):
    """x ← x + (σ_{i+1} − σ_i)·(x − D)/σ_i, D what the network makes of x (diffusers 0.42's EDMEulerScheduler; and
    FlowMatchEulerDiscreteScheduler as Cosmos-Predict2's pipelines call it, where D is a flow's x_0).

    sigmas: (steps,) fp64, falling. to_zero: end at σ = 0, else at the last of them, where the last step stands still,
    as in every released folder. scale: of the first sample.
    """

    def __init__(self, path: EdmPath | FlowPath, sigmas: np.ndarray, to_zero: bool, scale: float) -> None:
        self.path, self.scale = path, scale
        self.data = path.sigma_data if isinstance(path, EdmPath) else 1.0
        sigmas = sigmas.astype(np.float32)
        kept = sigmas.tolist()
        self.sigmas = [*kept, 0.0 if to_zero else kept[-1]]
        if isinstance(path, EdmPath):
            self.levels = [sigma / (sigma + 1) for sigma in kept]
            self.scales = [1 / math.hypot(sigma, self.data) for sigma in kept]
        else:  # theirs are fp32, and 1 − t is off by 2e-6 at σ = 80
            self.levels = (sigmas / (sigmas + 1)).tolist()
            self.scales = [1 - level for level in self.levels]

    def start(self, noise: Tensor) -> Tensor:
        return noise * self.scale

    def network_input(self, index: int, x: Tensor) -> Tensor:
        return x * self.scales[index]

    def step(self, index: int, output: Tensor, x: Tensor, noise: Tensor | None = None) -> Tensor:
        t = torch.tensor(self.levels[index], dtype=torch.float64)
        x0 = self.data * self.path.clean(output, self.network_input(index, x), t)
        return x + (self.sigmas[index + 1] - self.sigmas[index]) / self.sigmas[index] * (x - x0)

    def finish(self, x: Tensor) -> Tensor:
        return x / self.data
