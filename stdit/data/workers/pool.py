"""Reads clips in worker processes, so that a file that crashes or hangs the decoder costs only itself.

Requests and answers are JSON lines on the child's standard input and output (`workers.child`). Frames come back through
memory that both processes map, or after the answer where child processes cannot inherit memory (Windows).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import IO, Any, cast

import numpy as np

from stdit.data.decode.checks import LIMITS, Limits, VideoError
from stdit.data.remote.paths import file_of
from stdit.data.workers.child import GRACE, PATIENCE, SIGNALS
from stdit.errors import StditError

MEMORY = 4 << 30  # address space of a process beyond the frames it returns, where the system can limit it
HASH_RATE = 1e8  # bytes per second, at least
IDLE = 0.02  # share of CPU time below which a process waits for a file, not for a core
START = 300.0  # seconds that starting may take: Python may import from a slow shared disk


class Reader:
    """`video.read_frames` in worker processes, one per thread that calls at the same time.

    A process that dies or hangs is replaced; its clip raises VideoError "crashed" or "timeout".
    """

    def __init__(self) -> None:
        self._idle: deque[Worker] = deque()

    def __call__(
        self,
        path: str,
        count: int,
        size: tuple[int, int],
        fps: float | None = None,
        start: float = 0.0,
        crop: tuple[float, float] = (0.5, 0.5),
        limits: Limits = LIMITS,
        sha256: str | None = None,
    ) -> np.ndarray:
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = Worker()
        arguments = {"count": count, "size": size, "fps": fps, "start": start, "crop": crop, "sha256": sha256}
        memory = MEMORY + count * size[0] * size[1] * 3
        seconds = limits.seconds + GRACE
        if sha256 is not None:  # the whole file is hashed first
            with suppress(OSError):
                seconds += os.stat(file_of(path)).st_size / HASH_RATE
        try:
            return worker.call("read", path, seconds, limits, memory, **arguments)["frames"]
        finally:
            self._idle.append(worker)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


READER = Reader()  # shared by all loaders, so that its processes are reused


class Worker:
    """One worker process, started on demand and again after it died. Not thread-safe."""

    def __init__(self) -> None:
        self._process: _Process | None = None

    def call(
        self, task: str, path: str, seconds: float, limits: Limits = LIMITS, memory: int = MEMORY, **arguments: Any
    ) -> dict[str, Any]:
        """The answer of a task (see `child._answer`); "frames" are (T, H, W, 3) uint8.

        Raises VideoError: the task's own, "timeout" after `seconds`, or "crashed" if two processes died of it. A second
        process tries because the system may have killed the first (out of memory, or the run is being ended), and
        because a disk that did not respond may recover.
        """
        request = {"task": task, "seconds": seconds, "memory": memory, "path": path, "limits": asdict(limits)}
        request |= arguments
        status = 0
        for last in (False, True):
            if self._process is None or self._process.popen.poll() is not None:
                self.close()
                self._process = _start()
            try:
                answer = self._process.ask(request)
            except queue.Empty as error:
                self.close()
                if isinstance(error, _WaitsForFile) and not last:
                    continue
                raise VideoError(path, "timeout", f"took longer than {seconds:g} s to read.") from None
            except BaseException:  # Ctrl-C: the pending answer would be taken for the next request's
                self.close()
                raise
            if answer is not None:
                if "error" in answer:
                    raise VideoError(path, **answer["error"])
                return answer
            status = self._process.popen.wait()
        name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        raise VideoError(path, "crashed", f"crashed the decoder ({name}).")

    def close(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None


class _WaitsForFile(queue.Empty):
    """A process has neither answered nor computed: it waits for its file."""


def _start() -> _Process:
    try:
        return _Process()
    except StditError:  # it was killed; once may be chance
        return _Process()


@contextmanager
def _kept_from_signals() -> Iterator[None]:
    """Blocks SIGNALS for processes started in this context, until they ignore them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, name) for name in SIGNALS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Process:
    def __init__(self) -> None:
        self.memory = _shared_file()
        given = () if self.memory is None else (self.memory.fileno(),)
        with _kept_from_signals():
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "stdit.data.workers.child", *map(str, given)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=given,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # Windows: no Ctrl-C from the console
            )
        self.end = weakref.finalize(self, _end, self.popen)
        # read by a thread, so that a process that hangs or cannot be killed does not block the caller
        self.answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        heard = (self.popen.stdout, self.memory, self.answers)
        threading.Thread(target=_listen, args=heard, name="stdit-reader", daemon=True).start()
        with suppress(queue.Empty):
            if self.answers.get(timeout=START) is not None:
                return
        self.end()
        raise StditError("the decoder's process does not start. To see why, run: python -m stdit.data.workers.child")

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, or None if the process died. Raises queue.Empty on timeout.

        The limit is CPU time if the system reports it, so that other work on the machine costs no clip. A process that
        waits for its file counts as hung once the limit has passed.
        """
        assert self.popen.stdin is not None
        try:
            # surrogates (a file name that is not UTF-8) travel as \u escapes
            self.popen.stdin.write(json.dumps(request).encode() + b"\n")
            self.popen.stdin.flush()
        except OSError:
            return None
        limit = request["seconds"]
        begun = seen = _cpu_seconds(self.popen.pid)
        for _ in range(PATIENCE):
            try:
                return self.answers.get(timeout=limit)
            except queue.Empty:
                now = _cpu_seconds(self.popen.pid)
                if begun is None or seen is None or now is None or now - seen < IDLE * limit:
                    raise _WaitsForFile from None
                if now - begun >= limit:
                    raise
                seen = now
        raise queue.Empty


def _cpu_seconds(pid: int) -> float | None:
    """The CPU time of a process so far; None on systems without /proc."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            user, system = stat.read().rpartition(b")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    assert process.stdin is not None
    with suppress(OSError, subprocess.TimeoutExpired):  # it is stuck in the kernel, on a disk that does not respond
        process.stdin.close()
        process.wait(timeout=1)


def _listen(stdout: IO[bytes], memory: IO[bytes] | None, answers: queue.SimpleQueue) -> None:
    """Puts each answer of a process into the queue, and None when the process has ended."""
    with stdout:
        for line in stdout:
            if not line.endswith(b"\n"):
                break
            answer = json.loads(line)
            if shape := answer.pop("shape", None):
                if memory is None:
                    frames = np.frombuffer(stdout.read(math.prod(shape)), np.uint8)
                else:
                    with mmap.mmap(memory.fileno(), math.prod(shape)) as shared:
                        frames = np.array(np.frombuffer(shared, np.uint8))
                answer["frames"] = frames.reshape(shape)
            answers.put(answer)
    answers.put(None)


def _shared_file() -> IO[bytes] | None:
    """An in-memory file that a child process can inherit; not in /dev/shm, which is small in containers."""
    if sys.platform == "win32":
        return None
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stdit-frames"), "w+b", buffering=0)
    return cast("IO[bytes]", tempfile.TemporaryFile(buffering=0))
