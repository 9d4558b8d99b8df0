"""A bounded folder of files fetched from remote storage, shared by all processes of a machine.

Set by STDIT_LOCAL (the folder; default: stdit/remote in the user's cache folder) and STDIT_LOCAL_GB (its size; default
32). The least recently used files are dropped first. Files being read are kept, even beyond the limit.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from stdit.errors import StditError
from stdit.files import writing

PROCESSES = 16  # assumed to share the folder
STALE = 3600.0  # seconds after which an unfinished file counts as left by a dead process


class LocalCache:
    def __init__(self, folder: str | Path | None = None, limit: int | None = None) -> None:
        self._given_folder, self._given_limit = folder, limit
        self._lock = threading.Lock()
        self._allowance = -1.0

    @cached_property
    def folder(self) -> Path:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(self._given_folder or os.environ.get("STDIT_LOCAL") or os.path.join(home, "stdit", "remote"))

    @cached_property
    def limit(self) -> int:
        """The folder's size limit in bytes."""
        if self._given_limit is not None:
            return self._given_limit
        text = os.environ.get("STDIT_LOCAL_GB", "32")
        with suppress(ValueError, OverflowError):
            if (limit := int(float(text) * 1e9)) > 0:
                return limit
        raise StditError(f"STDIT_LOCAL_GB is {text!r}; it must be a positive number of gigabytes.")

    def pin(self, name: str) -> BinaryIO | None:
        """Opens a file, marks it as just used, and keeps it in the folder until closed; None if it is not there."""
        path = self.folder / name
        try:
            file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
        except FileNotFoundError:
            return None
        with suppress(ImportError, OSError):  # Windows never removes an open file
            import fcntl

            fcntl.flock(file, fcntl.LOCK_SH)  # filelock has no shared locks
        with suppress(OSError):
            os.utime(path)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # not dropped before we held the lock
                return file
        file.close()
        return None

    @contextmanager
    def mutex(self, name: str) -> Iterator[None]:
        """A mutex per name across threads and processes. Callers must re-check after acquiring it."""
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / f".{name}.lock"
        with FileLock(lock):
            try:
                yield
            finally:
                with suppress(OSError):  # Windows cannot remove a locked file
                    lock.unlink()  # whoever waits for it locks a new one

    @contextmanager
    def add(self, name: str, size: int) -> Iterator[BinaryIO]:
        """A file to write to; it appears under its name when the context ends without an error. size: 0 if unknown."""
        self._make_room(size)
        part = self.folder / f".{name}.{secrets.token_hex(4)}.part"
        try:
            with writing(f"{self.folder} (STDIT_LOCAL)"), open(part, "wb") as file:
                yield file
                excess = file.tell() - size
            if excess > 0:
                self._make_room(excess)
            os.replace(part, self.folder / name)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Drops old files if `size` more bytes exceed the limit.

        Listing the folder for each file would be slow: after a listing, this process may add a share of the free space.
        """
        with self._lock:
            self._allowance -= size
            if self._allowance >= 0:
                return
            files, used = [], 0
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    with suppress(OSError):  # removed meanwhile
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


def _drop(path: str) -> bool:
    """Removes a file unless it is pinned or locked. Returns whether it is gone."""
    try:
        with open(path, "rb") as file, suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a new file, perhaps pinned, may have replaced it since it was opened
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                os.unlink(path)
            return True
        os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
