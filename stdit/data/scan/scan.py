"""A folder of videos and images to a manifest: every file is a clip, or is named with the reason why not."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stdit.data.captions import Captions, Fault, Names, read_captions
from stdit.data.decode.formats import suffix_of
from stdit.data.decode.video import VERIFY_PIXELS
from stdit.data.manifest import Caption, Clip, Manifest, Skipped, clip_id, write_manifest
from stdit.data.measure.fingerprints import repeats
from stdit.data.measure.scenes import LEAST, check_available
from stdit.data.measure.scores import SCORES
from stdit.data.remote.paths import beside, is_remote
from stdit.data.remote.storage import STORAGE, StorageError
from stdit.data.scan.listing import File, Folder
from stdit.data.scan.probing import Opened, Probed, Span, Wanted, probe_files
from stdit.data.scan.scan_log import Memory, absolute, remembered
from stdit.data.scan.tars import COMPRESSED, tar_members
from stdit.errors import StditError, error_context
from stdit.files import is_utf8

FLASHES = 5  # stretches between cuts that a message tells the place of


@dataclass(frozen=True)
class Scan:
    """clips, what was skipped, and files that are clips but damaged further in (file, what happened)."""

    manifest: Manifest
    skipped: tuple[Skipped, ...]
    damaged: tuple[Skipped, ...]
    ignored: dict[str, int]  # files of other types that no caption names, by suffix
    repeats: tuple[Skipped, ...] = ()  # clips that look like others; they are kept
    reused: int = 0  # files that were probed by an earlier scan and have not changed since


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
    on_start: Callable[[int], None] = lambda _: None,
    on_file: Callable[[str], None] = lambda _: None,
) -> Scan:
    """Probes every video and image under `folder` (hidden ones left out), in processes that may crash or hang.

    folder: a folder or a URL of any fsspec scheme. Tar shards in it are looked into: see `tars.tar_members`.
    captions: a CSV, JSONL or Parquet; None: `captions.csv` or `captions.jsonl` in the folder, else .txt and .json files
        beside the videos. Their columns are found by name, or are `file_column` and `caption_column`. A caption that
        cannot be used costs its clip, as "bad_caption".
    out: the manifest to write, if there is a clip; what was skipped goes beside it as `….skipped.jsonl`, and what was
        found of every file as `….probed.jsonl`, while it is found: a scan that was stopped goes on there, and of files
        whose size and time of change are the same only what is new among `scenes` and `scores` is looked at.
    uncaptioned: keep files without a caption (their captions are empty) instead of skipping them as "no_caption"; those
        with a bad one are kept without it, and named among `damaged`.
    verify: decode the files (each up to `video.VERIFY_PIXELS`), which finds damage; else only their first frame.
    scenes: cut videos at their scene changes (see `scenes`): each scene is a clip with the captions of its file.
    scores: also write the columns of `with_scores`.
    timeout: seconds a file, of decoding; a scene's scores have as many, and looking for scenes has the video's length
        on top.
    on_start: is told how many files there are; again as tars are opened.

    A file damaged further in is a clip up to the damage. Files with equal content are one clip, with all captions.
    Raises StorageError where storage stays unreachable: the same scan goes on from there.
    """
    if scenes:
        check_available()
    source = Folder(str(folder))
    table = str(captions) if captions is not None else source.captions_file()
    captioned = Captions() if table is None else _table(table, source, file_column, caption_column)
    names, tars, ignored = _names(source, captioned, table, out)
    if table is not None and not captioned.texts and not tars and not uncaptioned:
        raise StditError(
            f"{table} captions no file in {folder}: the names in it are taken relative to that folder, or else to its "
            f"own. --allow-uncaptioned scans without captions."
        )
    if table is None:
        captioned = Captions(*source.sidecars(names, caption_column))
    wanted = Wanted(VERIFY_PIXELS if verify else 0, scenes, scores)
    with remembered(None if out is None else _probed_path(out), wanted, caption_column) as memory:
        probe = partial(probe_files, workers=workers or _cores(), wanted=wanted, timeout=timeout)
        found = _Found(memory, probe, on_start, on_file)
        found.look_at(source.files(names))
        for tar in source.files(tars):
            found.look_into(tar)
    found.skipped += source.unreadable
    found.skipped += [Skipped(row, "bad_row", f"{what}.") for row, what in captioned.rows]
    clips = found.clips(captioned, uncaptioned)
    manifest = Manifest.of(clips, "." if is_remote(source.root) else source.root)
    repeats: list[Skipped] = []
    if scores:
        manifest = with_scores(manifest, [found.scores[clip.id] for clip in clips])
        repeats = found.repeats(manifest)
    skipped = tuple(sorted(found.skipped, key=lambda s: s.file))
    scanned = Scan(manifest, skipped, tuple(found.damaged), ignored, tuple(repeats), found.reused)
    if out is not None:
        if len(manifest):
            write_manifest(manifest, out)
        lines = [json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in scanned.skipped]
        STORAGE.write(skipped_path(out), "".join(lines).encode())
    return scanned


class _Found:
    """What has been looked at so far, and what came of it."""

    def __init__(
        self,
        memory: Memory,
        probe: Callable[..., list[Probed]],
        on_start: Callable[[int], None],
        on_file: Callable[[str], None],
    ) -> None:
        self.memory, self.probe, self.on_start, self.on_file = memory, probe, on_start, on_file
        self.files: list[tuple[File, Probed]] = []
        self.skipped: list[Skipped] = []
        self.damaged: list[Skipped] = []
        self.reused = 0
        self.names: dict[str, str] = {}  # by clip id, as are the scores
        self.scores: dict[str, dict[str, Any]] = {}

    def look_at(self, files: list[File], opened: Opened = STORAGE.local) -> None:
        """Finds what is wanted of files, as far as no earlier scan has."""
        for file in files:
            if not is_utf8(file.name):
                name = file.name.encode("utf-8", "replace").decode()
                self.skipped.append(Skipped(name, "name", "has a name that is not UTF-8. Rename it."))
            elif file.refused:
                self.skipped.append(Skipped(file.name, *file.refused))
        files = [file for file in files if is_utf8(file.name) and not file.refused]
        self.on_start(len(self.files) + len(files))
        known = {file.path: result for file in files if (result := self.memory.get(file))}
        new = {file.path: file for file in files if not self._whole(known.get(file.path))}
        for file in files:
            if file.path not in new:
                self.on_file(file.path)

        def done(result: Probed) -> None:
            self.memory.keep(new[result.path], result)
            self.on_file(result.path)

        found = self.probe(list(new), on_done=done, opened=opened, known=known)
        results = known | dict(zip(new, found))
        self.files += [(file, results[file.path]) for file in files]
        self.reused += len(files) - len(new)

    def _whole(self, found: Probed | None) -> bool:
        return found is not None and self.memory.wanted.all_of(found)

    def look_into(self, tar: File) -> None:
        """Looks at what is in a tar, which is fetched whole if it is remote and has changed."""
        known = self.memory.members(tar)
        try:
            if tar.name.lower().endswith(COMPRESSED):
                raise tarfile.ReadError("it is compressed: only in a plain .tar can a file be read where it lies")
            if known is not None and all(file.refused or self._whole(self.memory.get(file)) for file in known[0]):
                members, damage = known
                self.look_at(members)
            else:
                with STORAGE.local(tar.path) as local:
                    members, damage = known or tar_members(tar, local, self.memory.caption_column)
                    self.memory.keep_members(tar, members, damage)
                    self.look_at(members, lambda path: nullcontext(local + path.removeprefix(tar.path)))
        except (tarfile.TarError, OSError) as error:
            self.skipped.append(Skipped(tar.name, "not_media", f"is no tar that can be read ({error})."))
        except StorageError as error:
            if error.reason == "unreachable":
                raise
            self.skipped.append(Skipped(tar.name, error.video_reason, error.message))
        else:
            if damage:
                self.damaged.append(Skipped(tar.name, "damaged", f"{damage} The files before that are used."))

    def clips(self, captioned: Captions, uncaptioned: bool) -> list[Clip]:
        """The clips of every file that can be one; why the others are none joins `skipped`."""
        clips: dict[str, Clip] = {}
        of_file = _Lookup(captioned, [file.name for file, _ in self.files])
        for file, result in self.files:
            captions, fault = of_file(file)
            if result.probe is None or result.sha256 is None:
                reason, message = result.reason or "undecodable", result.message or "cannot be read."
                self.skipped.append(Skipped(file.name, reason, message))
                continue
            reason, message = fault or ("no_caption", "has no caption.")
            if reason == "bad_caption" and uncaptioned:
                self.damaged.append(Skipped(file.name, reason, f"{message} The clip is kept without that."))
            elif reason == "bad_caption" or not (captions or uncaptioned):
                self.skipped.append(Skipped(file.name, reason, message))
                continue
            if damage := result.probe["damage"]:
                self.damaged.append(Skipped(file.name, "damaged", f"{damage} The frames before that are used."))
            spans, flashes = self.memory.wanted.spans(result), self.memory.wanted.flashes(result)
            if flashes:
                self.skipped.append(Skipped(file.name, "short_scene", _between_cuts(flashes, not spans)))
            for span in spans:
                clip = replace(_clip(result, span, captions), state=json.dumps(file.state) if file.state else "")
                name = file.name if len(spans) == 1 else f"{file.name} from {span.start:.2f} s"
                scores = result.scores.get(span.key, {})
                if clip.id in clips:
                    first = clips[clip.id]
                    merged = tuple(dict.fromkeys((*first.captions, *clip.captions)))
                    clips[clip.id] = replace(first, captions=merged)
                    message = f"has the same content as {self.names[clip.id]}; its captions are added there."
                    self.skipped.append(Skipped(name, "duplicate", message))
                elif self.memory.wanted.scores and "reason" in scores:
                    self.skipped.append(Skipped(name, scores["reason"], scores["message"]))
                else:
                    clips[clip.id], self.names[clip.id], self.scores[clip.id] = clip, name, scores
        return list(clips.values())

    def repeats(self, manifest: Manifest) -> list[Skipped]:
        """Which clips of a manifest with scores repeat which."""
        both = zip(manifest.ids.to_pylist(), manifest.table.column("repeats").to_pylist())
        return [
            Skipped(self.names[clip], "repeat", f"looks like {self.names[first]}.") for clip, first in both if first
        ]


def _between_cuts(flashes: Sequence[Span], all_of_it: bool) -> str:
    where = ", ".join(f"{span.start:.2f}" for span in flashes[:FLASHES]) + (", …" if len(flashes) > FLASHES else "")
    what = "is nothing but" if all_of_it else "has"
    return (
        f"{what} stretches of fewer than {LEAST} frames between cuts, which are left out: {len(flashes)}, at {where} s."
    )


def skipped_path(out: str | Path) -> str:
    """Where `scan` lists the files it skipped."""
    return beside(out, ".skipped.jsonl")


def _cores() -> int:
    """Those that this process may use: of a large machine a job often has a part."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _probed_path(out: str | Path) -> str:
    return beside(out, ".probed.jsonl")


def _table(path: str, source: Folder, file_column: str | None, caption_column: str | None) -> Captions:
    columns = (file_column, caption_column)
    if not is_remote(path):
        return read_captions(Path(path), source.root, source.names, *columns)
    with error_context(path), STORAGE.local(path) as local:
        return read_captions(Path(local), source.root, source.names, *columns)


class _Lookup:
    """The captions of a file, or why it has none: from a table or sidecars by its name, else a tar member's own."""

    def __init__(self, captioned: Captions, files: Sequence[str]) -> None:
        self.captioned, self.files = captioned, Names(files)
        self.named = Names({*captioned.texts, *captioned.faults})

    def __call__(self, file: File) -> tuple[tuple[Caption, ...], Fault | None]:
        texts, faults = self.captioned.texts, self.captioned.faults
        if file.name in self.named.all:
            return tuple(texts.get(file.name, ())), faults.get(file.name)
        alike = [] if file.name.isascii() else self.named.find(file.name)
        mine = [name for name in alike if name not in self.files.all]
        if len(mine) == 1 and len(self.files.find(mine[0])) == 1:  # a name in a tar, written in another Unicode form
            return tuple(texts.get(mine[0], ())), faults.get(mine[0])
        if alike and not file.captions:
            message = f"has no caption; {' and '.join(map(ascii, alike))}, the same but for its Unicode form, has."
            return (), ("no_caption", message)
        return file.captions, file.caption_fault


def _names(
    source: Folder, captioned: Captions, table: str | None, out: str | Path | None
) -> tuple[list[str], list[str], dict[str, int]]:
    """Files to probe, in order of name (media, and whatever a caption names); tars; how many others, by suffix."""
    tars = {name for name in source if name.lower().endswith((".tar", *COMPRESSED))}
    named = {*captioned.texts, *captioned.faults}
    in_tars = {name for name in named if any(name[: at.end()] in tars for at in re.finditer(r"\.tar(?=/)", name))}
    files = named - in_tars - tars | source.media()
    beside = [] if out is None else [out, skipped_path(out), _probed_path(out)]
    own = {absolute(str(path)) for path in (table, *beside) if path is not None}
    texts: set[str] = set()
    if table is None:
        texts = {text for name in files for place in source.captions_beside(name) for text in place}
    others = (name for name in source if name not in files and name not in tars and name not in texts)
    suffixes = Counter(suffix_of(name) for name in others if absolute(source.path(name)) not in own)
    return sorted(files), sorted(tars), dict(suffixes.most_common())


def _clip(result: Probed, span: Span, captions: tuple[Caption, ...]) -> Clip:
    found, sha256 = result.probe, result.sha256
    assert found is not None and sha256 is not None
    return Clip(
        id=clip_id(sha256, span.start, span.end),
        path=absolute(result.path),
        captions=captions,
        frames=span.frames,
        fps=span.fps,
        width=found["width"],
        height=found["height"],
        start=span.start,
        end=span.end,
        sha256=sha256,
    )


def with_scores(manifest: Manifest, scores: Sequence[Mapping[str, Any]]) -> Manifest:
    """The manifest with a column for each score of `scores.score` and `repeats`: the id of the clip that one repeats.

    Of copies, the one with the most pixels a frame is not a repeat (the first of those). Images repeat only images.
    """
    table = manifest.table
    for name in SCORES:
        table = table.append_column(name, pa.array([one[name] for one in scores], pa.float64()))
    of: list[str | None] = [None] * len(table)
    ids = table.column("id").to_pylist()
    sizes = manifest.column("width").astype(np.int64) * manifest.column("height")
    image = manifest.column("frames") == 1
    for kind in (image, ~image):
        there = np.flatnonzero(kind)
        rows = there[np.argsort(-sizes[there], kind="stable")].tolist()
        for row, first in zip(rows, repeats([scores[row]["fingerprint"] for row in rows])):
            if first is not None:
                of[row] = ids[rows[first]]
    return Manifest(table.append_column("repeats", pa.array(of, pa.string())), manifest.folder, manifest.source)
