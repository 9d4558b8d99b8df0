"""Looking at files in processes of their own, so that a file that crashes or hangs the decoder costs only itself."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from stdit.data.decode.pixels import Limits, VideoError
from stdit.data.measure.scenes import LEAST
from stdit.data.remote.storage import STORAGE, StorageError
from stdit.data.workers.child import GRACE
from stdit.data.workers.pool import Worker

Opened = Callable[[str], AbstractContextManager[str]]
LONG = 2_000_000  # frames of a video whose scenes are looked for


class Span(NamedTuple):
    """What a clip shows of its file, from `start` to `end` in seconds."""

    start: float
    end: float
    frames: int
    fps: float

    @property
    def key(self) -> str:
        return f"{self.start:.3f}:{self.end:.3f}"


@dataclass(frozen=True)
class Probed:
    """What became of one file: `probe` (see `video.Probe`) or a reason and a message, and its sha256 if readable.

    scenes: see `scenes.find_scenes`; None: not looked for. scores: by `Span.key`, what `scores.score` says, or the
    reason and message why it could not.
    """

    path: str
    probe: dict[str, Any] | None
    sha256: str | None
    reason: str | None = None
    message: str | None = None
    scenes: list[tuple[float, float, int, float]] | None = None
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """What is to be found of each file: see `scan.scan`."""

    verify_pixels: int
    scenes: bool = False
    scores: bool = False

    def spans(self, found: Probed) -> list[Span]:
        """The clips of a file that can be one."""
        probe = found.probe
        assert probe is not None
        if self.scenes and found.scenes:
            return [scene for scene in map(Span._make, found.scenes) if scene.frames >= LEAST]
        return [Span(round(probe["start"], 6), round(probe["end"], 6), probe["frames"], probe["fps"])]

    def flashes(self, found: Probed) -> list[Span]:
        """What lies between two cuts and is too short for a clip."""
        return [scene for scene in map(Span._make, (self.scenes and found.scenes) or []) if scene.frames < LEAST]

    def lacks_scenes(self, found: Probed) -> bool:
        return self.scenes and found.probe is not None and found.probe["frames"] > 1 and found.scenes is None

    def lacks_scores(self, found: Probed) -> list[Span]:
        if not self.scores or found.probe is None:
            return []
        return [span for span in self.spans(found) if span.key not in found.scores]

    def all_of(self, found: Probed) -> bool:
        return not self.lacks_scenes(found) and not self.lacks_scores(found)


def probe_files(
    paths: Sequence[str],
    workers: int,
    wanted: Wanted,
    timeout: float,
    on_done: Callable[[Probed], None] = lambda _: None,
    opened: Opened = STORAGE.local,
    known: Mapping[str, Probed] | None = None,
) -> list[Probed]:
    """Every path probed, in the order given. A file that takes longer than `timeout` seconds has reason "timeout".

    opened: gives a local path of the same bytes. known: what is there of some of the paths, of which the rest is found.
    Raises StorageError where storage stays unreachable.
    """
    results: list[Probed | None] = [None] * len(paths)
    jobs: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(paths)):
        jobs.put(index)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        worker = Worker()
        try:
            while not stop.is_set():
                try:
                    index = jobs.get_nowait()
                except queue.Empty:
                    return
                path = paths[index]
                results[index] = result = _probe(worker, path, wanted, timeout, opened, (known or {}).get(path))
                on_done(result)
        except BaseException as error:
            failures.append(error)
            stop.set()
        finally:
            worker.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(max(1, min(workers, len(paths))))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stop.set()
    if failures:
        raise failures[0]
    return [result for result in results if result is not None]


def _probe(worker: Worker, path: str, wanted: Wanted, timeout: float, opened: Opened, known: Probed | None) -> Probed:
    limits = asdict(Limits(seconds=timeout))
    try:
        with opened(path) as local:
            if known is None:
                answer, _ = worker.call("probe", local, timeout, verify_pixels=wanted.verify_pixels, limits=limits)
                known = Probed(path, **answer)
            return _look(worker, local, wanted, timeout, known)
    except VideoError as error:
        return Probed(path, None, None, error.reason, error.message)
    except StorageError as error:
        if error.reason == "unreachable":
            raise
        return Probed(path, None, None, error.video_reason, error.message)


def _look(worker: Worker, local: str, wanted: Wanted, timeout: float, found: Probed) -> Probed:
    """What is still wanted besides the probe. A clip that cannot be scored has the reason in place of its scores."""
    probe = found.probe
    if probe is not None and wanted.lacks_scenes(found):
        seconds = timeout + probe["end"] - probe["start"]  # all frames are decoded
        limits = asdict(Limits(frames=LONG, seconds=seconds))
        answer, _ = worker.call("scenes", local, seconds + GRACE, end=probe["end"], fps=probe["fps"], limits=limits)
        if "reason" in answer:
            raise VideoError(found.path, answer["reason"], answer["message"])
        found = replace(found, scenes=answer["scenes"])
    scores = {}
    for span in wanted.lacks_scores(found):
        try:
            scores[span.key] = _score(worker, local, timeout, span)
        except VideoError as error:
            scores[span.key] = {"reason": error.reason, "message": error.message}
    return replace(found, scores={**found.scores, **scores})


def _score(worker: Worker, local: str, timeout: float, span: Span) -> dict[str, Any]:
    where: dict[str, Any] = {"start": span.start, "end": span.end, "frames": span.frames}
    return worker.call("score", local, timeout, **where, limits=asdict(Limits(seconds=timeout)))[0]
