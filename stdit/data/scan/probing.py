"""Probes files in worker processes, so that a file that crashes or hangs the decoder costs only itself. Logs results
beside the manifest, so that a scan resumes and re-probes only new or changed files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any, NamedTuple

from stdit.data.decode.checks import Limits, VideoError, disk_failures
from stdit.data.manifest import Caption
from stdit.data.measure.scenes import MIN_FRAMES
from stdit.data.measure.scores import FORMAT as SCORES_FORMAT
from stdit.data.read_ahead import read_ahead
from stdit.data.remote.failures import DiskFailure, FileError
from stdit.data.remote.paths import is_remote
from stdit.data.remote.storage import STORAGE
from stdit.data.scan import tars
from stdit.data.scan.listing import File
from stdit.data.workers.child import GRACE
from stdit.data.workers.pool import Worker

OpenLocal = Callable[[str], AbstractContextManager[str]]
SCENE_FRAMES = 2_000_000  # the longest video, in frames, that is searched for scenes
FORMAT = 2  # raise it when probes, scenes or tar members come out differently: scans then probe all files again
TRANSIENT = ("timeout", "crashed", "missing", "unreadable", "unsupported")  # may not recur, so not kept

Line = dict[str, Any]


class Span(NamedTuple):
    """The part of a file, in seconds, that becomes a clip."""

    start: float
    end: float
    frames: int
    fps: float

    @property
    def key(self) -> str:
        return f"{self.start:.3f}:{self.end:.3f}"


@dataclass(frozen=True)
class ProbeResult:
    """What probing found in one file."""

    path: str
    probe: dict[str, Any] | None  # the fields of a `Probe`, or None with a reason and a message
    sha256: str | None  # None if the file could not be read
    reason: str | None = None
    message: str | None = None
    scenes: list[tuple[float, float, int, float]] | None = None  # of `find_scenes`; None: not searched for
    # by `Span.key`, the result of `scores.score`, or a reason and a message
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class ScanOptions:
    """What to find out about each file: see `scan.scan`."""

    verify_pixels: int
    scenes: bool = False
    scores: bool = False

    def spans(self, result: ProbeResult) -> list[Span]:
        """The time spans of a file that become clips."""
        probe = result.probe
        assert probe is not None
        if self.scenes and result.scenes:
            return [scene for scene in map(Span._make, result.scenes) if scene.frames >= MIN_FRAMES]
        return [Span(round(probe["start"], 6), round(probe["end"], 6), probe["frames"], probe["fps"])]

    def flashes(self, result: ProbeResult) -> list[Span]:
        """The scenes too short for a clip."""
        return [scene for scene in map(Span._make, (self.scenes and result.scenes) or []) if scene.frames < MIN_FRAMES]

    def needs_scenes(self, result: ProbeResult) -> bool:
        return self.scenes and result.probe is not None and result.probe["frames"] > 1 and result.scenes is None

    def spans_to_score(self, result: ProbeResult) -> list[Span]:
        if not self.scores or result.probe is None:
            return []
        return [span for span in self.spans(result) if span.key not in result.scores]

    def is_complete(self, result: ProbeResult | None) -> bool:
        return result is not None and not self.needs_scenes(result) and not self.spans_to_score(result)


def probe_files(
    paths: Sequence[str],
    workers: int,
    options: ScanOptions,
    timeout: float,
    on_done: Callable[[ProbeResult], None] = lambda _: None,
    open_local: OpenLocal = STORAGE.local,
    known: Mapping[str, ProbeResult] | None = None,
) -> list[ProbeResult]:
    """Probes files in parallel. Returns their results in the order of the paths.

    timeout: seconds per file; one that takes longer has reason "timeout".
    on_done: called with each result, from several threads.
    open_local: gives a local path to a file's bytes.
    known: partial results by path, which are completed.

    Raises StorageError where storage stays unreachable.
    """
    idle = [Worker() for _ in range(max(1, min(workers, len(paths))))]  # one per thread

    def probe(path: str) -> ProbeResult:
        worker = idle.pop()
        try:
            result = _probe(worker, path, options, timeout, open_local, (known or {}).get(path))
        finally:
            idle.append(worker)
        on_done(result)
        return result

    results = read_ahead(probe, ([path] for path in paths), len(idle), ahead=len(paths), closing=0.0)
    try:
        return [result for (result,) in results]
    finally:
        results.close()
        for worker in idle:
            worker.close()


def _probe(
    worker: Worker, path: str, options: ScanOptions, timeout: float, open_local: OpenLocal, known: ProbeResult | None
) -> ProbeResult:
    limits = Limits(seconds=timeout)
    try:
        with open_local(path) as local:
            if known is None:

                def ask() -> ProbeResult:
                    answer = worker.call("probe", local, timeout, limits, verify_pixels=options.verify_pixels)
                    if answer["reason"] == "unreachable":
                        raise DiskFailure(answer["message"])
                    return ProbeResult(path, **answer)

                known = STORAGE.retried(path, ask, retry_on=DiskFailure)
            return _complete(worker, local, options, timeout, known)
    except VideoError as error:
        return ProbeResult(path, None, None, error.reason, error.message)
    except FileError as error:
        return ProbeResult(path, None, None, error.video_reason, error.message)


def _complete(worker: Worker, local: str, options: ScanOptions, timeout: float, result: ProbeResult) -> ProbeResult:
    """Adds missing scenes and scores. A span that cannot be scored gets a reason and a message instead."""
    probe = result.probe
    if probe is not None and options.needs_scenes(result):
        seconds = timeout + probe["end"] - probe["start"]  # all frames are decoded
        limits = Limits(frames=SCENE_FRAMES, seconds=seconds)
        where: dict[str, Any] = {"end": probe["end"], "fps": probe["fps"]}
        answer = _call(worker, "scenes", local, seconds + GRACE, limits, where)
        result = replace(result, scenes=answer["scenes"])
    scores = dict(result.scores)
    limits = Limits(seconds=timeout)
    for span in options.spans_to_score(result):
        where = {"start": span.start, "end": span.end, "frames": span.frames}
        try:
            scores[span.key] = _call(worker, "score", local, timeout, limits, where)
        except VideoError as error:
            scores[span.key] = {"reason": error.reason, "message": error.message}
    return replace(result, scores=scores)


def _call(
    worker: Worker, task: str, local: str, seconds: float, limits: Limits, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The answer of a worker; a disk that fails is asked again."""

    def ask() -> dict[str, Any]:
        with disk_failures():
            return worker.call(task, local, seconds, limits, **arguments)

    return STORAGE.retried(local, ask, retry_on=DiskFailure)


class ScanLog:
    """Results by path, each with the file's state (size, time) at the time of its probe. add: appends to the log."""

    def __init__(
        self, options: ScanOptions, earlier: list[Line], add: Callable[[list[Line]], None], caption_column: str | None
    ) -> None:
        self.options, self.add, self.caption_column = options, add, caption_column
        self.tar_reading = [tars.FORMAT, caption_column]  # tar members logged with another value are read again
        self.known = {line["path"]: line for line in earlier}
        self.used: dict[str, Line] = {}

    def lookup(self, file: File) -> ProbeResult | None:
        """The logged result of an unchanged file; it may lack scenes or scores."""
        line = self._line(file)
        if line is None or line["verify_pixels"] != self.options.verify_pixels:
            return None
        scores = line.get("scores", {}) if line.get("scores_format") == SCORES_FORMAT else {}
        fields = {name: line[name] for name in ("probe", "sha256", "reason", "message")}
        return ProbeResult(file.path, **fields, scenes=line.get("scenes"), scores=scores)

    def record(self, file: File, result: ProbeResult) -> None:
        if result.reason in TRANSIENT:
            return
        scores = {key: score for key, score in result.scores.items() if score.get("reason") not in TRANSIENT}
        more = {"scores": scores, "scores_format": SCORES_FORMAT, "verify_pixels": self.options.verify_pixels}
        self._record(file, asdict(result) | more)

    def members(self, tar: File) -> tuple[list[File], str | None] | None:
        """What `tar_members` returned for an unchanged tar."""
        line = self._line(tar)
        if line is None or "members" not in line or line.get("reading") != self.tar_reading:
            return None
        members = []
        for name, place, captions, fault, refused in line["members"]:
            texts = tuple(Caption(*caption) for caption in captions)
            why = (fault and tuple(fault), refused and tuple(refused))
            members.append(File(f"{tar.name}/{name}", tar.path + place, tar.state, texts, *why))
        return members, line["damage"]

    def record_members(self, tar: File, members: list[File], damage: str | None) -> None:
        rows = []
        for file in members:
            name, place = file.name.removeprefix(f"{tar.name}/"), file.path.removeprefix(tar.path)
            captions = [astuple(caption) for caption in file.captions]
            rows.append((name, place, captions, file.caption_fault, file.refused))
        self._record(tar, {"members": rows, "damage": damage, "reading": self.tar_reading})

    def _line(self, file: File) -> Line | None:
        line = self.known.get(absolute(file.path))
        if line is None or file.state is None or line["file"] != file.state or line.get("format") != FORMAT:
            return None
        self.used[line["path"]] = line
        return line

    def _record(self, file: File, values: dict[str, Any]) -> None:
        path = absolute(file.path)
        self.used[path] = line = {**values, "format": FORMAT, "path": path, "file": file.state}
        self.add([line])


@contextmanager
def open_scan_log(
    path: str | None, options: ScanOptions, caption_column: str | None, others: Sequence[str] = ()
) -> Iterator[ScanLog]:
    """The log at a path (None: not stored). New results are appended at once; at the end, unused lines are removed.

    others: logs that are only read; what they know of a file gives way to what the log itself knows.
    """
    if path is None:
        yield ScanLog(options, [], lambda _: None, caption_column)
        return
    with STORAGE.journal(path) as (lines, add):
        known = [line for other in others for line in STORAGE.lines(other)]
        scan_log = ScanLog(options, known + lines, add, caption_column)
        yield scan_log
    used = sorted(scan_log.used.items())  # the same log, whichever file was done first
    STORAGE.write(path, "".join(json.dumps(line) + "\n" for _, line in used).encode())


def absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)
