"""A folder of files fetched from elsewhere, bounded in bytes and shared by the processes of a machine.

STDIT_LOCAL is the folder (default: stdit/remote in the user's cache folder), STDIT_LOCAL_GB its bound (default 32).
What was used longest ago goes first; what is being read stays, on top of the bound if need be.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from stdit.errors import StditError
from stdit.files import writing

PROCESSES = 16  # that share the folder, at a guess
STALE = 3600.0  # seconds after which a part that nobody finished is taken for a dead process's


class Copies:
    def __init__(self, folder: str | Path | None = None, limit: int | None = None) -> None:
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()
        self._allowance = -1.0

    @property
    def folder(self) -> Path:
        if self._folder is None:
            home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            self._folder = os.environ.get("STDIT_LOCAL") or os.path.join(home, "stdit", "remote")
        return Path(self._folder)

    @property
    def limit(self) -> int:
        """Bytes that the files may take."""
        if self._limit is None:
            text = os.environ.get("STDIT_LOCAL_GB", "32")
            try:
                limit = int(float(text) * 1e9)
            except (ValueError, OverflowError):
                limit = 0
            if limit <= 0:
                raise StditError(f"STDIT_LOCAL_GB is {text!r}; it must be a positive number of gigabytes.")
            self._limit = limit
        return self._limit

    def hold(self, name: str) -> BinaryIO | None:
        """The file opened, marked as used now, and kept until it is closed; None if it is not there."""
        path = self.folder / name
        try:
            file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
        except FileNotFoundError:
            return None
        with suppress(ImportError, OSError):  # Windows keeps open files by itself
            import fcntl

            fcntl.flock(file, fcntl.LOCK_SH)
        with suppress(OSError):
            os.utime(path)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # not dropped before the lock
                return file
        file.close()
        return None

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """One thread of one process at a time is in this context for a name (on Windows any): two that each put a copy
        in place would leave the first holding one that is not there. Who enters looks whether anything is left to do.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / f".{name}.lock"
        with _locked(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    @contextmanager
    def add(self, name: str, size: int) -> Iterator[BinaryIO]:
        """A file to write a new copy to; it takes its place when the context ends without an error. size: its bytes,
        0 where they are not known before."""
        self._make_room(size)
        part = self.folder / f".{name}.{secrets.token_hex(4)}.part"
        try:
            with writing(f"{self.folder} (STDIT_LOCAL)"), open(part, "wb") as file:
                yield file
                more = file.tell() - size  # of a server that does not tell sizes
            if more > 0:
                self._make_room(more)
            os.replace(part, self.folder / name)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Looks at the folder only now and then: a process may add a share of what was free when it last looked."""
        with self._lock:
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


def _locked(lock: Path) -> BinaryIO:
    """The file opened, and locked while it is open."""
    for tries_left in reversed(range(100)):  # not for ever, where a file system gives one file two identities
        file = open(lock, "wb")  # noqa: SIM115 (the caller closes it)
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):  # not removed by the one before
                break
        if tries_left:
            file.close()
    return file


def _drop(path: str) -> bool:
    """Removes a file unless someone holds it."""
    try:
        with open(path, "rb") as file, suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a new one may have taken its place since it was opened, which someone may hold
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                os.unlink(path)
            return True
        os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
