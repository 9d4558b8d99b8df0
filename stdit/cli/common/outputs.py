"""Arguments that name an output. One that cannot be written is an error before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer import BadParameter, Option

from stdit.errors import StditError
from stdit.files import local_file, local_folder, local_path


class Unwritable(Exception):
    """A valid path that cannot be written here. Not a ValueError, for which typer would print a message of its own."""

    exit_code = 1

    def format_message(self) -> str:
        return str(self)


# What `parser=` of typer takes: a folder or a file on this machine, or either; a manifest or a folder that may be the
# URL of any fsspec scheme.


def out_folder(given: str) -> Path:
    return _checked(given, local_folder)


def out_file(given: str) -> Path:
    return _checked(given, local_file)


def out_path(given: str) -> Path:
    return out_file(given) if Path(given).is_file() else out_folder(given)


def out_manifest(given: str) -> str:
    return given if _is_url(given) else str(out_file(given))


def out_store(given: str) -> str:
    return given if _is_url(given) else str(out_folder(given))


def folder_option(help: str) -> Any:
    return Option(metavar="FOLDER", parser=out_folder, help=help)


def _is_url(given: str) -> bool:
    return "://" in given and not given.startswith("file://")


def _checked(given: str, check: Callable[[str, str | Path], Path]) -> Path:
    try:
        path = local_path("it", given)
    except StditError as error:
        raise BadParameter(str(error)) from None
    try:
        return check("it", path)
    except StditError as error:
        raise Unwritable(str(error)) from None
