"""Reads captions from a table (CSV, JSONL, Parquet) or from files beside the clips (.txt, .json)."""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from stdit.data.remote.paths import is_remote
from stdit.errors import StditError
from stdit.text_files import Row, csv_rows, decode_text, fault_in, json_rows, shortened, split_lines, unicode_form

# The first of these columns that has a value is used. Case and surrounding spaces are ignored.
CAPTION_NAMES = ("captions", "caption", "text", "texts", "prompt", "prompts")
FILE_NAMES = ("file", "path", "file_name", "filename", "video")

_NAME_THEM = "--file-column and --caption-column name the columns of the file and its caption."

Fault = tuple[str, str]  # why a clip has no caption: (no_caption or bad_caption, message)


@dataclass(frozen=True)
class Caption:
    text: str
    weight: float = 1.0


@dataclass
class Captions:
    """The captions of a folder's files, by name relative to the folder."""

    texts: dict[str, list[Caption]] = field(default_factory=dict)
    faults: dict[str, Fault] = field(default_factory=dict)  # of files whose captions cannot be used
    rows: list[tuple[str, str]] = field(default_factory=list)  # (place, fault) of table rows that name no file


class Names:
    """The names of a folder's files, for look-up by exact spelling or else by Unicode form."""

    def __init__(self, names: Iterable[str]) -> None:
        self.all = set(names)
        self.by_form: dict[str, list[str]] = {}
        for name in sorted(name for name in self.all if not name.isascii()):
            self.by_form.setdefault(unicode_form(name), []).append(name)

    def find(self, name: str) -> list[str]:
        """The matching names; several if they differ only in Unicode form. A tar member matches if its tar does."""
        if name in self.all:
            return [name]
        tar_ends = [found.end() - 1 for found in re.finditer("[.]tar/", name)]
        if name.isascii():
            return [name] if any(name[:end] in self.all for end in tar_ends) else []
        if found := self.by_form.get(unicode_form(name)):
            return found
        return [tar + name[end:] for end in tar_ends for tar in self.find(name[:end])]


def captions_of(row: dict[str, Any], column: str | None = None, is_csv: bool = False) -> list[Caption]:
    """The captions in the first of CAPTION_NAMES (or in `column`) that has any: a text, {text, weight}, or a list of
    these. A plain text has the row's weight. is_csv: a list is written as JSON.

    Raises StditError for anything else; its message is a predicate, to follow the row's place.
    """
    for name in columns_in(row, (column,) if column else CAPTION_NAMES):
        value = _csv_cell(row[name]) if is_csv else row[name]
        found = []
        for caption in value if isinstance(value, list) else [value]:
            weight = next((row[key] for key in columns_in(row, ("weight",))), None)
            text = caption
            if isinstance(caption, dict):
                inner = columns_in(caption, ("text", "caption"))
                if not inner:
                    keys = _listed(caption)
                    raise StditError(f"has the keys {keys} in {name}; a caption is a text, or {{text, weight}}")
                text, weight = caption[inner[0]], caption.get("weight")
            if text is None or text == "":
                continue
            if not isinstance(text, str):
                raise StditError(f"has {shortened(text)} as {name}; a caption is a text")
            if fault := fault_in(text):
                raise StditError(f"has a {name} that {fault}")
            if text.strip():
                found.append(Caption(text.strip(), _weight(weight)))
        if found:
            return found
    return []


def _weight(value: Any) -> float:
    try:
        weight = 1.0 if value in (None, "") else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = -1.0
    if isinstance(value, bool) or not 0 < weight < float("inf"):
        raise StditError(f"has the weight {shortened(value)}; a caption is a text with a positive weight")
    return weight


def columns_in(row: Iterable[str], names: Sequence[str]) -> list[str]:
    """The columns of a row that match these names, in the order of the names."""
    return _columns_in(tuple(row), tuple(names))


@lru_cache(1024)  # all rows of a table have the same columns
def _columns_in(row: tuple[str, ...], names: tuple[str, ...]) -> list[str]:
    plain = {key.strip().lower(): key for key in reversed(row)}
    found = [name if name in row else plain.get(name.strip().lower()) for name in names]
    return [name for name in found if name is not None]


def _csv_cell(text: str) -> Any:
    """A JSON list of captions, or a text."""
    if text.lstrip().startswith(('["', "[{")):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StditError(f"has a list of captions that is not JSON ({error})") from error
    return text


def sidecar_captions(content: bytes, name: str, column: str | None = None) -> tuple[list[Caption], str]:
    """The captions in a file beside a clip, and why there are none, if so. Raises StditError if they cannot be used.

    `.txt`: one caption per line. `.json`: an object as in `captions_of`, a list, or a text.
    """
    text = decode_text(content, name)
    if name.lower().endswith(".txt"):
        return [Caption(line.strip()) for line in split_lines(text, name) if line.strip()], f"{name} is empty."
    try:
        row = json.loads(text.lstrip("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise StditError(f"{name} is not JSON ({fault_in(text) or error}).") from error
    if isinstance(row, str | list):
        row = {column or "caption": row}
    if not isinstance(row, dict):
        return [], f"{name} is {shortened(row)}, which is not a caption."
    try:
        captions = captions_of(row, column)
    except StditError as error:
        raise StditError(f"{name} {error}.") from error
    if there := columns_in(row, (column,) if column else CAPTION_NAMES):
        return captions, f"{name} has nothing in {' and '.join(there)}."
    asked = column or ", ".join(CAPTION_NAMES)
    return [], f"{name} has no caption: its keys are {_listed(row)}, not {asked}. --caption-column names another."


def _listed(row: Iterable[str]) -> str:
    names = list(row)
    return ", ".join(shortened(name, 40) for name in names[:12]) + (", …" if len(names) > 12 else "") or "none"


def read_captions(
    path: Path, folder: str, names: Names, file_column: str | None = None, caption_column: str | None = None
) -> Captions:
    """Reads a table of captions. Each row names a file and has captions as in `captions_of`; a file may have several.

    folder: that the names are relative to; otherwise they are relative to the table's own folder.
    names: of the files in the folder.
    file_column, caption_column: None: found by their usual names.

    A bad row costs only its own file. Raises StditError if columns are missing, a quotation mark is never closed, or no
    row can be used.
    """
    if not path.is_file():
        raise StditError(f"{path}: no such captions file.")
    table = _Table(path, folder, names, file_column, caption_column)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        header, rows = csv_rows(path, table.enough, table.is_row)
        table.check(header, "the first line")
        return table.read(rows, is_csv=True)
    if suffix == ".jsonl":
        return table.read(json_rows(path))
    if suffix == ".parquet":
        return table.read(table.parquet(), unit="row")
    raise StditError(f"{path}: captions must be a .csv, .jsonl, .tsv or .parquet file, or files beside the videos.")


class _Table:
    def __init__(self, path: Path, folder: str, names: Names, file_column: str | None, caption_column: str | None):
        self.path, self.folder, self.names = path, folder, names
        self.file_names = (file_column,) if file_column else FILE_NAMES
        self.caption_names = (caption_column,) if caption_column else CAPTION_NAMES
        self.caption_column = caption_column
        inside = is_remote(folder) or os.path.samefile(path.parent, folder)
        self.bases = [folder] if inside else [folder, str(path.parent)]  # what a row's file may be relative to

    def enough(self, columns: Collection[str]) -> bool:
        return bool(columns_in(columns, self.file_names) and columns_in(columns, self.caption_names))

    def check(self, columns: Collection[str], where: str) -> None:
        if not self.enough(columns):
            wanted = f"{self.file_names[0]} and {self.caption_column or 'caption'}, it has {_listed(columns)}"
            raise StditError(f"{self.path}: {where} must name the columns {wanted}. {_NAME_THEM}")
        used = {*self.file_names, *self.caption_names, "weight"}
        counts = Counter(column.strip().lower() for column in columns)
        if twice := [name for name in used if counts[name.strip().lower()] > 1]:
            raise StditError(f"{self.path}: {where} names {' and '.join(sorted(twice))} twice. Rename one of them.")

    def parquet(self) -> Iterator[Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.path) as file:
                columns = file.schema_arrow.names
                self.check(columns, "the schema")
                wanted = columns_in(columns, (*self.file_names, *self.caption_names, "weight"))
                batches = file.iter_batches(4096, columns=wanted)
                for number, values in enumerate(row for batch in batches for row in batch.to_pylist()):
                    yield Row(number, values)
        except (pa.ArrowException, OSError) as error:
            raise StditError(f"{self.path} cannot be read as Parquet: {error}") from error

    def is_row(self, values: dict[str, str]) -> bool:
        """Whether a line inside a quoted field is itself a row that names a file in the folder."""
        columns = columns_in(values, self.file_names)
        if not columns or not self.enough(values):
            return False
        return any(self.names.find(place) for place in self._places(values[columns[0]]))

    def read(self, rows: Iterable[Row], unit: str = "line", is_csv: bool = False) -> Captions:
        found, enough = Captions(), False
        first: Row | None = None
        for row in rows:
            where = f"{self.path}, {unit} {row.line}"
            first = first or row
            enough = enough or self.enough(row.values)
            name = next((row.values[key] for key in columns_in(row.values, self.file_names)), None)
            if not isinstance(name, str) or not name.strip():
                found.rows.append((where, row.fault or "names no file"))
                continue
            if wrong := fault_in(name):
                found.rows.append((where, f"names a file that {wrong}"))
                continue
            fault, captions = row.fault, []
            try:
                captions = [] if fault else captions_of(row.values, self.caption_column, is_csv)
            except StditError as error:
                fault = str(error)
            files = self._files(name)
            if len(files) > 1:
                fault = f"names {name}, and {' and '.join(map(ascii, files))} differ from it only in their Unicode form"
            for file in files:
                if fault:
                    found.faults.setdefault(file, ("bad_caption", f"{where} {fault}."))
                else:
                    found.texts.setdefault(file, []).extend(captions)
        if first and not found.texts:  # no row can be used, or all name files elsewhere
            faults = [message for _, message in found.faults.values()] + [f"{at} {what}." for at, what in found.rows]
            if faults:
                more = "" if enough else f" Its columns are {_listed(first.values)}. {_NAME_THEM}"
                raise StditError(faults[0] + more)
        if first and found.texts and not enough:
            self.check(first.values, f"{unit} {first.line}")
        return found

    def _files(self, name: str) -> list[str]:
        """The file that a row names; several if they differ only in Unicode form; none if it is elsewhere."""
        if name in self.names.all:
            return [name]
        places = list(dict.fromkeys(self._places(name)))
        for place in places:
            if found := self.names.find(place):
                return found
        if not is_remote(self.folder):  # it may not be listed, such as a hidden file
            places = [place for place in places if os.path.exists(os.path.join(self.folder, place))] or places
        return [] if places[0].startswith("../") else places[:1]

    def _places(self, name: str) -> list[str]:
        if is_remote(self.folder):
            return [posixpath.normpath(path.removeprefix(self.folder + "/")) for path in (name, name.strip())]
        if os.sep == "/":
            name = name.replace("\\", "/")
        paths = [os.path.join(base, path) for path in (name, name.strip()) for base in self.bases]
        return [os.path.relpath(path, self.folder).replace(os.sep, "/") for path in paths]
