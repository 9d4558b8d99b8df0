"""The learning rate over a run: warm-up, then constant, cosine or linear decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stdit.errors import StditError


@dataclass
class ScheduleConfig:
    """steps: of the whole run. warmup: steps of linear rise. final: where decay ends, as a share of optimizer.lr."""

    steps: int = 1000
    warmup: int = 0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0 or not 0 <= self.final <= 1:
            raise StditError(
                f"steps {self.steps} must be at least 1, warmup {self.warmup} at least 0, final {self.final} in [0, 1]."
            )

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by in step 0, 1, …; the last step's is not yet `final`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left
