"""Lists a folder or URL for a scan: its media files, and the captions beside them. For tar shards see `tars`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from urllib.parse import unquote

from stdit.data.captions import Caption, Captions, Fault, sidecar_captions
from stdit.data.decode.formats import HEAD, MEDIA, OTHER_SUFFIXES, content_of, suffix_of
from stdit.data.manifest import Skipped
from stdit.data.remote.failures import FileError, StorageError, is_disk_failure
from stdit.data.remote.paths import is_remote, join, name_of
from stdit.data.remote.storage import STORAGE, in_parallel
from stdit.errors import StditError
from stdit.files import is_utf8
from stdit.text_files import unicode_form

CAPTION_SUFFIXES = (".txt", ".json")
CAPTION_BYTES = 16 << 20  # the largest caption file that is read


@dataclass(frozen=True)
class File:
    """A file to scan."""

    name: str  # relative to the scanned folder; for a tar member, the tar's name and then its own
    path: str
    state: list[Any] | None  # changes when the file does; None for a local file that does not exist
    captions: tuple[Caption, ...] = ()  # a tar member's own
    caption_fault: Fault | None = None  # why a tar member has no captions
    refused: tuple[str, str] | None = None  # reason and message why a tar member cannot be read


class Folder:
    """All files under a folder or a URL, listed once. Hidden ones are left out, links to folders are followed."""

    def __init__(self, root: str) -> None:
        self.root = root.removeprefix("file://").rstrip("/") or "/"
        self._states: dict[str, list[Any] | None] = {}
        self.unreadable: list[Skipped] = []  # sub-folders
        self._quoted: dict[str, str] = {}  # names in web addresses before unquoting
        if is_remote(self.root):
            self._states = STORAGE.find(self.root)
            if self.root.startswith(("http://", "https://")):
                self._unquote()
        elif not is_utf8(place := os.path.abspath(self.root)):
            raise StditError(f"{place!r} is not UTF-8, so a manifest cannot hold it. Rename the folder.")
        elif not os.path.isdir(self.root):
            raise StditError(f"{root} is not a folder.")
        else:
            STORAGE.from_disk(self.root, self._walk)

    def _walk(self) -> None:
        """Lists a local folder. Links to folders are followed last, and no folder is visited twice."""
        self._states, self.unreadable = {}, []
        starts, visited = [self.root], set[tuple[int, int]]()
        for start in starts:
            for here, folders, names in os.walk(start, onerror=self._keep_unreadable):
                status = os.stat(here)
                if (status.st_dev, status.st_ino) in visited:
                    folders.clear()
                    continue
                visited.add((status.st_dev, status.st_ino))
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                starts += [path for path in (os.path.join(here, name) for name in folders) if os.path.islink(path)]
                for name in names:
                    if not name.startswith("."):
                        self._states[self._name(os.path.join(here, name))] = None

    def _unquote(self) -> None:
        """Replaces names in web addresses by those that captions use: without %20, without a query."""
        for quoted in list(self._states):
            name = unquote(name_of(f"{self.root}/{quoted}")[len(self.root) + 1 :])
            if name not in self._states:
                self._states[name], self._quoted[name] = self._states.pop(quoted), quoted

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.root).replace(os.sep, "/")

    def _keep_unreadable(self, error: OSError) -> None:
        if is_disk_failure(error):
            raise error
        name = self._name(str(error.filename))
        message = f"is a folder that cannot be read ({error.strerror}): nothing in it was scanned."
        self.unreadable.append(Skipped(name, "unreadable", message))

    def __contains__(self, name: str) -> bool:
        return name in self._states

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def path(self, name: str) -> str:
        return join(self.root, self._quoted.get(name, name))

    def files(self, names: list[str]) -> list[File]:
        """The files of these names. In parallel, since a web server needs a request for each."""
        return in_parallel(self._file, names)

    def _file(self, name: str) -> File:
        path = self.path(name)
        try:
            if is_remote(path):
                return File(name, path, self._states.get(name) or STORAGE.state(path))
            status = STORAGE.from_disk(path, lambda: os.stat(path))
            return File(name, path, [status.st_size, status.st_mtime_ns])
        except (OSError, FileError):
            return File(name, path, None)

    def media(self) -> set[str]:
        """The names of media files: by suffix, or by the first bytes if the suffix is unknown."""
        found = {name for name in self if suffix_of(name) in MEDIA}
        unknown = [name for name in self if name not in found and suffix_of(name) not in OTHER_SUFFIXES]
        return found | {name for name, is_media in zip(unknown, in_parallel(self._holds_media, unknown)) if is_media}

    def _holds_media(self, name: str) -> bool:
        try:
            return content_of(STORAGE.head(self.path(name), HEAD)) is not None
        except (OSError, FileError):
            return False

    def captions_file(self) -> str | None:
        tables = [name for name in ("captions.csv", "captions.jsonl") if name in self]
        if len(tables) > 1:
            raise StditError(f"{self.root} has both captions.csv and captions.jsonl. Name one with --captions.")
        return self.path(tables[0]) if tables else None

    @cached_property
    def _caption_files(self) -> dict[tuple[str, str], list[str]]:
        """Names of .txt and .json files, by suffix and by the name without it in NFC."""
        found: dict[tuple[str, str], list[str]] = {}
        for name in sorted(self._states):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in CAPTION_SUFFIXES:
                found.setdefault((suffix.lower(), unicode_form(stem)), []).append(name)
        return found

    @cached_property
    def _stems(self) -> set[str]:
        """Names of media files, with and without their suffixes."""
        media = [name for name in self._states if suffix_of(name) in MEDIA]
        return {*media, *(os.path.splitext(name)[0] for name in media)}

    def captions_beside(self, name: str) -> list[list[str]]:
        """A clip's caption files by precedence: clip.txt, clip.mp4.txt, clip.json, clip.mp4.json.

        Suffixes may be in any case. An entry with several files is ambiguous.
        """
        found = []
        for suffix in CAPTION_SUFFIXES:
            for stem in (os.path.splitext(name)[0], name):
                there = self._caption_files.get((suffix, unicode_form(stem)), [])
                own = [file for file in there if os.path.splitext(file)[0] == stem]
                # a name in another Unicode form also belongs to this clip, unless a clip has exactly that name
                if files := own or [file for file in there if os.path.splitext(file)[0] not in self._stems]:
                    found.append(files)
        return found

    def sidecars(self, names: list[str], column: str | None = None) -> Captions:
        """The captions in files beside the clips (see `captions_beside`)."""
        names = [name for name in names if self.captions_beside(name)]

        def read(name: str) -> tuple[list[Caption], Fault | None]:
            files = self.captions_beside(name)
            return first_captions({same[0]: partial(self._read_caption, same) for same in files}, column)

        found = dict(zip(names, in_parallel(read, names)))
        texts = {name: captions for name, (captions, _) in found.items() if captions}
        return Captions(texts, {name: fault for name, (_, fault) in found.items() if fault})

    def _read_caption(self, files: list[str]) -> bytes:
        if len(files) > 1:
            raise StditError(f"{' and '.join(map(ascii, files))} cannot be told apart. Remove one.")
        file = self._file(files[0])
        if file.state and file.state[0] is not None and int(file.state[0]) > CAPTION_BYTES:
            raise StditError(f"{files[0]} has {file.state[0]} bytes; a caption file has at most {CAPTION_BYTES}.")
        try:
            return STORAGE.read(file.path)
        except (OSError, FileError) as error:
            why = error.message if isinstance(error, FileError) else str(error.strerror)
            raise StditError(f"{files[0]} cannot be read ({why.rstrip('.')}).") from error


def first_captions(files: dict[str, Callable[[], bytes]], column: str | None) -> tuple[list[Caption], Fault | None]:
    """The captions of the first file that has any, or why there are none. files: functions that read them, by name."""
    empty = []
    for name, read in files.items():
        try:
            captions, why_none = sidecar_captions(read(), name, column)
        except StorageError:
            raise
        except StditError as error:
            return [], ("bad_caption", str(error))
        if captions:
            return captions, None
        empty.append(why_none)
    return [], ("no_caption", " ".join(empty)) if empty else None
