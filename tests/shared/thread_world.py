"""Ranks that are threads of one process."""

from __future__ import annotations

import threading
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

    def exchange(self, numbers: Tensor, sent: list[int], received: list[int]) -> Tensor:
        parts = [parts[self.rank] for parts in self.gather(numbers.clone().split(sent))]
        assert [len(part) for part in parts] == received
        return torch.cat(parts)
