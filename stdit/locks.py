"""A lock on a folder, so that two commands do not write to it at once. It ends with its process, however that ends.

The `filelock` package does not fit: it refuses a lock file that belongs to another user, fails on network disks mounted
without locks (ENOLCK), and does not say who holds a lock.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stdit.errors import StditError
from stdit.files import make_folder
from stdit.heartbeat import HEARTBEAT

NAME = ".stdit.lock"
WAIT = 10.0  # seconds: a process that was just killed takes a while to end
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


@contextmanager
def locked(folder: str | Path, what: str, remedy: str, keep: bool = False) -> Iterator[None]:
    """Makes the folder and locks it for this process. Raises StditError if another process holds the lock.

    The lock is an flock on a file in the folder, which says who holds it: what, host, process, and since when. Network
    disks that are mounted with locks share it between machines. Where a disk or system (Windows) has no locks, this
    prints a warning and continues without one.

    what, remedy: for messages: the command that takes the lock, and what to do if the folder is in use.
    keep: leave the file there at the end.
    """
    path = make_folder(folder) / NAME
    descriptor = _lock(path, remedy)
    if descriptor is None:
        print(f"{folder}: this disk has no file locks. Make sure that only one command writes there.", file=sys.stderr)
        yield
        return
    try:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"what": what, "host": socket.gethostname(), "pid": os.getpid(), "since": now}
        with suppress(OSError):  # disk full, or another user's file: the lock holds nevertheless
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(holder).encode())
        yield
    finally:
        if not keep:
            with suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _lock(path: Path, remedy: str) -> int | None:
    """A descriptor that holds the lock until it is closed; None if there are no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    end, told = time.monotonic() + WAIT, False
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:  # another user's file in a shared folder
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            if path.parent.is_dir():
                raise
            make_folder(path.parent)  # the last holder failed and removed its empty folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # not removed by the last holder
                    return descriptor
        except OSError as error:
            if error.errno in _NO_LOCKS:
                os.close(descriptor)
                return None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise
        os.close(descriptor)
        if time.monotonic() > end:
            raise StditError(f"{path.parent}: is in use by {_holder(path)}. {remedy}")
        if not told:
            print(f"{path.parent}: is in use by {_holder(path)}; waiting {WAIT:g} s for its end.", file=sys.stderr)
            HEARTBEAT.doing(f"waiting for {path.parent}")
            HEARTBEAT.spoke()
            told = True
        time.sleep(0.1)


def _holder(path: Path) -> str:
    """Describes the process that wrote the file last."""
    try:
        found = json.loads(path.read_bytes())
        said = f"{found['what']} (process {found['pid']} on {found['host']}, since {found['since']})"
        away = found["host"] != socket.gethostname()
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    return said + (f"; if that machine is gone, remove {path}" if away else "")
