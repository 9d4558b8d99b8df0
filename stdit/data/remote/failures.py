"""Errors of storage: which may pass, and the reasons of those that do not."""

from __future__ import annotations

import asyncio
import errno
import re
from typing import Any

from stdit.errors import StditError

# errors of a disk or of the network behind it, rather than of one file
_DISK_NAMES = (
    "EIO ESTALE ETIMEDOUT ECONNRESET ECONNABORTED ECONNREFUSED ENOTCONN EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH "
    "ENETRESET EREMOTEIO ENOLINK"
)
_DISK_ERRORS = {getattr(errno, name) for name in _DISK_NAMES.split() if hasattr(errno, name)}
FILE_REASONS = ("missing", "too_large", "changed")  # these concern one file, not the storage


class StorageError(StditError):
    """A file that could not be read from, or written to, storage.

    reason: missing, denied, too_large, changed (while it was read), unreachable (after all tries) or wrong (a URL that
        cannot work).
    """

    def __init__(self, path: str, reason: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path, self.reason, self.message = path, reason, message

    @property
    def video_reason(self) -> str:
        """The matching reason of a `VideoError`."""
        return self.reason if self.reason in FILE_REASONS else "unreadable"


class FileError(StorageError):
    """Any reason but unreachable: other files may still be read, so a scan names this one and goes on."""


class DiskFailure(OSError):
    """A local disk, or the network behind it, failed: the next try may not."""


def is_disk_failure(error: BaseException) -> bool:
    """Whether an error is one of a disk or network, also as safetensors words it: "… (os error 5)"."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) and error.errno is not None else found and int(found[1])
    return number in _DISK_ERRORS


def failure_kind(error: Exception) -> str:
    """missing, denied, wrong (retrying is pointless) or passing."""
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "passing"
    cause: BaseException | None = error
    while cause is not None:  # fsspec's HTTP reports every failed HEAD as "not found" and chains the real error
        status = _http_status(cause)
        if status is not None:
            kinds = {404: "missing", 410: "missing", 401: "denied", 403: "denied"}
            passing = status >= 500 or status in (408, 409, 425, 429)
            return kinds.get(status, "passing" if passing else "wrong")
        cause = cause.__cause__
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__
        return "missing" if cause is None or isinstance(cause, FileNotFoundError | LookupError) else "passing"
    if isinstance(error, PermissionError) or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return "denied"
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return "wrong"
    permanent = isinstance(error, ValueError | TypeError | ImportError | NotImplementedError)
    return "wrong" if permanent and not isinstance(error, OSError) else "passing"


def _http_status(error: BaseException) -> int | None:
    """The HTTP status behind an exception of botocore, aiohttp, requests, …; None if there is none."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    if status is None and not type(error).__module__.startswith("aiohttp"):  # its code 400 means a truncated response
        status = getattr(error, "code", None)
    return status if isinstance(status, int) and status >= 400 else None


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
