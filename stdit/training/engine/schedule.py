"""The learning rate over a run: warm-up, then constant, cosine or linear decay."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from stdit.errors import StditError


@dataclass
class ScheduleConfig:
    """steps: of the whole run. warmup: steps of linear rise. final: where decay ends, as a share of optimizer.lr.

    A resumed run may have other steps. A decay then ends at the new last step: its whole curve moves, and the learning
    rate jumps (up, if steps were raised). The run says from what to what. Without decay nothing moves.
    """

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

    def jump(self, steps_before: int, step: int, lr: float) -> str | None:
        """What a change of `steps` on resume does to the learning rate of `step`; None where it does nothing."""
        before, now = (lr * one.factor(step) for one in (replace(self, steps=steps_before), self))
        if before == now:
            return None
        return (
            f"schedule.steps was {steps_before} and is {self.steps}: the {self.decay} decay ends there now, so the "
            f"learning rate of step {step} is {now:.3g} where it was {before:.3g}. For a rate that does not jump, "
            "train on from the exported model: model.init (vae.path) and another run=PATH."
        )
