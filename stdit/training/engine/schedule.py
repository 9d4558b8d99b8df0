"""The learning rate over a run: warm-up, then constant, cosine or linear decay."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from stdit.settings import Share


@dataclass
class ScheduleConfig:
    """The length of a run and its learning rate.

    A resumed run may have other steps. A decay then ends at the new last step: its whole curve moves, and the learning
    rate jumps (up, if steps were raised). The run says from what to what. Without decay nothing moves.

    steps: optimizer steps of the whole run.
    warmup: steps in which the learning rate rises linearly.
    decay: the curve after the warm-up.
    final: where the decay ends, as a share of optimizer.lr.
    """

    steps: PositiveInt = 1000
    warmup: NonNegativeInt = 0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final: Share = 0.0

    def factor(self, step: int) -> float:
        """The factor on the learning rate in step 0, 1, …; in the last step it is not quite `final` yet."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left

    def jump(self, steps_before: int, step: int, lr: float) -> str | None:
        """Says how a change of `steps` on resume moves the learning rate of `step`; None if it does not."""
        before, now = (lr * one.factor(step) for one in (replace(self, steps=steps_before), self))
        if before == now:
            return None
        return (
            f"schedule.steps was {steps_before} and is {self.steps}: the {self.decay} decay ends there now, so the "
            f"learning rate of step {step} is {now:.3g} where it was {before:.3g}. For a rate that does not jump, "
            "train on from the exported model: model.init (vae.path) and another run=PATH."
        )
