"""What a folder of weights is, as one hash of its content: caches of what a model made are addressed by it."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from stdit.errors import StditError
from stdit.files import sha256_of

_COUNTED = {".safetensors", ".json", ".model", ".txt"}


def folder_identity(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over the names and contents of a folder's weights, configs and vocabularies, or of one file.

    Where the folder lies, when it was written, and other files in it do not matter; subfolders do not count.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return _file_hash(place, place.stat().st_size, place.stat().st_mtime_ns)
    if not place.is_dir():
        raise StditError(f"{place}: no such file or folder.")
    found = sorted(entry for entry in place.iterdir() if entry.is_file() and entry.suffix in _COUNTED)
    found = [entry for entry in found if not entry.name.startswith(".")]
    if not any(entry.suffix == ".safetensors" for entry in found):
        raise StditError(f"{place}: holds no .safetensors file.")
    total = hashlib.sha256()
    for entry in found:
        stat = entry.stat()
        total.update(f"{entry.name}\0{_file_hash(entry, stat.st_size, stat.st_mtime_ns)}\0".encode())
    return total.hexdigest()


@lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, once for every state of it (size, time of change) that a process sees."""
    with open(path, "rb") as file:
        return sha256_of(file)
