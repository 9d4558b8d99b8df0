"""The decoder's process, `python -m stdit.data.workers.child`: without torch and pyarrow.

It reads a JSON request per line on standard input and writes a JSON answer per line on standard output.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from stdit.data.decode.checks import Limits, VideoError, as_video_errors, check_file, file_sha256

GRACE = 5.0  # seconds beyond its time limit after which a process counts as hung
PATIENCE = 20  # multiple of its time limit that a read may take on a busy machine while it makes progress
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # ignored: they ask the run to save and end, for which it needs its clips


class _FrameBuffer:
    """Memory for the frames of one answer, shared with the parent where possible."""

    def __init__(self, fd: int | None) -> None:
        self.fd = fd

    def allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        if self.fd is None:
            return np.empty(shape, np.uint8)
        os.ftruncate(self.fd, max(os.fstat(self.fd).st_size, math.prod(shape)))
        return np.frombuffer(mmap.mmap(self.fd, math.prod(shape)), np.uint8).reshape(shape)


def _read(memory: _FrameBuffer, limits: dict[str, Any], **arguments: Any) -> tuple[dict[str, Any], np.ndarray]:
    from stdit.data.decode.video import read_frames

    frames = read_frames(**arguments, limits=Limits(**limits), allocate=memory.allocate)
    return {"shape": frames.shape}, frames


def _probe(memory: _FrameBuffer, path: str, verify_pixels: int, limits: dict[str, Any]) -> tuple[dict[str, Any], None]:
    return probe_and_hash(path, verify_pixels, Limits(**limits)), None


def probe_and_hash(path: str, verify_pixels: int, limits: Limits) -> dict[str, Any]:
    """The fields of a `ProbeResult` other than its path. A file that cannot be read has a reason; nothing is raised."""
    from stdit.data.decode.video import probe

    sha256 = found = reason = message = None
    try:
        with as_video_errors(path):
            check_file(path, limits)
            sha256 = file_sha256(path)
            found = asdict(probe(path, verify_pixels, limits))
    except VideoError as error:
        reason, message = error.reason, error.message
    return {"probe": found, "sha256": sha256, "reason": reason, "message": message}


def _score(memory: _FrameBuffer, path: str, limits: dict[str, Any], **span: Any) -> tuple[dict[str, Any], None]:
    from stdit.data.measure.scores import score

    return score(path, **span, limits=Limits(**limits)), None


def _scenes(memory: _FrameBuffer, path: str, limits: dict[str, Any], **video: Any) -> tuple[dict[str, Any], None]:
    from stdit.data.measure.scenes import find_scenes

    return {"scenes": find_scenes(path, **video, limits=Limits(**limits))}, None


_TASKS: dict[str, Callable[..., tuple[dict[str, Any], np.ndarray | None]]] = {
    "read": _read, "probe": _probe, "score": _score, "scenes": _scenes
}  # fmt: skip


def _serve(fd: int | None) -> None:
    import av.logging

    import stdit.data.decode.video  # noqa: F401 (imported before the first request's time starts)

    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries must not get between the answers
    av.logging.set_level(av.logging.PANIC)
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    _limit("RLIMIT_CORE", 0)
    memory = _FrameBuffer(fd)
    out.write(b"{}\n")
    out.flush()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        seconds, task = request.pop("seconds"), _TASKS[request.pop("task")]
        _limit("RLIMIT_AS", request.pop("memory"))
        if hasattr(signal, "setitimer"):  # ends a hung process whose parent is gone
            signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds + GRACE)
        frames = None  # frees the last request's frames before memory is limited
        try:
            answer, frames = task(memory, **request)
        except VideoError as error:
            answer = {"reason": error.reason, "message": error.message}
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        out.write(json.dumps(answer).encode() + b"\n")
        if frames is not None and fd is None:
            out.write(np.ascontiguousarray(frames).data)
        out.flush()


def _limit(what: str, bytes_: int) -> None:
    try:
        import resource

        hard = resource.getrlimit(getattr(resource, what))[1]
        resource.setrlimit(getattr(resource, what), (bytes_ if hard < 0 else min(bytes_, hard), hard))
    except (ImportError, AttributeError, ValueError, OSError):
        pass  # the system has no such limit


if __name__ == "__main__":
    _serve(int(sys.argv[1]) if len(sys.argv) > 1 else None)
