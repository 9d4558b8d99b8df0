"""Limits of the gradient's norm: a fixed one, and one that follows the norms of the last steps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field, PositiveFloat


@dataclass
class AdaptiveClipConfig:
    """Clips gradients whose norm is far above what it was lately: to its mean + sigma standard deviations.

    Mean and variance are exponential averages over steps, in which a clipped norm counts as clipped (Kumar et al. 2025,
    ZClip, arXiv 2504.02507, with a limit as in its "clip to max"). Three deviations are the rule of Open-Sora Plan
    (Lin et al. 2024, arXiv 2412.00131).

    sigma: standard deviations above the mean.
    decay: of the averages, per step.
    warmup: steps at the start that are only observed.
    """

    sigma: PositiveFloat = 3.0
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.97
    warmup: Annotated[int, Field(ge=2)] = 25


@dataclass
class NormLimit:
    """The largest norm that the next step's gradient may have.

    fixed: a limit that always holds; 0: none.
    steps, mean, variance: of the norms so far; what a checkpoint keeps.
    """

    fixed: float
    adaptive: AdaptiveClipConfig | None = None
    steps: int = 0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def value(self) -> float:
        """The limit; 0: none."""
        limits = [self.fixed] if self.fixed > 0 else []
        if self.adaptive is not None and self.steps >= self.adaptive.warmup:
            limits.append(self.mean + self.adaptive.sigma * math.sqrt(self.variance))
        return min(limits, default=0.0)

    def note(self, norm: float) -> None:
        """Counts a step's norm before clipping; one that is not finite updated nothing, and does not count."""
        if self.adaptive is None or not math.isfinite(norm):
            return
        norm = min(norm, self.value or norm)
        self.steps += 1
        new = max(1 / self.steps, 1 - self.adaptive.decay)  # of the first steps the plain mean and variance
        before, self.mean = self.mean, self.mean + new * (norm - self.mean)
        self.variance = (1 - new) * self.variance + new * (norm - before) * (norm - self.mean)

    @property
    def state(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name in ("steps", "mean", "variance")}

    def load(self, state: dict[str, Any]) -> None:
        self.steps, self.mean, self.variance = state["steps"], state["mean"], state["variance"]
