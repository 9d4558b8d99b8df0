"""Captions as people keep them: a CSV, a JSONL, or a text file beside each video."""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stdit.data.manifest import Caption, json_lines
from stdit.data.paths import is_remote
from stdit.errors import StditError


def read_captions(path: Path, folder: str) -> dict[str, list[Caption]]:
    """{file relative to `folder`: captions} of a CSV (columns file, caption and perhaps weight) or a JSONL
    (file with caption, or with captions: a list of texts or of {text, weight}). A file may have several lines."""
    if not path.is_file():
        raise StditError(f"{path}: no such captions file.")
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".jsonl"):
        raise StditError(f"{path}: captions are a .csv or a .jsonl file, or .txt files beside the videos.")
    found: dict[str, list[Caption]] = {}
    try:
        for line, row in _csv(path) if suffix == ".csv" else json_lines(path):
            name = row.get("file") or row.get("path")
            if not isinstance(name, str):
                raise StditError(f"{path}, line {line} names no file.")
            relative = _relative(name, path.parent, folder)
            if not relative.startswith("../"):  # a file elsewhere, of a table that captions more than this folder
                found.setdefault(relative, []).extend(captions_of(row, f"{path}, line {line}"))
    except UnicodeDecodeError as error:
        raise StditError(f"{path} is not UTF-8 ({error}). Save it as UTF-8.") from error
    return found


def caption_lines(text: bytes, where: str) -> list[Caption]:
    """The captions of a text file, one a line."""
    try:
        lines = text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise StditError(f"{where} is not UTF-8 ({error}). Save it as UTF-8.") from error
    return [Caption(line.strip()) for line in lines if line.strip()]


def _relative(name: str, beside: Path, folder: str) -> str:
    """The name as found in `folder`: as it stands, or relative to the captions file's own folder."""
    if is_remote(folder):
        return posixpath.normpath(name.removeprefix(folder + "/"))
    name = name if os.sep == "\\" else name.replace("\\", "/")
    for path in (Path(folder, name), beside / name):
        if path.exists():
            return os.path.relpath(path, folder).replace(os.sep, "/")
    return os.path.normpath(name).replace(os.sep, "/")


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if "caption" not in columns or not {"file", "path"} & set(columns):
            raise StditError(f"{path}: the first line must name the columns file and caption, it is {columns}.")
        for row in reader:
            if None in row:
                raise StditError(
                    f"{path}, line {reader.line_num} has more fields than the first line. "
                    'A caption with a comma goes into "quotation marks".'
                )
            yield reader.line_num, row


def captions_of(row: dict[str, Any], where: str) -> Iterator[Caption]:
    """A row's `captions` or `caption`; raises StditError for one that is no text with a positive weight."""
    values = row.get("captions") if isinstance(row.get("captions"), list) else [row.get("caption")]
    for value in values or []:
        text, weight = (
            (value.get("text"), value.get("weight")) if isinstance(value, dict) else (value, row.get("weight"))
        )
        if text is None or text == "":
            continue  # the file then has no caption, and the scan says so
        try:
            weight = float(1.0 if weight in (None, "") else weight)
        except (TypeError, ValueError):
            weight = -1.0
        if not isinstance(text, str) or not 0 < weight < float("inf"):
            raise StditError(f"{where}: a caption is a text with a positive weight, not {value!r}.")
        if text.strip():
            yield Caption(text.strip(), weight)
