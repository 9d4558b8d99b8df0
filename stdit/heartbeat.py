"""Tells on stderr what a command is doing: a line at its start, and another whenever 10 s have passed in silence."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SILENCE = 10.0  # seconds


class Heartbeat:
    """Silent until it is started: who uses stdit as a library hears nothing. Only rank 0 speaks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop: threading.Event | None = None  # of the thread that speaks
        self._thread: threading.Thread | None = None
        self._name = self._doing = ""
        self._begun = self._spoke = 0.0
        self._muted = 0

    def start(self, name: str) -> None:
        """Prints the first line at once: before slow imports, before any work."""
        if self._thread is not None or os.environ.get("RANK", "0") != "0":
            return
        self._name, self._doing, self._muted = name, "loading libraries", 0
        self._begun = time.monotonic()
        self._say(f"{name}: starting …")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._stop,), name="stdit-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None and self._stop is not None:
            self._stop.set()
            thread.join()

    def doing(self, what: str) -> None:
        """What the next line will say, if the work takes that long."""
        with self._lock:
            self._doing = what

    def spoke(self) -> None:
        """Something else was printed: the silence begins anew."""
        with self._lock:
            self._spoke = time.monotonic()

    @contextmanager
    def muted(self) -> Iterator[None]:
        """While a bar on a terminal shows what is being done."""
        self._muted += 1
        try:
            yield
        finally:
            self._muted -= 1
            self.spoke()

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(0.5):
            self.beat()

    def beat(self) -> None:
        """Speaks if nothing was printed for long."""
        with self._lock:
            doing, due = self._doing, time.monotonic() - self._spoke >= SILENCE
        if due and not self._muted:
            self._say(f"{self._name}: {doing} … {time.monotonic() - self._begun:.0f} s")

    def _say(self, line: str) -> None:
        self.spoke()
        with suppress(OSError, ValueError):  # nobody reads it, or stderr is closed
            print(line, file=sys.stderr, flush=True)


HEARTBEAT = Heartbeat()
