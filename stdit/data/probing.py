"""Probing files in processes of their own, so that a file that crashes or hangs the decoder costs only itself.

`python -m stdit.data.probing` is such a process: a JSON request a line on standard input, a JSON answer a line on
standard output. It imports neither torch nor pyarrow.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stdit.files import sha256_of

MEMORY = 4 << 30  # address space of one process, where the system can limit it


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
) -> list[Probed]:
    """Every path probed, in the order given. A file that takes longer than `timeout` seconds has reason "timeout"."""
    results: list[Probed | None] = [None] * len(paths)
    jobs: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(paths)):
        jobs.put(index)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        process = _Process(verify_pixels)
        try:
            while not stop.is_set():
                try:
                    index = jobs.get_nowait()
                except queue.Empty:
                    return
                results[index] = result = process.probe(paths[index], timeout)
                on_done(result)
        except BaseException as error:
            failures.append(error)
            stop.set()
        finally:
            process.close()

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


class _Process:
    """One probing process, started when needed and started again after a crash."""

    def __init__(self, verify_pixels: int) -> None:
        self.verify_pixels = verify_pixels
        self.process: subprocess.Popen[str] | None = None

    def probe(self, path: str, timeout: float) -> Probed:
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stdit.data.probing"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout, kill)
        timer.start()
        try:
            # surrogates (a file name that is not UTF-8) travel as \u escapes
            process.stdin.write(json.dumps({"path": path, "verify_pixels": self.verify_pixels}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return Probed(path=path, **json.loads(line))
        process.kill()
        process.wait()
        if late.is_set():
            return Probed(path, None, None, "timeout", f"took longer than {timeout:g} s to read.")
        return Probed(path, None, None, "crashed", f"crashed the decoder (exit status {process.returncode}).")

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()


def file_sha256(path: str) -> str:
    from stdit.data.pixels import open_bytes

    with open_bytes(path) as file:
        return sha256_of(file)


def _answer(path: str, verify_pixels: int) -> dict[str, Any]:
    from stdit.data import video_io

    sha256 = None
    try:
        video_io.check_file(path)
        sha256 = file_sha256(path)
        found = video_io.probe(path, verify_pixels)
        return {"probe": asdict(found), "sha256": sha256}
    except video_io.VideoError as error:
        return {"probe": None, "sha256": sha256, "reason": error.reason, "message": error.message}
    except MemoryError:
        return {"probe": None, "sha256": sha256, "reason": "too_large", "message": "needs too much memory."}
    except Exception as error:  # whatever a strange file brings up is a reason to skip it, not to stop
        return {"probe": None, "sha256": sha256, "reason": "undecodable", "message": f"{type(error).__name__}: {error}"}


def _serve() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, ValueError, OSError):
        pass  # no such limit on this system
    import av.logging

    av.logging.set_level(av.logging.PANIC)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_answer(**json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
