"""The moving average of the weights, on each rank's own fp32 pieces: 1/ranks of the memory and nothing to gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor


@dataclass
class EmaConfig:
    """The moving average of the weights, which is what a run exports.

    decay: of the average, per step; 0 keeps no average.
    warmup: the decay is at most (1 + step) / (warmup + step), so that the first steps count less.
    """

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    warmup: PositiveInt = 10


class Ema:
    """Averages of `flat_masters`, fp32 tensors that an optimizer updates in place."""

    def __init__(self, flat_masters: Sequence[Tensor], config: EmaConfig) -> None:
        self.config = config
        self.flat_masters = [flat.detach() for flat in flat_masters]
        self.averages = [flat.clone() for flat in self.flat_masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step` (the first is 1)."""
        decay = min(self.config.decay, (1 + step) / (self.config.warmup + step))
        torch._foreach_lerp_(self.averages, self.flat_masters, 1 - decay)
