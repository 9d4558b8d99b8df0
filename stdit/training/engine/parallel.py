"""Where this process stands among the ranks, and the few collectives that training needs. Without ranks: no-ops."""

from __future__ import annotations

import os
from collections.abc import Callable
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
    """rank of size processes; device is this process's own."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Sums over ranks in place. values lie on any device; fp64 stays exact enough to compare ranks."""
        if self.size > 1:
            on_device = values.to(self.device)
            dist.all_reduce(on_device)
            values.copy_(on_device)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

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

    def from_main(self, find: Callable[[], Found]) -> Found:
        """What `find` returns on rank 0, which alone runs it; an error of it is raised on every rank."""
        found: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                found = find()
            except Exception as caught:
                error = caught
        self.all_succeeded(error)
        return self.gather(found)[0]

    def all_succeeded(self, error: Exception | None) -> None:
        """Raises on every rank if any rank has an error, so that none waits for one that is gone."""
        errors = [
            str(found) for found in self.gather(None if error is None else f"{type(error).__name__}: {error}") if found
        ]
        if error is not None:
            raise error
        if errors:
            raise StditError(f"another rank stopped: {errors[0]}")


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
        # Rank 0 alone samples and exports while the others wait at a barrier: longer than the usual ten minutes.
        timeout = timedelta(hours=2)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timeout, rank=rank, world_size=size
        )
    return World(rank, size, device)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
