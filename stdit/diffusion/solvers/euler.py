"""Euler steps of rectified flows, as diffusers' FlowMatchEulerDiscreteScheduler and the pipelines around it take them.

Kept by hand: native models are sampled without diffusers, training needs the same shifts, three pipelines feed this
scheduler in ways of their own, and no library has Open-Sora's. Quirks are reproduced (diffusers 0.42,
`schedulers/scheduling_flow_match_euler_discrete.py`), since weights are published and judged with them:

- A static shift is applied twice: once to the table of 1000 levels, whose ends are then spaced evenly, and once more to
  the result. LTX-Video's pipelines pass levels of their own instead.
- Cosmos-Predict2's pipelines run flow weights in the coordinates x_0 + σ·ε, from σ = 80, where σ = t/(1 − t).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Generator, Tensor

from stdit.diffusion.noise_levels import shift_noise_level
from stdit.diffusion.paths import open_sora_shift
from stdit.diffusion.solvers.base import Config, Schedule, Solver, caller_of
from stdit.diffusion.solvers.diffusers_schedulers import import_diffusers
from stdit.errors import StditError


class Euler(Solver):
    """x ← x + (σ_{i+1} − σ_i)·v, v = ε − x_0.

    The levels are shifted, stretched to `shift_terminal`, replaced by Karras' between their ends (or sigma_min and
    sigma_max) under use_karras_sigmas, and followed by 0.

    sigmas: σ_0 … σ_steps, as fp32 holds them.
    lengths: of the steps.
    """

    sigmas: list[float]
    lengths: list[float]

    def __init__(self, config: Config, schedule: Schedule) -> None:
        if schedule.levels is not None:
            self._set(np.array(schedule.levels))
            return
        shift = float(config.get("shift", 1.0)) if schedule.shift is None else schedule.shift
        dynamic = config.get("use_dynamic_shifting")
        if dynamic and schedule.shift is None:
            if schedule.latent is None:
                raise StditError("a scheduler with use_dynamic_shifting needs the clip's latent shape.")
            shift = dynamic_shift(math.prod(schedule.latent.sizes), config)
        if dynamic or caller_of(config) == "ltx":  # as LTX-Video's pipelines pass them: 1, …, 1/steps
            levels = np.linspace(1.0, 1 / schedule.steps, schedule.steps).astype(np.float32)
        else:
            levels = _table_levels(schedule.steps, shift)
        sigmas = _stretched(shift_noise_level(levels, shift), config)
        if config.get("use_karras_sigmas"):
            low, high = config.get("sigma_min", float(sigmas[-1])), config.get("sigma_max", float(sigmas[0]))
            sigmas = karras_sigmas(len(sigmas), low, high)
        self._set(sigmas)

    def _set(self, sigmas: np.ndarray) -> None:
        self.sigmas = [*sigmas.astype(np.float32).tolist(), 0.0]
        # diffusers' timesteps are fp32(σ)·1000 in fp32; the division turns them back into noise levels.
        self.levels = [float(np.float32(sigma) * np.float32(1000)) / 1000 for sigma in self.sigmas[:-1]]
        self.lengths = [end - start for start, end in pairwise(self.sigmas)]

    def begin(self, index: int, latents: Tensor, noise: Tensor) -> Tensor:
        level = self.levels[index]
        return (1 - level) * latents + level * noise

    def step(self, index: int, output: Tensor, x: Tensor, generators: Sequence[Generator] = ()) -> Tensor:
        return x + self.lengths[index] * output


class LtxConditionEuler(Euler):
    """As LTXConditionPipeline runs it (LTX-Video 0.9.5 and later).

    The pipeline passes levels and not sigmas to its scheduler. So a static shift and shift_terminal move where steps
    end, at the next lower sigma, but not where they begin. A shift of ours moves where they begin as well.
    """

    def __init__(self, config: Config, schedule: Schedule) -> None:
        if option := next((key for key in ("use_dynamic_shifting", "use_karras_sigmas") if config.get(key)), ""):
            raise StditError(f"{option}: LTXConditionPipeline gives its scheduler levels of its own. Set it to false.")
        module = import_diffusers(
            "diffusers.pipelines.ltx.pipeline_ltx_condition", "LTXConditionPipeline's schedule", schedule.where
        )
        levels = module.linear_quadratic_schedule(schedule.steps).double().numpy()
        shift = float(config.get("shift", 1.0))
        if schedule.shift is not None:
            levels, shift = shift_noise_level(levels, schedule.shift), 1.0
        levels = levels.astype(np.float32) * np.float32(1000) / np.float32(1000)  # through timesteps and back
        self.levels = levels.tolist()
        sigmas = _stretched(shift_noise_level(levels, shift), config)
        self.sigmas = [*sigmas.astype(np.float32).tolist(), 0.0]
        ends = (max(sigma for sigma in self.sigmas if sigma < max(level - 1e-6, 1e-9)) for level in self.levels)
        self.lengths = [end - level for level, end in zip(self.levels, ends)]


class OpenSoraEuler(Euler):
    """Open-Sora 1.2's RFLOW: over 1, (S−1)/S, …, 1/S, shifted once; the network's output is x_0 − ε."""

    def __init__(self, config: Config, schedule: Schedule) -> None:
        if schedule.levels is not None:
            raise StditError(f"{schedule.where}: RFLOW has noise levels of its own; leave levels out.")
        shift = 1.0 if schedule.shift is None else schedule.shift
        if schedule.shift is None and config.get("use_timestep_transform", False):
            if schedule.shape is None:
                raise StditError("Open-Sora's noise levels need the clip's shape in pixels.")
            shift = open_sora_shift(schedule.shape)
        times = np.array([1 - i / schedule.steps for i in range(schedule.steps)], dtype=np.float32)
        self.levels = [min(float(t), 1.0) for t in shift_noise_level(times, shift)]  # rounding may pass 1
        self.sigmas = [*self.levels, 0.0]
        self.lengths = [start - end for start, end in pairwise(self.sigmas)]


class CosmosEuler(Solver):
    """Euler in the coordinates x_0 + σ·ε of Karras et al. (2022), as Cosmos-Predict2's pipelines run flow weights.

    It ends at the last σ above 0, where the last step stands still, as in released folders; or at 0 if the config's
    final_sigmas_type is "zero".
    """

    def __init__(self, config: Config, schedule: Schedule) -> None:
        config = {"sigma_min": 0.002, "sigma_max": 80.0, "final_sigmas_type": "sigma_min", **config}  # its pipelines'
        sigmas = karras_sigmas(schedule.steps, config["sigma_min"], config["sigma_max"]).astype(np.float32)
        self.start_scale = config["sigma_max"]
        self.sigmas = [*sigmas.tolist(), 0.0 if config["final_sigmas_type"] == "zero" else float(sigmas[-1])]
        self.levels = (sigmas / (sigmas + 1)).tolist()  # in fp32, as in diffusers: 1 − t is off by 2e-6 at σ = 80

    def start(self, noise: Tensor) -> Tensor:
        return noise * self.start_scale

    def begin(self, index: int, latents: Tensor, noise: Tensor) -> Tensor:
        return latents + self.sigmas[index] * noise

    def network_input(self, index: int, x: Tensor) -> Tensor:
        return x * (1 - self.levels[index])

    def step(self, index: int, output: Tensor, x: Tensor, generators: Sequence[Generator] = ()) -> Tensor:
        x0 = self.network_input(index, x) - self.levels[index] * output
        return x + (self.sigmas[index + 1] - self.sigmas[index]) / self.sigmas[index] * (x - x0)


def flow_euler(config: Config, schedule: Schedule) -> Solver:
    """The solver of a FlowMatchEulerDiscreteScheduler, as the pipeline around it runs it."""
    if schedule.levels is not None:
        return Euler(config, schedule)
    if config.get("use_karras_sigmas") and in_cosmos_coordinates(config):
        return CosmosEuler(config, schedule)
    return (LtxConditionEuler if caller_of(config) == "ltx condition" else Euler)(config, schedule)


def in_cosmos_coordinates(config: Config) -> bool:
    """Whether a flow is solved in σ = t/(1 − t). Without a caller, sigma_max tells: a flow's own levels end at 1."""
    caller = caller_of(config)
    return caller in ("cosmos2", "cosmos2.5") or (not caller and config.get("sigma_max", 0.0) > 1)


def _table_levels(steps: int, shift: float) -> np.ndarray:
    """(steps,) fp64 that diffusers' flow Euler starts from: evenly between the ends of its shifted table.

    The static shift is applied once more to the result (10 steps, shift 3: the last σ is 0.009, not 0.25).
    """
    ends = np.array([1000, 1], dtype=np.float32) / np.float32(1000)
    ends = shift_noise_level(ends, shift).astype(np.float32).astype(np.float64)
    return np.linspace(ends[0], ends[1], steps)


def _stretched(sigmas: np.ndarray, config: Config) -> np.ndarray:
    """(steps,) from 1 downwards, stretched so that the last is the config's shift_terminal, if it has one."""
    terminal = config.get("shift_terminal")
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


def dynamic_shift(positions: int, config: Config) -> float:
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
