"""What a path may be: a local file, a URL of any fsspec scheme, or a file inside a tar shard of either.

A file inside a tar is `SHARD.tar#OFFSET+SIZE/NAME`: where its bytes lie, and its name, whose suffix tells what it is.
Cheap to import: the processes that decode files do.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

_TAR = r"(?P<tar>https?://[^?#]+\.tar\?[^#]*|.+\.tar)"  # only a web address has a query: elsewhere "?" is of the name
_MEMBER = re.compile(_TAR + r"#(?P<offset>\d+)\+(?P<size>\d+)/(?P<name>.+)", re.DOTALL | re.IGNORECASE)


class Member(NamedTuple):
    """A file inside a tar: `size` bytes from `offset` of the shard."""

    tar: str
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.tar}#{self.offset}+{self.size}/{self.name}"


def split_member(path: str) -> Member | None:
    """What a path says of a tar's member; None for a file of its own."""
    found = _MEMBER.fullmatch(path)
    return found and Member(found["tar"], int(found["offset"]), int(found["size"]), found["name"])


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def file_of(path: str) -> str:
    """The file that holds a path's bytes: the path itself, or the tar it is in."""
    member = split_member(path)
    return member.tar if member else path


def join(folder: str, name: str) -> str:
    """`name` in a folder that may be a URL."""
    return f"{folder.rstrip('/')}/{name}" if "://" in folder else os.path.join(folder, name)


def name_of(path: str) -> str:
    """A path or URL without the query of a web address: its suffix says what the file is."""
    return path.partition("?")[0] if path.startswith(("http://", "https://")) else path


def beside(path: str | Path, suffix: str) -> str:
    """A file's path or URL with another suffix."""
    path = str(path)
    return os.path.splitext(path)[0] + suffix


def open_bytes(path: str) -> BinaryIO:
    """A local file, or a part of one, opened for reading."""
    member = split_member(path)
    return open(path, "rb") if member is None else io.BufferedReader(_Section(member))


class _Section(io.RawIOBase):
    def __init__(self, member: Member) -> None:
        self._file = open(member.tar, "rb", buffering=0)  # noqa: SIM115 (closed with this)
        self._first, self._size, self._at = member.offset, member.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError(f"seek to {at}, before the beginning.")
        self._at = at
        return at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._first + self._at)
        wanted = max(0, min(len(buffer), self._size - self._at))
        got = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()
