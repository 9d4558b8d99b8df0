"""Watches the ranks of a run: when one dies, fails or hangs, all others end with an error that names it.

Every rank keeps a connection to rank 0, and each second both tell each other what they are doing. The system closes the
connection of a process that dies, of whatever, so that is known at once. A process that hangs falls silent. Collectives
do not tell it: NCCL waits for a dead rank until its timeout, and no error names the rank.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stdit.errors import Interrupted, StditError
from stdit.heartbeat import HEARTBEAT
from stdit.training.engine.parallel import World

BEAT = 1.0  # seconds between messages
QUIET = 5.0  # seconds of silence after which a rank is suspected, once another one has failed
SETTLE = 1.0  # seconds that an error waits for the news of a death, which may be its cause
GRACE = 3.0  # seconds that a rank has to end by itself, once it is known who is to blame
GOES_ON = "The same command goes on from the last checkpoint."


class Verdict(NamedTuple):
    """Why the run ends: the rank to blame, what to say, and its process if this machine can see it."""

    rank: int
    message: str
    process: tuple[str, int] | None = None


@contextmanager
def watched(world: World, timeout: float) -> Iterator[None]:
    """Ends this process within GRACE once another rank is known to have died, failed, or been silent for `timeout`
    minutes: by a StditError, or where the process waits for a device or a rank, by exit status 1.

    An error in this context is told to the others. If another rank was its cause, it becomes a StditError that says so.
    """
    if world.size == 1:
        yield
        return
    hub = _Hub(timeout * 60) if world.is_main else None
    where = world.gather(None if hub is None else hub.where)[0]
    watch = _Watch(world.rank, where, timeout * 60)
    try:
        yield
    except Interrupted:
        watch.leave()
        raise
    except Exception as error:
        watch.fail(error)
        if isinstance(error, StditError):  # says what is wrong, mostly on all ranks
            raise
        verdict = watch.verdict_on_others()
        if verdict is None:
            raise
        raise StditError(verdict.message) from error
    else:
        watch.leave()
    finally:
        if hub is not None:
            hub.close()


class _Lines:
    """A connection that carries JSON, a message a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket, self._rest = connection, b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, **message: Any) -> None:
        with suppress(OSError):  # its end is noticed on reading
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None at the end of the connection."""
        try:
            content = self.socket.recv(65536)
        except (BlockingIOError, TimeoutError):
            return []
        except OSError:
            return None
        if not content:
            return None
        *lines, self._rest = (self._rest + content).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:  # a stranger's
            return None
        return [message for message in messages if isinstance(message, dict)]


class _Watch:
    """One rank's side."""

    def __init__(self, rank: int, where: dict[str, Any], timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self.verdict: Verdict | None = None
        self._decided, self._left = threading.Event(), False
        self._failed = False  # the main thread is about to say why
        self._lines: _Lines | None = None
        self._heard, self._doing_of_main = time.monotonic(), "starting"
        self._main: tuple[str, int] = tuple(where["process"])
        try:
            connection = socket.create_connection((where["host"], where["port"]), timeout=30)
        except OSError as error:
            print(
                f"rank {rank} cannot reach rank 0 at {where['host']}:{where['port']} ({error}): a rank that dies is "
                "noticed only by parallel.timeout.",
                file=sys.stderr,
                flush=True,
            )
            return
        connection.settimeout(BEAT)
        self._lines = _Lines(connection)
        self._lines.send(rank=rank, token=where["token"], process=_process())
        threading.Thread(target=self._run, args=(self._lines,), name="stdit-watch", daemon=True).start()

    def leave(self) -> None:
        self._left = True
        if self._lines is not None:
            self._lines.send(left=True)

    def fail(self, error: Exception) -> None:
        self._failed = True
        text = str(error).splitlines()[0] if str(error) else ""
        if self._lines is not None:
            self._lines.send(failed=f"{type(error).__name__}: {text}", doing=_doing())

    def verdict_on_others(self) -> Verdict | None:
        """Waits for the verdict after this rank's error. None if no other rank is to blame."""
        if self._lines is None:
            return None
        self._decided.wait(QUIET + SETTLE)
        if self.verdict is None and time.monotonic() - self._heard > QUIET:
            self._decide(self._main_hangs())
        return None if self.verdict is None or self.verdict.rank == self.rank else self.verdict

    def _run(self, lines: _Lines) -> None:
        last = 0.0
        while not self._left and self.verdict is None:
            if time.monotonic() - last >= BEAT:
                last = time.monotonic()
                lines.send(doing=_doing())
            messages = lines.read()
            if messages is None:
                if not self._left:
                    self._decide(Verdict(0, f"rank 0 has died ({self._doing_of_main}): see its own output. {GOES_ON}"))
                break
            for message in messages:
                self._heard = time.monotonic()
                self._doing_of_main = message.get("doing", self._doing_of_main)
                if message.get("left"):
                    return
                if "verdict" in message:
                    rank, text, process = message["verdict"]
                    self._decide(Verdict(rank, text, process and tuple(process)))
            if time.monotonic() - self._heard > self.timeout:
                self._decide(self._main_hangs())
        if self.verdict is not None:
            self._end(self.verdict)

    def _main_hangs(self) -> Verdict:
        return Verdict(0, _hangs(0, self._doing_of_main, time.monotonic() - self._heard), self._main)

    def _decide(self, verdict: Verdict) -> None:
        self.verdict = self.verdict or verdict
        self._decided.set()

    def _end(self, verdict: Verdict) -> None:
        """Ends the process, if it does not end by itself: its main thread may wait for the other rank for ever."""
        if verdict.rank != self.rank and verdict.process is not None:
            place, number = verdict.process
            if place == _process()[0]:  # it hangs, and would be left behind
                with suppress(OSError):
                    os.kill(number, signal.SIGKILL)
        time.sleep(GRACE)
        if self._failed:
            time.sleep(GRACE)
        else:
            print(f"error: {verdict.message}", file=sys.stderr, flush=True)
        os._exit(1)


@dataclass
class _Peer:
    lines: _Lines
    rank: int = -1  # until it has said who it is
    process: tuple[str, int] | None = None
    doing: str = "starting"
    heard: float = field(default_factory=time.monotonic)
    failed: str = ""
    ended: bool = False  # its connection


class _Hub:
    """Rank 0's side of all connections: hears every rank, and tells all of them whom to blame."""

    def __init__(self, timeout: float) -> None:
        self.timeout, self._token = timeout, secrets.token_hex()
        with suppress(ImportError, ValueError, OSError):  # a file for each rank
            import resource

            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._server = socket.create_server(("", 0), backlog=4096)
        self._server.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ, None)
        self._peers: list[_Peer] = []
        self._first_failure = self._said = 0.0
        self._verdict: Verdict | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stdit-watch-hub", daemon=True)
        self._thread.start()

    @property
    def where(self) -> dict[str, Any]:
        host = os.environ.get("MASTER_ADDR", "localhost")
        port = self._server.getsockname()[1]
        return {"host": host, "port": port, "token": self._token, "process": _process()}

    def close(self) -> None:
        """Says good-bye. After an error, waits until all other ranks have ended, knowing whom to blame."""
        self._closing.set()
        self._thread.join(SETTLE + 2 * GRACE)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select(BEAT / 4):
                self._accept() if key.data is None else self._hear(key.data)
            if self._verdict is None and (verdict := self._judge()) is not None:
                self._verdict = verdict
                self._tell(verdict=verdict)
            if time.monotonic() - self._said >= BEAT:
                self._said = time.monotonic()
                self._tell(doing=_doing())
            if self._closing.is_set() and (
                self._first_failure == 0 or all(peer.ended or peer.rank == 0 for peer in self._peers)
            ):
                return self._tell(left=True)

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._server.accept()
            connection.setblocking(False)
            peer = _Peer(_Lines(connection))
            self._peers.append(peer)
            self._selector.register(connection, selectors.EVENT_READ, peer)

    def _hear(self, peer: _Peer) -> None:
        messages = peer.lines.read()
        for message in messages or []:
            if peer.rank < 0:
                if message.get("token") != self._token:
                    messages = None
                    self._peers.remove(peer)
                    break
                peer.rank, peer.process = message["rank"], message["process"]
            peer.heard, peer.doing = time.monotonic(), message.get("doing", peer.doing)
            if message.get("left"):
                messages = None
                self._peers.remove(peer)
                break
            if "failed" in message:
                peer.failed = message["failed"]
                self._first_failure = self._first_failure or time.monotonic()
        if messages is None:
            peer.ended = True
            self._selector.unregister(peer.lines.socket)
            peer.lines.socket.close()

    def _judge(self) -> Verdict | None:
        """Whom to blame, if anyone."""
        now, known = time.monotonic(), [peer for peer in self._peers if peer.rank >= 0]
        for peer in known:
            if peer.ended and not peer.failed:
                text = f"rank {peer.rank} has died ({peer.doing}): it crashed, or was killed, perhaps for its memory. "
                return Verdict(peer.rank, f"{text}See its own output and the system's log. {GOES_ON}")
        failed = next((peer for peer in known if peer.failed), None)
        limit = self.timeout
        if failed is not None:
            if now - self._first_failure < SETTLE:
                return None
            limit = QUIET
        for peer in known:
            if not peer.failed and now - peer.heard > limit:
                return Verdict(peer.rank, _hangs(peer.rank, peer.doing, now - peer.heard), peer.process)
        if failed is not None:
            return Verdict(failed.rank, f"rank {failed.rank} stopped ({failed.doing}): {failed.failed}")
        return None

    def _tell(self, **message: Any) -> None:
        for peer in self._peers:
            if not peer.ended:
                peer.lines.send(**message)


def _hangs(rank: int, doing: str, seconds: float) -> str:
    return (
        f"rank {rank} has not answered for {seconds:.0f} s ({doing}): its process or its machine hangs. "
        f"parallel.timeout says how long to wait. {GOES_ON}"
    )


def _doing() -> str:
    return HEARTBEAT.activity or "starting"


def _process() -> tuple[str, int]:
    """This process: a name of the system whose process numbers it has, and its number."""
    place = ""
    with suppress(OSError):
        boot = open("/proc/sys/kernel/random/boot_id").read().strip()  # noqa: SIM115
        place = f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return place or secrets.token_hex(), os.getpid()
