"""The clips of every step, read ahead: plan → this rank's share → examples, across the ends of epochs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from stdit.data.load.loader import Example, Loader
from stdit.data.plan.planner import Plan
from stdit.data.plan.split import PlanItem, split

CLOSING = 30.0  # seconds


@dataclass(frozen=True)
class StepClips:
    """A global step, as one rank sees it: its items and examples, micro-step by micro-step (a list may be empty)."""

    epoch: int
    index: int  # in the epoch
    clips: int  # on all ranks
    items: list[list[PlanItem]]
    examples: list[list[Example]]


class StepLoader:
    """Steps from `first_step` (counted over epochs) on, without end.

    plan_of: the plan of an epoch. A thread reads ahead unless the loader has no workers; `close` ends it, or a process
    that has finished could end in an abort: Python stops threads where they are, and in torch's code C++ takes offence.
    """

    def __init__(self, plan_of: Callable[[int], Plan], loader: Loader, rank: int, ranks: int, first_step: int) -> None:
        self.plan_of, self.loader, self.rank, self.ranks = plan_of, loader, rank, ranks
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        steps = self._read(first_step)
        self.steps: Iterator[StepClips] = self._ahead(steps) if loader.workers else steps

    def close(self) -> None:
        """Ends reading ahead. Waits for the clips that are being read, at most CLOSING for one that hangs."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSING)

    def _read(self, first_step: int) -> Generator[StepClips, None, None]:
        epoch, index = 0, first_step
        while index >= (steps := self.plan_of(epoch).num_steps):
            epoch, index = epoch + 1, index - steps
        while True:
            plan = self.plan_of(epoch)
            bound = plan.token_bound()
            dealt: list[tuple[int, int, list[list[PlanItem]]]] = []  # of steps whose clips are being read
            first = index

            def packs(plan: Plan = plan, bound: int = bound, first: int = first, dealt: list = dealt) -> Iterator:
                for i in range(first, plan.num_steps):
                    step = plan.items(i)
                    mine = [groups[self.rank] for groups in split(step, self.ranks, bound)]
                    dealt.append((i, len(step), mine))
                    yield from mine

            batches = self.loader.iterate(packs(), epoch)
            for batch in batches:
                index, clips, items = dealt.pop(0)
                yield StepClips(epoch, index, clips, items, [batch, *(next(batches) for _ in items[1:])])
            epoch, index = epoch + 1, 0

    def _ahead(self, steps: Generator[StepClips, None, None]) -> Iterator[StepClips]:
        """Reads the next steps on a thread: the first clips of an epoch come while the last of the one before train."""
        ready: queue.Queue[StepClips | BaseException] = queue.Queue(maxsize=2)

        def put(value: StepClips | BaseException) -> None:
            while not self._stop.is_set():
                try:
                    return ready.put(value, timeout=0.2)
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for step in steps:
                    if self._stop.is_set():
                        return
                    put(step)
            except BaseException as error:  # the reader of the queue raises it
                put(error)
            finally:
                steps.close()

        self._thread = threading.Thread(target=work, name="stdit-feed", daemon=True)
        self._thread.start()
        while True:
            value = ready.get()
            if isinstance(value, BaseException):
                raise value
            yield value
