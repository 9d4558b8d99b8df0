"""Solvers of variance-preserving diffusions (DDPM weights), as diffusers 0.42 has them.

`schedulers/scheduling_dpmsolver_multistep.py`, `scheduling_ddim.py` and `scheduling_euler_ancestral_discrete.py`. A
sample is √ᾱ·x_0 + √(1−ᾱ)·ε for the first two, x_0 + σ·ε with σ² = (1−ᾱ)/ᾱ for the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stdit.diffusion.paths import INDICES, DdpmPath
from stdit.diffusion.solvers.base import Solver
from stdit.errors import StditError


def table(path: DdpmPath) -> np.ndarray:
    """σ = √((1−ᾱ)/ᾱ) of every index, (1000,) fp32."""
    alphas = path.alphas.float()
    return (((1 - alphas) / alphas) ** 0.5).numpy()


def spaced(steps: int, spacing: str, offset: int = 0, one_more: bool = False) -> np.ndarray:
    """The indices of `steps` steps, falling, fp64 and not rounded (Lin et al. 2023, table 2).

    one_more: as if of one step more, the last one left out.
    """
    count = steps + one_more
    if spacing == "linspace":
        return np.linspace(0, INDICES - 1, count)[::-1][:steps]
    if spacing == "leading":
        found = (np.arange(count) * (INDICES // count))[::-1][:steps].astype(np.float64) + offset
        if found.max() > INDICES - 1:
            raise StditError(f"{steps} steps with steps_offset {offset} begin beyond the last of {INDICES} levels.")
        return found
    if spacing == "trailing":
        return np.arange(INDICES, 0, -INDICES / steps).round()[:steps] - 1
    raise StditError(f"timestep_spacing {spacing!r} is not supported: linspace, leading or trailing.")


class DpmSolver(Solver):
    """DPM-Solver++ on data predictions, order 1 or 2 with the midpoint rule (Lu et al. 2022, algorithm 2, "2M").

    indices: of the steps. lower_order_final: the last of fewer than 15 steps is of order 1. last: σ at the end, 0 or
    that of index 0; at 0 the last step is of order 1 whatever is asked.
    """

    path: DdpmPath

    def __init__(
        self,
        path: DdpmPath,
        indices: Sequence[int],
        order: int = 2,
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        last: float = 0.0,
    ) -> None:
        self.path, self.order = path, order
        self.levels = [index / INDICES for index in indices]
        self.sigmas = [*(float(sigma) for sigma in table(path)[list(indices)]), last]
        self.plain_end = last == 0 or euler_at_final or (lower_order_final and len(self.levels) < 15)
        self.before: Tensor | None = None  # the last prediction of x_0

    def step(self, index: int, output: Tensor, x: Tensor, noise: Tensor | None = None) -> Tensor:
        x0 = self.path.clean(output, x, torch.tensor(self.levels[index], dtype=torch.float64))
        (_, sigma, now), (alpha_end, sigma_end, end) = self._at(index), self._at(index + 1)
        growth = math.expm1(now - end)
        x = sigma_end / sigma * x - alpha_end * growth * x0
        single = self.order == 1 or index == 0 or (index == len(self.levels) - 1 and self.plain_end)
        if not single:
            assert self.before is not None
            ratio = (now - self._at(index - 1)[2]) / (end - now)
            x = x - 0.5 * alpha_end * growth / ratio * (x0 - self.before)
        self.before = x0
        return x

    def _at(self, index: int) -> tuple[float, float, float]:
        """α, σ and λ = log(α/σ) of the variance-preserving sample."""
        sigma = self.sigmas[index]
        alpha = 1 / math.sqrt(sigma**2 + 1)
        return alpha, sigma * alpha, math.inf if sigma == 0 else -math.log(sigma)


class Ddim(Solver):
    """DDIM with η = 0 (Song et al. 2020, eq. 12), a step being 1000 // steps indices.

    end: ᾱ of what lies before index 0: 1, or that of index 0 itself.
    """

    path: DdpmPath

    def __init__(self, path: DdpmPath, indices: Sequence[int], end: float = 1.0) -> None:
        self.path = path
        self.levels = [index / INDICES for index in indices]
        stride, alphas = INDICES // len(self.levels), path.alphas.tolist()
        self.steps = [(alphas[i], alphas[i - stride] if i >= stride else end) for i in indices]
        self.sigmas = [math.sqrt((1 - a) / a) for a in (*(alphas[i] for i in indices), end)]

    def step(self, index: int, output: Tensor, x: Tensor, noise: Tensor | None = None) -> Tensor:
        alpha, alpha_end = self.steps[index]
        x0 = self.path.clean(output, x, torch.tensor(self.levels[index], dtype=torch.float64))
        epsilon = output
        if self.path.prediction == "v_prediction":
            epsilon = math.sqrt(alpha) * output + math.sqrt(1 - alpha) * x
        return math.sqrt(alpha_end) * x0 + math.sqrt(1 - alpha_end) * epsilon


class EulerAncestral(Solver):
    """Euler steps to less noise than wanted, then fresh noise (k-diffusion's `sample_euler_ancestral`).

    timesteps: fp32, between indices where the spacing says so; σ is interpolated. widest: the first sample's deviation
    counts x_0's own, √(σ² + 1).
    """

    path: DdpmPath
    draws = True

    def __init__(self, path: DdpmPath, timesteps: np.ndarray, widest: bool) -> None:
        self.path = path
        self.levels = [float(step) / INDICES for step in timesteps.astype(np.float32)]
        sigmas = np.interp(timesteps.astype(np.float32), np.arange(INDICES), table(path)).astype(np.float32)
        self.sigmas = [*(float(sigma) for sigma in sigmas), 0.0]
        self.widest = widest

    def start(self, noise: Tensor) -> Tensor:
        largest = max(self.sigmas)
        return noise * (math.sqrt(largest**2 + 1) if self.widest else largest)

    def network_input(self, index: int, x: Tensor) -> Tensor:
        return x / math.sqrt(self.sigmas[index] ** 2 + 1)

    def step(self, index: int, output: Tensor, x: Tensor, noise: Tensor | None = None) -> Tensor:
        assert noise is not None
        sigma, end = self.sigmas[index], self.sigmas[index + 1]
        up = math.sqrt(end**2 * (sigma**2 - end**2) / sigma**2)
        down = math.sqrt(max(end**2 - up**2, 0.0))
        derivative = output
        if self.path.prediction == "v_prediction":
            derivative = output / math.sqrt(sigma**2 + 1) + x * (sigma / (sigma**2 + 1))
        return x + derivative * (down - sigma) + noise * up
