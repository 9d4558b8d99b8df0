"""Reads text that people write: captions, prompts, manifests, configs. The same rules hold for all.

Files are UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one. Lines end only at \\n or \\r\\n, so
U+2028, U+0085, form feeds and the like stay within a text. Bytes that are not UTF-8 become lone surrogates (Python's
`surrogateescape`), which `fault_in` reports: a bad text is rejected, not its file.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from stdit.errors import StditError

MARKS = {  # byte order marks; UTF-32 first, since its mark starts with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DELIMITERS = ",;\t|"
_MERGE = "tag:yaml.org,2002:merge"
_SCIENTIFIC = ("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), [*"-+.0123456789"])
_ODD = re.compile("[\0\ud800-\udfff]")
_NUL = "\udc00"  # stands for NUL, which the csv module of Python 3.10 refuses


class Row(NamedTuple):
    """A row of a table. fault: what is wrong with it; `values` then holds what could be read, if anything."""

    line: int
    values: dict[str, Any]
    fault: str = ""


def fault_in(text: str) -> str:
    """What is wrong with a text and its remedy, as a predicate ('has a NUL character…'), or ''."""
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
    """A name in Unicode form NFC, since macOS writes é as two characters where others write one."""
    return unicodedata.normalize("NFC", name)


@contextmanager
def _decoding(first: bytes, where: str) -> Iterator[dict[str, Any]]:
    """Yields the encoding of a file with these first bytes, as options of `open` and `bytes.decode`."""
    encoding = next((encoding for mark, encoding in MARKS.items() if first.startswith(mark)), "utf-8")
    if encoding == "utf-8" and len(first) >= 4 and first.count(0) * 3 >= len(first):
        raise StditError(f"{where} is UTF-16 or UTF-32 without a byte order mark, or not text. Save it as UTF-8.")
    try:
        yield {"encoding": encoding, "errors": "surrogateescape" if encoding.startswith("utf-8") else "strict"}
    except UnicodeDecodeError as error:
        raise StditError(f"{where} is not {encoding.upper()} ({error.reason}). Save it as UTF-8.") from error


def decode_text(content: bytes, where: str) -> str:
    """Decodes the content of a file. Raises StditError if it contradicts its byte order mark."""
    with _decoding(content[:1024], where) as options:
        return content.decode(**options)


def read_text(path: str | Path) -> str:
    """Reads a whole file, such as a config. Raises StditError for a fault in any line, or OSError."""
    text = decode_text(Path(path).read_bytes(), str(path))
    split_lines(text, str(path))
    return text


def read_lines(path: str | Path) -> list[str]:
    """Reads the lines of a file. Raises StditError for a fault in any of them, or OSError."""
    lines = split_lines(read_text(path), str(path))
    if len(lines) == 1 and "\r" in lines[0]:
        raise StditError(f"{path}: its lines end in CR alone. Save it with the line ends of Unix or Windows.")
    return lines if lines[-1] else lines[:-1]


def split_lines(text: str, where: str) -> list[str]:
    """The lines of a text, without line ends and byte order marks. Raises StditError for a fault in any of them."""
    lines = [line.removesuffix("\r").lstrip("\ufeff") for line in text.split("\n")]
    for number, line in enumerate(lines, 1):
        if fault := fault_in(line):
            raise StditError(f"{where}, line {number} {fault}.")
    return lines


def _raw_lines(path: Path, newline: str) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        first = file.read(1024)
    with _decoding(first, str(path)) as options, open(path, newline=newline, **options) as file:
        for number, line in enumerate(file, 1):
            yield number, line.lstrip("\ufeff")


def read_yaml(text: str, where: str) -> Any:
    """Parses YAML; no key may come twice, and 1e-8 is a number (YAML 1.2). where: how an error starts: "FILE is"."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
            if twice := [key for key, count in Counter(keys).items() if count > 1]:
                message = f"{twice[0]} is set twice"
                raise yaml.constructor.ConstructorError("in a mapping", node.start_mark, message, node.start_mark)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(*_SCIENTIFIC)
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, AttributeError) as error:
        # the others: dates such as 2020-13-45, numbers of 5,000 digits, a thousand brackets, !!binary
        raise StditError(f"{where} not YAML: {error}") from error


def yaml_text(value: Any) -> str:
    """YAML that `read_yaml` reads back."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_implicit_resolver(*_SCIENTIFIC)
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def json_rows(path: Path) -> Iterator[Row]:
    """Reads the objects of a JSONL file, one per line. Empty lines are skipped."""
    for number, line in _raw_lines(path, "\n"):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Row(number, {}, f"is not JSON: {error}")
                continue
            if isinstance(row, dict):
                yield Row(number, row)
            else:
                yield Row(number, {}, f"is {shortened(row)}, not an object {{…}}; a JSONL file has one per line")


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of each line of a JSONL file that is not empty. Raises StditError at a bad one."""
    for row in json_rows(path):
        if row.fault:
            raise StditError(f"{path}, line {row.line} {row.fault}")
        yield row.line, row.values


def csv_rows(
    path: Path, enough: Callable[[Sequence[str]], bool], is_row: Callable[[dict[str, str]], bool]
) -> tuple[list[str], Iterator[Row]]:
    """Reads the column names and the rows of a CSV file. Quoted fields may have any number of lines and any length.

    enough: whether these columns suffice. The delimiter is the first of comma, semicolon, tab and | for which they do.
    is_row: whether a line looks like a row of its own. If a quoted field contains such a line or the end of the file,
        its quotation mark was never closed, and StditError names its line.
    """
    lines = _raw_lines(path, "")
    delimiter, line, header = _header(path, lines, enough)
    return header, _csv_rows(path, lines, delimiter, line + 1, header, is_row)


def _header(
    path: Path, lines: Iterator[tuple[int, str]], enough: Callable[[Sequence[str]], bool]
) -> tuple[str, int, list[str]]:
    """(delimiter, line number, names) from the first line that is not empty, after Excel's optional `sep=;`."""
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
        found = {mark: next(csv.reader([text], delimiter=mark, skipinitialspace=True)) for mark in given or DELIMITERS}
        delimiter = next((mark for mark, names in found.items() if enough(names)), next(iter(found)))
        return delimiter, number, [name.strip() for name in found[delimiter]]
    return ",", 0, []


def _csv_rows(
    path: Path,
    lines: Iterator[tuple[int, str]],
    delimiter: str,
    first: int,
    header: list[str],
    is_row: Callable[[dict[str, str]], bool],
) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    held: list[str] = []  # the lines of the current row

    def feed() -> Iterator[str]:
        for _, text in lines:
            held.append(text)
            yield text

    def parsed(texts: Iterable[str], strict: bool = False) -> Any:
        plain = (text.replace("\0", _NUL) for text in texts)
        return csv.reader(plain, delimiter=delimiter, skipinitialspace=True, strict=strict)

    reader = parsed(feed(), strict=True)
    while True:
        held.clear()
        start, fault = first + reader.line_num, ""
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if len(held) != 1 or "unexpected end" in str(error):
                raise _open_quote(path, start) from error
            cells = next(parsed(held))
            fault = 'has a quotation mark inside a field: quote the whole field, and double the mark, ""'
        if any("\0" in text for text in held):
            cells = [cell.replace(_NUL, "\0") for cell in cells]
        for text in held[1:]:
            if is_row(dict(zip(header, next(parsed([text]), [])))):
                raise _open_quote(path, start)
        if not any(cell.strip() for cell in cells):
            continue  # a spreadsheet's empty rows
        row = dict(zip(header, cells))
        extra = any(cell.strip() for cell in cells[len(header) :])
        if not fault and (extra or len(cells) < len(header)):
            fault = f"has {'more' if extra else 'fewer'} fields than the first line ({len(cells)}, not {len(header)})"
            fault += f'. A text with "{delimiter}" in it goes into "quotation marks"' if extra else ""
        yield Row(start, row, fault)


def _open_quote(path: Path, line: int) -> StditError:
    return StditError(
        f"{path}, line {line}: a quotation mark opens a field there and does not close it. Close it. If the mark is "
        'part of the text, quote the whole field and double the mark, "".'
    )


def shortened(value: object, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"
