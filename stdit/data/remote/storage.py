"""Files of any fsspec URL (s3://, gs://, https://, …) as local ones: fetched into a bounded folder, retried, counted.

Credentials and endpoints are fsspec's and the storage's own: AWS_* variables, ~/.config/fsspec, and so on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from stdit.data.remote.local_cache import Copies
from stdit.data.remote.paths import Member, is_remote, name_of, split_member
from stdit.errors import StditError
from stdit.files import Journal, journal, publish, writing

TRIES = 8  # of one request, with pauses of 0.5, 1, 2, … seconds, a minute in all
LONGEST_PAUSE = 30.0
TIMEOUT = 60.0  # seconds for one request, which asks for at most BLOCK bytes
BLOCK = 8 << 20
OF_ONE_FILE = ("missing", "too_large", "changed")  # reasons that say nothing of other files

Item = TypeVar("Item")
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class StorageError(StditError):
    """A file that storage does not give. `reason`: missing, denied, too_large, changed (while it was read), unreachable
    (after all tries) or wrong (a URL that cannot work)."""

    def __init__(self, path: str, reason: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path, self.reason, self.message = path, reason, message

    @property
    def video_reason(self) -> str:
        """The reason as a `VideoError` has it."""
        return self.reason if self.reason in OF_ONE_FILE else "unreadable"


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
        self.copies = Copies(folder, limit)
        self.tries, self.pause, self.timeout = tries, pause, timeout
        self.retries = 0
        self._lock = threading.Lock()
        self._info = lru_cache(maxsize=1 << 16)(self._ask_info)

    @contextmanager
    def local(self, path: str) -> Iterator[str]:
        """A local path of the same bytes: the path itself, or a copy that stays at least while the context is open.

        Of a file inside a remote tar, only its own bytes are fetched. Raises StorageError.
        """
        if not is_remote(path):
            yield path.removeprefix("file://")
            return
        member = split_member(path)
        name = member.name if member else name_of(path)
        for _ in range(self.tries):
            copy = self._copy_name(path, member, os.path.splitext(name)[1])
            held = self.copies.hold(copy)
            if held is None:
                with self.copies.alone(copy):  # what others have fetched meanwhile is there
                    held = self.copies.hold(copy)
                    if held is None:
                        self._fetch(path, member, copy)
                        held = self.copies.hold(copy)
            if held is not None:  # otherwise another process needed the room at once
                break
        else:
            message = f"its copies in {self.copies.folder} are dropped at once: raise STDIT_LOCAL_GB."
            raise StorageError(path, "unreachable", message)
        with held:
            yield str(self.copies.folder / copy)

    def read(self, path: str) -> bytes:
        """The content of a file."""
        if not is_remote(path):
            try:
                return Path(path.removeprefix("file://")).read_bytes()
            except FileNotFoundError as error:
                raise StorageError(path, "missing", "no such file.") from error
        system, name = self._system(path)
        return self._retried(path, lambda: system.cat_file(name, **self._within(system)))

    def head(self, path: str, size: int) -> bytes:
        """The first bytes of a file; none of what is no regular file."""
        if not is_remote(path):
            path = path.removeprefix("file://")
            if not os.path.isfile(path):
                return b""
            with open(path, "rb") as file:
                return file.read(size)
        system, name = self._system(path)
        return self._retried(path, lambda: system.cat_file(name, start=0, end=size, **self._within(system)))[:size]

    def read_all(self, paths: Sequence[str]) -> list[bytes]:
        """The contents of many files, read side by side."""
        return side_by_side(self.read, paths)

    def write(self, path: str, content: bytes) -> None:
        """Puts a file in its place whole: object stores do so by themselves, local files are renamed into place."""
        if is_remote(path):
            system, name = self._system(path)
            within = self._within(system, len(content))
            return self._put(path, lambda: system.pipe_file(name, content, **within))
        for last in (False, False, True):
            try:
                with publish(path.removeprefix("file://")) as part:
                    part.write_bytes(content)
                return
            except FileNotFoundError:  # another process that writes this file took the part for a leftover
                if last:
                    raise

    @contextmanager
    def publish(self, path: str) -> Iterator[Path]:
        """`files.publish` for a path that may be a URL: the file is sent there whole at the end."""
        if not is_remote(path):
            with publish(path.removeprefix("file://")) as part:
                yield part
            return
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part"
            with writing(part):
                yield part
            system, name = self._system(path)
            within = self._within(system, part.stat().st_size)
            self._put(path, lambda: system.put_file(str(part), name, **within))

    @contextmanager
    def journal(self, path: str) -> Iterator[Journal]:
        """`files.journal` for a path that may be a URL: lines are added to a file in the folder of copies, which is
        sent at the end; a process that was ended goes on with that file. Sends what is there at once, so that a URL
        that cannot be written to is an error before the work."""
        if not is_remote(path):
            with journal(path.removeprefix("file://")) as found:
                yield found
            return
        here = self.copies.folder / "journals" / (hashlib.sha256(path.encode()).hexdigest()[:32] + ".jsonl")
        if not here.exists():
            try:
                before = self.read(path)
            except StorageError as error:
                if error.reason != "missing":
                    raise
                before = b""
            with publish(here) as part:
                part.write_bytes(before)
        self.write(path, here.read_bytes())
        with journal(here) as found:
            yield found
        self.write(path, here.read_bytes())
        here.unlink(missing_ok=True)

    def _put(self, path: str, request: Callable[[], object]) -> None:
        try:
            self._retried(path, request)
        except StorageError as error:
            if error.reason not in ("missing", "wrong"):
                raise
            why = "no such bucket or folder" if error.reason == "missing" else _said(error.__cause__ or error)
            message = f"cannot be written ({why}). Choose another URL, of a store that takes files, or a path."
            raise StorageError(path, error.reason, message) from error

    def names(self, folder: str) -> list[str]:
        """Names of what is directly in a folder, sorted; none if there is no such folder."""
        if not is_remote(folder):
            folder = folder.removeprefix("file://")
            try:
                return sorted(os.listdir(folder))
            except (FileNotFoundError, NotADirectoryError):
                return []
            except OSError as error:  # a disk that does not answer is not an empty one
                raise StorageError(folder, "unreachable", f"cannot be listed ({error.strerror}).") from error
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
        """Names in a remote folder of all files under it but hidden ones; each with its `state` where the list says it.

        Every folder is a request of its own: one that fails does not start the whole again.
        """
        system, first = self._system(folder)
        system.invalidate_cache()
        found: dict[str, list[Any] | None] = {}
        first = first.rstrip("/")
        folders, seen = [first], set()
        while folders:
            name = folders.pop()
            if name in seen:
                continue
            seen.add(name)
            for info in self._entries(system, name, missing=name == first):
                child = info["name"].rstrip("/")
                if info["type"] == "directory":
                    if child != name and not _hidden(child[len(name) + 1 :]):
                        folders.append(child)
                elif (key := info["name"][len(first) + 1 :]) and not key.endswith("/") and not _hidden(key):
                    found[key] = None if info.get("size") is None else _state(info)
        return found

    def _entries(self, system: Any, folder: str, missing: bool) -> list[dict[str, Any]]:
        """What is directly in a folder, and all files whose key goes on with a second "/": no `ls` enters those.

        missing: whether a folder that is not there is an error; else it has only such files, or was removed."""
        url = system.unstrip_protocol(folder)
        found = []
        try:
            found = self._retried(url, partial(system.ls, folder, detail=True))
        except StorageError as error:
            if missing or error.reason != "missing":
                raise
        if not found or any(info["type"] == "directory" and info["name"].rstrip("/") == folder for info in found):
            every = self._retried(url, partial(system.find, folder, detail=True)).values()
            found += [info for info in every if info["name"].startswith(f"{folder}//")]
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

            if _is_chain(path):
                system, name = fsspec.url_to_fs(path, **options)
            else:  # url_to_fs would cut a name at "::"
                protocol = path.partition("://")[0]
                kind = fsspec.get_filesystem_class(protocol)
                system = fsspec.filesystem(protocol, **{**kind._get_kwargs_from_urls(path), **options})
                name = system._strip_protocol(path)
        except (ImportError, ValueError) as error:
            message = f"cannot be read: {error}. pip install 'stdit[remote]' brings what s3:// and https:// need."
            raise StorageError(path, "wrong", message) from error
        if s3:
            system.retries = 1
        return system, name

    def _within(self, system: Any, size: int = 0) -> dict[str, float]:
        """Seconds that a request of `size` bytes may take, where fsspec itself can end it."""
        return {"timeout": self.timeout * max(1, size / BLOCK)} if system.async_impl else {}

    def until_reached(self, path: str, request: Callable[[], Result]) -> Result:
        """What the request returns; tried again while it raises an OSError, and then StorageError "unreachable"."""

        def answered() -> tuple[Any, Exception | None]:
            try:
                return request(), None
            except OSError:
                raise
            except Exception as error:  # no matter of the storage
                return None, error

        result, error = self._retried(path, answered)
        if error is not None:
            raise error
        return result

    def _retried(self, path: str, request: Callable[[], Result]) -> Result:
        for number in range(1, self.tries + 1):
            try:
                return request()
            except StorageError:
                raise
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
        return hashlib.sha256(text.encode()).hexdigest()[:32] + (
            suffix.lower() if suffix[1:].isalnum() and len(suffix) < 16 else ""
        )

    def _fetch(self, path: str, member: Member | None, copy: str) -> None:
        """Block by block, so that a connection that is cut costs a block."""
        url = member.tar if member else path
        info = self._info(url)
        start, size = (member.offset, member.size) if member else (0, info.get("size"))
        if size is not None and size > self.copies.limit:
            message = f"has {size} bytes, STDIT_LOCAL_GB allows {self.copies.limit}. Raise it."
            raise StorageError(path, "too_large", message)
        system, name = self._system(url)
        with self.copies.add(copy, size or 0) as file:
            if size is None:
                file.write(self._retried(path, lambda: system.cat_file(name, **self._within(system))))
            while size is not None and file.tell() < size:
                first = start + file.tell()
                file.write(self._block(path, url, first, min(first + BLOCK, start + size), info))
            if size is not None and size > BLOCK:
                self._check_same(path, url, info)

    def _block(self, path: str, url: str, first: int, end: int, info: dict[str, Any]) -> bytes:
        system, name = self._system(url)

        def request() -> bytes:
            got = system.cat_file(name, start=first, end=end, **self._within(system))
            if len(got) == info["size"]:  # from a server that knows no ranges
                got = got[first:end]
            if len(got) != end - first:
                self._check_same(path, url, info)
                raise OSError(f"{len(got)} bytes came, {end - first} were asked for")
            return got

        return self._retried(path, request)

    def _check_same(self, path: str, url: str, info: dict[str, Any]) -> None:
        if _state(self._ask_info(url)) != _state(info):
            self._info.cache_clear()
            raise StorageError(path, "changed", "was written to while it was read.")


def _is_chain(path: str) -> bool:
    """Whether a URL is several of fsspec's, such as simplecache::s3://bucket/key, and not a name with "::" in it."""
    from fsspec.registry import known_implementations

    links = path.split("::")
    return len(links) > 1 and all("://" in link or link in known_implementations for link in links)


def _hidden(name: str) -> bool:
    """Whether a name, or a folder in it, begins with a dot; a store may have folders called "." and ".."."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results in order, some thousands at a time, so that millions of items cost no more memory than results."""
    with ThreadPoolExecutor(16) as pool:
        return [one for i in range(0, len(items), 4096) for one in pool.map(function, items[i : i + 4096])]


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
