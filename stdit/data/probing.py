"""Probing files in processes of their own, so that a file that crashes or hangs the decoder costs only itself."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from stdit.data.isolated import Worker
from stdit.data.pixels import VideoError, check_file, file_sha256
from stdit.data.storage import STORAGE, StorageError

Opened = Callable[[str], AbstractContextManager[str]]


@dataclass(frozen=True)
class Probed:
    """What became of one file: `probe` (see `video_io.Probe`) or a reason and a message, and its sha256 if readable."""

    path: str
    probe: dict[str, Any] | None
    sha256: str | None
    reason: str | None = None
    message: str | None = None


def probe_files(
    paths: Sequence[str],
    workers: int,
    verify_pixels: int,
    timeout: float,
    on_done: Callable[[Probed], None] = lambda _: None,
    opened: Opened = STORAGE.local,
) -> list[Probed]:
    """Every path probed, in the order given. A file that takes longer than `timeout` seconds has reason "timeout".

    opened: gives a local path of the same bytes. Raises StorageError where that stays unreachable.
    """
    results: list[Probed | None] = [None] * len(paths)
    jobs: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(paths)):
        jobs.put(index)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        worker = Worker()
        try:
            while not stop.is_set():
                try:
                    index = jobs.get_nowait()
                except queue.Empty:
                    return
                results[index] = result = _probe(worker, paths[index], verify_pixels, timeout, opened)
                on_done(result)
        except BaseException as error:
            failures.append(error)
            stop.set()
        finally:
            worker.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(max(1, min(workers, len(paths))))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stop.set()
    if failures:
        raise failures[0]
    return [result for result in results if result is not None]


def _probe(worker: Worker, path: str, verify_pixels: int, timeout: float, opened: Opened) -> Probed:
    try:
        with opened(path) as local:
            return Probed(path, **worker.call("probe", local, timeout, verify_pixels=verify_pixels)[0])
    except VideoError as error:
        return Probed(path, None, None, error.reason, error.message)
    except StorageError as error:
        if error.reason == "unreachable":
            raise
        return Probed(path, None, None, error.video_reason, error.message)


def probe_and_hash(path: str, verify_pixels: int) -> dict[str, Any]:
    """The fields of a `Probed` besides its path; what cannot be read is a reason, never an exception."""
    from stdit.data.video_io import probe

    sha256 = found = reason = message = None
    try:
        check_file(path)
        sha256 = file_sha256(path)
        found = asdict(probe(path, verify_pixels))
    except VideoError as error:
        reason, message = error.reason, error.message
    except MemoryError:
        reason, message = "too_large", "needs too much memory."
    except Exception as error:  # whatever a strange file brings up is a reason to skip it, not to stop
        reason, message = "undecodable", f"{type(error).__name__}: {error}"
    return {"probe": found, "sha256": sha256, "reason": reason, "message": message}
