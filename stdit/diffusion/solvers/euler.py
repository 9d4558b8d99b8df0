"""Euler steps of rectified flows, as diffusers' FlowMatchEulerDiscreteScheduler and the pipelines around it take them.

Kept by hand: native models are sampled without diffusers, training needs the same shifts, and three pipelines feed
this scheduler in ways of their own. Quirks are reproduced (diffusers 0.42,
`schedulers/scheduling_flow_match_euler_discrete.py`), since weights are published and judged with them:

- A static shift is applied twice: once to the table of 1000 levels, whose ends are then spaced evenly, and once more to
  the result. LTX-Video's pipelines pass levels of their own instead.
- Cosmos-Predict2's pipelines run flow weights in the coordinates x_0 + σ·ε, from σ = 80, where σ = t/(1 − t).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Generator, Tensor

from stdit.diffusion.noise_levels import shift_noise_level
from stdit.diffusion.solvers.base import Solver
from stdit.errors import StditError


class Euler(Solver):
    """x ← x + (σ_{i+1} − σ_i)·v, v = ε − x_0. sigmas: σ_0 … σ_steps, as fp32 holds them."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = list(sigmas)
        # diffusers' timesteps are fp32(σ)·1000 in fp32; the division turns them back into noise levels.
        self.levels = [float(np.float32(sigma) * np.float32(1000)) / 1000 for sigma in self.sigmas[:-1]]

    def step(self, index: int, output: Tensor, x: Tensor, generators: Sequence[Generator] = ()) -> Tensor:
        return x + (self.sigmas[index + 1] - self.sigmas[index]) * output


class LtxConditionEuler(Solver):
    """Euler as LTXConditionPipeline runs it (LTX-Video 0.9.5 and later).

    The pipeline passes levels and not sigmas to its scheduler. So a static shift and shift_terminal move where steps
    end, at the next lower sigma, but not where they begin.

    levels: (steps,) where steps begin.
    shift, terminal: the scheduler's shift and shift_terminal.
    """

    def __init__(self, levels: np.ndarray, shift: float, terminal: float | None = None) -> None:
        levels = levels.astype(np.float32) * np.float32(1000) / np.float32(1000)  # through timesteps and back
        self.levels = levels.tolist()
        sigmas = stretched(shift_noise_level(levels, shift), terminal)
        self.sigmas = [*sigmas.astype(np.float32).tolist(), 0.0]
        self.ends = [max(sigma for sigma in self.sigmas if sigma < max(level - 1e-6, 1e-9)) for level in self.levels]

    def step(self, index: int, output: Tensor, x: Tensor, generators: Sequence[Generator] = ()) -> Tensor:
        return x + (self.ends[index] - self.levels[index]) * output


class CosmosEuler(Solver):
    """Euler in the coordinates x_0 + σ·ε of Karras et al. (2022), as Cosmos-Predict2's pipelines run flow weights.

    sigmas: (steps,) falling.
    to_zero: end at σ = 0; otherwise at the last of `sigmas`, where the last step stands still, as in released folders.
    start_scale: deviation of the first sample.
    """

    def __init__(self, sigmas: np.ndarray, to_zero: bool, start_scale: float) -> None:
        sigmas = sigmas.astype(np.float32)
        self.start_scale = start_scale
        self.sigmas = [*sigmas.tolist(), 0.0 if to_zero else float(sigmas[-1])]
        self.levels = (sigmas / (sigmas + 1)).tolist()  # in fp32, as in diffusers: 1 − t is off by 2e-6 at σ = 80

    def start(self, noise: Tensor) -> Tensor:
        return noise * self.start_scale

    def network_input(self, index: int, x: Tensor) -> Tensor:
        return x * (1 - self.levels[index])

    def step(self, index: int, output: Tensor, x: Tensor, generators: Sequence[Generator] = ()) -> Tensor:
        x0 = self.network_input(index, x) - self.levels[index] * output
        return x + (self.sigmas[index + 1] - self.sigmas[index]) / self.sigmas[index] * (x - x0)


def table_levels(steps: int, shift: float) -> np.ndarray:
    """(steps,) fp64 that diffusers' flow Euler starts from: evenly between the ends of its shifted table.

    shift: static. It is applied once more to the result (10 steps, shift 3: the last σ is 0.009 where the formula
    gives 0.25).
    """
    ends = np.array([1000, 1], dtype=np.float32) / np.float32(1000)
    ends = shift_noise_level(ends, shift).astype(np.float32).astype(np.float64)
    return np.linspace(ends[0], ends[1], steps)


def even_levels(steps: int) -> np.ndarray:
    """(steps,) fp32 as LTX-Video's pipelines pass them to their scheduler: 1, …, 1/steps evenly."""
    return np.linspace(1.0, 1 / steps, steps).astype(np.float32)


def euler_sigmas(levels: np.ndarray, shift: float, config: Mapping[str, Any]) -> list[float]:
    """σ_0 … σ_steps of diffusers' flow Euler, as fp32 holds them.

    The levels are shifted, stretched to `shift_terminal`, replaced by Karras' between their ends (or sigma_min and
    sigma_max) under use_karras_sigmas, and followed by 0.
    """
    sigmas = stretched(shift_noise_level(levels, shift), config.get("shift_terminal"))
    if config.get("use_karras_sigmas"):
        low, high = config.get("sigma_min", float(sigmas[-1])), config.get("sigma_max", float(sigmas[0]))
        sigmas = karras_sigmas(len(sigmas), low, high)
    return [*sigmas.astype(np.float32).tolist(), 0.0]


def stretched(sigmas: np.ndarray, terminal: float | None) -> np.ndarray:
    """(steps,) from 1 downwards, stretched so that the last is `terminal`; unchanged without one."""
    if not terminal:
        return sigmas
    if len(sigmas) == 1:
        raise StditError(f"one step has no last level to bring to shift_terminal {terminal}; take two or more.")
    left = 1 - sigmas
    return 1 - left / (left[-1] / (1 - terminal))


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """(steps,) fp64 from sigma_max to sigma_min, even in σ^(1/ρ) (Karras et al. 2022, eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** rho


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
