"""Hashes weights by content: to name what caches and checkpoints were made from, and to compare with published hashes.

The hash of a large file is kept in the user's cache folder (XDG_CACHE_HOME, stdit/sha256) and used as long as the
file's path, inode, size, mtime and ctime stay the same.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from stdit.errors import StditError
from stdit.files import publish_text, sha256_of
from stdit.weights.tensor_files import PICKLES

WEIGHTS = frozenset({".safetensors", ".json", ".model", ".txt"})
TOKENIZER = frozenset({".json", ".model", ".txt", ".jinja", ".tiktoken", ".bpe", ".vocab"})
REMEMBERED = 64 << 20  # bytes: hashes of larger files are kept, since hashing takes seconds
SETTLED = 10.0  # seconds: a file that changed more recently could change again with the same timestamp
_HASH = re.compile(r"[0-9a-f]{64}")
_LISTS = ("SHA256SUMS", "SHA256SUMS.txt", "sha256sums.txt", "checksums.sha256")  # of checksums of a folder's files


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


@dataclass(frozen=True)
class Checked:
    """A file, its SHA-256 (found), the published one (wanted; "" if unknown) and where that was read (source)."""

    file: Path
    found: str
    wanted: str
    source: str

    @property
    def verdict(self) -> str:
        if not self.wanted:
            return "nothing to check against"
        return "ok" if self.found == self.wanted else "differs"


def weight_files(path: Path) -> list[Path]:
    """The files of weights at a path: the file itself, or all in a folder and below it, except hidden ones."""
    if not path.is_dir():
        return [path]
    kinds = {".safetensors", ".sft", *PICKLES}
    found = (entry for entry in sorted(path.rglob("*")) if entry.suffix.lower() in kinds and entry.is_file())
    return [entry for entry in found if not any(p.startswith(".") for p in entry.relative_to(path).parts)]


def check(file: Path) -> Checked:
    """Hashes a file and compares. Raises StditError for a checksum file that is none."""
    wanted, source = expected(file)
    if not wanted:
        return Checked(file, "", "", "")
    with open(file, "rb") as opened:
        return Checked(file, sha256_of(opened), wanted, source)


def expected(file: Path) -> tuple[str, str]:
    """A file's published SHA-256 and where it was found; ("", "") if it was not.

    Searched in this order: FILE.sha256 beside it; a list such as SHA256SUMS in its folder; the notes of `hf download
    --local-dir` (.cache/huggingface/download/FILE.metadata, where a large file's ETag is its hash); the name of the
    blob in the hub's cache, if the file is a link to it.
    """
    beside = file.with_name(f"{file.name}.sha256")
    if beside.is_file():
        words = _text(beside).lower().split()
        if not words or not _HASH.fullmatch(words[0]):
            raise StditError(f"{beside}: does not begin with a SHA-256 of 64 hexadecimal digits.")
        return words[0], str(beside)
    for name in _LISTS:
        listed = file.with_name(name)
        for line in _text(listed).splitlines() if listed.is_file() else []:
            hashed, _, named = line.strip().partition(" ")
            if named.strip().lstrip("*").removeprefix("./") == file.name and _HASH.fullmatch(hashed.lower()):
                return hashed.lower(), str(listed)
    for folder in file.absolute().parents:
        note = folder / ".cache/huggingface/download" / f"{file.absolute().relative_to(folder)}.metadata"
        if note.is_file():
            lines = _text(note).split()
            if len(lines) > 1 and _HASH.fullmatch(lines[1].strip('"')):
                return lines[1].strip('"'), f"{note} (the hub's)"
            break
    if file.is_symlink() and (blob := file.resolve()).parent.name == "blobs" and _HASH.fullmatch(blob.name):
        return blob.name, "the blob's name in the hub's cache"
    return "", ""


def _text(path: Path) -> str:
    return path.read_bytes()[:1_000_000].decode("utf-8", "replace").lstrip("\ufeff")
