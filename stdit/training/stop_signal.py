"""Ctrl-C, SIGTERM and SIGUSR1: finish the step, save, and stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from stdit.errors import Interrupted
from stdit.training.engine.parallel import World


class StopSignal:
    """Notes the first signal; the trainer acts on it after the step. A second Ctrl-C stops at once."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.received: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals meanwhile. Python allows that on the main thread only; on others nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        if self.world.is_main:  # print is not for handlers: the signal may come within one
            with suppress(OSError):
                os.write(2, f"{signal.Signals(number).name}: saving after this step …\n".encode())

    @property
    def flags(self) -> list[bool]:
        """Whether this rank got Ctrl-C, and whether another signal: summed over ranks, the input of `of_flags`."""
        return [self.received == signal.SIGINT, self.received not in (None, signal.SIGINT)]

    @staticmethod
    def of_flags(interrupted: float, terminated: float) -> int:
        """The signal that some rank got, or 0."""
        return int(signal.SIGTERM) if terminated else int(signal.SIGINT) if interrupted else 0

    def interrupted(self, number: int, step: int, folder: Path) -> Interrupted:
        message = f"saved after step {step} in {folder / 'checkpoints'}; the same command goes on from there"
        return Interrupted(message if self.world.is_main else "", 130 if number == signal.SIGINT else 75)
