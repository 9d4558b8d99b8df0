"""Progress on stderr: bars on a terminal, otherwise a line every 10 s and one at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from stdit.heartbeat import HEARTBEAT

if TYPE_CHECKING:
    from rich.progress import TaskID

T = TypeVar("T")


@contextmanager
def counting_bar(what: str, hidden: bool = False) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar with a count and the time left. Yields two functions: one sets the total, the other adds to the count."""
    if hidden or not sys.stderr.isatty():
        with _lines(hidden) as update:
            state = {"done": 0, "total": 0}

            def show(**values: int) -> None:
                state.update(values)
                update(what, state["done"], state["total"])

            yield lambda total: show(total=total), lambda count: show(done=state["done"] + count)
        return
    from rich.progress import MofNCompleteColumn

    with _bars(MofNCompleteColumn()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda total: bar.update(task, total=total), lambda count: bar.advance(task, count)


@contextmanager
def named_bars(hidden: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function of (task, done, total) that shows a bar per task; the bars disappear at the end."""
    if hidden or not sys.stderr.isatty():
        with _lines(hidden) as update:
            yield update
        return
    with _bars(transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield progress


def tracked(items: Iterable[T], what: str) -> Iterable[T]:
    """Iterates over the items with a bar that disappears at the end."""
    items = list(items)
    with named_bars(hidden=False) as progress:
        for done, item in enumerate(items):
            progress(what, done, len(items))
            yield item
        progress(what, len(items), len(items))


@contextmanager
def _bars(*columns: Any, transient: bool = False) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    with HEARTBEAT.muted(), Progress(*columns, transient=transient, console=Console(stderr=True)) as bar:
        yield bar


@contextmanager
def _lines(hidden: bool) -> Iterator[Callable[[str, int, int], None]]:
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
