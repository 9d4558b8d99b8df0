"""UniPC for rectified flows, as Wan's and Cosmos-Predict2.5's pipelines sample.

Kept by hand: native models are sampled with it, and without diffusers. As diffusers 0.42 has it
(`schedulers/scheduling_unipc_multistep.py`): it starts at 1 − 1e-6, and tells the network timesteps truncated to
integers (999, 964, …) while it integrates over the levels themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Generator, Tensor

from stdit.diffusion.noise_levels import shift_noise_level
from stdit.diffusion.solvers.base import Config, Schedule, Solver, caller_of
from stdit.diffusion.solvers.euler import karras_sigmas


class UniPC(Solver):
    """UniPC on data predictions (Zhao et al. 2023, with B(h) = e^h − 1) over diffusers' flow levels.

    With λ = log((1 − σ)/σ) and h = λ_{i+1} − λ_i, the predictor of order p extrapolates x_0 through the last p
    predictions. The corrector then redoes the step just taken with the prediction at its end, unless the config's
    disable_corrector names that step.

    sigmas: σ_0 … σ_steps.
    """

    def __init__(self, config: Config, schedule: Schedule) -> None:
        by_karras = config.get("use_karras_sigmas")
        if schedule.levels is not None:
            told = np.minimum(schedule.levels, 1 - 1e-6)  # λ is −∞ at σ = 1
            sigmas = told.astype(np.float32)
        elif by_karras:  # as Cosmos-Predict2.5's pipelines take them: t = σ/(σ + 1) of Karras' σ
            karras = karras_sigmas(schedule.steps, config["sigma_min"], config["sigma_max"])
            told = sigmas = (karras / (karras + 1)).astype(np.float32)
        else:  # as WanPipeline takes them
            shift = float(config.get("flow_shift", 1.0)) if schedule.shift is None else schedule.shift
            told = shift_noise_level(np.linspace(1, 1 / 1000, schedule.steps + 1)[:-1], shift)
            if abs(told[0] - 1) < 1e-6:
                told[0] -= 1e-6  # λ is −∞ at σ = 1
            sigmas = told.astype(np.float32)
        self.sigmas = [*sigmas.tolist(), 0.0]
        exact = by_karras and caller_of(config) == "cosmos2.5"
        self.levels = told.tolist() if exact else [int(level * 1000) / 1000 for level in told.tolist()]
        self.order = int(config.get("solver_order", 2))
        self.disable_corrector = set(config.get("disable_corrector") or ())
        self.clean: list[Tensor] = []  # the last `order` predictions of x_0, newest last
        self.before: Tensor | None = None  # the sample the last predictor step started from
        self.last_order = 0

    def begin(self, index: int, latents: Tensor, noise: Tensor) -> Tensor:
        sigma = self.sigmas[index]
        return (1 - sigma) * latents + sigma * noise

    def step(self, index: int, output: Tensor, x: Tensor, generators: Sequence[Generator] = ()) -> Tensor:
        if index == 0:
            self.clean, self.before, self.last_order = [], None, 0
        x0 = x - self.sigmas[index] * output
        if self.before is not None and index - 1 not in self.disable_corrector:
            x = self._advance(index - 1, self.before, self.last_order, x0)
        self.clean = [*self.clean, x0][-self.order :]
        self.before = x
        # The last steps are of lower order.
        self.last_order = min(self.order, len(self.levels) - index, len(self.clean))
        return self._advance(index, x, self.last_order, None)

    def _lambda(self, index: int) -> float:
        sigma = self.sigmas[index]
        return math.inf if sigma == 0 else math.log(1 - sigma) - math.log(sigma)

    def _advance(self, index: int, x: Tensor, order: int, x0_end: Tensor | None) -> Tensor:
        """From σ_index to σ_{index+1}: the corrector if x0_end, x_0 at the end, is known, else the predictor."""
        sigma, sigma_end = self.sigmas[index], self.sigmas[index + 1]
        h = self._lambda(index + 1) - self._lambda(index)
        growth = math.expm1(-h)  # e^{−h} − 1, and B(h)
        newest = self.clean[-1]
        ratios = [(self._lambda(index - i) - self._lambda(index)) / h for i in range(1, order)]
        differences = [(self.clean[-(i + 1)] - newest) / r for i, r in zip(range(1, order), ratios)]
        if x0_end is not None:
            differences.append(x0_end - newest)
            weights = [0.5] if order == 1 else _weights([*ratios, 1.0], h)
        elif order == 2:
            weights = [0.5]
        else:
            weights = _weights(ratios, h)
        x = sigma_end / sigma * x - (1 - sigma_end) * growth * newest
        for weight, difference in zip(weights, differences):
            x = x - (1 - sigma_end) * growth * weight * difference
        return x


def _weights(ratios: list[float], h: float) -> list[float]:
    """Solves Σ_m ρ_m r_m^{n−1} = n!·φ_{n+1}(−h)·(−h) / B(h) for ρ (UniPC's eq. 5 for data prediction)."""
    if not ratios:
        return []
    growth, factorial, right = math.expm1(-h), 1, []
    phi = growth / -h - 1
    for n in range(1, len(ratios) + 1):
        right.append(phi * factorial / growth)
        factorial *= n + 1
        phi = phi / -h - 1 / factorial
    matrix = np.array([[r**power for r in ratios] for power in range(len(ratios))])
    return np.linalg.solve(matrix, np.array(right)).tolist()
