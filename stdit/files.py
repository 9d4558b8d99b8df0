"""Files that are whole or not there: written beside their name, brought to the disk, renamed into place."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from stdit.errors import StditError


@contextmanager
def _made(path: Path) -> Iterator[None]:
    """Says of what is made at `path` that nothing can be, on file systems such as /proc; `stdit.cli.main` tells what a
    user can mend of all other errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise StditError(f"{path}: no file or folder can be made there. Choose another path.") from error


def make_folder(path: str | Path) -> Path:
    """The folder, made with those above it where it is not there."""
    path = Path(path)
    with _made(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def publish(path: str | Path) -> Iterator[Path]:
    """Gives a name beside `path` to write a file to; at the end it takes the place of `path` in one step.

    A reader sees the old file or the new one, after a power cut too. Where writing fails, nothing is left behind. The
    folder is made. Where no file can be made the error is the system's own, or a StditError, and not a library's.
    """
    path = Path(path)
    if path.is_dir():  # where a system may say "busy" in the end
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    part = make_folder(path.parent) / f".{path.name}.{secrets.token_hex(4)}.part"
    with _made(path):
        part.touch()
        part.unlink()
    try:
        yield part
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def publish_text(path: str | Path, text: str) -> None:
    """`publish` of a text, as UTF-8 with its line ends as they are."""
    with publish(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def publish_folder(part: Path, path: Path) -> None:
    """The folder `part` and all in it take the place of `path`, beside it; of an older one there nothing is left."""
    for file in (*part.rglob("*"), part):
        sync(file)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: BinaryIO) -> str:
    """SHA-256 (hex) of the rest of an open file."""
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total.hexdigest()


def unpickled(path: str | Path) -> Any:
    """What torch.save wrote to a file, if it is tensors in plain containers alone. None where it is more, or damaged:
    torch's own words are not repeated, which advise to run what the file says."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except (PermissionError, MemoryError):
        raise
    except Exception:  # of any kind, where the damage is
        return None


@contextmanager
def journal(path: str | Path) -> Iterator[tuple[list[dict[str, Any]], Callable[[list[dict[str, Any]]], None]]]:
    """The JSON objects in a file of lines, and a function that adds more, those of one call at once.

    What is added survives the process at any moment. A line that was cut off as a process was ended is left out.
    """
    path = Path(path)
    make_folder(path.parent)
    found = []
    # not splitlines(), which also splits at characters that JSON keeps as they are
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    with _made(path):
        path.touch()
    with open(path, "ab", buffering=0) as file:  # a call of `add` is a write: several threads may
        file.write(b"\n")  # after a line that was cut off

        def add(lines: list[dict[str, Any]]) -> None:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())  # ASCII: any name of a file

        yield [line for line in found if isinstance(line, dict)], add
