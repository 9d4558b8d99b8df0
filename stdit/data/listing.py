"""What a scan looks at: media files under a folder or a URL, and those in tar shards (WebDataset's layout) there."""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from dataclasses import dataclass
from typing import Any

from stdit.data.captions import caption_lines, captions_of
from stdit.data.formats import HEAD, MEDIA, OTHER_SUFFIXES, content_of, suffix_of
from stdit.data.manifest import Caption, Skipped
from stdit.data.paths import Member, is_remote, join
from stdit.data.storage import STORAGE, StorageError, side_by_side
from stdit.errors import StditError

_TEXT_BYTES = 1 << 20  # of a caption file in a tar; longer ones are none


@dataclass(frozen=True)
class File:
    """name: relative to the scanned folder, as people see it; of a tar's member, the tar's and then its own.

    state: another one when the file changes; None for a local file that is not there. captions: a tar member's own.
    """

    name: str
    path: str
    state: list[Any] | None
    captions: tuple[Caption, ...] = ()


class Folder:
    """The names of all files under a folder or a URL, hidden ones left out; read once. Links to folders count."""

    def __init__(self, root: str) -> None:
        self.root = root.removeprefix("file://").rstrip("/") or "/"
        self._states: dict[str, list[Any] | None] = {}
        self.unreadable: list[Skipped] = []  # folders in it
        if is_remote(self.root):
            self._states = STORAGE.find(self.root)
            return
        if not os.path.isdir(self.root):
            raise StditError(f"{root} is not a folder.")
        self._walk()

    def _walk(self) -> None:
        """Finds the names; links to folders are followed after all that is not linked, and no folder is met twice."""
        starts, met = [self.root], set[tuple[int, int]]()
        for start in starts:
            for here, folders, names in os.walk(start, onerror=self._keep_unreadable):
                status = os.stat(here)
                if (status.st_dev, status.st_ino) in met:
                    folders.clear()
                    continue
                met.add((status.st_dev, status.st_ino))
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                starts += [path for path in (os.path.join(here, name) for name in folders) if os.path.islink(path)]
                for name in names:
                    if not name.startswith("."):
                        self._states[self._name(os.path.join(here, name))] = None

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.root).replace(os.sep, "/")

    def _keep_unreadable(self, error: OSError) -> None:
        name = self._name(str(error.filename))
        message = f"is a folder that cannot be read ({error.strerror}): nothing in it was looked at."
        self.unreadable.append(Skipped(name, "unreadable", message))

    def __contains__(self, name: str) -> bool:
        return name in self._states

    def __iter__(self) -> Any:
        return iter(self._states)

    def path(self, name: str) -> str:
        return join(self.root, name)

    def files(self, names: list[str]) -> list[File]:
        """Asks side by side: a web server is asked for each."""
        return side_by_side(self.file, names)

    def file(self, name: str) -> File:
        path = self.path(name)
        try:
            if is_remote(path):
                return File(name, path, self._states.get(name) or STORAGE.state(path))
            status = os.stat(path)
            return File(name, path, [status.st_size, status.st_mtime_ns])
        except (OSError, StorageError) as error:
            if isinstance(error, StorageError) and error.reason == "unreachable":
                raise
            return File(name, path, None)

    def media(self) -> set[str]:
        """The names of media: by suffix, and by the first bytes where a suffix says nothing or there is none."""
        found = {name for name in self if suffix_of(name) in MEDIA}
        unknown = [name for name in self if name not in found and suffix_of(name) not in OTHER_SUFFIXES]
        return found | {name for name, one in zip(unknown, side_by_side(self._holds_media, unknown)) if one}

    def _holds_media(self, name: str) -> bool:
        try:
            return content_of(STORAGE.head(self.path(name), HEAD)) is not None
        except (OSError, StorageError) as error:
            if isinstance(error, StorageError) and error.reason == "unreachable":
                raise
            return False

    def captions_file(self) -> str | None:
        tables = [name for name in ("captions.csv", "captions.jsonl") if name in self]
        if len(tables) > 1:
            raise StditError(f"{self.root} has both captions.csv and captions.jsonl. Name one with --captions.")
        return self.path(tables[0]) if tables else None

    def text_beside(self, name: str) -> str | None:
        return next((text for text in (os.path.splitext(name)[0] + ".txt", name + ".txt") if text in self), None)

    def sidecars(self, names: list[str]) -> dict[str, list[Caption]]:
        """The captions of `clip.txt` or `clip.mp4.txt` beside clip.mp4, one a line."""
        texts = {name: self.path(text) for name in names if (text := self.text_beside(name))}
        contents = STORAGE.read_all(list(texts.values()))
        return {name: caption_lines(text, path) for (name, path), text in zip(texts.items(), contents)}


def tar_members(tar: File, local: str) -> tuple[list[File], str | None]:
    """The videos and images of a tar, whose bytes are in the file `local`, and what is wrong further in, if anything.

    Files whose names are the same up to the first dot belong together: `clip.txt` (a caption a line) or else
    `clip.json` (caption, captions or text) captions `clip.mp4`. Raises tarfile.TarError, OSError: it is no tar.
    """
    media: list[tuple[str, Member]] = []
    captions: dict[str, tuple[Caption, ...]] = {}
    damage = None
    with tarfile.open(local, "r:") as shard:
        try:
            for info in shard:
                name = posixpath.normpath("/" + info.name)[1:]  # without a way out of the tar
                folder, base = posixpath.split(name)
                if not info.isreg() or info.issparse() or base.startswith("."):
                    continue
                key, suffix = posixpath.join(folder, base.partition(".")[0]), posixpath.splitext(base)[1].lower()
                if suffix in MEDIA or (suffix not in OTHER_SUFFIXES and _holds_media(shard, info)):
                    media.append((key, Member(tar.path, info.offset_data, info.size, name)))
                elif suffix in (".txt", ".json") and info.size <= _TEXT_BYTES:
                    content = shard.extractfile(info)
                    found = _captions(content.read() if content else b"", suffix)
                    if suffix == ".txt" or key not in captions:
                        captions[key] = found or captions.get(key, ())
        except (tarfile.TarError, OSError, ValueError) as error:
            damage = f"cannot be read to its end ({error})."
        assert shard.fileobj is not None
        shard.fileobj.seek(shard.offset)
        if damage is None and any(shard.fileobj.read(tarfile.BLOCKSIZE)):  # an end is empty
            damage = f"is no tar from byte {shard.offset} on."
    files = [File(f"{tar.name}/{m.name}", str(m), tar.state, captions.get(key, ())) for key, m in media]
    return files, damage


def _holds_media(shard: tarfile.TarFile, info: tarfile.TarInfo) -> bool:
    content = shard.extractfile(info)
    return content is not None and content_of(content.read(HEAD)) is not None


def _captions(content: bytes, suffix: str) -> tuple[Caption, ...]:
    """What a caption file says; one that says nothing readable leaves its clip without a caption, which is named."""
    try:
        if suffix == ".txt":
            return tuple(caption_lines(content, ""))
        row = json.loads(content)
        if not isinstance(row, dict):
            return ()
        return tuple(captions_of({"caption": row.get("text"), **row}, ""))
    except (StditError, ValueError):
        return ()
