"""What a person sees of a run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import Any

from stdit.heartbeat import HEARTBEAT, SILENCE

EVERY = SILENCE - 2  # seconds between two lines where there is no terminal: the heartbeat speaks only in long steps


class Progress:
    """Steps done, loss, tokens/s, MFU and the time left."""

    def __init__(self, step: int, steps: int, shown: bool) -> None:
        self.steps = steps
        self.shown = shown
        self.text = ""
        self.bar: Any = None
        self._muted = ExitStack()
        self.spoke = time.monotonic()
        self.begun, self.first = time.monotonic(), step
        if not shown:
            self._muted.enter_context(HEARTBEAT.muted())
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Bar(*columns, console=Console(stderr=True), refresh_per_second=2)
            self._muted.enter_context(HEARTBEAT.muted())
            self.bar.start()
            self.task = self.bar.add_task("", total=steps, completed=step)

    def begin(self, step: int) -> None:
        """A step begins: what the heartbeat says while it lasts."""
        HEARTBEAT.doing(f"step {step}/{self.steps}")

    def show(self, loss: float, tokens_per_second: float, mfu: float | None) -> None:
        self.text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if mfu is not None:
            self.text += f"  MFU {100 * mfu:.1f} %"
        if self.bar is not None:
            self.bar.update(self.task, description=self.text)

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step)
        elif self.shown and self.text and (time.monotonic() - self.spoke > EVERY or step == self.steps):
            self.spoke = time.monotonic()
            left = (self.steps - step) * (self.spoke - self.begun) / max(1, step - self.first)
            print(f"step {step}/{self.steps}  {self.text}  {left / 60:.1f} min left", flush=True)
            HEARTBEAT.spoke()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self._muted.close()
