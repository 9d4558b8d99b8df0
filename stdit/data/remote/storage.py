"""Files of any fsspec URL (s3://, gs://, https://, …) as local ones: fetched into a bounded folder, with retries.

Credentials and endpoints are configured as fsspec and the storage expect: AWS_* variables, ~/.config/fsspec, and so on.
"""

from __future__ import annotations

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
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from stdit.data.remote.failures import DiskFailure, FileError, StorageError, describe, failure_kind, is_disk_failure
from stdit.data.remote.local_cache import LocalCache
from stdit.data.remote.paths import Member, is_remote, name_of, split_member
from stdit.files import Journal, journal, publish, whole_objects, writing

TRIES = 8  # per request, with pauses of 0.5, 1, 2, … seconds: about a minute in all
LONGEST_PAUSE = 30.0
TIMEOUT = 60.0  # seconds per request of at most BLOCK bytes
BLOCK = 8 << 20
_FINAL = {  # messages by reason
    "missing": "no such file.",
    "denied": "access denied ({error}). Are the credentials set, and valid for this bucket?",
    "wrong": "cannot be read ({error}). Is the URL right?",
    "disk": "{tries} tries failed, the last with: {error}. Check the disk; if it is this file alone, move it away.",
    "unreachable": "{tries} tries failed, the last with: {error}. Is the storage reachable?",
}

Item = TypeVar("Item")
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Storage:
    """Reads and writes whole files, local or remote, by path. Thread-safe.

    A request is tried `tries` times: again after `pause` seconds, then after twice as many, and so on. One of BLOCK
    bytes may take `timeout` seconds.
    """

    def __init__(
        self, local_cache: LocalCache | None = None, tries: int = TRIES, pause: float = 0.5, timeout: float = TIMEOUT
    ) -> None:
        self.local_cache = local_cache or LocalCache()
        self.tries, self.pause, self.timeout = tries, pause, timeout
        self.retries = 0  # so far, of all requests
        self._lock = threading.Lock()
        self._info = lru_cache(maxsize=1 << 16)(self._ask_info)

    def retried(self, path: str, request: Callable[[], Result], retry_on: type[Exception] = Exception) -> Result:
        """The request's result. Raises StorageError when it fails for good, and exceptions of other types unchanged."""
        for number in range(1, self.tries + 1):
            try:
                return request()
            except StorageError:
                raise
            except retry_on as error:
                kind, text = failure_kind(error), describe(error)
                if kind == "passing" and number == self.tries:
                    kind = "unreachable"
                if kind != "passing":
                    failure = StorageError if kind == "unreachable" else FileError
                    why = _FINAL["disk" if kind == "unreachable" and not is_remote(path) else kind]
                    raise failure(path, kind, why.format(error=text, tries=number)) from error
                pause = min(LONGEST_PAUSE, self.pause * 2 ** (number - 1)) * random.uniform(0.75, 1.25)
                with self._lock:
                    self.retries += 1
                log.warning("%s: try %d of %d failed (%s); next in %.1f s", path, number, self.tries, text, pause)
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def from_disk(self, path: str, request: Callable[[], Result]) -> Result:
        """The result of a request to a local disk. Its failures are tried again; errors of the file pass unchanged."""

        def tried() -> Result:
            try:
                return request()
            except Exception as error:
                if is_disk_failure(error):
                    raise DiskFailure(getattr(error, "strerror", None) or str(error)) from error
                raise

        return self.retried(path, tried, retry_on=DiskFailure)

    @contextmanager
    def local(self, path: str) -> Iterator[str]:
        """A local path to the file's bytes: the path itself, or a cached copy pinned while the context is open.

        For a member of a remote tar, only its own bytes are fetched. Raises StorageError.
        """
        if not is_remote(path):
            yield path.removeprefix("file://")
            return
        member = split_member(path)
        name = member.name if member else name_of(path)
        cache = self.local_cache
        for _ in range(self.tries):
            cached = self._cached_name(path, member, os.path.splitext(name)[1])
            pinned = cache.pin(cached)
            if pinned is None:
                with cache.mutex(cached):
                    pinned = cache.pin(cached)  # another thread or process may have fetched it
                    if pinned is None:
                        self._fetch(path, member, cached)
                        pinned = cache.pin(cached)
            if pinned is not None:  # else another process has already dropped it to make room
                with pinned:
                    yield str(cache.folder / cached)
                return
        message = f"its copies in {cache.folder} are dropped at once: raise STDIT_LOCAL_GB."
        raise StorageError(path, "unreachable", message)

    def read(self, path: str) -> bytes:
        """A file's content."""
        if not is_remote(path):
            try:
                return self.from_disk(path, Path(path.removeprefix("file://")).read_bytes)
            except FileNotFoundError as error:
                raise FileError(path, "missing", "no such file.") from error
        return self._bytes(path)

    def lines(self, path: str) -> list[dict[str, Any]]:
        """What a journal holds; nothing if there is none."""
        with _may_be_missing(), self.local(path) as local:
            return whole_objects(Path(local))
        return []

    def head(self, path: str, size: int) -> bytes:
        """A file's first `size` bytes; b"" if it is not a regular file."""
        if not is_remote(path):
            path = path.removeprefix("file://")
            return self.from_disk(path, lambda: _head(path, size))
        return self._bytes(path, start=0, end=size)[:size]

    def write(self, path: str, content: bytes) -> None:
        """Writes a file atomically."""
        if is_remote(path):
            system, name = self._system(path)
            timeout = self._timeout_for(system, len(content))
            return self._put(path, lambda: system.pipe_file(name, content, **timeout))
        for last in (False, False, True):
            try:
                with publish(path.removeprefix("file://")) as part:
                    part.write_bytes(content)
                return
            except FileNotFoundError:  # another process writing this file removed our part as a leftover
                if last:
                    raise

    def remove(self, path: str) -> None:
        """Removes a file; it need not exist."""
        if not is_remote(path):
            Path(path.removeprefix("file://")).unlink(missing_ok=True)
            return
        system, name = self._system(path)
        with _may_be_missing():
            self.retried(path, lambda: system.rm_file(name))

    @contextmanager
    def publish(self, path: str) -> Iterator[Path]:
        """As `files.publish`, also for URLs: the finished file is uploaded whole."""
        if not is_remote(path):
            with publish(path.removeprefix("file://")) as part:
                yield part
            return
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part"
            with writing(part):
                yield part
            system, name = self._system(path)
            timeout = self._timeout_for(system, part.stat().st_size)
            self._put(path, lambda: system.put_file(str(part), name, **timeout))

    @contextmanager
    def journal(self, path: str) -> Iterator[Journal]:
        """As `files.journal`, also for URLs: lines go to a local journal, which is uploaded at the end.

        An interrupted process continues with the local journal. It is also uploaded at the start, so that a URL that
        cannot be written to fails before any work is done.
        """
        if not is_remote(path):
            with journal(path.removeprefix("file://")) as entries:
                yield entries
            return
        here = self.local_cache.folder / "journals" / (hashlib.sha256(path.encode()).hexdigest()[:32] + ".jsonl")
        if not here.exists():
            before = b""
            with _may_be_missing():
                before = self.read(path)
            with publish(here) as part:
                part.write_bytes(before)
        self.write(path, here.read_bytes())
        with journal(here) as entries:
            yield entries
        self.write(path, here.read_bytes())
        here.unlink(missing_ok=True)

    def _put(self, path: str, request: Callable[[], object]) -> None:
        try:
            self.retried(path, request)
        except StorageError as error:
            if error.reason not in ("missing", "wrong"):
                raise
            why = "no such bucket or folder" if error.reason == "missing" else describe(error.__cause__ or error)
            message = f"cannot be written ({why}). Choose a writable URL or a local path."
            raise FileError(path, error.reason, message) from error

    def names(self, folder: str) -> list[str]:
        """The sorted names of a folder's entries; empty if there is no such folder."""
        if not is_remote(folder):
            folder = folder.removeprefix("file://")
            try:
                return sorted(self.from_disk(folder, lambda: os.listdir(folder)))
            except (FileNotFoundError, NotADirectoryError):
                return []
            except OSError as error:
                raise StorageError(folder, "unreachable", f"cannot be listed ({error.strerror}).") from error
        system, name = self._system(folder)
        found: list[str] = []
        system.invalidate_cache()
        with _may_be_missing():
            found = self.retried(folder, lambda: system.ls(name, detail=False))
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in found)

    def find(self, folder: str) -> dict[str, list[Any] | None]:
        """All files under a remote folder by relative name, hidden ones left out, with their `state` if listed.

        Each folder is one request, so a failed request does not restart the whole listing.
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
        """A folder's entries, and all files whose key continues with a second "/", which no `ls` lists.

        missing: raise if the folder is not there; otherwise it may hold only such keys, or have been removed.
        """
        url = system.unstrip_protocol(folder)
        found = []
        with nullcontext() if missing else _may_be_missing():
            found = self.retried(url, partial(system.ls, folder, detail=True))
        if not found or any(info["type"] == "directory" and info["name"].rstrip("/") == folder for info in found):
            every = self.retried(url, partial(system.find, folder, detail=True)).values()
            found += [info for info in every if info["name"].startswith(f"{folder}//")]
        return found

    def state(self, url: str) -> list[Any]:
        """Identifies the current version of a remote file; JSON-serialisable."""
        return _state(self._info(url))

    def _bytes(self, path: str, **span: int) -> bytes:
        """A remote file's bytes, or those from `start` to `end`."""
        system, name = self._system(path)
        return self.retried(path, lambda: system.cat_file(name, **span, **self._timeout_for(system)))

    def _ask_info(self, path: str) -> dict[str, Any]:
        system, name = self._system(path)
        return self.retried(path, lambda: system.info(name, **self._timeout_for(system)))

    def _system(self, path: str) -> tuple[Any, str]:
        """fsspec's file system and the path in it. Its own retries are off: they would not be counted or logged."""
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
            message = f"cannot be read: {error}. s3:// and https:// need: pip install 'stdit[remote]'."
            raise FileError(path, "wrong", message) from error
        if s3:
            system.retries = 1
        return system, name

    def _timeout_for(self, system: Any, size: int = 0) -> dict[str, float]:
        """fsspec's timeout option for a request of `size` bytes, if the file system has one."""
        return {"timeout": self.timeout * max(1, size / BLOCK)} if system.async_impl else {}

    def _cached_name(self, path: str, member: Member | None, suffix: str) -> str:
        state = self.state(member.tar if member else path)
        name = hashlib.sha256(json.dumps([path, state]).encode()).hexdigest()[:32]
        return name + (suffix.lower() if suffix[1:].isalnum() and len(suffix) < 16 else "")

    def _fetch(self, path: str, member: Member | None, copy: str) -> None:
        """Downloads into the local cache in blocks, so that a broken connection costs only one block."""
        url = member.tar if member else path
        info = self._info(url)
        start, size = (member.offset, member.size) if member else (0, info.get("size"))
        if size is not None and size > self.local_cache.limit:
            message = f"has {size} bytes; STDIT_LOCAL_GB allows {self.local_cache.limit}. Raise it."
            raise FileError(path, "too_large", message)
        with self.local_cache.add(copy, size or 0) as file:
            if size is None:
                file.write(self._bytes(path))
                return
            while file.tell() < size:
                first = start + file.tell()
                file.write(self._block(path, url, first, min(first + BLOCK, start + size), info))
            if size > BLOCK:
                self._check_same(path, url, info)

    def _block(self, path: str, url: str, first: int, end: int, info: dict[str, Any]) -> bytes:
        system, name = self._system(url)

        def request() -> bytes:
            got = system.cat_file(name, start=first, end=end, **self._timeout_for(system))
            if len(got) == info["size"]:  # the server ignores ranges
                got = got[first:end]
            if len(got) != end - first:
                self._check_same(path, url, info)
                raise OSError(f"got {len(got)} of {end - first} bytes")
            return got

        return self.retried(path, request)

    def _check_same(self, path: str, url: str, info: dict[str, Any]) -> None:
        if _state(self._ask_info(url)) != _state(info):
            self._info.cache_clear()
            raise FileError(path, "changed", "was modified while it was being read.")


def _head(path: str, size: int) -> bytes:
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return file.read(size)


@contextmanager
def _may_be_missing() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        if error.reason != "missing":
            raise


def _is_chain(path: str) -> bool:
    """Whether a URL chains fsspec file systems (simplecache::s3://bucket/key), rather than having "::" in a name."""
    from fsspec.registry import known_implementations

    links = path.split("::")
    return len(links) > 1 and all("://" in link or link in known_implementations for link in links)


def _hidden(name: str) -> bool:
    """Whether a part of a path begins with a dot; object stores may have folders called "." and ".."."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The function's results in order. Items are submitted in blocks, so that millions of futures never coexist."""
    with ThreadPoolExecutor(16) as pool:
        return [result for i in range(0, len(items), 4096) for result in pool.map(function, items[i : i + 4096])]


def _state(info: dict[str, Any]) -> list[Any]:
    """The fields of fsspec's file info that change when the file does."""
    names = ("size", "ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "updated", "created")
    return [None if info.get(name) is None else str(info[name]) for name in names]


STORAGE = Storage()
