"""A folder of videos and images to a manifest: every file is a clip, or is named with the reason why not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

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
    out: the manifest to write, if there is a clip; what was skipped goes beside it as `….skipped.jsonl`.
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
    probed = probe_files(
        [str(folder / file) for file in present],
        workers or os.cpu_count() or 1,
        VERIFY_PIXELS if verify else 0,
        timeout,
        lambda result: on_file(result.path),
    )
    clips: dict[str, Clip] = {}
    names: dict[str, str] = {}
    damaged: list[Skipped] = []
    for file, result in zip(present, probed):
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
    done = Scan(manifest, tuple(sorted(skipped, key=lambda s: s.file)), tuple(damaged), ignored)
    if out is not None:
        if len(manifest):
            write_manifest(manifest, out)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in done.skipped]
        publish_text(skipped_path(out), "".join(lines))
    return done


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
