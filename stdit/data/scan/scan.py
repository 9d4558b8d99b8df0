"""Scans a folder of videos and images into a manifest: each file becomes clips, or is named with the reason why not."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stdit.data.captions import Captions, Fault, Names
from stdit.data.decode.video import VERIFY_PIXELS
from stdit.data.manifest import Caption, Clip, Manifest, Skipped, clip_id, write_manifest
from stdit.data.measure.fingerprints import find_repeats
from stdit.data.measure.scenes import MIN_FRAMES, check_available
from stdit.data.measure.scores import SCORES
from stdit.data.parts import Part
from stdit.data.remote.failures import FileError
from stdit.data.remote.paths import is_remote
from stdit.data.remote.storage import STORAGE
from stdit.data.scan.finding import available_cores, find_files, log_path, part_log, skipped_path
from stdit.data.scan.listing import File, Folder
from stdit.data.scan.probing import (
    OpenLocal,
    ProbeResult,
    ScanLog,
    ScanOptions,
    Span,
    absolute,
    open_scan_log,
    probe_files,
)
from stdit.data.scan.tars import COMPRESSED, tar_members
from stdit.files import is_utf8

FLASHES_NAMED = 5  # in a message


@dataclass(frozen=True)
class Scan:
    """A scan's result."""

    manifest: Manifest
    skipped: list[Skipped]  # files, or parts of them, that did not become clips
    damaged: list[Skipped]  # files that are used up to a damage
    ignored: dict[str, int]  # how many files of other types there are, by suffix
    repeats: list[Skipped]  # clips that look like others; they are kept
    reused: int  # files unchanged since an earlier scan and not probed again


def scan(
    folder: str | Path,
    captions: str | Path | None = None,
    out: str | Path | None = None,
    *,
    caption_column: str | None = None,
    file_column: str | None = None,
    uncaptioned: bool = False,
    verify: bool = True,
    scenes: bool = False,
    scores: bool = False,
    workers: int | None = None,
    timeout: float = 30.0,
    logs: Sequence[str] = (),
    on_start: Callable[[int], None] = lambda _: None,
    on_file: Callable[[str], None] = lambda _: None,
) -> Scan:
    """Probes every video and image under a folder, hidden ones left out, in worker processes.

    folder: a folder or a URL of any fsspec scheme. Tar shards in it are opened: see `tars.tar_members`.
    captions: a CSV, JSONL or Parquet file. None: `captions.csv` or `captions.jsonl` in the folder, else .txt and .json
        files beside the videos. A caption that cannot be used skips its clip, as "bad_caption".
    out: the manifest to write, if there is a clip. Skipped files are listed beside it in `….skipped.jsonl`. Results are
        logged in `….probed.jsonl` as they come: an interrupted scan resumes from there, and a later one probes only
        files whose size or time has changed, and adds only missing scenes and scores.
    caption_column, file_column: columns of the captions file; None: found by their usual names.
    uncaptioned: keep files without a caption instead of skipping them as "no_caption". Those with a bad caption are
        kept without it, and named among `damaged`.
    verify: decode the files (each up to `video.VERIFY_PIXELS`) to find damage; otherwise only their first frame.
    scenes: cut videos at scene changes (see `measure.scenes`): each scene becomes a clip with its file's captions.
    scores: add the columns of `with_scores`.
    workers: probing processes; None: one per core.
    timeout: seconds per file, and per scene for scores. Searching for scenes may also take the video's own length.
    logs: of the parts (see `scan_part`), whose results are used.
    on_start: called with the number of files; called again as tars are opened.
    on_file: called with the path of each file when it is done.

    A file damaged further in becomes a clip up to the damage. Files with equal content become one clip with all their
    captions. Raises StorageError where storage stays unreachable; the same scan then resumes.
    """
    if scenes:
        check_available()
    found = find_files(folder, captions, caption_column, file_column, uncaptioned)
    source = found.folder
    captioned = source.sidecars(found.names, caption_column) if found.table is None else found.captions
    options = ScanOptions(VERIFY_PIXELS if verify else 0, scenes, scores)
    with open_scan_log(None if out is None else log_path(out), options, caption_column, logs) as scan_log:
        probe = partial(probe_files, workers=workers or available_cores(), options=options, timeout=timeout)
        scanner = _Scanner(scan_log, probe, on_start, on_file)
        scanner.probe_all(source, found.names, found.tars)
    scanner.skipped += source.unreadable
    scanner.skipped += [Skipped(row, "bad_row", f"{fault}.") for row, fault in captioned.rows]
    manifest = Manifest.of(scanner.clips(captioned, uncaptioned), "." if is_remote(source.root) else source.root)
    repeats: list[Skipped] = []
    if scores:
        manifest = with_scores(manifest, [scanner.scores[clip] for clip in manifest.ids.to_pylist()])
        repeats = scanner.repeats(manifest)
    skipped = sorted(scanner.skipped, key=lambda s: s.file)
    if out is not None:
        if len(manifest):
            write_manifest(manifest, out)
        lines = [json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in skipped]
        STORAGE.write(skipped_path(out), "".join(lines).encode())
    return Scan(manifest, skipped, scanner.damaged, found.count_others(out), repeats, scanner.reused)


@dataclass(frozen=True)
class ScannedPart:
    """What a part of a scan has done. unusable: files that cannot be read."""

    files: int
    reused: int
    unusable: list[Skipped]


def scan_part(
    folder: str | Path,
    captions: str | Path | None,
    out: str | Path,
    part: Part,
    *,
    caption_column: str | None = None,
    file_column: str | None = None,
    uncaptioned: bool = False,
    verify: bool = True,
    scenes: bool = False,
    scores: bool = False,
    workers: int | None = None,
    timeout: float = 30.0,
    on_start: Callable[[int], None] = lambda _: None,
    on_file: Callable[[str], None] = lambda _: None,
) -> ScannedPart:
    """Probes the files of one part, dealt by their names (a tar is one file), into a log of its own beside `out`.

    `scan` with the parts' `logs` then makes the manifest without probing a file again, but for those that timed out,
    crashed the decoder or could not be opened, and those that have changed. The other arguments are those of `scan`.
    """
    if scenes:
        check_available()
    found = find_files(folder, captions, caption_column, file_column, uncaptioned)
    options = ScanOptions(VERIFY_PIXELS if verify else 0, scenes, scores)
    with open_scan_log(part_log(out, part), options, caption_column, [log_path(out)]) as scan_log:
        probe = partial(probe_files, workers=workers or available_cores(), options=options, timeout=timeout)
        scanner = _Scanner(scan_log, probe, on_start, on_file)
        names, tars = (list(filter(part.has_name, names)) for names in (found.names, found.tars))
        scanner.probe_all(found.folder, names, tars)
    for file, result in scanner.files:
        if result.probe is None:
            scanner.skip(file.name, result.reason or "undecodable", result.message or "cannot be read.")
    return ScannedPart(len(scanner.files), scanner.reused, sorted(scanner.skipped, key=lambda s: s.file))


@dataclass
class _Scanner:
    """Probes files and collects their results, then makes clips of them. names, scores: by clip id."""

    scan_log: ScanLog
    probe: Callable[..., list[ProbeResult]]
    on_start: Callable[[int], None]
    on_file: Callable[[str], None]
    files: list[tuple[File, ProbeResult]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    damaged: list[Skipped] = field(default_factory=list)
    reused: int = 0
    names: dict[str, str] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)

    def skip(self, file: str, reason: str, message: str) -> None:
        self.skipped.append(Skipped(file, reason, message))

    def probe_all(self, source: Folder, names: list[str], tars: list[str]) -> None:
        """Probes files, and the members of tars."""
        self.probe_files(source.files(names))
        for tar in source.files(tars):
            self.probe_tar(tar)

    def probe_files(self, files: list[File], open_local: OpenLocal = STORAGE.local) -> None:
        """Probes files, as far as the scan log does not know them."""
        usable = []
        for file in files:
            if not is_utf8(file.name):
                name = file.name.encode("utf-8", "replace").decode()
                self.skip(name, "name", "has a name that is not UTF-8. Rename it.")
            elif file.refused:
                self.skip(file.name, *file.refused)
            else:
                usable.append(file)
        self.on_start(len(self.files) + len(usable))
        known = {file.path: result for file in usable if (result := self.scan_log.lookup(file))}
        new = {file.path: file for file in usable if not self.scan_log.options.is_complete(known.get(file.path))}
        for file in usable:
            if file.path not in new:
                self.on_file(file.path)

        def done(result: ProbeResult) -> None:
            self.scan_log.record(new[result.path], result)
            self.on_file(result.path)

        results = known | dict(zip(new, self.probe(list(new), on_done=done, open_local=open_local, known=known)))
        self.files += [(file, results[file.path]) for file in usable]
        self.reused += len(usable) - len(new)

    def probe_tar(self, tar: File) -> None:
        """Probes the members of a tar. A remote tar that has changed is fetched whole."""
        log = self.scan_log
        known = log.members(tar)
        try:
            if tar.name.lower().endswith(COMPRESSED):
                raise tarfile.ReadError("it is compressed, and files can be read in place from a plain .tar only")
            if known and all(file.refused or log.options.is_complete(log.lookup(file)) for file in known[0]):
                members, damage = known
                self.probe_files(members)
            else:
                with STORAGE.local(tar.path) as local:
                    look = partial(tar_members, tar, local, log.caption_column)
                    members, damage = known or STORAGE.from_disk(tar.path, look)
                    log.record_members(tar, members, damage)
                    self.probe_files(members, lambda path: nullcontext(local + path.removeprefix(tar.path)))
        except (tarfile.TarError, OSError) as error:
            self.skip(tar.name, "not_media", f"cannot be read as a tar ({error}).")
        except FileError as error:
            self.skip(tar.name, error.video_reason, error.message)
        else:
            if damage:
                self.damaged.append(Skipped(tar.name, "damaged", f"{damage} The files before that are used."))

    def clips(self, captioned: Captions, uncaptioned: bool) -> list[Clip]:
        """The clips of all files. What does not become a clip is added to `skipped`."""
        clips: dict[str, Clip] = {}
        options = self.scan_log.options
        captions_of = _CaptionLookup(captioned, [file.name for file, _ in self.files])
        for file, result in self.files:
            captions, fault = captions_of(file)
            if result.probe is None or result.sha256 is None:
                self.skip(file.name, result.reason or "undecodable", result.message or "cannot be read.")
                continue
            reason, message = fault or ("no_caption", "has no caption.")
            if reason == "bad_caption" and uncaptioned:
                self.damaged.append(Skipped(file.name, reason, f"{message} The clip is kept without that."))
            elif reason == "bad_caption" or not (captions or uncaptioned):
                self.skip(file.name, reason, message)
                continue
            if damage := result.probe["damage"]:
                self.damaged.append(Skipped(file.name, "damaged", f"{damage} The frames before that are used."))
            spans = options.spans(result)
            if flashes := options.flashes(result):
                self.skip(file.name, "short_scene", _describe_flashes(flashes, bool(spans)))
            for span in spans:
                clip = _clip(file, result.probe, result.sha256, span, captions)
                name = file.name if len(spans) == 1 else f"{file.name} from {span.start:.2f} s"
                scores = result.scores.get(span.key, {})
                if first := clips.get(clip.id):
                    clips[clip.id] = replace(first, captions=tuple(dict.fromkeys((*first.captions, *captions))))
                    message = f"has the same content as {self.names[clip.id]}; its captions are added there."
                    self.skip(name, "duplicate", message)
                elif options.scores and "reason" in scores:
                    self.skip(name, scores["reason"], scores["message"])
                else:
                    clips[clip.id], self.names[clip.id], self.scores[clip.id] = clip, name, scores
        return list(clips.values())

    def repeats(self, manifest: Manifest) -> list[Skipped]:
        """The clips of a manifest with scores that repeat others."""
        pairs = zip(manifest.ids.to_pylist(), manifest.table.column("repeats").to_pylist())
        return [
            Skipped(self.names[clip], "repeat", f"looks like {self.names[first]}.") for clip, first in pairs if first
        ]


def _describe_flashes(flashes: Sequence[Span], has_clips: bool) -> str:
    where = ", ".join(f"{span.start:.2f}" for span in flashes[:FLASHES_NAMED])
    where += ", …" if len(flashes) > FLASHES_NAMED else ""
    scenes = f"scenes of fewer than {MIN_FRAMES} frames"
    return f"has {scenes if has_clips else f'only {scenes}'}, which are left out: {len(flashes)}, at {where} s."


class _CaptionLookup:
    """Finds a file's captions, or why it has none: in the table or sidecars by its name, else the tar member's own."""

    def __init__(self, captioned: Captions, files: Sequence[str]) -> None:
        self.captioned, self.files = captioned, Names(files)
        self.named = Names({*captioned.texts, *captioned.faults})

    def __call__(self, file: File) -> tuple[tuple[Caption, ...], Fault | None]:
        texts, faults = self.captioned.texts, self.captioned.faults
        if file.name in self.named.all:
            return tuple(texts.get(file.name, ())), faults.get(file.name)
        alike = [] if file.name.isascii() else self.named.find(file.name)
        mine = [name for name in alike if name not in self.files.all]
        if len(mine) == 1 and len(self.files.find(mine[0])) == 1:  # a tar member's name in another Unicode form
            return tuple(texts.get(mine[0], ())), faults.get(mine[0])
        if alike and not file.captions:
            message = f"has no caption; {' and '.join(map(ascii, alike))}, the same but for its Unicode form, has."
            return (), ("no_caption", message)
        return file.captions, file.caption_fault


def _clip(file: File, probe: Mapping[str, Any], sha256: str, span: Span, captions: tuple[Caption, ...]) -> Clip:
    return Clip(
        clip_id(sha256, span.start, span.end), absolute(file.path), captions, sha256=sha256,
        frames=span.frames, fps=span.fps, width=probe["width"], height=probe["height"], start=span.start, end=span.end,
        state=json.dumps(file.state) if file.state else "",
    )  # fmt: skip


def with_scores(manifest: Manifest, scores: Sequence[Mapping[str, Any]]) -> Manifest:
    """Adds a column per score, and `repeats`: the id of the clip that a clip is a copy of, or null.

    scores: of `measure.scores.score`, one per row. Of several copies, the first with the most pixels per frame counts
    as the original. Images repeat only images.
    """
    table = manifest.table
    for name in SCORES:
        table = table.append_column(name, pa.array([score[name] for score in scores], pa.float64()))
    original: list[str | None] = [None] * len(table)
    ids = table.column("id").to_pylist()
    sizes = manifest.column("width").astype(np.int64) * manifest.column("height")
    image = manifest.column("frames") == 1
    for kind in (image, ~image):
        there = np.flatnonzero(kind)
        rows = there[np.argsort(-sizes[there], kind="stable")].tolist()
        for row, first in zip(rows, find_repeats([scores[row]["fingerprint"] for row in rows])):
            if first is not None:
                original[row] = ids[rows[first]]
    return Manifest(table.append_column("repeats", pa.array(original, pa.string())), manifest.folder, manifest.source)
