"""The scan log: probe results beside the manifest, so that a scan resumes and re-probes only new or changed files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple
from typing import Any

from stdit.data.manifest import Caption
from stdit.data.measure.scores import FORMAT as SCORES_FORMAT
from stdit.data.remote.paths import is_remote
from stdit.data.remote.storage import STORAGE
from stdit.data.scan import tars
from stdit.data.scan.listing import File
from stdit.data.scan.probing import ProbeResult, ScanOptions

FORMAT = 2  # raise it when probes, scenes or tar members come out differently: scans then probe all files again
TRANSIENT = ("timeout", "crashed", "missing", "unreadable", "unreachable", "unsupported")  # may not recur, so not kept

Line = dict[str, Any]


class ScanLog:
    """Results by path, each with the file's state (size, time) at the time of its probe. add: appends to the log."""

    def __init__(
        self, options: ScanOptions, earlier: list[Line], add: Callable[[list[Line]], None], caption_column: str | None
    ) -> None:
        self.options, self.add, self.caption_column = options, add, caption_column
        self.tar_reading = [tars.FORMAT, caption_column]  # tar members logged with another value are read again
        self.known = {line["path"]: line for line in earlier}
        self.used: dict[str, Line] = {}

    def lookup(self, file: File) -> ProbeResult | None:
        """The logged result of an unchanged file; it may lack scenes or scores."""
        line = self._line(file)
        if line is None or line["verify_pixels"] != self.options.verify_pixels:
            return None
        scores = line.get("scores", {}) if line.get("scores_format") == SCORES_FORMAT else {}
        fields = {name: line[name] for name in ("probe", "sha256", "reason", "message")}
        return ProbeResult(file.path, **fields, scenes=line.get("scenes"), scores=scores)

    def record(self, file: File, result: ProbeResult) -> None:
        if result.reason in TRANSIENT:
            return
        scores = {key: score for key, score in result.scores.items() if score.get("reason") not in TRANSIENT}
        more = {"scores": scores, "scores_format": SCORES_FORMAT, "verify_pixels": self.options.verify_pixels}
        self._record(file, asdict(result) | more)

    def members(self, tar: File) -> tuple[list[File], str | None] | None:
        """What `tar_members` returned for an unchanged tar."""
        line = self._line(tar)
        if line is None or "members" not in line or line.get("reading") != self.tar_reading:
            return None
        members = []
        for name, place, captions, fault, refused in line["members"]:
            texts = tuple(Caption(*caption) for caption in captions)
            why = (fault and tuple(fault), refused and tuple(refused))
            members.append(File(f"{tar.name}/{name}", tar.path + place, tar.state, texts, *why))
        return members, line["damage"]

    def record_members(self, tar: File, members: list[File], damage: str | None) -> None:
        rows = []
        for file in members:
            name, place = file.name.removeprefix(f"{tar.name}/"), file.path.removeprefix(tar.path)
            captions = [astuple(caption) for caption in file.captions]
            rows.append((name, place, captions, file.caption_fault, file.refused))
        self._record(tar, {"members": rows, "damage": damage, "reading": self.tar_reading})

    def _line(self, file: File) -> Line | None:
        line = self.known.get(absolute(file.path))
        if line is None or file.state is None or line["file"] != file.state or line.get("format") != FORMAT:
            return None
        self.used[line["path"]] = line
        return line

    def _record(self, file: File, values: dict[str, Any]) -> None:
        path = absolute(file.path)
        self.used[path] = line = {**values, "format": FORMAT, "path": path, "file": file.state}
        self.add([line])


@contextmanager
def open_scan_log(path: str | None, options: ScanOptions, caption_column: str | None) -> Iterator[ScanLog]:
    """The log at a path (None: not stored). New results are appended at once; at the end, unused lines are removed."""
    if path is None:
        yield ScanLog(options, [], lambda _: None, caption_column)
        return
    with STORAGE.journal(path) as (lines, add):
        scan_log = ScanLog(options, lines, add, caption_column)
        yield scan_log
    STORAGE.write(path, "".join(json.dumps(line) + "\n" for line in scan_log.used.values()).encode())


def absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)
