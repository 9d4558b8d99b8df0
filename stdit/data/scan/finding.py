"""Finds what a scan probes: media files, tars, the table of captions, and the files that a scan writes beside them."""

from __future__ import annotations

import os
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from stdit.data.captions import Captions, Names, read_captions
from stdit.data.decode.formats import suffix_of
from stdit.data.parts import Part
from stdit.data.remote.paths import beside, is_remote
from stdit.data.remote.storage import STORAGE
from stdit.data.scan.listing import Folder
from stdit.data.scan.probing import absolute
from stdit.data.scan.tars import COMPRESSED
from stdit.errors import StditError, error_context

PART_LOG = ".probed.jsonl"  # ends the name of a part's log
WRITTEN = (".skipped.jsonl", ".probed.jsonl", ".part-")  # beside a manifest, after its name without the suffix


@dataclass(frozen=True)
class FoundFiles:
    """names: of the files to probe, relative to the folder: media, and whatever the captions name. tars: of the tars.

    table: the file of captions, None if they are beside the files. captions: those of the table.
    """

    folder: Folder
    names: list[str]
    tars: list[str]
    table: str | None
    captions: Captions

    def count_others(self, out: str | Path | None) -> dict[str, int]:
        """The number of files, by suffix, that are neither used nor written by a scan to `out`."""
        used = {*self.names, *self.tars}
        if self.table is None:
            used |= {text for name in self.names for place in self.folder.captions_beside(name) for text in place}
        own = {absolute(str(path)) for path in (self.table, out) if path is not None}
        written = () if out is None else tuple(absolute(beside(out, end)) for end in WRITTEN)

        def is_other(name: str) -> bool:
            path = absolute(self.folder.path(name))
            return path not in own and not path.startswith(written)

        return dict(
            Counter(suffix_of(name) for name in self.folder if name not in used and is_other(name)).most_common()
        )


def skipped_path(out: str | Path) -> str:
    """Where `scan` lists the files it skipped."""
    return beside(out, ".skipped.jsonl")


def log_path(out: str | Path) -> str:
    """Where `scan` logs what it found out about each file."""
    return beside(out, ".probed.jsonl")


def part_log(out: str | Path, part: Part) -> str:
    """The same of a part of a scan."""
    return part.beside(str(out), PART_LOG)


def find_files(
    folder: str | Path,
    captions: str | Path | None,
    caption_column: str | None,
    file_column: str | None,
    uncaptioned: bool,
) -> FoundFiles:
    """Lists a folder and reads its table of captions. The arguments are those of `scan`.

    Raises StditError if the table captions none of the files, unless `uncaptioned`.
    """
    source = Folder(str(folder))
    table = str(captions) if captions is not None else source.captions_file()
    captioned = Captions() if table is None else _read_table(table, source, file_column, caption_column)
    tars = {name for name in source if name.lower().endswith((".tar", *COMPRESSED))}
    named = {*captioned.texts, *captioned.faults}
    in_tars = {name for name in named if any(name[: at.end()] in tars for at in re.finditer(r"\.tar(?=/)", name))}
    names = sorted(named - in_tars - tars | source.media())
    if table is not None and not captioned.texts and not tars and not uncaptioned:
        raise StditError(
            f"{table} captions no file in {folder}: names in it are relative to that folder, or to the table's own. "
            f"--allow-uncaptioned scans without captions."
        )
    return FoundFiles(source, names, sorted(tars), table, captioned)


def _read_table(path: str, source: Folder, file_column: str | None, caption_column: str | None) -> Captions:
    with error_context(path) if is_remote(path) else nullcontext(), STORAGE.local(path) as local:
        return read_captions(Path(local), source.root, Names(source), file_column, caption_column)


def available_cores() -> int:
    """The cores this process may use: on a large machine, a job often has only some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
