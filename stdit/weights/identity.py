"""Hashes of folders of weights by content. Caches and checkpoints name by them what they were made from.

The hash of a large file is kept in the user's cache folder (XDG_CACHE_HOME, stdit/sha256) and used as long as the
file's path, inode, size, mtime and ctime stay the same.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from stdit.errors import StditError
from stdit.files import publish_text, sha256_of

WEIGHTS = frozenset({".safetensors", ".json", ".model", ".txt"})
TOKENIZER = frozenset({".json", ".model", ".txt", ".jinja", ".tiktoken", ".bpe", ".vocab"})
REMEMBERED = 64 << 20  # bytes: hashes of larger files are kept, since hashing takes seconds
SETTLED = 10.0  # seconds: a file that changed more recently could change again with the same timestamp


def folder_identity(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over the names and contents of a folder's weights, configs and vocabularies, or of one file.

    The folder's path, timestamps, subfolders and other files do not matter.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return file_identity(place)
    if not place.is_dir():
        raise StditError(f"{place}: no such file or folder.")
    found = _files(place, WEIGHTS)
    if not any(entry.suffix == ".safetensors" for entry in found):
        raise StditError(f"{place}: holds no .safetensors file.")
    return files_identity(found)


def tokenizer_identity(folder: Path) -> str:
    """SHA-256 (hex) over the names and contents of a tokenizer's files."""
    return files_identity(_files(folder, TOKENIZER))


def files_identity(files: Iterable[Path]) -> str:
    """SHA-256 (hex) over the names and contents of files, in this order."""
    files = list(files)
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(file_identity, files))
    total = hashlib.sha256()
    for file, content in zip(files, hashes):
        total.update(f"{file.name}\0{content}\0".encode())
    return total.hexdigest()


def file_identity(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    return _file_hash(str(path.resolve()), _state(path))


def _files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    found = (entry for entry in folder.iterdir() if entry.is_file() and entry.suffix in suffixes)
    return sorted(entry for entry in found if not entry.name.startswith("."))


def _state(path: str | Path) -> tuple[int, ...]:
    """Differs after any change of the file: programs can set mtime, but not ctime."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@lru_cache(maxsize=1024)
def _file_hash(path: str, state: tuple[int, ...]) -> str:
    """SHA-256 of a file, computed once per state and process; if it is large, once per state."""
    key = hashlib.sha256(f"{path}\0{state}".encode()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    memory = Path(home) / "stdit" / "sha256" / key
    large = state[2] >= REMEMBERED
    if large:
        with suppress(OSError, ValueError):
            found = memory.read_text("ascii")
            if len(found) == 64:
                return found
    begun = time.time()
    with open(path, "rb") as file:
        found = sha256_of(file)
    if _state(path) != state:
        raise StditError(f"{path}: changed while it was read. Start again when it is complete.")
    if large and begun - max(state[3:]) / 1e9 > SETTLED:
        with suppress(OSError, StditError):  # then the file is hashed again next time
            publish_text(memory, found)
    return found
