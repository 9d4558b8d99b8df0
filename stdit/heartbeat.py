"""Progress on stderr. The heartbeat prints what a command is doing: a line at its start, and one after every 10 s of
silence. On a terminal, work of known length has a bar; elsewhere the heartbeat says how far it is, and a line its end.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")
Report = Callable[[str, int, int], None]  # (task, done, total)
SILENCE = 10.0  # seconds


class Heartbeat:
    """Prints nothing until it is started, so nothing when stdit is used as a library. Only rank 0 prints."""

    def __init__(self) -> None:
        self._stop = threading.Event()  # ends the thread that prints
        self._thread: threading.Thread | None = None
        self._name = self._doing = ""
        self._begun = self._spoke = 0.0
        self._muted = 0

    def start(self, name: str) -> None:
        """Prints the first line at once, before slow imports and any work."""
        if self._thread is not None or os.environ.get("RANK", "0") != "0":
            return
        self._name, self._doing, self._muted = name, "loading libraries", 0
        self._begun = time.monotonic()
        self._say(f"{name}: starting …")
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="stdit-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            thread.join()

    def doing(self, what: str) -> None:
        """Sets what the next line says."""
        self._doing = what

    @property
    def activity(self) -> str:
        """What `doing` was told last, on any rank; at first nothing."""
        return self._doing

    def spoke(self) -> None:
        """Restarts the 10 s, after something else was printed."""
        self._spoke = time.monotonic()

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Prints nothing within this context, while a progress bar is shown."""
        self._muted += 1
        try:
            yield
        finally:
            self._muted -= 1
            self.spoke()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            self.beat()

    def beat(self) -> None:
        """Prints a line if nothing was printed for 10 s."""
        if time.monotonic() - self._spoke >= SILENCE and not self._muted:
            self._say(f"{self._name}: {self._doing} … {time.monotonic() - self._begun:.0f} s")

    def _say(self, line: str) -> None:
        self.spoke()
        with suppress(OSError, ValueError):  # the reader is gone, or stderr is closed
            print(line, file=sys.stderr, flush=True)


HEARTBEAT = Heartbeat()


@contextmanager
def counting_bar(what: str, hidden: bool = False) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar with a count and the time left. Yields two functions: one sets the total, the other adds to the count."""
    with named_bars(hidden, what, counts=True, transient=False) as progress:
        state = {"done": 0, "total": 0}

        def show(**values: int) -> None:
            state.update(values)
            progress(what, state["done"], state["total"])

        yield lambda total: show(total=total), lambda count: show(done=state["done"] + count)


@contextmanager
def named_bars(hidden: bool, *tasks: str, counts: bool = False, transient: bool = True) -> Iterator[Report]:
    """Yields a function that shows a bar per task, first those of `tasks`; transient: they disappear at the end."""
    if hidden or not sys.stderr.isatty():
        with _lines(hidden) as progress:
            yield progress
        return
    with rich_bars(counts, transient) as bars:
        shown = {what: bars.add_task(what, total=None) for what in tasks}

        def update(what: str, done: int, total: int) -> None:
            if what not in shown:
                shown[what] = bars.add_task(what, total=None)
            bars.update(shown[what], completed=done, total=total)

        yield update


@contextmanager
def rich_bars(counts: bool, transient: bool) -> Iterator[Any]:
    """A rich.progress.Progress on stderr, while the heartbeat is silent. counts: shows done and total in numbers."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    numbers = [MofNCompleteColumn()] if counts else []
    columns = (TextColumn("{task.description}"), BarColumn(), *numbers, TimeRemainingColumn())
    console = Console(stderr=True)
    with HEARTBEAT.muted(), Progress(*columns, transient=transient, console=console, refresh_per_second=2) as bars:
        yield bars


def tracked(items: Sequence[T], what: str) -> Iterator[T]:
    """Iterates over the items with a bar that disappears at the end."""
    with named_bars(hidden=False) as progress:
        for done, item in enumerate(items):
            progress(what, done, len(items))
            yield item
        progress(what, len(items), len(items))


@contextmanager
def _lines(hidden: bool) -> Iterator[Report]:
    """Without a terminal: the heartbeat reports progress now and then; at the end, one line per task unless hidden."""
    begun: dict[str, float] = {}
    ends: dict[str, str] = {}

    def progress(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        taken = now - begun.setdefault(what, now)
        left = f", {readable_time(taken * (total - done) / done)} left" if 0 < done < total else ""
        HEARTBEAT.doing(f"{what} {done:,}/{total:,}{left}" if total else what)
        ends[what] = f"{what}: {done:,} of {total:,} in {readable_time(taken)}"

    try:
        yield progress
    finally:
        HEARTBEAT.doing("finishing")
        if not hidden:
            for line in ends.values():
                print(line, file=sys.stderr, flush=True)
                HEARTBEAT.spoke()


def readable_time(seconds: float) -> str:
    """Such as "42 s", "7 min", "3 h 05 min" or "12 d 3 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
    return f"{hours // 24} d {hours % 24} h"
