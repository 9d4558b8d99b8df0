"""Reads text that people hand over: captions, prompts, manifests, configs. One rule for all of it.

UTF-8, with a byte order mark or without; UTF-16 and UTF-32 with one. A line ends at \\n or \\r\\n only, so that U+2028,
U+0085, form feeds and the like stay inside a text. Bytes that are not UTF-8 come as lone surrogates (Python's
`surrogateescape`), which `fault_in` names: a bad text costs itself, not its file.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stdit.errors import StditError

MARKS = {  # the longer first: UTF-16's mark begins UTF-32's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DELIMITERS = ",;\t|"
_MERGE = "tag:yaml.org,2002:merge"
_ODD = re.compile("[\0\ud800-\udfff]")
_NUL = "\udc00"  # in the place of a NUL, which the csv module of Python 3.10 refuses


class Row(NamedTuple):
    """A line of a table. fault: what is wrong with the row; `values` then holds what could be told, perhaps nothing."""

    line: int
    values: dict[str, Any]
    fault: str = ""


def fault_in(text: str) -> str:
    """What no text may hold, said as a predicate, or ''."""
    found = _ODD.search(text)
    if found is None:
        return ""
    code = ord(found[0])
    if not code:
        return "has a NUL character. Remove it"
    if 0xDC80 <= code <= 0xDCFF:
        return f"is not UTF-8 (byte 0x{code - 0xDC00:02x} after {text[: found.start()][-20:]!r}). Save it as UTF-8"
    return f"has half of a character (U+{code:04X}, a lone surrogate). Remove it, or write the whole character"


def unicode_form(name: str) -> str:
    """A name as one Unicode form (NFC): macOS writes é as two characters where others write one."""
    return unicodedata.normalize("NFC", name)


def _encoding(first: bytes, where: str) -> str:
    for mark, encoding in MARKS.items():
        if first.startswith(mark):
            return encoding
    if len(first) >= 4 and first.count(0) * 3 >= len(first):
        raise StditError(f"{where} is UTF-16 or UTF-32 without a byte order mark, or no text. Save it as UTF-8.")
    return "utf-8"


def decode_text(content: bytes, where: str) -> str:
    """The text of a file. Raises StditError where bytes are not in the encoding that their mark tells."""
    encoding = _encoding(content[:1024], where)
    try:
        return content.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise StditError(f"{where} is not {encoding.upper()} ({error.reason}). Save it as UTF-8.") from error


def read_text(path: str | Path) -> str:
    """A whole file, such as a config, in which nothing may be odd. Raises StditError, or OSError."""
    text = decode_text(Path(path).read_bytes(), str(path))
    for number, line in enumerate(split_lines(text), 1):
        if fault := fault_in(line):
            raise StditError(f"{path}, line {number} {fault}.")
    return text


def read_lines(path: str | Path) -> list[str]:
    """The lines of a file in which nothing may be odd. Raises StditError, or OSError."""
    lines = split_lines(read_text(path))
    if len(lines) == 1 and "\r" in lines[0]:
        raise StditError(f"{path}: its lines end in CR alone. Save it with the line ends of Unix or Windows.")
    return lines if lines[-1] else lines[:-1]


def split_lines(text: str) -> list[str]:
    """The lines of a text without their ends and without byte order marks of files that were joined."""
    return [line.removesuffix("\r").lstrip("\ufeff") for line in text.split("\n")]


def _raw_lines(path: Path, newline: str) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        encoding = _encoding(file.read(1024), str(path))
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    with open(path, encoding=encoding, errors=errors, newline=newline) as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line.lstrip("\ufeff")
        except UnicodeDecodeError as error:
            raise StditError(f"{path} is not {encoding.upper()} ({error.reason}). Save it as UTF-8.") from error


def read_yaml(text: str, where: str) -> Any:
    """What a text says as YAML, in which no key comes twice. where: "FILE is", which an error goes on from."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
            if twice := [key for key, count in Counter(keys).items() if count > 1]:
                message = f"{twice[0]} is set twice"
                raise yaml.constructor.ConstructorError("in a mapping", node.start_mark, message, node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, AttributeError) as error:
        # also for a date such as 2020-13-45, a number of 5,000 digits, a thousand brackets, !!binary
        raise StditError(f"{where} not YAML: {error}") from error


def json_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file, one a line; empty lines are left out."""
    for number, line in _raw_lines(path, "\n"):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Row(number, {}, f"is not JSON: {error}")
                continue
            if not isinstance(row, dict):
                yield Row(number, {}, f"is {shortened(row)}, not an object {{…}}; a JSONL file has one a line")
            else:
                yield Row(number, row)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line of a JSONL file that is not empty. Raises StditError at a bad one."""
    for row in json_rows(path):
        if row.fault:
            raise StditError(f"{path}, line {row.line} {row.fault}")
        yield row.line, row.values


def csv_rows(
    path: Path,
    enough: Callable[[Sequence[str]], bool],
    is_row: Callable[[dict[str, str]], bool],
) -> tuple[list[str], Iterator[Row]]:
    """The column names of a CSV file and its rows; the lines of quoted fields may be many, fields of any length.

    enough: whether these columns are what is needed; the delimiter (comma, semicolon, tab or |) is the first that gives
    them. is_row: whether a line looks like a row of its own. Where a quoted field holds such a line, or the file ends
    in it, the field's quotation mark was never closed: StditError names its line.
    """
    lines = _raw_lines(path, "")
    delimiter, first, header = _header(path, lines, enough)
    return header, _csv_rows(path, lines, delimiter, first, header, is_row)


def _header(
    path: Path, lines: Iterator[tuple[int, str]], enough: Callable[[Sequence[str]], bool]
) -> tuple[str, int, list[str]]:
    """(delimiter, line, names) of the first line that is not empty, after Excel's `sep=;` if that is there."""
    given = ""
    for number, line in lines:
        text = line.rstrip("\r\n")
        if text.lower().startswith("sep=") and len(text) == 5 and not given:
            given = text[4]
            continue
        if not text.strip():
            continue
        if fault := fault_in(text):
            raise StditError(f"{path}, line {number} {fault}.")
        choices = [(one, next(csv.reader([text], delimiter=one, skipinitialspace=True))) for one in given or DELIMITERS]
        delimiter, names = next((choice for choice in choices if enough(choice[1])), choices[0])
        return delimiter, number, [name.strip() for name in names]
    return ",", 0, []


def _csv_rows(
    path: Path,
    lines: Iterator[tuple[int, str]],
    delimiter: str,
    line: int,
    header: list[str],
    is_row: Callable[[dict[str, str]], bool],
) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    options: dict[str, Any] = {"delimiter": delimiter, "skipinitialspace": True}
    held: list[str] = []  # the lines of the present row

    def feed() -> Iterator[str]:
        nonlocal line
        for number, text in lines:
            line = number
            held.append(text)
            yield text.replace("\0", _NUL)

    reader = csv.reader(feed(), strict=True, **options)
    while True:
        held.clear()
        start = line + 1
        fault = ""
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if len(held) != 1 or "unexpected end" in str(error):
                raise _open_quote(path, start) from error
            cells = next(csv.reader(_again(held), **options))
            fault = 'has a quotation mark inside a field: quote the whole field, and write a mark within it twice, ""'
        if any("\0" in text for text in held):
            cells = [cell.replace(_NUL, "\0") for cell in cells]
        for text in held[1:]:
            if is_row(dict(zip(header, next(csv.reader(_again([text]), **options), [])))):
                raise _open_quote(path, start)
        if not any(cell.strip() for cell in cells):
            continue  # a spreadsheet's empty rows
        row = dict(zip(header, cells))
        if any(cell.strip() for cell in cells[len(header) :]) and not fault:
            fault = f"has more fields than the first line ({len(cells)}, not {len(header)})"
            fault += f'. A text with "{delimiter}" in it goes into "quotation marks"'
        elif len(cells) < len(header) and not fault:
            fault = f"has fewer fields than the first line ({len(cells)}, not {len(header)})"
        yield Row(start, row, fault)


def _again(lines: list[str]) -> list[str]:
    return [line.replace("\0", _NUL) for line in lines]


def _open_quote(path: Path, line: int) -> StditError:
    return StditError(
        f"{path}, line {line}: a quotation mark opens a field there and does not close it. Close it; a mark that is "
        'part of the text is written twice, "", in a field with quotation marks around it.'
    )


def shortened(value: object, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"
