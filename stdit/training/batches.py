"""The clips of every step, read ahead: plan → this rank's share → examples, across the ends of epochs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from stdit.data.load.loader import Example, Loader
from stdit.data.plan.planner import Plan
from stdit.data.plan.split import PlanItem, balance, split


@dataclass(frozen=True)
class MicroStep:
    """The clips of one forward and backward pass on one rank; there may be none."""

    items: list[PlanItem]
    examples: list[Example]


@dataclass(frozen=True)
class StepClips:
    """One rank's share of a global step."""

    epoch: int
    index: int  # in the epoch
    num_clips: int  # on all ranks
    micro_steps: list[MicroStep]
    balance: float = 1.0  # of the work that the plan gives the ranks: mean work / Σ of each micro-step's largest

    @property
    def examples(self) -> list[Example]:
        return [example for micro in self.micro_steps for example in micro.examples]


@dataclass(frozen=True)
class _PendingStep:
    epoch: int
    index: int
    num_clips: int
    packs: list[list[PlanItem]]
    balance: float


class StepLoader:
    """Endless iterator over the steps from `first_step` (counted over epochs) on.

    plan_of: the plan of an epoch. The loader reads ahead, also across the end of an epoch. `close` must be called:
    torch may abort a process that ends while a thread reads.
    """

    def __init__(self, plan_of: Callable[[int], Plan], loader: Loader, rank: int, ranks: int, first_step: int) -> None:
        self.plan_of, self.rank, self.ranks = plan_of, rank, ranks
        self._pending: deque[_PendingStep] = deque()  # steps whose clips are being read
        self._batches = loader.iterate(self._packs(first_step))
        self.steps: Iterator[StepClips] = self._read()

    def close(self) -> None:
        """Stops reading ahead. Waits for the clips that are being read, but not for one that hangs."""
        self._batches.close()

    def _packs(self, first_step: int) -> Iterator[tuple[int, list[PlanItem]]]:
        """(epoch, this rank's pack) of every micro-step. Its step is added to `_pending` before its first pack."""
        epoch, first = 0, first_step
        while first >= (steps := self.plan_of(epoch).num_steps):
            epoch, first = epoch + 1, first - steps
        while True:
            plan = self.plan_of(epoch)
            bound = plan.token_bound()
            for index in range(first, plan.num_steps):
                step = plan.items(index)
                micro_steps = split(step, self.ranks, bound)
                packs = [groups[self.rank] for groups in micro_steps]
                self._pending.append(_PendingStep(epoch, index, len(step), packs, balance(micro_steps)))
                yield from ((epoch, pack) for pack in packs)
            epoch, first = epoch + 1, 0

    def _read(self) -> Iterator[StepClips]:
        for first_batch in self._batches:
            step = self._pending.popleft()
            examples = [first_batch, *(next(self._batches) for _ in step.packs[1:])]
            micro_steps = [MicroStep(*pair) for pair in zip(step.packs, examples)]
            yield StepClips(step.epoch, step.index, step.num_clips, micro_steps, step.balance)
