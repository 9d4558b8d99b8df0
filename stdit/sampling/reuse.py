"""Spares runs of the network in steps where its output is predictable from those before."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

FEWEST = 10  # steps, below which every step runs: few-step weights change too much from one to the next
FIRST = 3  # steps that always run


@dataclass
class Reuse:
    """The last outputs of one clip, guided, and how fast they changed.

    How much the output has changed since the network ran last is estimated as EasyCache does (Zhou et al. 2025,
    arXiv 2507.02860): by how much the input has changed in each step, times the rate at which the output followed the
    input between the last two runs, added up. While that is below `tolerance`, as a share of the output, the network
    does not run. The output is then continued on the line through the last two, as TaylorSeer does with features (Liu
    et al. 2025, arXiv 2503.06923); EasyCache adds the input's change instead, which is further off here (docs/log.md).

    tolerance: 0: the network always runs.
    """

    tolerance: float
    _known: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)  # level, input, output; newest last
    _kind: Hashable = None
    _before: Tensor | None = None  # the input of the last step
    _change: float = 0.0

    def predict(self, step: int, steps: int, level: float, x: Tensor, kind: Hashable) -> Tensor | None:
        """The output in a step, or None if the network has to run. Call it once in each step.

        x: the network's input.
        kind: what would run; outputs of something else predict nothing.
        """
        before, self._before = self._before, x
        if kind != self._kind:
            self._known, self._kind = [], kind
        if not self.tolerance or steps < FEWEST or step < FIRST or step == steps - 1 or len(self._known) < 2:
            return None
        (early, x_early, first), (late, x_late, last) = self._known
        assert before is not None
        rate = _mean(last - first) / max(_mean(x_late - x_early), 1e-12)
        self._change += rate * _mean(x - before) / max(_mean(last), 1e-12)
        if self._change >= self.tolerance:
            return None
        return last + (level - late) / (late - early) * (last - first)

    def note(self, level: float, x: Tensor, output: Tensor) -> None:
        """Keeps what the network gave."""
        if self.tolerance:
            self._known = [*self._known, (level, x, output)][-2:]
            self._change = 0.0


def _mean(x: Tensor) -> float:
    return float(x.abs().mean())
