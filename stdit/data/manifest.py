"""The manifest: a table of clips, one row each, as Parquet (JSONL and CSV are read too).

Columns: `id` (sha256 of the file's sha256 with start and end, not of the path), `path`, `captions` (list of {text,
weight}), `frames`, `fps`, `width`, `height` (as displayed), `start`, `end` (seconds; both 0 for an image), `sha256`.

Paths inside the manifest's folder are stored relative to it, so that the folder can be moved as a whole; others are
absolute, or URLs of any fsspec scheme. A file in a tar shard is `SHARD.tar#OFFSET+SIZE/NAME` (see `remote.paths`).
`stdit data scan` adds `file_state` (the file's size and time, to notice changes), and with --scores the columns of
`scan.with_scores`. Further columns are kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stdit.data.captions import CAPTION_NAMES, Caption, captions_of, columns_in
from stdit.data.remote.paths import beside, is_remote, join
from stdit.data.remote.storage import STORAGE
from stdit.errors import StditError, error_context, nearest_name
from stdit.text_files import Row, csv_rows, fault_in, json_rows, shortened

__all__ = ["SCHEMA", "Caption", "Clip", "Manifest", "Skipped", "clip_id", "read_manifest", "write_manifest"]
FORMAT = 1
STATE = "file_state"  # optional column; not part of a clip's identity
WARNINGS = 5  # left-out rows that are named

log = logging.getLogger(__name__)

_TEXT = pa.large_string()  # 64-bit offsets: ten million captions exceed 2 GB
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("path", _TEXT),
        ("captions", pa.large_list(pa.struct([("text", _TEXT), ("weight", pa.float64())]))),
        ("frames", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class Clip:
    """One row."""

    id: str
    path: str  # ready to be opened
    captions: tuple[Caption, ...]
    frames: int
    fps: float
    width: int
    height: int
    start: float
    end: float
    sha256: str
    # of the file when it was scanned (see `listing.File`), as JSON; "" if unknown. Not part of the clip's identity
    state: str = dataclasses.field(default="", compare=False)

    @property
    def image(self) -> bool:
        return self.frames == 1


@dataclass(frozen=True)
class Skipped:
    """A file that did not become a clip. reason: one word, for programs. message: a sentence."""

    file: str
    reason: str
    message: str


def clip_id(sha256: str, start: float, end: float) -> str:
    """A clip's identity: hash of its file's content and its start and end in milliseconds."""
    return hashlib.sha256(f"{sha256}:{start:.3f}:{end:.3f}".encode()).hexdigest()


class Manifest:
    """Clips as an Arrow table (ten million rows take a few gigabytes); numeric columns can be read as numpy arrays.

    checked: the table comes from manifests, and need not be checked again.
    """

    def __init__(
        self, table: pa.Table, folder: str | Path = ".", source: str = "manifest", checked: bool = False
    ) -> None:
        self.table = table if checked else _checked(table, source)
        self.folder = str(folder)
        self.source = source

    @classmethod
    def of(cls, clips: Sequence[Clip], folder: str | Path = ".") -> Manifest:
        columns: dict[str, list[Any]] = {name: [getattr(clip, name) for clip in clips] for name in SCHEMA.names}
        columns["captions"] = [[asdict(caption) for caption in clip.captions] for clip in clips]
        table = pa.table(columns, schema=SCHEMA)
        if any(clip.state for clip in clips):
            table = table.append_column(STATE, pa.array([clip.state for clip in clips], pa.string()))
        return cls(table, folder)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> Clip:
        values = {name: column[int(row)].as_py() for name, column in self._columns.items()}
        values["captions"] = tuple(Caption(c["text"], c["weight"]) for c in values["captions"])
        values["path"] = self._resolve(values["path"])
        values["state"] = values.get("state") or ""
        return Clip(**values)

    def __iter__(self) -> Iterator[Clip]:
        return (self[row] for row in range(len(self)))

    def _resolve(self, path: str) -> str:
        return path if "://" in path or os.path.isabs(path) else join(self.folder, path)

    def column(self, name: str) -> np.ndarray:
        """(rows,) a column of numbers."""
        if name not in self.table.column_names:
            raise StditError(f"{self.source} has no column {name!r}.{nearest_name(name, self.table.column_names)}")
        return self.table.column(name).to_numpy()

    @cached_property
    def _columns(self) -> dict[str, pa.ChunkedArray]:
        """A clip's columns. Cached: looking them up for each clip would take longer than reading its latents."""
        columns = {name: self.table.column(name) for name in SCHEMA.names}
        if STATE in self.table.column_names and pa.types.is_string(self.table.schema.field(STATE).type):
            columns["state"] = self.table.column(STATE)
        return columns

    @cached_property
    def ids(self) -> pa.ChunkedArray:
        return self.table.column("id")

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all rows in order, except for paths: a folder can be moved."""
        digest = hashlib.sha256(f"manifest {FORMAT} {len(self)}".encode())
        for name in sorted(set(SCHEMA.names) - {"path"}):
            digest.update(name.encode())
            _digest(digest, self.table.column(name))
        return digest.hexdigest()


def _digest(digest: Any, column: pa.ChunkedArray) -> None:
    """Adds a column's values to a digest, independent of its chunks."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        digest.update(pc.binary_length(column).to_numpy().astype("<i8").tobytes())
        for chunk in filter(len, column.chunks):
            offsets = np.frombuffer(chunk.buffers()[1], "<i8" if pa.types.is_large_string(kind) else "<i4")
            offsets = offsets[chunk.offset : chunk.offset + len(chunk) + 1]
            if offsets[-1] > offsets[0]:
                digest.update(memoryview(chunk.buffers()[2])[int(offsets[0]) : int(offsets[-1])])
    elif pa.types.is_large_list(kind):
        digest.update(pc.list_value_length(column).to_numpy().astype("<i8").tobytes())
        flat = pc.list_flatten(column)
        for index in range(kind.value_type.num_fields):
            _digest(digest, pc.struct_field(flat, [index]))
    else:
        digest.update(column.to_numpy().tobytes())


def _checked(table: pa.Table, source: str) -> pa.Table:
    """The table with the schema's types. Raises StditError that names the bad row."""
    table = _with_captions(table, source)
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise StditError(
            f"{source} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}. "
            f"`stdit data scan FOLDER --out MANIFEST` writes complete ones."
        )
    table = table.select([*SCHEMA.names, *(name for name in table.column_names if name not in SCHEMA.names)])
    for index, field in enumerate(SCHEMA):
        try:
            column = table.column(field.name).cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise StditError(f"{source}: column {field.name} cannot be read as {field.type}: {error}") from error
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise StditError(f"{source}: row {row} has no {field.name}.")
        table = table.set_column(index, field, column)
    ids = table.column("id")
    if len(pc.unique(ids)) != len(ids):
        first = pc.index_in(ids, value_set=ids).to_numpy()
        row = int(np.flatnonzero(first != np.arange(len(ids)))[0])
        raise StditError(f"{source}: rows {first[row]} and {row} have the same id {ids[row]}. Remove one of them.")
    _check_captions(table.column("captions"), source)
    for name in ("frames", "fps", "width", "height"):
        values = table.column(name).to_numpy()
        bad = np.flatnonzero(~(values > 0) | ~np.isfinite(values))
        if len(bad):
            raise StditError(f"{source}: row {bad[0]} has {name} {values[bad[0]]}; it must be positive.")
    return table


def _with_captions(table: pa.Table, source: str) -> pa.Table:
    """Converts texts or lists of texts in any of CAPTION_NAMES to the schema's captions."""
    names = columns_in(table.column_names, CAPTION_NAMES)
    there = "captions" in table.column_names
    kind = table.schema.field("captions").type if there else pa.null()
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not names or (lists and pa.types.is_struct(kind.value_type)):
        return table
    found = []
    for number, row in enumerate(table.select([*names, *columns_in(table.column_names, ("weight",))]).to_pylist()):
        with error_context(f"{source}: row {number}"):
            found.append([asdict(caption) for caption in captions_of(row)])
    column = pa.array(found, SCHEMA.field("captions").type)
    if not there:
        return table.append_column("captions", column)
    return table.set_column(table.column_names.index("captions"), "captions", column)


def _check_captions(captions: pa.ChunkedArray, source: str) -> None:
    each = pc.list_flatten(captions)
    weights = pc.struct_field(each, "weight").to_numpy()
    texts = pc.struct_field(each, "text")
    right = pc.is_valid(texts).to_numpy().astype(bool) & (weights > 0) & np.isfinite(weights)
    right &= ~pc.fill_null(pc.match_substring(texts, "\0"), False).to_numpy().astype(bool)
    if not right.all():
        row = np.repeat(np.arange(len(captions)), pc.list_value_length(captions).to_numpy())[np.argmin(right)]
        wrong = each[int(np.argmin(right))].as_py()
        raise StditError(
            f"{source}: row {row} has the caption {wrong}; it is a text (without NUL) with a positive weight."
        )


def read_manifest(path: str | Path) -> Manifest:
    """Reads a manifest from a .parquet, .jsonl or .csv file, or the URL of one."""
    if is_remote(str(path)):
        with error_context(str(path)), STORAGE.local(str(path)) as local:
            return Manifest(read_manifest(local).table, str(path).rpartition("/")[0], str(path))
    path = Path(path)
    if not path.is_file():
        raise StditError(f"{path}: no such manifest. `stdit data scan FOLDER --out {path}` writes one.")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        try:
            table = STORAGE.from_disk(str(path), lambda: pq.read_table(path))
        except (pa.ArrowInvalid, OSError) as error:
            raise StditError(f"{path} cannot be read as Parquet: {error}") from error
        version = (table.schema.metadata or {}).get(b"stdit_manifest", b"1")
        if version != str(FORMAT).encode():
            raise StditError(f"{path} has manifest format {version.decode()}; this stdit reads {FORMAT}.")
    elif suffix in (".jsonl", ".csv"):
        table = _table(path, suffix == ".csv")
    else:
        raise StditError(f"{path}: a manifest must be a .parquet, .jsonl or .csv file.")
    return Manifest(table, path.parent, str(path))


def parquet_path(path: str | Path) -> str:
    """The path or URL as text. Raises StditError unless it ends in .parquet."""
    path = str(path)
    if not path.lower().endswith(".parquet"):
        raise StditError(f"{path}: manifests are written as Parquet; name it {beside(path, '.parquet')}.")
    return path


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """Writes Parquet to a path or URL, atomically."""
    path = parquet_path(path)
    folder = None if is_remote(path) else os.path.join(os.path.dirname(os.path.abspath(path)), "")
    stored = [_stored(p, folder) for p in (manifest._resolve(p) for p in manifest.table.column("path").to_pylist())]
    table = manifest.table.set_column(manifest.table.column_names.index("path"), "path", pa.array(stored, _TEXT))
    table = table.replace_schema_metadata({"stdit_manifest": str(FORMAT)})
    with STORAGE.publish(path) as part:
        pq.write_table(table, part, compression="zstd")


def _stored(path: str, folder: str | None) -> str:
    """A path as stored in a manifest. folder: the manifest's, ending in a separator; None for a URL."""
    if "://" in path:
        return path
    if folder is None:
        return os.path.abspath(path)
    if not path.startswith(folder) or ".." in path:
        path = os.path.abspath(path)
    return path.removeprefix(folder).replace(os.sep, "/") if path.startswith(folder) else path


def _table(path: Path, is_csv: bool) -> pa.Table:
    """The rows of a CSV or JSONL file. Rows with bad captions are left out with a warning."""
    header: list[str] = []
    rows: Iterable[Row]
    if is_csv:
        header, rows = csv_rows(
            path, lambda columns: bool(columns_in(columns, ("path",))), lambda row: _is_row(row, header)
        )
        counts = Counter(name.strip().lower() for name in header)
        if twice := [name for name in (*SCHEMA.names, *CAPTION_NAMES, "weight") if counts[name] > 1]:
            raise StditError(f"{path}: the first line names {' and '.join(twice)} twice. Rename one of them.")
    else:
        rows = json_rows(path)
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    left_out = []
    for row in rows:
        where = f"{path}, line {row.line}"
        if row.fault:
            raise StditError(f"{where} {row.fault}.")
        try:
            captions = captions_of(row.values, is_csv=is_csv)
        except StditError as error:
            left_out.append(f"{where} {error}.")
            continue
        for name, value in _fields(row.values, where).items():
            columns[name].append(value)
        columns["captions"].append([asdict(caption) for caption in captions])
    if left_out and not columns["id"]:
        raise StditError(left_out[0])
    for message in left_out[:WARNINGS]:
        log.warning("%s Its clip is left out.", message)
    if len(left_out) > WARNINGS:
        log.warning("%s: %d more rows are left out.", path, len(left_out) - WARNINGS)
    try:
        return pa.table(columns, schema=SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise StditError(f"{path} cannot be read as a manifest: {error}") from error


def _is_row(row: dict[str, str], header: list[str]) -> bool:
    """Whether a line inside a quoted field is itself a row: it has every column, and a number of frames."""
    return len(row) == len(header) and row.get("frames", "").strip().isdigit()


def _fields(given: dict[str, Any], where: str) -> dict[str, Any]:
    """A row's fields except for captions; `start`, `end` and `id` are computed if missing."""
    kinds: dict[str, type] = {"frames": int, "width": int, "height": int, "fps": float, "start": float, "end": float}
    there = {name: given[key] for name in SCHEMA.names for key in columns_in(given, (name,)) if name != "captions"}
    there = {"start": 0.0} | {name: value for name, value in there.items() if value not in (None, "")}
    for name, value in there.items():
        if isinstance(value, str) and (fault := fault_in(value)):
            raise StditError(f"{where}: {name} is {shortened(value)}, which {fault}.")
    follows = {"captions": True, "id": "sha256" in there, "end": "frames" in there and "fps" in there}
    for name in SCHEMA.names:
        if name not in there and not follows.get(name):
            raise StditError(f"{where} has no {name}. `stdit data scan` determines it and writes a manifest.")
    row: dict[str, Any] = {}
    for name, value in there.items():
        kind = kinds.get(name, str)
        try:
            row[name] = kind(value)
            if (kind is str and not isinstance(value, str)) or isinstance(value, bool):
                raise ValueError(f"it must be {'a text' if kind is str else 'a number'}")
            if kind is int and isinstance(value, float) and value != row[name]:
                raise ValueError("it must be a whole number")
        except (TypeError, ValueError, OverflowError) as error:
            raise StditError(f"{where}: {name} is {shortened(value)} ({error}).") from error
    try:
        if "end" not in row:
            row["end"] = 0.0 if row["frames"] == 1 else row["start"] + row["frames"] / row["fps"]
        if "id" not in row:
            row["id"] = clip_id(row["sha256"], row["start"], row["end"])
    except (OverflowError, ZeroDivisionError) as error:
        raise StditError(f"{where}: frames is {row['frames']}, fps {row['fps']} ({error}).") from error
    return row
