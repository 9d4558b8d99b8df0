"""Ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from torch import Tensor

from stdit.training.engine.parallel import World


class ThreadWorld(World):
    """A rank that is a thread; all ranks of a size take the same turns at the collectives."""

    values: ClassVar[dict[tuple[int, int], Any]] = {}  # by number of ranks, and rank
    barriers: ClassVar[dict[int, threading.Barrier]] = {}

    def gather(self, value: Any) -> list[Any]:
        barrier = self.barriers.setdefault(self.size, threading.Barrier(self.size))
        self.values[self.size, self.rank] = value
        barrier.wait(60)
        found = [self.values[self.size, rank] for rank in range(self.size)]
        barrier.wait(60)
        return found

    def gather_on_main(self, value: Any) -> list[Any] | None:
        found = self.gather(value)
        return found if self.is_main else None

    def sum_(self, values: Tensor) -> Tensor:
        return values.copy_(torch.stack(self.gather(values.clone())).sum(0))

    def exchange(self, numbers: Tensor, sent: list[int], received: list[int]) -> Tensor:
        parts = [parts[self.rank] for parts in self.gather(numbers.clone().split(sent))]
        assert [len(part) for part in parts] == received
        return torch.cat(parts)


def on_ranks(ranks: int, work: Callable[[ThreadWorld], Any]) -> list[Any]:
    """What `work` returns on each rank, or the error that it ends in."""
    with ThreadPoolExecutor(ranks) as pool:
        jobs = [pool.submit(work, ThreadWorld(rank, ranks, torch.device("cpu"))) for rank in range(ranks)]
        return [job.exception(300) or job.result() for job in jobs]
