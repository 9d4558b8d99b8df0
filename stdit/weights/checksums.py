"""Compares files of weights with their published SHA-256."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from stdit.errors import StditError
from stdit.files import sha256_of
from stdit.weights.tensor_files import PICKLES

_HASH = re.compile(r"[0-9a-f]{64}")
_LISTS = ("SHA256SUMS", "SHA256SUMS.txt", "sha256sums.txt", "checksums.sha256")


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
