"""Reads batches ahead of their consumer: a thread decides what to read next, worker threads read it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")
CLOSING = 30.0  # seconds to wait, when closed, for a read that hangs


def read_ahead(
    read: Callable[[Input], Output], batches: Iterable[Sequence[Input]], workers: int, ahead: int
) -> Generator[list[Output], None, None]:
    """Yields the results of `read` for each batch, in order.

    read: called for each member of a batch, by `workers` threads; with no workers, by the consumer on demand.
    batches: iterated on a thread of its own, so that the consumer does not wait for what it computes.
    ahead: how many batches are read beyond the current one.

    An exception of `read` or `batches` is raised to the consumer. Closing the generator ends the threads.
    """
    if workers == 0:
        for batch in batches:
            yield [read(member) for member in batch]
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="stdit-loader")
    submitted: queue.SimpleQueue[list[Future[Output]] | BaseException | None] = queue.SimpleQueue()
    room = threading.Semaphore(ahead + 1)
    stop = threading.Event()

    def submit() -> None:
        iterator = iter(batches)
        try:
            while room.acquire() and not stop.is_set():
                batch = next(iterator, None)
                if batch is None:
                    break
                submitted.put([pool.submit(read, member) for member in batch])
            submitted.put(None)
        except BaseException as error:  # raised to the consumer
            submitted.put(error)
        finally:
            pool.shutdown()

    thread = threading.Thread(target=submit, name="stdit-feed", daemon=True)
    thread.start()
    try:
        while (futures := submitted.get()) is not None:
            if isinstance(futures, BaseException):
                raise futures
            yield [future.result() for future in futures]
            room.release()
    finally:
        stop.set()
        room.release()
        pool.shutdown(wait=False, cancel_futures=True)
        thread.join(CLOSING)
