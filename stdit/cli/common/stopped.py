"""What Ctrl-C ends a command in: exit status 130, and a line that says what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stdit.errors import Interrupted


@contextmanager
def when_stopped(advice: str) -> Iterator[None]:
    """For commands as a decorator. `advice`: what is kept, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"stopped. {advice}", 130) from None
