"""Reads batches ahead of their consumer, on threads that also compute which to read next."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")


def read_ahead(
    read: Callable[[Input], Output], batches: Iterable[Sequence[Input]], workers: int, ahead: int, closing: float = 30.0
) -> Generator[list[Output], None, None]:
    """Yields the results of `read` for each batch, in order.

    read: called for each member of a batch, by `workers` threads; with no workers, by the consumer on demand.
    batches: iterated by the threads too, so that the consumer does not wait for what it computes.
    ahead: how many batches are read beyond the current one.
    closing: seconds to wait, when closed, for reads that hang.

    An exception of `read` or `batches` is raised to the consumer. Closing the generator ends the threads.
    """
    if workers == 0:
        for batch in batches:
            yield [read(member) for member in batch]
        return
    begun: SimpleQueue[list[Future[Output]] | BaseException | None] = SimpleQueue()
    room, stop = threading.Semaphore(ahead), threading.Event()

    def members() -> Iterator[tuple[Future[Output], Input]]:
        try:
            for batch in batches:
                futures: list[Future[Output]] = [Future() for _ in batch]
                begun.put(futures)
                yield from zip(futures, batch)
                room.acquire()
                if stop.is_set():
                    return
            begun.put(None)
        except BaseException as error:  # raised to the consumer
            begun.put(error)

    todo, turn = members(), threading.Lock()

    def work() -> None:
        while not stop.is_set():
            with turn:
                job = next(todo, None)
            if job is None:
                return
            future, member = job
            try:
                future.set_result(read(member))
            except BaseException as error:  # raised to the consumer
                future.set_exception(error)

    threads = [threading.Thread(target=work, name="stdit-loader", daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        while (futures := begun.get()) is not None:
            if isinstance(futures, BaseException):
                raise futures
            yield [future.result() for future in futures]
            room.release()
    finally:
        stop.set()
        room.release()
        end = time.monotonic() + closing
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
