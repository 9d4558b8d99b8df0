"""Where this process stands among the ranks, and the few collectives that training needs. A single rank needs none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stdit.errors import StditError

Found = TypeVar("Found")


@dataclass(frozen=True)
class World:
    """rank: of this process, among `size`. device: of this process alone."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Sums over ranks in place. values: on any device; in fp64 all ranks get the same sums."""
        if self.size > 1:
            on_device = values.to(self.device)
            dist.all_reduce(on_device)
            values.copy_(on_device)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_on_main(self, value: Any) -> list[Any] | None:
        """As `gather`, on rank 0 alone."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values

    def exchange(self, numbers: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends the first `sent[0]` of the numbers, on `device`, to rank 0, the next `sent[1]` to rank 1, and so on.

        Returns what the ranks sent to this one, `received[0]` numbers of rank 0 first.
        """
        if self.size == 1:
            return numbers
        result = numbers.new_empty(sum(received))
        dist.all_to_all_single(result, numbers, received, sent)
        return result

    def from_main(self, find: Callable[[], Found]) -> Found:
        """What `find` returns on rank 0, which alone runs it; its error is raised on every rank."""
        found: Any = None
        with self.together():
            if self.is_main:
                found = find()
        return self.gather(found)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the work fails on any rank, raises on every rank, so that none waits for one that is gone."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        errors = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        if first := next(filter(None, errors), None):
            raise StditError(f"another rank stopped: {first}")


def join_world() -> World:
    """Joins the ranks that torchrun or deepspeed started (RANK, WORLD_SIZE, LOCAL_RANK), or stands alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it warns on import
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Longer than the usual ten minutes: rank 0 samples and exports alone while the others wait.
        dist.init_process_group(backend, timeout=timedelta(hours=2), rank=rank, world_size=size)
    return World(rank, size, device)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
