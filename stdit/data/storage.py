"""Files of any fsspec URL (s3://, gs://, https://, …) as local ones: fetched into a bounded folder, retried, counted.

STDIT_LOCAL is the folder (default: stdit/remote in the user's cache folder), shared by all processes of a machine, and
STDIT_LOCAL_GB its bound (default 32): what was used longest ago goes first, what is being read stays. Credentials and
endpoints are fsspec's and the storage's own: AWS_* variables, ~/.config/fsspec, and so on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from stdit.data.paths import Member, is_remote, split_member
from stdit.errors import StditError
from stdit.files import publish

TRIES = 8  # of one request, with pauses of 0.5, 1, 2, … seconds, a minute in all
LONGEST_PAUSE = 30.0
TIMEOUT = 60.0  # seconds for one request, which asks for at most BLOCK bytes
BLOCK = 8 << 20
PROCESSES = 16  # that share the folder, at a guess
STALE = 3600.0  # seconds after which a part that nobody finished is taken for a dead process's

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class StorageError(StditError):
    """A file that storage does not give. `reason`: missing, denied, too_large, unreachable (after all tries) or wrong
    (a URL that cannot work)."""

    def __init__(self, path: str, reason: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path, self.reason, self.message = path, reason, message

    @property
    def video_reason(self) -> str:
        """The reason as a `VideoError` has it."""
        return self.reason if self.reason in ("missing", "too_large") else "unreadable"


class Storage:
    """Reads and writes whole files by path, local ones directly; thread-safe.

    retries: requests that failed and were tried again, so far. pause: seconds before the first of a request's retries.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        limit: int | None = None,
        tries: int = TRIES,
        pause: float = 0.5,
        timeout: float = TIMEOUT,
    ) -> None:
        self._folder, self._limit = folder, limit
        self.tries, self.pause, self.timeout = tries, pause, timeout
        self.retries = 0
        self._lock, self._looking = threading.Lock(), threading.Lock()
        self._allowance = -1.0
        self._info = lru_cache(maxsize=1 << 16)(self._ask_info)

    @property
    def folder(self) -> Path:
        """Where fetched files lie."""
        if self._folder is None:
            home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            self._folder = os.environ.get("STDIT_LOCAL") or os.path.join(home, "stdit", "remote")
        return Path(self._folder)

    @property
    def limit(self) -> int:
        """Bytes that fetched files may take."""
        if self._limit is None:
            text = os.environ.get("STDIT_LOCAL_GB", "32")
            try:
                self._limit = int(float(text) * 1e9)
            except (ValueError, OverflowError):
                raise StditError(f"STDIT_LOCAL_GB is {text!r}; it must be a number of gigabytes.") from None
        return self._limit

    @contextmanager
    def local(self, path: str) -> Iterator[str]:
        """A local path of the same bytes: the path itself, or a copy that stays at least while the context is open.

        Of a file inside a remote tar, only its own bytes are fetched. Raises StorageError.
        """
        if not is_remote(path):
            yield path.removeprefix("file://")
            return
        member = split_member(path)
        name = member.name if member else path.partition("?")[0]
        for _ in range(self.tries):
            copy = self.folder / self._copy_name(path, member, os.path.splitext(name)[1])
            held = _hold(copy)
            if held is None:
                self._fetch(path, member, copy)
                held = _hold(copy)
            if held is not None:  # otherwise another process needed the room at once
                break
        else:
            raise StorageError(path, "unreachable", f"its copies in {self.folder} keep vanishing: {_ROOM}")
        with held:
            yield str(copy)

    def read(self, path: str) -> bytes:
        """The content of a file."""
        if not is_remote(path):
            try:
                return Path(path.removeprefix("file://")).read_bytes()
            except FileNotFoundError as error:
                raise StorageError(path, "missing", "no such file.") from error
        system, name = self._system(path)
        return self._retried(path, lambda: system.cat_file(name, **self._within(system)))

    def read_all(self, paths: Sequence[str]) -> list[bytes]:
        """The contents of many files, read side by side."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(self.read, paths))

    def write(self, path: str, content: bytes) -> None:
        """Puts a file in its place whole: object stores do so by themselves, local files are renamed into place."""
        if not is_remote(path):
            with publish(path.removeprefix("file://")) as part:
                part.write_bytes(content)
            return
        system, name = self._system(path)
        self._retried(path, lambda: system.pipe_file(name, content, **self._within(system, len(content))))

    def names(self, folder: str) -> list[str]:
        """Names of what is directly in a folder, sorted; none if there is no such folder."""
        if not is_remote(folder):
            folder = folder.removeprefix("file://")
            return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        system, name = self._system(folder)
        try:
            system.invalidate_cache()
            found = self._retried(folder, lambda: system.ls(name, detail=False))
        except StorageError as error:
            if error.reason == "missing":
                return []
            raise
        return sorted(one.rstrip("/").rpartition("/")[2] for one in found)

    def find(self, folder: str) -> dict[str, list[Any] | None]:
        """URLs of all files under a remote folder, hidden ones left out; each with its `state` where the list says it.

        Every folder is a request of its own: one that fails does not start the whole again.
        """
        system, first = self._system(folder)
        system.invalidate_cache()
        found: dict[str, list[Any] | None] = {}
        folders, seen = [first.rstrip("/")], set()
        while folders:
            name = folders.pop()
            if name in seen:
                continue
            seen.add(name)
            url = system.unstrip_protocol(name)
            for info in self._retried(url, partial(system.ls, name, detail=True)):
                child = info["name"].rstrip("/")
                if child == name or child.rpartition("/")[2].startswith("."):
                    continue
                if info["type"] == "directory":
                    folders.append(child)
                elif not info["name"].endswith("/"):
                    found[system.unstrip_protocol(child)] = None if info.get("size") is None else _state(info)
        return found

    def state(self, url: str) -> list[Any]:
        """What tells one version of a remote file from the next, as JSON has it."""
        return _state(self._info(url))

    def _ask_info(self, path: str) -> dict[str, Any]:
        system, name = self._system(path)
        return self._retried(path, lambda: system.info(name, **self._within(system)))

    def _system(self, path: str) -> tuple[Any, str]:
        """The file system and the path in it. Trying again is left to us: hidden retries are not counted or logged."""
        s3 = path.startswith(("s3://", "s3a://"))
        times = {"connect_timeout": self.timeout, "read_timeout": self.timeout}
        options = {"config_kwargs": {"retries": {"total_max_attempts": 1}, **times}} if s3 else {}
        try:
            import fsspec

            system, name = fsspec.url_to_fs(path, **options)
        except (ImportError, ValueError) as error:
            message = f"cannot be read: {error}. pip install 'stdit[remote]' brings what s3:// and https:// need."
            raise StorageError(path, "wrong", message) from error
        if s3:
            system.retries = 1
        return system, name

    def _within(self, system: Any, size: int = 0) -> dict[str, float]:
        """Seconds that a request of `size` bytes may take, where fsspec itself can end it."""
        return {"timeout": self.timeout * max(1, size / BLOCK)} if system.async_impl else {}

    def _retried(self, path: str, request: Callable[[], Result]) -> Result:
        for number in range(1, self.tries + 1):
            try:
                return request()
            except Exception as error:
                self._give_up(path, error, number)
                pause = min(LONGEST_PAUSE, self.pause * 2 ** (number - 1)) * random.uniform(0.75, 1.25)
                with self._lock:
                    self.retries += 1
                text = "%s: try %d of %d failed (%s); again in %.1f s"
                log.warning(text, path, number, self.tries, _said(error), pause)
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _give_up(self, path: str, error: Exception, number: int) -> None:
        """Raises if there is no use in trying again."""
        kind = _kind(error)
        if kind == "missing":
            raise StorageError(path, kind, "no such file.") from error
        if kind == "denied":
            message = f"access is denied ({_said(error)}). Are the credentials set, and for this bucket?"
            raise StorageError(path, kind, message) from error
        if kind == "wrong":
            raise StorageError(path, kind, f"cannot be read ({_said(error)}). Is the URL right?") from error
        if number == self.tries:
            message = f"{number} tries failed, the last with: {_said(error)}. Is the storage reachable?"
            raise StorageError(path, "unreachable", message) from error

    def _copy_name(self, path: str, member: Member | None, suffix: str) -> str:
        state = _state(self._info(member.tar if member else path))
        text = json.dumps([path, state])
        return hashlib.sha256(text.encode()).hexdigest()[:32] + (suffix.lower() if suffix[1:].isalnum() else "")

    def _fetch(self, path: str, member: Member | None, copy: Path) -> None:
        """Block by block, so that a connection that is cut costs a block."""
        url = member.tar if member else path
        info = self._info(url)
        start, size = (member.offset, member.size) if member else (0, info.get("size"))
        if size is not None and size > self.limit:
            raise StorageError(path, "too_large", f"has {size} bytes, STDIT_LOCAL_GB allows {self.limit}. Raise it.")
        copy.parent.mkdir(parents=True, exist_ok=True)
        self._make_room(size or 0)
        system, name = self._system(url)
        part = copy.with_name(f".{copy.name}.{secrets.token_hex(4)}.part")
        try:
            with open(part, "wb") as file:
                if size is None:
                    file.write(self._retried(path, lambda: system.cat_file(name, **self._within(system))))
                while size is not None and file.tell() < size:
                    first = start + file.tell()
                    end = min(first + BLOCK, start + size)
                    file.write(self._block(path, system, name, first, end, info.get("size")))
            os.replace(part, copy)
        finally:
            part.unlink(missing_ok=True)

    def _block(self, path: str, system: Any, name: str, first: int, end: int, total: int | None) -> bytes:
        def request() -> bytes:
            got = system.cat_file(name, start=first, end=end, **self._within(system))
            if len(got) == total:  # from a server that knows no ranges
                got = got[first:end]
            if len(got) != end - first:
                self._info.cache_clear()  # perhaps it is another file by now
                raise OSError(f"{len(got)} bytes came, {end - first} were asked for")
            return got

        return self._retried(path, request)

    def _make_room(self, size: int) -> None:
        """Looks at the folder only now and then: a process may add a share of what was free when it last looked."""
        with self._looking:
            self._allowance -= size
            if self._allowance >= 0:
                return
            files, used = [], 0
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    with suppress(OSError):  # gone meanwhile
                        status = entry.stat()
                        used += status.st_size
                        finished = not entry.name.startswith(".")
                        if finished or time.time() - status.st_mtime > STALE:
                            files.append((finished, status.st_mtime, status.st_size, entry.path))
            wanted = self.limit if used + size <= self.limit else 0.9 * self.limit
            for _, _, bytes_, path in sorted(files):
                if used + size <= wanted:
                    break
                if _drop(path):
                    used -= bytes_
            self._allowance = (self.limit - used - size) / PROCESSES


_ROOM = "more is read at the same time than STDIT_LOCAL_GB has room for. Raise it."


def _hold(path: Path) -> BinaryIO | None:
    """The file opened, marked as used now and locked against `_drop`; None if it is not there."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    except FileNotFoundError:
        return None
    with suppress(ImportError, OSError):  # Windows keeps open files by itself
        import fcntl

        fcntl.flock(file, fcntl.LOCK_SH)
    with suppress(OSError):
        os.utime(path)
    if os.path.exists(path):
        return file
    file.close()
    return None


def _drop(path: str) -> bool:
    """Removes a fetched file unless someone holds it."""
    try:
        with open(path, "rb") as file, suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
            return True
        os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _state(info: dict[str, Any]) -> list[Any]:
    """What tells one version of a remote file from the next, as JSON has it."""
    names = ("size", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "updated", "created")
    return [None if info.get(name) is None else str(info[name]) for name in names]


def _kind(error: Exception) -> str:
    """missing, denied, wrong (no use in trying again), or passing."""
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "passing"
    seen: BaseException | None = error
    while seen is not None:  # fsspec's HTTP calls every failure of a HEAD "not found" and keeps the cause
        status = _status(seen)
        if status is not None:
            kinds = {404: "missing", 410: "missing", 401: "denied", 403: "denied"}
            passing = status >= 500 or status in (408, 409, 425, 429)
            return kinds.get(status, "passing" if passing else "wrong")
        seen = seen.__cause__
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__
        return "missing" if cause is None or isinstance(cause, FileNotFoundError | LookupError) else "passing"
    if isinstance(error, PermissionError) or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return "denied"
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return "wrong"
    permanent = isinstance(error, ValueError | TypeError | ImportError | NotImplementedError)
    return "wrong" if permanent and not isinstance(error, OSError) else "passing"


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of some library is about."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    if status is None and not type(error).__module__.startswith("aiohttp"):  # whose code 400 is an answer cut short
        status = getattr(error, "code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


STORAGE = Storage()
