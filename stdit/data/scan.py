"""A folder of videos and images to a manifest: every file is a clip, or is named with the reason why not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stdit.data.captions import read_captions, sidecar
from stdit.data.manifest import Caption, Clip, Manifest, Skipped, clip_id, write_manifest
from stdit.data.probing import Probed, probe_files
from stdit.data.video_io import IMAGE_SUFFIXES, VERIFY_PIXELS, VIDEO_SUFFIXES
from stdit.errors import StditError
from stdit.files import publish_text


@dataclass(frozen=True)
class Scan:
    """clips, what was skipped, and files that are clips but damaged further in (file, what happened)."""

    manifest: Manifest
    skipped: tuple[Skipped, ...]
    damaged: tuple[Skipped, ...]
    ignored: int  # files of other types that no caption names
    reused: int = 0  # files that were probed by an earlier scan and have not changed since


def scan(
    folder: str | Path,
    captions: str | Path | None = None,
    out: str | Path | None = None,
    *,
    uncaptioned: bool = False,
    verify: bool = True,
    workers: int | None = None,
    timeout: float = 30.0,
    on_start: Callable[[int], None] = lambda _: None,
    on_file: Callable[[str], None] = lambda _: None,
) -> Scan:
    """Probes every video and image under `folder` (hidden ones left out), in processes that may crash or hang.

    captions: a CSV or JSONL; None: `captions.csv` or `captions.jsonl` in the folder, else .txt files beside the videos.
    out: the manifest to write, if there is a clip; what was skipped goes beside it as `….skipped.jsonl`, and what was
        found of every file as `….probed.jsonl`, while it is found: a scan that was stopped goes on there, and files
        whose size and time of change are the same are not probed again.
    uncaptioned: keep files without a caption (their captions are empty) instead of skipping them as "no_caption".
    verify: decode the files (each up to `video_io.VERIFY_PIXELS`), which finds damage; else only their first frame.
    timeout: seconds a file.

    A file damaged further in is a clip up to the damage. Files with equal content are one clip, with all captions.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StditError(f"{folder} is not a folder.")
    table = _captions_file(folder, captions)
    captioned = {} if table is None else read_captions(table, folder)
    files, ignored = _files(folder, captioned, table, out)
    texts = {file: captioned.get(file, []) if table is not None else sidecar(folder / file) for file in files}
    present = [file for file in files if not _unnameable(file)]
    skipped = [
        Skipped(file.encode("utf-8", "replace").decode(), "name", "has a name that is not UTF-8. Rename it.")
        for file in files
        if _unnameable(file)
    ]
    on_start(len(present))
    paths = [str(folder / file) for file in present]
    verify_pixels = VERIFY_PIXELS if verify else 0
    with _remembered(None if out is None else Path(out).with_suffix(".probed.jsonl"), verify_pixels) as memory:
        found = {path: result for path in paths if (result := memory.get(path))}
        for path in found:
            on_file(path)

        def done(result: Probed) -> None:
            memory.keep(result)
            on_file(result.path)

        new = [path for path in paths if path not in found]
        found |= zip(new, probe_files(new, workers or os.cpu_count() or 1, verify_pixels, timeout, done))
    clips: dict[str, Clip] = {}
    names: dict[str, str] = {}
    damaged: list[Skipped] = []
    for file, path in zip(present, paths):
        result = found[path]
        if result.probe is None or result.sha256 is None:
            skipped.append(Skipped(file, result.reason or "undecodable", result.message or "cannot be read."))
            continue
        if not texts[file] and not uncaptioned:
            skipped.append(Skipped(file, "no_caption", "has no caption."))
            continue
        clip = _clip(result, texts[file])
        if result.probe["damage"]:
            damaged.append(Skipped(file, "damaged", f"{result.probe['damage']} The frames before that are used."))
        if clip.id in clips:
            first = clips[clip.id]
            merged = tuple(dict.fromkeys((*first.captions, *clip.captions)))
            clips[clip.id] = Clip(**{**first.__dict__, "captions": merged})
            message = f"has the same content as {names[clip.id]}; its captions are added there."
            skipped.append(Skipped(file, "duplicate", message))
        else:
            clips[clip.id], names[clip.id] = clip, file
    manifest = Manifest.of(list(clips.values()), folder)
    scanned = Scan(
        manifest, tuple(sorted(skipped, key=lambda s: s.file)), tuple(damaged), ignored, len(paths) - len(new)
    )
    if out is not None:
        if len(manifest):
            write_manifest(manifest, out)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in scanned.skipped]
        publish_text(skipped_path(out), "".join(lines))
    return scanned


class _Memory:
    """What was found of files, by path, with the size and time that a file had then."""

    def __init__(self, verify_pixels: int, lines: list[dict[str, Any]], write: Callable[[bytes], object]) -> None:
        self.verify_pixels, self.write = verify_pixels, write
        self.known = {line["path"]: line for line in lines}
        self.used: dict[str, dict[str, Any]] = {}

    def get(self, path: str) -> Probed | None:
        line = self.known.get(os.path.abspath(path))
        if line is None or line["file"] != _state(path) or line["verify_pixels"] != self.verify_pixels:
            return None
        self.used[line["path"]] = line
        return Probed(path, line["probe"], line["sha256"], line["reason"], line["message"])

    def keep(self, result: Probed) -> None:
        if result.reason in ("timeout", "crashed", "missing", "unreadable"):  # may be otherwise the next time
            return
        path = os.path.abspath(result.path)
        line = asdict(result) | {"path": path, "file": _state(path), "verify_pixels": self.verify_pixels}
        self.used[path] = line
        self.write(json.dumps(line).encode() + b"\n")


@contextmanager
def _remembered(path: Path | None, verify_pixels: int) -> Iterator[_Memory]:
    """What earlier scans wrote to this file; what is new is added as it comes, what is of no use any more goes."""
    if path is None:
        yield _Memory(verify_pixels, [], lambda _: None)
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # cut off as the scan was ended
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:  # a write is a line: several threads write
        file.write(b"\n")  # after a line that was cut off
        memory = _Memory(verify_pixels, lines, file.write)
        yield memory
    publish_text(path, "".join(json.dumps(line) + "\n" for line in memory.used.values()))


def _state(path: str) -> list[int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def skipped_path(out: str | Path) -> Path:
    """Where `scan` lists the files it skipped."""
    return Path(out).with_suffix(".skipped.jsonl")


def _unnameable(file: str) -> bool:
    return any(0xD800 <= ord(c) <= 0xDFFF for c in file)


def _captions_file(folder: Path, captions: str | Path | None) -> Path | None:
    if captions is not None:
        return Path(captions)
    tables = [folder / name for name in ("captions.csv", "captions.jsonl") if (folder / name).is_file()]
    if len(tables) > 1:
        raise StditError(f"{folder} has both captions.csv and captions.jsonl. Name one with --captions.")
    return tables[0] if tables else None


def _files(
    folder: Path, captioned: dict[str, list[Caption]], table: Path | None, out: str | Path | None
) -> tuple[list[str], int]:
    """Files to probe, relative to the folder, in order of name: media by suffix, and whatever a caption names."""
    files, ignored = set(captioned), 0
    own = {os.path.abspath(path) for path in (table, out) if path is not None}
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(root, name)
            relative = os.path.relpath(path, folder).replace(os.sep, "/")
            if name.startswith(".") or relative in files:
                continue
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                files.add(relative)
            elif os.path.abspath(path) not in own:
                ignored += 1
    return sorted(files), ignored


def _clip(result: Probed, captions: list[Caption]) -> Clip:
    found, sha256 = result.probe, result.sha256
    assert found is not None and sha256 is not None
    start, end = round(found["start"], 6), round(found["end"], 6)
    return Clip(
        id=clip_id(sha256, start, end),
        path=os.path.abspath(result.path),
        captions=tuple(captions),
        frames=found["frames"],
        fps=found["fps"],
        width=found["width"],
        height=found["height"],
        start=start,
        end=end,
        sha256=sha256,
    )
