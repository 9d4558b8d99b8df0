"""Solvers of rectified flows, along the velocity that the network predicts.

diffusers' schedulers are reproduced quirks included, since weights are published and judged with them (diffusers 0.42,
`schedulers/scheduling_flow_match_euler_discrete.py` and `scheduling_unipc_multistep.py`):

- FlowMatchEulerDiscreteScheduler applies a static shift twice: once to its table of 1000 levels, whose ends it then
  spaces evenly, and once more to the result. LTX-Video's pipelines give it levels of their own instead.
- UniPCMultistepScheduler starts at 1 − 1e-6, and gives the network timesteps truncated to integers (999, 964, …) while
  it integrates over the levels themselves.
- Cosmos-Predict2's pipelines run flow weights in the coordinates x_0 + σ·ε, from σ = 80, where σ = t/(1 − t).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from stdit.diffusion.paths import FlowPath
from stdit.diffusion.solvers.base import Solver
from stdit.diffusion.timesteps import shift_noise_level
from stdit.errors import StditError


class Euler(Solver):
    """x ← x + (σ_{i+1} − σ_i)·v, v = ε − x_0. sigmas: σ_0 … σ_steps, as fp32 holds them."""

    path = FlowPath()

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = list(sigmas)
        # Their timesteps are fp32(σ)·1000 in fp32; the division gives them back as noise levels.
        self.levels = [float(np.float32(sigma) * np.float32(1000)) / 1000 for sigma in self.sigmas[:-1]]

    def step(self, index: int, output: Tensor, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return x + (self.sigmas[index + 1] - self.sigmas[index]) * output


def table_levels(steps: int, shift: float) -> np.ndarray:
    """(steps,) fp64 that diffusers' flow Euler starts from: evenly between the ends of its shifted table.

    shift: static. It is applied once more to the result (10 steps, shift 3: the last σ is 0.009 where the formula
    gives 0.25).
    """
    ends = np.array([1000, 1], dtype=np.float32) / np.float32(1000)
    ends = shift_noise_level(ends, shift).astype(np.float32).astype(np.float64)
    return np.linspace(ends[0], ends[1], steps)


def even_levels(steps: int) -> np.ndarray:
    """(steps,) fp32 as LTX-Video's pipelines give them to their scheduler: 1, …, 1/steps evenly."""
    return np.linspace(1.0, 1 / steps, steps).astype(np.float32)


def euler_sigmas(levels: np.ndarray, shift: float, config: Mapping[str, Any]) -> list[float]:
    """σ_0 … σ_steps of diffusers' flow Euler, as fp32 holds them: the levels shifted, stretched to `shift_terminal`,
    replaced by Karras' between their ends or between sigma_min and sigma_max, then 0."""
    sigmas = stretched(shift_noise_level(levels, shift), config.get("shift_terminal"))
    if config.get("use_karras_sigmas"):
        low, high = config.get("sigma_min", float(sigmas[-1])), config.get("sigma_max", float(sigmas[0]))
        sigmas = karras_sigmas(len(sigmas), low, high)
    return [*(float(sigma) for sigma in sigmas.astype(np.float32)), 0.0]


def stretched(sigmas: np.ndarray, terminal: float | None) -> np.ndarray:
    """(steps,) from 1 downwards, stretched so that the last is `terminal`; as they are without one."""
    if not terminal:
        return sigmas
    if len(sigmas) == 1:
        raise StditError(f"one step has no last level to bring to shift_terminal {terminal}; take two or more.")
    left = 1 - sigmas
    return 1 - left / (left[-1] / (1 - terminal))


class LtxCondition(Solver):
    """LTX-Video 0.9.5 and later, as diffusers' LTXConditionPipeline has it: Euler over a schedule that is first linear
    and then quadratic.

    The pipeline gives its scheduler these levels and not their sigmas: a static shift and shift_terminal move where
    steps end, which is at the next lower sigma, and not where they begin.
    """

    path = FlowPath()

    def __init__(self, levels: np.ndarray, shift: float, terminal: float | None = None) -> None:
        thousandths = levels.astype(np.float32) * np.float32(1000)
        self.levels = [float(level) for level in thousandths / np.float32(1000)]
        sigmas = stretched(shift_noise_level(thousandths / np.float32(1000), shift), terminal)
        self.sigmas = [*(float(sigma) for sigma in sigmas.astype(np.float32)), 0.0]
        self.ends = [max(sigma for sigma in self.sigmas if sigma < max(level - 1e-6, 1e-9)) for level in self.levels]

    def step(self, index: int, output: Tensor, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return x + (self.ends[index] - self.levels[index]) * output


def linear_quadratic_levels(steps: int, threshold: float = 0.025) -> np.ndarray:
    """(steps,) from 1 downwards: half of the steps cover `threshold` evenly, the others the rest, ever faster, with
    one slope where they meet (Movie Gen, Polyak et al. 2024, section 3.4.2, as LTX-Video has it)."""
    if steps < 2:
        return np.ones(1)
    even = steps // 2
    rest = steps - even
    slope = threshold / even
    curve = (1 - threshold - slope * rest) / rest**2
    past = np.maximum(np.arange(steps) - even, 0.0)
    return 1 - (slope * np.arange(steps) + curve * past**2)


def dynamic_shift(positions: int, config: Mapping[str, Any]) -> float:
    """The shift of a clip of T'·H'·W' latent positions under `use_dynamic_shifting`.

    Between base_image_seq_len and max_image_seq_len, and beyond, log(shift) goes linearly from base_shift to max_shift
    (diffusers' `calculate_shift`); time_shift_type "linear" takes the result as the shift itself.
    """
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    if many == few:
        raise StditError(f"use_dynamic_shifting: base_image_seq_len and max_image_seq_len are both {few}.")
    slope = (high - low) / (many - few)
    mu = positions * slope + (low - slope * few)
    return float(mu) if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)


class OpenSora(Solver):
    """Open-Sora 1.2's RFLOW: Euler over 1, (S−1)/S, …, 1/S, shifted once; the network puts out x_0 − ε."""

    path = FlowPath(reverse=True, by_shape=True)

    def __init__(self, steps: int, shift: float) -> None:
        times = np.array([1 - i / steps for i in range(steps)], dtype=np.float32)
        self.levels = [min(float(t), 1.0) for t in shift_noise_level(times, shift)]  # rounding may pass 1
        self.sigmas = [*self.levels, 0.0]

    def step(self, index: int, output: Tensor, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return x + (self.sigmas[index] - self.sigmas[index + 1]) * output


class UniPC(Solver):
    """UniPC on data predictions (Zhao et al. 2023, with B(h) = e^h − 1) over diffusers' flow levels.

    With λ = log((1 − σ)/σ) and h = λ_{i+1} − λ_i, the predictor of order p extrapolates x_0 through the last p
    predictions; the corrector then redoes the step just taken with the prediction at its end. It keeps state.
    """

    path = FlowPath()

    def __init__(
        self, levels: Sequence[float], sigmas: Sequence[float], order: int = 2, disable_corrector: Iterable[int] = ()
    ) -> None:
        self.levels, self.sigmas = list(levels), list(sigmas)
        self.order, self.disable_corrector = order, set(disable_corrector)
        self.clean: list[Tensor] = []  # the last `order` predictions of x_0, newest last
        self.before: Tensor | None = None  # the sample the last predictor step started from
        self.last_order = 0

    def step(self, index: int, output: Tensor, x: Tensor, noise: Tensor | None = None) -> Tensor:
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
        """From σ_index to σ_{index+1}: the predictor, or the corrector where x_0 at the end is known."""
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


def unipc_levels(steps: int, shift: float) -> tuple[list[float], list[float]]:
    """(levels, σ_0 … σ_steps) of diffusers' UniPC for flows, as WanPipeline takes them."""
    sigmas = shift_noise_level(np.linspace(1, 1 / 1000, steps + 1)[:-1], shift)
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6  # λ is −∞ at σ = 1
    levels = [int(sigma * 1000) / 1000 for sigma in sigmas]
    return levels, [*(float(sigma) for sigma in sigmas.astype(np.float32)), 0.0]


def unipc_karras_levels(steps: int, sigma_min: float, sigma_max: float) -> tuple[list[float], list[float]]:
    """The same as Cosmos-Predict2.5's pipelines take them: t = σ/(σ + 1) of Karras' σ, told to the network as it is."""
    sigmas = karras_sigmas(steps, sigma_min, sigma_max)
    levels = [float(level) for level in (sigmas / (sigmas + 1)).astype(np.float32)]
    return levels, [*levels, 0.0]


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """(steps,) fp64 from sigma_max to sigma_min, even in σ^(1/ρ) (Karras et al. 2022, eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** rho
