"""Limits of reading a file, errors with a reason, and checks that a file is readable and unchanged."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import av

from stdit.data.remote.failures import DiskFailure, is_disk_failure
from stdit.data.remote.paths import file_of, open_bytes, split_member
from stdit.errors import StditError
from stdit.files import sha256_of


@dataclass(frozen=True)
class Limits:
    """Limits of one read."""

    bytes: int = 1 << 40  # of a local file
    pixels: int = 8192 * 8192  # of one frame
    frames: int = 100_000  # decoded
    packets: int = 2_000_000  # decoded
    seconds: float = 60.0  # CPU time of the reading thread, checked between packets


LIMITS = Limits()
CHANGED = "is not the file that was scanned"  # messages of reason "changed" begin like this


class VideoError(StditError):
    """A file, or the requested part of it, that cannot be read.

    reason: for programs: missing, unreadable, unreachable (the disk or network failed, not the file), empty, changed,
        not_media, unsupported, no_video, undecodable, no_frames, too_large, too_long, too_short, damaged, timeout, or
        crashed (from a worker process).
    """

    def __init__(self, path: str, reason: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path, self.reason, self.message = path, reason, message


def error_text(error: BaseException) -> str:
    """The message without error number and file name."""
    return str(getattr(error, "strerror", None) or error)


@contextmanager
def reading(path: str, limits: Limits = LIMITS) -> Iterator[None]:
    """Raises VideoError if the file cannot be read, and for any exception of a decoder: no bad clip ends a run."""
    try:
        _check_file(path, limits)
        yield
    except Exception as error:
        if (failed := _storage_error(path, error)) is not None:
            raise VideoError(path, "unreachable", f"the storage failed ({error_text(failed)}).") from failed
        if isinstance(error, StditError):
            raise
        if isinstance(error, MemoryError):
            raise VideoError(path, "too_large", "needs more memory than is available.") from error
        raise VideoError(path, "undecodable", f"cannot be decoded ({type(error).__name__}: {error}).") from error


@contextmanager
def disk_failures() -> Iterator[None]:
    """Raises DiskFailure, which `Storage.retried` tries again, for a VideoError "unreachable"."""
    try:
        yield
    except VideoError as error:
        if error.reason != "unreachable":
            raise
        raise DiskFailure(error.message) from error


def _storage_error(path: str, error: BaseException | None) -> OSError | None:
    """The disk or network error that caused an exception, if any."""
    while error is not None:
        if isinstance(error, OSError) and is_disk_failure(error):
            return error if not isinstance(error, av.FFmpegError) else _read_error(path)
        error = error.__cause__
    return None


def _read_error(path: str) -> OSError | None:
    """The error of reading the whole file, if any: FFmpeg also reports "Input/output error" for damaged files."""
    try:
        file_sha256(path)
    except OSError as error:
        return error
    return None


def _check_file(path: str, limits: Limits) -> None:
    """Raises VideoError unless the file is a readable, non-empty regular file within the size limit."""
    member, file = split_member(path), file_of(path)
    try:
        status = os.stat(file)
        is_regular, size = stat.S_ISREG(status.st_mode), status.st_size
        if is_regular:  # opening a pipe would block
            with open(file, "rb"):
                pass
    except FileNotFoundError as error:
        raise VideoError(path, "missing", "no such file.") from error
    except (OSError, ValueError) as error:
        raise VideoError(path, "unreadable", f"cannot be opened ({error_text(error)}).") from error
    if not is_regular:
        raise VideoError(path, "unreadable", "is not a regular file.")
    if member is not None:
        if member.offset + member.size > size:
            raise VideoError(path, "damaged", f"extends beyond the end of its tar ({size} bytes). Scan again.")
        size = member.size
    if size == 0:
        raise VideoError(path, "empty", "is an empty file.")
    if size > limits.bytes:
        raise VideoError(path, "too_large", f"has {size} bytes; the limit is {limits.bytes} bytes.")


@contextmanager
def unchanged(path: str, sha256: str | None) -> Iterator[None]:
    """Raises VideoError "changed" unless the file has this sha256 (None: any), or if it is modified meanwhile."""
    if sha256 is None:
        yield
        return
    before = _version(path)
    check_content(path, sha256)
    yield
    if _version(path) != before:
        raise VideoError(path, "changed", f"{CHANGED}: it was modified while it was being read. Scan again.")


def check_content(path: str, sha256: str) -> None:
    """Raises VideoError "changed" unless the file has this sha256; hashes it anew only if its size or time changed."""
    found = _cached_sha256(path, _version(path))
    if found != sha256:
        message = f"{CHANGED} (sha256 {found}, the manifest has {sha256}). Scan again: stdit data scan."
        raise VideoError(path, "changed", message)


def _version(path: str) -> tuple[int, int, int]:
    status = os.stat(file_of(path))
    return status.st_size, status.st_mtime_ns, status.st_ino


@lru_cache(maxsize=1 << 16)
def _cached_sha256(path: str, version: tuple[int, int, int]) -> str:
    return file_sha256(path)


def file_sha256(path: str) -> str:
    with open_bytes(path) as file:
        return sha256_of(file)
