"""The base class of user-facing errors, and helpers for their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class StditError(ValueError):
    """An error that the user can fix. The message names the value, where it came from, and the remedy.

    Commands print the message without a traceback and exit with status 1.
    """


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean X?' for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


@contextmanager
def error_context(what: str) -> Iterator[None]:
    """Prepends `what`, such as the name of a setting or file, to the message of a StditError raised within."""
    try:
        yield
    except StditError as error:
        raise StditError(f"{what}: {error}") from error


class Interrupted(Exception):
    """Raised when a signal has stopped a run and its state is saved. The message says how to continue.

    status: the exit status, 75 after SIGTERM (requeue me), 130 after Ctrl-C.
    """

    def __init__(self, message: str, status: int = 75) -> None:
        super().__init__(message)
        self.status = status
