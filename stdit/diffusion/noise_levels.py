"""Draws the noise levels of training, and shifts them by the number of tokens.

A level is logit-normal or uniform, then moved towards 1 by a shift. Levels are fp64 and stratified over the clips of a
global step: each position of a step of n clips gets one of n equal strata, by a permutation keyed by (seed, epoch,
step). So the levels of a step cover [0, 1] evenly in any order of the plan, and do not depend on ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from stdit.errors import StditError
from stdit.keyed import keyed_uniform
from stdit.keyed.stream import keyed_stream
from stdit.settings import Share


@dataclass(frozen=True)
class NoiseLevelConfig:
    """The distribution of noise levels in training.

    distribution: own is that of the path: logit-normal for flows and EDM (whose σ is then log-normal), uniform for
        DDPMs.
    mean: of the normal distribution below the logit-normal.
    std: of the normal distribution below the logit-normal.
    shift: moves every level towards 1. Unset: as the scheduler beside the weights does, by the clip's size if it does
        so; 1 for fresh weights.
    shift_tokens: multiplies the shift by √(tokens / shift_tokens): a clip of shift_tokens tokens has the shift as
        written, larger clips see more noise. stdit samples in the same way. diffusers' schedulers know only the shift
        as written, and must be given another one for every size. Unset: no such factor.
    range: lowest and highest level to draw, for one of two experts; unset: all.
    """

    distribution: Literal["own", "logit_normal", "uniform"] = "own"
    mean: Annotated[float, Field(ge=-100, le=100)] = 0.0
    std: Annotated[float, Field(gt=0, le=100)] = 1.0
    shift: Annotated[float, Field(gt=0, le=1000)] | None = None
    shift_tokens: PositiveInt | None = None
    range: tuple[Share, Share] | None = None

    def __post_init__(self) -> None:
        if self.range is not None and self.range[0] >= self.range[1]:
            raise StditError(f"range {list(self.range)} must be two noise levels, the lower one first.")


Levels = TypeVar("Levels", Tensor, np.ndarray)


def shift_noise_level(t: Levels, shift: float | Levels) -> Levels:
    """Moves noise levels t (…,) in [0, 1] towards 1, for clips with many tokens (Esser et al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def shift_by_tokens(tokens: int, base: int) -> float:
    """The shift √(tokens / base), which keeps the uncertainty about a constant clip equal at both token counts.

    Section 5.3.2 of Esser et al. 2024 (eq. 23 with m = tokens, n = base), for spacetime tokens. (Flux interpolates
    log(shift) linearly between two counts instead.)
    """
    return math.sqrt(tokens / base)


@lru_cache(maxsize=8)
def _strata(count: int, seed: int, epoch: int, step: int) -> tuple[int, ...]:
    return tuple(keyed_stream(seed, "strata", epoch, step).permutation(count).tolist())


def stratified_uniform(positions: Sequence[int], count: int, *, seed: int, epoch: int, step: int) -> Tensor:
    """A number in (0, 1), fp64, for each position: over all `count` of a step, one in each of as many equal strata."""
    strata = _strata(count, seed, epoch, step)
    jitter = [keyed_uniform(seed, "noise level", epoch, step, position) + 2.0**-54 for position in positions]  # never 0
    return torch.tensor([(strata[p] + j) / count for p, j in zip(positions, jitter)], dtype=torch.float64)


def noise_levels(
    positions: Sequence[int],
    count: int,
    tokens: Sequence[int],
    config: NoiseLevelConfig,
    *,
    seed: int,
    epoch: int,
    step: int,
    shifts: Sequence[float] | None = None,
) -> Tensor:
    """The noise levels, fp64 in (0, 1) and in config.range, of the clips at these positions of a step of `count` clips.

    shifts: of each clip, in place of those that config and tokens give.
    """
    u = stratified_uniform(positions, count, seed=seed, epoch=epoch, step=step)
    uniform, mean, std = config.distribution == "uniform", config.mean, config.std
    if shifts is None:
        static = 1.0 if config.shift is None else config.shift
        shifts = [static * (shift_by_tokens(n, config.shift_tokens) if config.shift_tokens else 1.0) for n in tokens]
    moves = torch.tensor(shifts, dtype=torch.float64)
    low, high = config.range or (0.0, 1.0)
    if (low, high) != (0.0, 1.0):  # draw between the quantiles of the ends
        ends = [shift_noise_level(torch.full_like(moves, t), 1 / moves).clamp(0, 1) for t in (low, high)]
        first, last = ends if uniform else [torch.special.ndtr((torch.logit(t) - mean) / std) for t in ends]
        u = first + u * (last - first)
    t = u if uniform else torch.sigmoid(mean + std * torch.special.ndtri(u))
    return shift_noise_level(t, moves).clamp(low, high)
