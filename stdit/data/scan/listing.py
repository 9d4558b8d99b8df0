"""What a scan looks at: media files under a folder or a URL, and the captions beside them. Tars: see `tars`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import unquote

from stdit.data.captions import Caption, Fault, Names, sidecar_captions
from stdit.data.decode.formats import HEAD, MEDIA, OTHER_SUFFIXES, content_of, suffix_of
from stdit.data.manifest import Skipped
from stdit.data.remote.paths import is_remote, join, name_of
from stdit.data.remote.storage import STORAGE, StorageError, side_by_side
from stdit.errors import StditError
from stdit.files import is_utf8
from stdit.text_files import unicode_form

CAPTION_SUFFIXES = (".txt", ".json")
CAPTION_BYTES = 16 << 20  # of a file beside a clip; longer ones are none


@dataclass(frozen=True)
class File:
    """name: relative to the scanned folder, as people see it; of a tar's member, the tar's and then its own.

    state: another one when the file changes; None for a local file that is not there. captions: a tar member's own, or
    in caption_fault why it has none. refused: the reason and the message why a tar member cannot be looked at.
    """

    name: str
    path: str
    state: list[Any] | None
    captions: tuple[Caption, ...] = ()
    caption_fault: Fault | None = None
    refused: tuple[str, str] | None = None


class Folder:
    """The names of all files under a folder or a URL, hidden ones left out; read once. Links to folders count."""

    def __init__(self, root: str) -> None:
        self.root = root.removeprefix("file://").rstrip("/") or "/"
        self._states: dict[str, list[Any] | None] = {}
        self.unreadable: list[Skipped] = []  # folders in it
        self._written: dict[str, str] = {}  # names of web addresses, as they are written there
        if is_remote(self.root):
            self._states = STORAGE.find(self.root)
            if self.root.startswith(("http://", "https://")):
                self._unquote()
            return
        if not is_utf8(os.path.abspath(self.root)):
            raise StditError(
                f"{os.path.abspath(self.root)!r}: its name is not UTF-8, so no manifest can hold it. Rename it."
            )
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

    def _unquote(self) -> None:
        """Names as people and captions have them: without %20, without a query."""
        for written in list(self._states):
            name = unquote(name_of(f"{self.root}/{written}")[len(self.root) + 1 :])
            if name not in self._states:
                self._states[name], self._written[name] = self._states.pop(written), written

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
        return join(self.root, self._written.get(name, name))

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

    @cached_property
    def names(self) -> Names:
        return Names(self._states)

    def captions_file(self) -> str | None:
        tables = [name for name in ("captions.csv", "captions.jsonl") if name in self]
        if len(tables) > 1:
            raise StditError(f"{self.root} has both captions.csv and captions.jsonl. Name one with --captions.")
        return self.path(tables[0]) if tables else None

    @cached_property
    def _caption_files(self) -> dict[tuple[str, str], list[str]]:
        """Names of .txt and .json files by suffix and the name before it, in one Unicode form."""
        found: dict[tuple[str, str], list[str]] = {}
        for name in sorted(self._states):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in CAPTION_SUFFIXES:
                found.setdefault((suffix.lower(), unicode_form(stem)), []).append(name)
        return found

    @cached_property
    def _stems(self) -> set[str]:
        """Names of media files, without their suffixes and with."""
        media = [name for name in self._states if suffix_of(name) in MEDIA]
        return {*media, *(os.path.splitext(name)[0] for name in media)}

    def captions_beside(self, name: str) -> list[list[str]]:
        """The caption files of a clip, the first that says anything counts: clip.txt, clip.mp4.txt, clip.json,
        clip.mp4.json, their suffixes in any case. More than one in a place cannot be told apart."""
        found = []
        for suffix in CAPTION_SUFFIXES:
            for stem in (os.path.splitext(name)[0], name):
                there = self._caption_files.get((suffix, unicode_form(stem)), [])
                own = [file for file in there if os.path.splitext(file)[0] == stem]
                # one in another Unicode form is this clip's unless there is a clip of that very name
                if places := own or [file for file in there if os.path.splitext(file)[0] not in self._stems]:
                    found.append(places)
        return found

    def sidecars(
        self, names: list[str], column: str | None = None
    ) -> tuple[dict[str, list[Caption]], dict[str, Fault]]:
        """The captions in files beside the clips (see `captions_beside`), and why clips have none."""
        names = [name for name in names if self.captions_beside(name)]

        def look(name: str) -> tuple[list[Caption], Fault | None]:
            return first_captions([(self._reading(files), files[0]) for files in self.captions_beside(name)], column)

        found = dict(zip(names, side_by_side(look, names)))
        captions = {name: captions for name, (captions, _) in found.items() if captions}
        return captions, {name: fault for name, (_, fault) in found.items() if fault}

    def _reading(self, files: list[str]) -> Callable[[], bytes]:
        def read() -> bytes:
            if len(files) > 1:
                raise StditError(f"{' and '.join(map(ascii, files))} cannot be told apart. Remove one.")
            file = self.file(files[0])
            if file.state and file.state[0] is not None and int(file.state[0]) > CAPTION_BYTES:
                raise StditError(f"{files[0]} has {file.state[0]} bytes, a caption at most {CAPTION_BYTES}.")
            try:
                return STORAGE.read(file.path)
            except (OSError, StorageError) as error:
                if isinstance(error, StorageError) and error.reason == "unreachable":
                    raise
                why = error.message if isinstance(error, StorageError) else str(error.strerror)
                raise StditError(f"{files[0]} cannot be read ({why.rstrip('.')}).") from error

        return read


def first_captions(
    files: list[tuple[Callable[[], bytes], str]], column: str | None
) -> tuple[list[Caption], Fault | None]:
    """The captions of the first file (how to read it, name) that says anything, or why there are none."""
    faults: list[Fault] = []
    for read, name in files:
        try:
            captions, fault = sidecar_captions(read(), name, column)
        except StorageError:
            raise
        except StditError as error:
            return [], ("bad_caption", str(error))
        if captions or (fault and fault[0] == "bad_caption"):
            return captions, fault
        faults += [fault] if fault else []
    return [], ("no_caption", " ".join(message for _, message in faults)) if faults else None
