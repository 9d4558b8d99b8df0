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
from dataclasses import asdict
from functools import partial
from typing import Any

import av.logging
import numpy as np

from stdit.data.decode.checks import Limits, VideoError, file_sha256, reading
from stdit.data.decode.video import probe, read_frames
from stdit.data.measure.scenes import find_scenes
from stdit.data.measure.scores import score

GRACE = 5.0  # seconds beyond its time limit after which a process counts as hung
PATIENCE = 20  # multiple of its time limit that a read may take on a busy machine while it makes progress
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # ignored: they ask the run to save and end, for which it needs its clips


def _allocate(fd: int | None, shape: tuple[int, ...]) -> np.ndarray:
    """Memory for the frames of one answer, shared with the parent where possible."""
    if fd is None:
        return np.empty(shape, np.uint8)
    os.ftruncate(fd, max(os.fstat(fd).st_size, math.prod(shape)))
    return np.frombuffer(mmap.mmap(fd, math.prod(shape)), np.uint8).reshape(shape)


def _probe_and_hash(path: str, verify_pixels: int, limits: Limits) -> dict[str, Any]:
    """The fields of a `ProbeResult` other than its path. A file that cannot be read has a reason; nothing is raised."""
    sha256 = found = reason = message = None
    try:
        with reading(path, limits):
            sha256 = file_sha256(path)
            found = asdict(probe(path, verify_pixels, limits))
    except VideoError as error:
        reason, message = error.reason, error.message
    return {"probe": found, "sha256": sha256, "reason": reason, "message": message}


def _answer(fd: int | None, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if task == "read":
        return {"frames": read_frames(**arguments, allocate=partial(_allocate, fd))}
    if task == "probe":
        return _probe_and_hash(**arguments)
    if task == "score":
        return score(**arguments)
    return {"scenes": find_scenes(**arguments)}


def _serve(fd: int | None) -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries must not get between the answers
    av.logging.set_level(av.logging.PANIC)
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    _limit("RLIMIT_CORE", 0)
    out.write(b"{}\n")
    out.flush()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        seconds, task = request.pop("seconds"), request.pop("task")
        _limit("RLIMIT_AS", request.pop("memory"))
        _end_after(PATIENCE * seconds + GRACE)
        request["limits"] = Limits(**request["limits"])
        frames = None  # frees the last request's frames
        try:
            answer = _answer(fd, task, request)
        except VideoError as error:
            answer = {"error": {"reason": error.reason, "message": error.message}}
        _end_after(0)
        if (frames := answer.pop("frames", None)) is not None:
            answer["shape"] = frames.shape
        out.write(json.dumps(answer).encode() + b"\n")
        if frames is not None and fd is None:
            out.write(np.ascontiguousarray(frames).data)
        out.flush()


def _end_after(seconds: float) -> None:
    """Ends a hung process whose parent is gone. 0: it does not hang."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit(what: str, bytes_: int) -> None:
    try:
        import resource

        hard = resource.getrlimit(getattr(resource, what))[1]
        resource.setrlimit(getattr(resource, what), (bytes_ if hard < 0 else min(bytes_, hard), hard))
    except (ImportError, AttributeError, ValueError, OSError):
        pass  # the system has no such limit


if __name__ == "__main__":
    _serve(int(sys.argv[1]) if len(sys.argv) > 1 else None)
