"""Parts of a command's work, so that many machines share it: which part a process is, and which parts have finished.

Work is dealt by name, or by place in a list that follows from the input alone. So any part can be run again, anywhere.
A part that has finished leaves a record beside the output. `stdit data merge` checks that all are there, makes of the
parts what one run would have made, and removes the records.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stdit.data.remote.paths import beside, is_remote, join
from stdit.data.remote.storage import STORAGE
from stdit.errors import StditError

FORMAT = 1  # of a record
MOST = 100_000  # parts
TORCHRUN = "torchrun's RANK and WORLD_SIZE"
SHOWN = 8  # missing parts, or files, that an error names
_RECORD = re.compile(r"part-(\d+)-of-(\d+)\.(scan|caption|encode)\.json")


@dataclass(frozen=True)
class Part:
    """One of `of` parts. number: from 1. chosen_by: the option or variables that say which one it is."""

    number: int = 1
    of: int = 1
    chosen_by: str = ""

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def is_whole(self) -> bool:
        return self.of == 1

    @property
    def is_quiet(self) -> bool:
        """Whether another part on the same terminal shows the progress."""
        return self.number > 1 and self.chosen_by == TORCHRUN

    def has_name(self, name: str) -> bool:
        """Whether the part has this name to do. It depends on no other name, so new files move no old ones."""
        number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        return self.has_place(number)

    def has_place(self, place: int) -> bool:
        """Whether the part has this place of a list to do, counted from 0."""
        return place % self.of == self.number - 1

    def beside(self, out: str, suffix: str) -> str:
        """A file of this part, beside the output."""
        return beside(out, f".part-{self.number}-of-{self.of}{suffix}")


WHOLE = Part()


def choose_part(given: str | None, environ: Mapping[str, str] = os.environ) -> Part:
    """The part that `--part I/N` names, or else the launcher: torchrun's RANK, or the task of a Slurm array.

    Raises StditError for a part that does not exist, or where it is not certain which one is meant.
    """
    if given is not None:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", given.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]) <= MOST:
            raise StditError(f"--part {given}: it must be I/N, such as 2/8, with I from 1 to N and N up to {MOST:,}.")
        return Part(int(found[1]), int(found[2]), "--part")
    ranks = int(environ.get("WORLD_SIZE", 1))
    in_array = "SLURM_ARRAY_TASK_ID" in environ
    if ranks > 1 and in_array:
        raise StditError(
            f"this is rank {environ.get('RANK')} of torchrun within task {environ['SLURM_ARRAY_TASK_ID']} of a Slurm "
            f"array: say with --part I/N which part it is."
        )
    if ranks > 1:
        return Part(int(environ.get("RANK", 0)) + 1, ranks, TORCHRUN)
    return _part_of_array(environ) if in_array else WHOLE


def _part_of_array(environ: Mapping[str, str]) -> Part:
    names = ("ID", "COUNT", "MIN", "MAX")
    task, count, first, last = (int(environ.get(f"SLURM_ARRAY_TASK_{name}", 0)) for name in names)
    step = int(environ.get("SLURM_ARRAY_TASK_STEP", 1)) or 1
    if count < 2 or (last - first) // step + 1 != count:  # some tasks of an earlier array, submitted again
        what = f"one task, {task}" if count < 2 else f"{count} tasks between {first} and {last}"
        raise StditError(
            f"this Slurm array has {what}. If these are parts of a larger whole, name them: --part "
            f"$SLURM_ARRAY_TASK_ID/N. If not, add --part 1/1."
        )
    return Part((task - first) // step + 1, count, "Slurm's SLURM_ARRAY_TASK_ID")


@dataclass(frozen=True)
class PartRecord:
    """What a finished part leaves. kind: scan, caption or encode. command: its words, without --part.

    settings: on which the result depends; all parts must have the same.
    paths: those of them that are a path, a list of paths, or None.
    found: what a merge needs of this part alone.
    """

    part: Part
    kind: str
    command: Sequence[str]
    settings: Mapping[str, Any]
    paths: Sequence[str]
    found: Mapping[str, Any]


def unfinish(out: str, part: Part, kind: str) -> None:
    """Removes the record of an earlier run of the part, before it runs again."""
    STORAGE.remove(_record_path(out, part, kind))


def finish(out: str, record: PartRecord) -> None:
    """Writes the record of a part that has done all its work."""
    content = {"format": FORMAT, "folder": os.getcwd(), "command": list(record.command), "paths": list(record.paths)}
    content |= {"settings": record.settings, "found": record.found}
    STORAGE.write(_record_path(out, record.part, record.kind), json.dumps(content, indent=1).encode())


def finished_parts(out: str) -> list[PartRecord]:
    """The records of all parts, in order. Raises StditError if one is missing, or made with other settings."""
    there = {}
    for name in STORAGE.names(_folder(out)):
        found = _RECORD.fullmatch(name.removeprefix(_prefix(out))) if name.startswith(_prefix(out)) else None
        if found:
            there[int(found[2]), int(found[1]), found[3]] = name
    if not there:
        raise StditError(f"{out}: no part has finished. Run the command that makes it with --part 1/N, …, N/N first.")
    if len({(of, kind) for of, _, kind in there}) > 1:
        names = ", ".join(list(there.values())[:SHOWN])
        raise StditError(f"{out}: there are parts of different runs. Remove the files of the wrong one among {names}.")
    records = [_read(out, Part(number, of), kind) for of, number, kind in sorted(there)]
    first, of = records[0], records[0].part.of
    if missing := sorted(set(range(1, of + 1)) - {record.part.number for record in records}):
        lines = [_again(first, Part(number, of)) for number in missing[:SHOWN]]
        lines += [f"… and {len(missing) - SHOWN} more"] if len(missing) > SHOWN else []
        which = f"part {missing[0]}/{of} has" if len(missing) == 1 else f"{len(missing)} of {of} parts have"
        raise StditError(f"{out}: {which} not finished. Run:\n  " + "\n  ".join(lines))
    for record in records:
        for name, value in first.settings.items():
            if record.settings.get(name) != value:
                raise StditError(
                    f"{out}: part {record.part} was made with {name} {record.settings.get(name)!r}, part {first.part} "
                    f"with {value!r}. Run the wrong one again, as:\n  {_again(first, record.part)}"
                )
    return records


def clear_parts(out: str, records: Sequence[PartRecord], *suffixes: str) -> None:
    """Removes the parts' files with these suffixes (see `Part.beside`) and then their records, after a merge."""
    for record in records:
        for suffix in suffixes:
            STORAGE.remove(record.part.beside(out, suffix))
    for record in records:
        STORAGE.remove(_record_path(out, record.part, record.kind))


def _again(record: PartRecord, part: Part) -> str:
    return shlex.join([*record.command, "--part", str(part)])


def _read(out: str, part: Part, kind: str) -> PartRecord:
    path = _record_path(out, part, kind)
    try:
        content = json.loads(STORAGE.read(path))
        settings, folder = dict(content["settings"]), content["folder"]
        for name in content["paths"] if folder != os.getcwd() else ():
            settings[name] = _seen_from(folder, settings[name])
        return PartRecord(part, kind, content["command"], settings, content["paths"], content["found"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StditError(f"{path} is damaged ({error}). Remove it, and run part {part} again.") from error


def _seen_from(folder: str, value: Any) -> Any:
    """A path or paths relative to another folder, from here."""
    if isinstance(value, list):
        return [_seen_from(folder, one) for one in value]
    return value if value is None or is_remote(value) else os.path.join(folder, value)


def _record_path(out: str, part: Part, kind: str) -> str:
    return join(_folder(out), f"{_prefix(out)}part-{part.number}-of-{part.of}.{kind}.json")


def _folder(out: str) -> str:
    """Where the records of an output are: beside a manifest, in a cache."""
    if not _is_manifest(out):
        return out
    return out.rpartition("/")[0] if is_remote(out) else os.path.dirname(out) or "."


def _prefix(out: str) -> str:
    """The beginning of the records' names."""
    return f"{os.path.splitext(os.path.basename(out))[0]}." if _is_manifest(out) else ""


def _is_manifest(out: str) -> bool:
    return out.lower().endswith(".parquet")
