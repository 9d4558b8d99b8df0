"""Exit status and message for Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stdit.errors import Interrupted


@contextmanager
def when_stopped(advice: str) -> Iterator[None]:
    """A decorator for commands: Ctrl-C ends them with status 130. advice: what is kept, and how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"stopped. {advice}", 130) from None
