"""A disk that loses power at a chosen operation, and forgets what was not synced.

`FaultyDisk.watching` patches what a checkpoint is written with. Every write, sync, rename and removal counts as an
operation; the one with number `stop` does not happen (a write happens by half), and raises PowerCut. `after_cut` then
lays out what a disk may hold.
"""

from __future__ import annotations

import builtins
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stdit import files
from stdit.training.engine import saver


class PowerCut(BaseException):
    pass


class File:
    """An open file whose writes are operations."""

    def __init__(self, disk: FaultyDisk, *arguments: Any) -> None:
        self.disk, self.file = disk, builtins.open(*arguments, buffering=0)  # noqa: SIM115

    def write(self, block: bytes) -> int:
        if self.disk.is_last("write"):
            self.file.write(memoryview(block).cast("B")[: len(block) // 2])
            raise PowerCut
        return self.file.write(block)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class FaultyDisk:
    """root: the folder that stands for the disk; what is in it now is on the disk."""

    def __init__(self, root: Path, stop: int | None = None) -> None:
        self.root, self.stop = root, stop
        self.operations: list[str] = []
        self._held: list[int] = []  # open descriptors: a number of a file that is gone is not given to another
        self._contents: dict[int, bytes] = {}  # of files on the disk, by inode
        self._names: dict[int, dict[str, int]] = {}  # of folders on the disk
        self._folders: set[int] = set()  # which of those inodes are folders
        for here, _, names in os.walk(root):
            for path in (here, *(os.path.join(here, name) for name in names)):
                self._note(os.open(path, os.O_RDONLY))

    def is_last(self, what: str) -> bool:
        self.operations.append(what)
        return len(self.operations) == self.stop

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            if self.is_last("sync"):
                raise PowerCut
            sync(descriptor)
            self._note(os.dup(descriptor))

        def counted(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                if self.is_last(what):
                    raise PowerCut
                return real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(saver, "open", lambda *arguments: File(self, *arguments), raising=False)
            patch.setattr(files, "_exchange", counted("exchange", files._exchange))
            patch.setattr(os, "fsync", fsync)
            for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
                patch.setattr(os, name, counted(name, getattr(os, name)))
            try:
                yield
            finally:
                for descriptor in self._held:
                    os.close(descriptor)

    def _note(self, descriptor: int) -> None:
        """What an open file or folder holds now is on the disk."""
        self._held.append(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        inode = os.fstat(descriptor).st_ino
        if os.path.isdir(path):
            entries = list(os.scandir(path))
            self._names[inode] = {entry.name: entry.inode() for entry in entries}
            self._folders |= {inode, *(entry.inode() for entry in entries if entry.is_dir())}
        else:
            self._contents[inode] = Path(path).read_bytes()

    def after_cut(self, place: Path) -> list[Path]:
        """Three disks: what was synced alone; all names, but only contents that were synced; everything."""
        synced, names, all_ = (place / name for name in ("synced", "names", "all"))
        self._lay_out(os.stat(self.root).st_ino, synced)
        shutil.copytree(self.root, all_)
        shutil.copytree(self.root, names)
        for here, _, found in os.walk(self.root):
            for name in found:
                path = Path(here) / name
                (names / path.relative_to(self.root)).write_bytes(self._contents.get(path.stat().st_ino, b""))
        return [synced, names, all_]

    def _lay_out(self, inode: int, path: Path) -> None:
        if inode not in self._folders:
            path.write_bytes(self._contents.get(inode, b""))
        else:
            path.mkdir()
            for name, inner in self._names.get(inode, {}).items():
                self._lay_out(inner, path / name)
