"""The one error a user's mistake ends in."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class StditError(ValueError):
    """Something a user can mend: the message names the value, the place it came from and the way out.

    The commands print its message without a traceback and exit with status 1.
    """


def nearest_name(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


@contextmanager
def about(what: str) -> Iterator[None]:
    """Puts the setting, or whatever a StditError raised within is about, in front of its message."""
    try:
        yield
    except StditError as error:
        raise StditError(f"{what}: {error}") from error


class Interrupted(Exception):
    """A signal stopped a run after it had saved its state. The message says how to go on.

    `status` is the exit status: 75 after SIGTERM (requeue me), 130 after Ctrl-C.
    """

    def __init__(self, message: str, status: int = 75) -> None:
        super().__init__(message)
        self.status = status
