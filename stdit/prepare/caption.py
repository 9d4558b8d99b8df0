"""Captions the clips of a manifest, each once; can be stopped and continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from stdit.data.decode.checks import Limits, VideoError, disk_failures
from stdit.data.load.loader import local_file
from stdit.data.manifest import SCHEMA, Clip, Manifest, Skipped, write_manifest
from stdit.data.parts import WHOLE, Part
from stdit.data.read_ahead import read_ahead
from stdit.data.remote.failures import DiskFailure
from stdit.data.remote.paths import beside
from stdit.data.remote.storage import STORAGE
from stdit.data.workers.pool import READER
from stdit.errors import StditError
from stdit.text.captioner import Captioner, Refused
from stdit.weights.identity import folder_identity

LONGEST_SIDE = 1280  # of frames passed to the model's processor, which scales them further
JOURNAL = ".captions.jsonl"  # ends the name of the list of captions, beside the manifest
REFUSALS = 3  # give up if the model fails on so many clips before any success


@dataclass(frozen=True)
class CaptionResult:
    """The manifest with the new captions; how many clips were captioned now, and how many by an earlier call."""

    manifest: Manifest
    captioned: int
    reused: int
    failures: tuple[Skipped, ...]


class _ShownClip(NamedTuple):
    """Frames (T, H, W, 3) of a clip, and their fps."""

    row: Clip
    frames: np.ndarray
    fps: float


def caption_identity(folder: str | Path, captioner: Captioner, frames: int) -> str:
    """SHA-256 (hex) of all that a clip's caption depends on: the model's folder, the prompt and the frames shown."""
    parts = [folder_identity(folder), captioner.template, captioner.prompt, captioner.max_new_tokens]
    parts += [str(captioner.model.dtype), captioner.frames(frames)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def caption_manifest(
    manifest: Manifest,
    captioner: Captioner,
    out: str | Path,
    *,
    maker: str,
    frames: int = 8,
    batch: int = 1,
    weight: float = 1.0,
    replace: bool = False,
    workers: int = 2,
    timeout: float = 60.0,
    part: Part = WHOLE,
    on_start: Callable[[int], None] = lambda _: None,
    on_clips: Callable[[int], None] = lambda _: None,
) -> CaptionResult:
    """Writes the manifest to `out` with a new caption for every clip.

    Each caption is appended at once to `….captions.jsonl` beside `out`, with its clip's id and maker. So the same call
    continues one that was killed, and makes the same manifest: the batches follow from the manifest alone. A clip that
    cannot be read, or that the model fails on, keeps its captions, and every call tries it again. Raises StditError if
    no clip could be captioned.

    maker: identifies what makes the captions, as `caption_identity` does.
    frames: shown per clip, evenly spaced.
    batch: clips per call of the model.
    replace: the new captions replace the old ones, instead of joining them.
    workers, timeout: how many clips are read at the same time, and how many seconds each may take.
    part: captions every `part.of`-th batch into a list of its own, and writes no manifest: `merge_captions` does.
    on_start, on_clips: are called with the number of clips to caption, and of clips just done.
    """
    _check_weight(weight)
    made, failures, refused = 0, list[Skipped](), 0
    # what is known already: of a part, also what an earlier merge has written
    earlier = [] if part.is_whole else STORAGE.lines(_journal(out))
    with STORAGE.journal(_journal(out, part)) as (lines, add):
        texts = {line["id"]: line["text"] for line in [*earlier, *lines] if line.get("maker") == maker}
        there = len(texts.keys() & set(manifest.ids.to_pylist()))
        todo = _batches(manifest, texts, batch, part)
        on_start(sum(map(len, todo)))
        show = partial(_show, manifest, count=captioner.frames(frames), limits=Limits(seconds=timeout))
        for shown in read_ahead(show, todo, workers, ahead=2):
            failures += [clip for clip in shown if isinstance(clip, Skipped)]
            new = []
            for clip, text in _captioned(captioner, [clip for clip in shown if isinstance(clip, _ShownClip)]):
                if isinstance(text, Skipped):
                    failures.append(text)
                    refused += text.reason == "refused"
                else:
                    new.append({"id": clip.row.id, "maker": maker, "text": text})
            add(new)
            texts |= {line["id"]: line["text"] for line in new}
            made += len(new)
            if refused >= REFUSALS and not made + there:
                break
            on_clips(len(shown))
    if not made + there and (part.is_whole or refused >= REFUSALS):  # a part may have none but bad clips
        why = f"The first of {len(failures)}: {failures[0].file}: {failures[0].message}" if failures else "It is empty."
        raise StditError(f"no clip of {manifest.source} could be captioned. {why}")
    if part.is_whole:
        manifest = _with_captions(manifest, texts, weight, replace)
        write_manifest(manifest, out)
    return CaptionResult(manifest, made, there, tuple(failures))


def merge_captions(
    manifest: Manifest,
    out: str | Path,
    parts: Sequence[Part],
    *,
    maker: str,
    weight: float = 1.0,
    replace: bool = False,
) -> CaptionResult:
    """Writes the manifest that `caption_manifest` would have written, from the captions of its parts.

    Their captions are added to `….captions.jsonl`. Raises StditError if there are none.
    """
    _check_weight(weight)
    with STORAGE.journal(_journal(out)) as (lines, add):
        known = {(line.get("maker"), line["id"]) for line in lines}
        for part in parts:
            new = [line for line in STORAGE.lines(_journal(out, part)) if (line.get("maker"), line["id"]) not in known]
            add(new)
            lines += new
    texts = {line["id"]: line["text"] for line in lines if line.get("maker") == maker}
    there = len(texts.keys() & set(manifest.ids.to_pylist()))
    if not there:
        raise StditError(f"no clip of {manifest.source} could be captioned, by any part.")
    captioned = _with_captions(manifest, texts, weight, replace)
    write_manifest(captioned, out)
    return CaptionResult(captioned, 0, there, ())


def _check_weight(weight: float) -> None:
    if not 0 < weight < float("inf"):
        raise StditError(f"a caption's weight is positive, not {weight}.")


def _journal(out: str | Path, part: Part = WHOLE) -> str:
    return beside(out, JOURNAL) if part.is_whole else part.beside(str(out), JOURNAL)


def _batches(manifest: Manifest, texts: dict[str, str], batch: int, part: Part) -> list[list[int]]:
    """The part's rows still to caption, images apart from videos. Batches do not depend on what has been captioned."""
    ids, image = manifest.ids.to_pylist(), manifest.column("frames") == 1
    batches = []
    for rows in (np.flatnonzero(image), np.flatnonzero(~image)):
        batches += [rows[first : first + batch].tolist() for first in range(0, len(rows), batch)]
    todo = ([row for row in rows if ids[row] not in texts] for n, rows in enumerate(batches) if part.has_place(n))
    return [rows for rows in todo if rows]


def _show(manifest: Manifest, row: int, count: int, limits: Limits) -> _ShownClip | Skipped:
    """`count` frames of a clip (or all, if it has fewer), each from the middle of an equal part of its duration."""
    clip = manifest[row]
    count = min(count, clip.frames)
    seconds = clip.end - clip.start
    fps = count / seconds if seconds > 0 else clip.fps
    # A frame's middle is half a frame after its time: as many parts as frames give exactly the frames.
    first = clip.start + max(0.0, (1 / fps - 1 / clip.fps) / 2)
    scale = min(1.0, LONGEST_SIDE / max(clip.width, clip.height))
    size = (max(1, round(clip.width * scale)), max(1, round(clip.height * scale)))
    try:
        with local_file(clip) as path:

            def read() -> np.ndarray:
                with disk_failures():
                    return READER(path, count, size, fps, first, limits=limits)

            return _ShownClip(clip, STORAGE.retried(clip.path, read, retry_on=DiskFailure), fps)
    except VideoError as error:
        return Skipped(clip.path, error.reason, error.message)


def _captioned(captioner: Captioner, shown: list[_ShownClip]) -> Iterator[tuple[_ShownClip, str | Skipped]]:
    """Each clip with its caption or its failure. A batch that the model fails on is tried clip by clip."""
    if not shown:
        return
    try:
        texts = captioner.caption([clip.frames for clip in shown], [clip.fps for clip in shown])
    except Refused as error:
        if len(shown) > 1:
            for clip in shown:
                yield from _captioned(captioner, [clip])
        else:
            yield shown[0], Skipped(shown[0].row.path, "refused", str(error))
        return
    for clip, text in zip(shown, texts):
        yield clip, text or Skipped(clip.row.path, "no_caption", "the model says nothing about it.")


def _with_captions(manifest: Manifest, texts: dict[str, str], weight: float, replace: bool) -> Manifest:
    captions = manifest.table.column("captions").to_pylist()
    for row, clip_id in enumerate(manifest.ids.to_pylist()):
        text = texts.get(clip_id)
        if text is not None and (replace or all(caption["text"] != text for caption in captions[row])):
            captions[row] = [*([] if replace else captions[row]), {"text": text, "weight": weight}]
    place = manifest.table.column_names.index("captions")
    table = manifest.table.set_column(place, "captions", pa.array(captions, SCHEMA.field("captions").type))
    return Manifest(table, manifest.folder, manifest.source)
