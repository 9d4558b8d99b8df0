"""Progress on stderr: bars on a terminal, otherwise a line every 10 s and one at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from stdit.heartbeat import HEARTBEAT

T = TypeVar("T")
Report = Callable[[str, int, int], None]  # (task, done, total)


@contextmanager
def counting_bar(what: str, hidden: bool = False) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar with a count and the time left. Yields two functions: one sets the total, the other adds to the count."""
    with named_bars(hidden, what, columns=[MofNCompleteColumn()], transient=False) as progress:
        state = {"done": 0, "total": 0}

        def show(**values: int) -> None:
            state.update(values)
            progress(what, state["done"], state["total"])

        yield lambda total: show(total=total), lambda count: show(done=state["done"] + count)


@contextmanager
def named_bars(
    hidden: bool, *tasks: str, columns: Iterable[ProgressColumn] = (), transient: bool = True
) -> Iterator[Report]:
    """Yields a function that shows a bar per task, first those of `tasks`; transient: they disappear at the end."""
    if hidden or not sys.stderr.isatty():
        with _lines(hidden) as progress:
            yield progress
        return
    columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    with HEARTBEAT.muted(), Progress(*columns, transient=transient, console=Console(stderr=True)) as bars:
        shown = {what: bars.add_task(what, total=None) for what in tasks}

        def update(what: str, done: int, total: int) -> None:
            if what not in shown:
                shown[what] = bars.add_task(what, total=None)
            bars.update(shown[what], completed=done, total=total)

        yield update


def tracked(items: Sequence[T], what: str) -> Iterator[T]:
    """Iterates over the items with a bar that disappears at the end."""
    with named_bars(hidden=False) as progress:
        for done, item in enumerate(items):
            progress(what, done, len(items))
            yield item
        progress(what, len(items), len(items))


@contextmanager
def _lines(hidden: bool) -> Iterator[Report]:
    """Without a terminal: the heartbeat reports the progress now and then; at the end, one line per task.

    hidden: no lines at the end.
    """
    begun: dict[str, float] = {}
    ends: dict[str, str] = {}

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        taken = now - begun.setdefault(what, now)
        left = f", {_duration(taken * (total - done) / done)} left" if 0 < done < total else ""
        HEARTBEAT.doing(f"{what} {done:,}/{total:,}{left}" if total else what)
        ends[what] = f"{what}: {done:,} of {total:,} in {_duration(taken)}"

    try:
        yield progress
    finally:
        HEARTBEAT.doing("finishing")
        if not hidden:
            for line in ends.values():
                print(line, file=sys.stderr, flush=True)
                HEARTBEAT.spoke()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
