"""Child processes of tests: each has a time limit, and its output goes to a file, never to a pipe that can fill."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

LIMIT = 900.0  # seconds; generous, since the machine may be busy with other things
SHOWN = 4000  # characters of a child's output that an error shows, from its end


class Child:
    """A started process, with its children in a group of its own. stdout and stderr are kept together in a file."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with this object)
        self.popen = subprocess.Popen(
            command,
            env={**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.kill = weakref.finalize(self, _kill_group, self.popen)  # also when a test fails and forgets it

    @property
    def output(self) -> str:
        """What it has printed so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def status(self, limit: float = LIMIT) -> int:
        """Waits for its end and returns its exit status. Past the limit, kills it and raises with its output."""
        try:
            return self.popen.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {limit:g} s:\n{self.output[-SHOWN:]}") from None

    def finish(self, limit: float = LIMIT) -> str:
        """As `status`, but raises unless the exit status is 0. Returns the output."""
        status = self.status(limit)
        assert status == 0, f"exit status {status}:\n{self.output[-SHOWN:]}"
        return self.output


def finish_together(children: Sequence[Child], limit: float = LIMIT) -> None:
    """Waits for processes that wait for one another: as soon as one fails, the others are killed and it is shown."""
    deadline = time.monotonic() + limit
    try:
        while time.monotonic() < deadline:
            statuses = [child.popen.poll() for child in children]
            for number, (child, status) in enumerate(zip(children, statuses)):
                assert status in (None, 0), f"child {number}, exit status {status}:\n{child.output[-SHOWN:]}"
            if None not in statuses:
                return
            time.sleep(0.05)
        told = "\n--\n".join(child.output[-SHOWN:] for child in children if child.popen.poll() is None)
        raise AssertionError(f"still running after {limit:g} s:\n{told}")
    finally:
        for child in children:
            child.kill()


def _kill_group(popen: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()
