"""The moving average of the weights, on each rank's own fp32 pieces: 1/ranks of the memory and nothing to gather."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stdit.errors import StditError


@dataclass
class EmaConfig:
    """decay: of the average, per step; 0 keeps none. The first steps use less: (1 + step) / (warmup + step)."""

    decay: float = 0.999
    warmup: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1 or self.warmup < 1:
            raise StditError(f"ema: decay {self.decay} must be in [0, 1) and warmup {self.warmup} at least 1.")


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
