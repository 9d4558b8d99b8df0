"""Retries storage requests that may succeed later, and names the reason of those that cannot."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from stdit.errors import StditError

TRIES = 8  # per request, with pauses of 0.5, 1, 2, … seconds: about a minute in all
LONGEST_PAUSE = 30.0
FILE_REASONS = ("missing", "too_large", "changed")  # these concern one file, not the storage

Result = TypeVar("Result")
log = logging.getLogger(__name__)


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


class Retrier:
    """Runs requests, retrying those that fail for a passing reason. Thread-safe.

    tries: per request.
    pause: seconds before a request's first retry; doubles with each further one.
    retries: how many retries there have been so far.
    """

    def __init__(self, tries: int = TRIES, pause: float = 0.5) -> None:
        self.tries, self.pause = tries, pause
        self.retries = 0
        self._lock = threading.Lock()

    def retried(self, path: str, request: Callable[[], Result]) -> Result:
        """The request's result. Raises StorageError when it fails for good."""
        for number in range(1, self.tries + 1):
            try:
                return request()
            except StorageError:
                raise
            except Exception as error:
                self._raise_if_final(path, error, number)
                pause = min(LONGEST_PAUSE, self.pause * 2 ** (number - 1)) * random.uniform(0.75, 1.25)
                with self._lock:
                    self.retries += 1
                text = "%s: try %d of %d failed (%s); next in %.1f s"
                log.warning(text, path, number, self.tries, describe(error), pause)
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def retried_on_os_error(self, path: str, request: Callable[[], Result]) -> Result:
        """As `retried`, but only an OSError is retried; any other exception is raised at once, unchanged."""

        def attempt() -> tuple[Any, Exception | None]:
            try:
                return request(), None
            except OSError:
                raise
            except Exception as error:
                return None, error

        result, error = self.retried(path, attempt)
        if error is not None:
            raise error
        return result

    def _raise_if_final(self, path: str, error: Exception, number: int) -> None:
        """Raises StorageError if retrying is pointless or the tries are used up."""
        kind = failure_kind(error)
        if kind == "missing":
            raise StorageError(path, kind, "no such file.") from error
        if kind == "denied":
            message = f"access denied ({describe(error)}). Are the credentials set, and valid for this bucket?"
            raise StorageError(path, kind, message) from error
        if kind == "wrong":
            raise StorageError(path, kind, f"cannot be read ({describe(error)}). Is the URL right?") from error
        if number == self.tries:
            message = f"{number} tries failed, the last with: {describe(error)}. Is the storage reachable?"
            raise StorageError(path, "unreachable", message) from error


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
