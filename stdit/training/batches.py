"""The clips of every step, read ahead: plan → this rank's share → examples, across the ends of epochs."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from stdit.data.load.loader import Example, Loader
from stdit.data.plan.planner import Plan
from stdit.data.plan.split import PlanItem, split

CLOSING = 30.0  # seconds to wait for a read that hangs


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

    @property
    def examples(self) -> list[Example]:
        return [example for micro in self.micro_steps for example in micro.examples]


class StepLoader:
    """Endless iterator over the steps from `first_step` (counted over epochs) on.

    plan_of: the plan of an epoch. A thread reads ahead unless the loader has no workers. `close` must be called: torch
    may abort a process that ends while the thread runs.
    """

    def __init__(self, plan_of: Callable[[int], Plan], loader: Loader, rank: int, ranks: int, first_step: int) -> None:
        self.plan_of, self.loader, self.rank, self.ranks = plan_of, loader, rank, ranks
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        steps = self._read(first_step)
        self.steps: Iterator[StepClips] = self._read_ahead(steps) if loader.workers else steps

    def close(self) -> None:
        """Stops reading ahead. Waits for the clips that are being read, at most CLOSING seconds."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSING)

    def _read(self, first_step: int) -> Generator[StepClips, None, None]:
        epoch, index = 0, first_step
        while index >= (steps := self.plan_of(epoch).num_steps):
            epoch, index = epoch + 1, index - steps
        while True:
            yield from self._read_epoch(epoch, index)
            epoch, index = epoch + 1, 0

    def _read_epoch(self, epoch: int, first: int) -> Generator[StepClips, None, None]:
        plan = self.plan_of(epoch)
        bound = plan.token_bound()
        pending: deque[tuple[int, int, list[list[PlanItem]]]] = deque()  # steps whose clips are being read

        def packs() -> Iterator[list[PlanItem]]:
            for index in range(first, plan.num_steps):
                step = plan.items(index)
                mine = [groups[self.rank] for groups in split(step, self.ranks, bound)]
                pending.append((index, len(step), mine))
                yield from mine

        batches = self.loader.iterate(packs(), epoch)
        for first_batch in batches:
            index, num_clips, packs_of_step = pending.popleft()
            examples = [first_batch, *(next(batches) for _ in packs_of_step[1:])]
            yield StepClips(epoch, index, num_clips, [MicroStep(*pair) for pair in zip(packs_of_step, examples)])

    def _read_ahead(self, steps: Generator[StepClips, None, None]) -> Iterator[StepClips]:
        """Reads the next steps on a thread, so that an epoch's first clips come while the last of the one before
        train."""
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
            except BaseException as error:  # raised to the reader of the queue
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
