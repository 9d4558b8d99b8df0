"""Ranks that share packs, as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from stdit.models.sequence import SequenceGroup


class ThreadGroup(SequenceGroup):
    """One of the ranks. `sent`: the numbers that each of its exchanges sent to others."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, given: list[Any]) -> None:
        super().__init__(rank, size)
        self.__dict__ |= {"barrier": barrier, "given": given, "sent": []}  # the class is frozen

    def exchange(self, numbers: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        assert numbers.ndim == 1 and len(numbers) == sum(sent)
        self.__dict__["sent"].append(len(numbers) - sent[self.rank])
        given = self.__dict__["given"]
        given[self.rank] = numbers.split(list(sent))
        self.__dict__["barrier"].wait(60)
        parts = [given[rank][self.rank] for rank in range(self.size)]
        self.__dict__["barrier"].wait(60)
        assert [len(part) for part in parts] == list(received)
        return torch.cat(parts)


def run_together(size: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What `work` returns on each rank of a group."""
    barrier, given = threading.Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(work, ThreadGroup(rank, size, barrier, given)) for rank in range(size)]
        for future in futures:
            future.add_done_callback(lambda done: barrier.abort() if done.exception() else None)
        return [future.result() for future in futures]
