"""Prints on stderr what a command is doing: a line at its start, and another after every 10 s of silence."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
