"""Where this process stands among the ranks, and the few collectives that training needs. A single rank needs none."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stdit.errors import StditError
from stdit.training.engine.traffic import count_collectives

Item = TypeVar("Item")
Found = TypeVar("Found")
TIMEOUT = 10.0  # minutes that a collective may take
ALIVE = 5.0  # seconds between two messages of rank 0 while the others wait for its work
_WORKING, _DONE = "", "\0"  # its messages, or the name of what it asks for
Ask = Callable[[str], Tensor]


class SharingStopped(Exception):
    """Raised on all ranks where shared work ends early: what was done is lost."""


@dataclass(frozen=True)
class World:
    """rank: of this process, among `size`. device: of this process alone.

    host_group: the ranks' group for what lies in host memory (gloo), so that no device waits for it; None: the default
        group has it.
    asked_to_stop: whether this process was, so that shared work ends early.
    """

    rank: int
    size: int
    device: torch.device
    host_group: Any = None
    asked_to_stop: Callable[[], bool] = lambda: False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Sums over ranks in place, where the values are. In fp64 all ranks get the same sums."""
        if self.size > 1:
            dist.all_reduce(values, group=self.host_group if values.is_cpu else None)
        return values

    def join_(self, numbers: Tensor) -> Tensor:
        """Completes fp32 numbers in host memory, each 0 on all ranks but one, in place. Exact: it adds their bits."""
        self.sum_(numbers.view(torch.int32))
        return numbers

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def gather_on_main(self, value: Any) -> list[Any] | None:
        """As `gather`, on rank 0 alone."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.host_group)
        return values

    def share_out(self, items: Sequence[Item], work: Callable[[Item], Found]) -> list[Found]:
        """work(item) of all items, in their order, on every rank. One rank does each, in rounds of an item per rank, so
        that no rank waits longer than one item takes. An error on any rank is raised on all after its round, and
        SharingStopped once any rank is asked to stop."""
        found: list[Found] = []
        for first in range(0, len(items), self.size):
            done: list[Found] = []
            with self.together():
                done = [work(item) for item in items[first + self.rank : first + self.rank + 1]]
            stop = False
            for results, asked in self.gather((done, self.asked_to_stop())):
                found += results
                stop = stop or asked
            if stop:
                raise SharingStopped
        return found

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

    def after_main(self, work: Callable[[Ask], None], give: Callable[[str], Tensor]) -> None:
        """As `from_main`, for work that may take longer than a collective may, and that asks for what only all ranks
        can give together. Rank 0 works in a thread, and tells the others meanwhile that it is alive.

        work: is called with a function that returns give(name). give: is called on all ranks together.
        """
        if self.size == 1:
            return work(give)
        errors: list[Exception] = []
        wanted: SimpleQueue[str] = SimpleQueue()
        given: SimpleQueue[Tensor] = SimpleQueue()

        def ask(name: str) -> Tensor:
            wanted.put(name)
            return given.get()

        def run() -> None:
            try:
                work(ask)
            except Exception as error:
                errors.append(error)
            finally:
                wanted.put(_DONE)

        if self.is_main:
            threading.Thread(target=run, name="stdit-main-work", daemon=True).start()
        while True:
            word = _WORKING
            if self.is_main:
                with suppress(Empty):
                    word = wanted.get(timeout=ALIVE)
            word = self.gather(word)[0]
            if word == _DONE:
                break
            if word != _WORKING:
                found = give(word)
                if self.is_main:
                    given.put(found)
        with self.together():
            for error in errors:
                raise error

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


def join_world(timeout: float = TIMEOUT) -> World:
    """Joins the ranks that torchrun or deepspeed started (RANK, WORLD_SIZE, LOCAL_RANK), or stands alone.

    timeout: minutes after which a collective that a rank does not join fails.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it warns on import
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    host_group = None
    if size > 1:
        count_collectives()
        limit = timedelta(minutes=timeout)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=limit, rank=rank, world_size=size)
        if dist.get_backend() != "gloo":
            host_group = dist.new_group(backend="gloo", timeout=limit)
    return World(rank, size, device, host_group)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
