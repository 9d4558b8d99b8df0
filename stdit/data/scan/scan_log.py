"""What scans found of files, beside the manifest, so that they go on where they stopped and probe only what is new."""

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
from stdit.data.scan.probing import Probed, Wanted

FORMAT = 2  # raise it when a probe, scenes or a tar's members come out otherwise: scans then look at all files again
PASSING = (
    "timeout",
    "crashed",
    "missing",
    "unreadable",
    "unreachable",
    "unsupported",
)  # reasons that may be none the next time


class Memory:
    """What was found of files, by path, with the state (size, time) that a file had then."""

    def __init__(
        self,
        wanted: Wanted,
        lines: list[dict[str, Any]],
        add: Callable[[list[dict[str, Any]]], None],
        column: str | None = None,
    ) -> None:
        self.wanted, self.add = wanted, add
        self.caption_column = column
        self.reading = [tars.FORMAT, column]  # how captions in tars are read
        self.known = {line["path"]: line for line in lines}
        self.used: dict[str, dict[str, Any]] = {}

    def get(self, file: File) -> Probed | None:
        """What is known of a file, which may lack some of what is wanted."""
        line = self._line(file)
        if line is None or line["verify_pixels"] != self.wanted.verify_pixels:
            return None
        looked = line.get("scores", {}) if line.get("scores_format") == SCORES_FORMAT else {}
        reason, message = line["reason"], line["message"]
        return Probed(file.path, line["probe"], line["sha256"], reason, message, line.get("scenes"), looked)

    def keep(self, file: File, result: Probed) -> None:
        if result.reason in PASSING:
            return
        scores = {key: score for key, score in result.scores.items() if score.get("reason") not in PASSING}
        more = {"scores": scores, "scores_format": SCORES_FORMAT, "verify_pixels": self.wanted.verify_pixels}
        self._keep(file, asdict(result) | more)

    def members(self, tar: File) -> tuple[list[File], str | None] | None:
        """What `tar_members` said."""
        line = self._line(tar)
        if line is None or "members" not in line or line.get("reading") != self.reading:
            return None
        members = []
        for name, place, captions, fault, refused in line["members"]:
            path, texts = tar.path + place, tuple(Caption(*one) for one in captions)
            why = (fault and tuple(fault), refused and tuple(refused))
            members.append(File(f"{tar.name}/{name}", path, tar.state, texts, *why))
        return members, line["damage"]

    def keep_members(self, tar: File, members: list[File], damage: str | None) -> None:
        rows = [
            (
                file.name.removeprefix(f"{tar.name}/"),
                file.path.removeprefix(tar.path),
                [astuple(c) for c in file.captions],
                file.caption_fault,
                file.refused,
            )
            for file in members
        ]
        self._keep(tar, {"members": rows, "damage": damage, "reading": self.reading})

    def _line(self, file: File) -> dict[str, Any] | None:
        line = self.known.get(absolute(file.path))
        if line is None or file.state is None or line["file"] != file.state or line.get("format") != FORMAT:
            return None
        self.used[line["path"]] = line
        return line

    def _keep(self, file: File, values: dict[str, Any]) -> None:
        path = absolute(file.path)
        self.used[path] = line = {**values, "format": FORMAT, "path": path, "file": file.state}
        self.add([line])


@contextmanager
def remembered(path: str | None, wanted: Wanted, column: str | None = None) -> Iterator[Memory]:
    """What earlier scans wrote to this file; what is new is added as it comes, what is of no use any more goes.

    column: the key of captions in .json files of tars."""
    if path is None:
        yield Memory(wanted, [], lambda _: None, column)
        return
    with STORAGE.journal(path) as (lines, add):
        memory = Memory(wanted, lines, add, column)
        yield memory
    STORAGE.write(path, "".join(json.dumps(line) + "\n" for line in memory.used.values()).encode())


def absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)
