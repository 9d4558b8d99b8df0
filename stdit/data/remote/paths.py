"""Paths: local files, URLs of any fsspec scheme, and members of tar shards.

A tar member is `SHARD.tar#OFFSET+SIZE/NAME`: the position of its bytes, and its name, whose suffix gives its type.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

_TAR = r"(?P<tar>https?://[^?#]+\.tar\?[^#]*|.+\.tar)"  # "?" begins a query in web addresses only
_MEMBER = re.compile(_TAR + r"#(?P<offset>\d+)\+(?P<size>\d+)/(?P<name>.+)", re.DOTALL | re.IGNORECASE)


class Member(NamedTuple):
    """A file inside a tar shard: `size` bytes from `offset`."""

    tar: str
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.tar}#{self.offset}+{self.size}/{self.name}"


def split_member(path: str) -> Member | None:
    """Parses the path of a tar member; None for any other path."""
    found = _MEMBER.fullmatch(path)
    return found and Member(found["tar"], int(found["offset"]), int(found["size"]), found["name"])


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def file_of(path: str) -> str:
    """The file that holds a path's bytes: the path itself, or its tar shard."""
    member = split_member(path)
    return member.tar if member else path


def join(folder: str, name: str) -> str:
    """The path of `name` in a folder, which may be a URL."""
    return f"{folder.rstrip('/')}/{name}" if "://" in folder else os.path.join(folder, name)


def name_of(path: str) -> str:
    """A path or URL without the query of a web address, so that its suffix gives the file type."""
    return path.partition("?")[0] if path.startswith(("http://", "https://")) else path


def beside(path: str | Path, suffix: str) -> str:
    """The path or URL with its suffix replaced."""
    path = str(path)
    return os.path.splitext(path)[0] + suffix


def open_bytes(path: str) -> BinaryIO:
    """Opens a local file, or a member of a local tar, for reading."""
    member = split_member(path)
    return open(path, "rb") if member is None else io.BufferedReader(_Section(member))


class _Section(io.RawIOBase):
    """A tar member as a read-only file."""

    def __init__(self, member: Member) -> None:
        self._file = open(member.tar, "rb", buffering=0)  # noqa: SIM115 (closed in `close`)
        self._first, self._size, self._at = member.offset, member.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError(f"seek to {at}, before the start.")
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
