"""Arguments that name an output. One that cannot be written is an error before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from stdit.errors import StditError
from stdit.files import local_file, local_folder, local_path


class Unwritable(Exception):
    """A valid path that cannot be written here. Not a ValueError, for which typer would print a message of its own."""

    exit_code = 1

    def format_message(self) -> str:
        return str(self)


def out_folder(given: str) -> Path:
    """For `parser=` of a folder on this machine."""
    return _checked(given, local_folder)


def out_file(given: str) -> Path:
    """For `parser=` of a file on this machine."""
    return _checked(given, local_file)


def out_manifest(given: str) -> str:
    """For `parser=` of a manifest, which may be a URL of any fsspec scheme."""
    return given if _is_url(given) else str(out_file(given))


def out_store(given: str) -> str:
    """For `parser=` of a folder that may be a URL of any fsspec scheme."""
    return given if _is_url(given) else str(out_folder(given))


def _is_url(given: str) -> bool:
    return "://" in given and not given.startswith("file://")


def _checked(given: str, check: Callable[[str, str | Path], Path]) -> Path:
    try:
        path = local_path("it", given)
    except StditError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        return check("it", path)
    except StditError as error:
        raise Unwritable(str(error)) from None


def out_path(given: str) -> Path:
    """For `parser=` of a folder, or a file that may be there, on this machine."""
    return out_file(given) if Path(given).is_file() else out_folder(given)
