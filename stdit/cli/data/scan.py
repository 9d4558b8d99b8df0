"""`stdit data scan`: probes files and writes the manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from stdit.cli.common.options import SECONDS, Json, PartOf, out_manifest, when_stopped
from stdit.cli.common.tables import print_table
from stdit.errors import StditError
from stdit.heartbeat import HEARTBEAT, counting_bar

if TYPE_CHECKING:
    from stdit.data.manifest import Skipped
    from stdit.data.scan.scan import Scan

SUFFIXES = 8  # of other files, that are named
SHOWN = 40  # table rows; the file beside the manifest has all


@when_stopped("The manifest is written when all files are probed. Results so far are kept: run the same command again.")
def scan(
    folder: Annotated[str, Argument(help="Folder or URL of videos, images and tar shards; searched recursively.")],
    out: Annotated[
        str, Option(metavar="MANIFEST", parser=out_manifest, help="The manifest to write (.parquet), or its URL.")
    ],
    captions: Annotated[
        str | None,
        Option(
            help="CSV (file,caption[,weight]), JSONL or Parquet. Default: captions.csv or captions.jsonl in FOLDER, "
            "else .txt (one caption per line) or .json files beside the videos. Tar shards have their own."
        ),
    ] = None,
    caption_column: Annotated[
        str | None, Option(metavar="NAME", help="The column or key of the captions. Default: caption, text or prompt.")
    ] = None,
    file_column: Annotated[
        str | None, Option(metavar="NAME", help="The column of the file names. Default: file or path.")
    ] = None,
    allow_uncaptioned: Annotated[bool, Option("--allow-uncaptioned", help="Keep files without a caption.")] = False,
    quick: Annotated[
        bool, Option("--quick", help="Decode only the first frame: faster, but damage is not found.")
    ] = False,
    scenes: Annotated[
        bool, Option("--scenes", help="Cut videos at scene changes: each scene is a clip (PySceneDetect).")
    ] = False,
    scores: Annotated[
        bool,
        Option(
            "--scores",
            help="Score motion, sharpness, brightness, black bars and still frames for data.filter, and find clips "
            "that look alike.",
        ),
    ] = False,
    workers: Annotated[int | None, Option(min=1, max=1000, help="Probing processes. Default: one per core.")] = None,
    timeout: Annotated[float, Option(callback=SECONDS, help="Seconds per file.")] = 30.0,
    part: PartOf = None,
    as_json: Json = False,
) -> None:
    """Probe every file of a folder or URL, write the manifest, and list what was skipped and why.

    With --part, many machines share the work: each probes its files, and `stdit data merge` writes the manifest.

    Example: stdit data scan videos --out videos/manifest.parquet
    """
    from stdit.cli.common.parts import finish_part, part_answer, take_part
    from stdit.data.manifest import parquet_path
    from stdit.data.scan.scan import scan as scan_folder
    from stdit.data.scan.scan import scan_part

    parquet_path(out)
    mine = take_part(part, out, "scan")
    HEARTBEAT.doing(f"listing {folder}")
    settings: dict[str, Any] = {
        "folder": folder, "captions": captions, "caption_column": caption_column, "file_column": file_column,
        "uncaptioned": allow_uncaptioned, "verify": not quick, "scenes": scenes, "scores": scores, "timeout": timeout,
    }  # fmt: skip
    with counting_bar("probing", hidden=mine.is_quiet) as (on_start, on_files):
        calls: dict[str, Any] = {"workers": workers, "on_start": on_start, "on_file": lambda _: on_files(1)}
        if mine.is_whole:
            result = scan_folder(out=out, **settings, **calls)
        else:
            done = scan_part(out=out, part=mine, **settings, **calls)
    if mine.is_whole:
        print_scan(folder, out, result, as_json)
        return
    then = finish_part(mine, out, "scan", settings, ("folder", "captions"))
    if as_json:
        answer = {"files": done.files, "reused": done.reused, "unusable": [asdict(file) for file in done.unusable]}
        print(json.dumps(part_answer(mine, answer), ensure_ascii=False))
        return
    if done.unusable:
        _print_files("Cannot be used", done.unusable)
    known = f", {done.reused} of them known from an earlier scan" if done.reused else ""
    print(f"part {mine} of {folder}: {_count(done.files, 'file')} probed{known}. {then}")


def print_scan(folder: str, out: str, result: Scan, as_json: bool) -> None:
    """Prints what a scan has found. Raises StditError if that is no clip."""
    from stdit.data.remote.storage import STORAGE
    from stdit.data.scan.finding import skipped_path

    clips, skipped = len(result.manifest), _count(len(result.skipped), "file")
    if as_json:
        answer: dict[str, object] = {"manifest": out if clips else None, "clips": clips, "hash": result.manifest.hash}
        for name, files in (("skipped", result.skipped), ("damaged", result.damaged), ("repeats", result.repeats)):
            answer[name] = [asdict(file) for file in files]
        answer |= {"reused": result.reused, "ignored": sum(result.ignored.values())}
        answer |= {"ignored_suffixes": result.ignored, "retries": STORAGE.retries}
        print(json.dumps(answer, ensure_ascii=False))
    else:
        _print_files("Skipped", result.skipped)
        _print_files("Damaged, used as far as it goes", result.damaged)
        _print_files("Look like others, kept unless data.repeats is false", result.repeats)
        if any(file.reason in ("no_caption", "bad_caption") for file in result.skipped):
            print("--allow-uncaptioned keeps files without a caption.")
        images = sum(clip.image for clip in result.manifest)
        print(
            f"{out if clips else 'no manifest'}: {_count(clips - images, 'video')}, {_count(images, 'image')}; "
            f"{skipped} skipped"
            + (f" (all in {skipped_path(out)})" if result.skipped else "")
            + (f"; {_count(result.reused, 'file')} known from an earlier scan" if result.reused else "")
            + (f"; {_others(result.ignored)}" if result.ignored else "")
            + (f"; {_count(STORAGE.retries, 'request')} retried" if STORAGE.retries else "")
            + "."
        )
    if not clips:  # nothing was written; an older manifest of this name is still there
        seen = "see above." if result.skipped else "and none is a video or an image."
        raise StditError(f"{folder} has no usable clip: {skipped} skipped, {seen}")


def _others(suffixes: dict[str, int]) -> str:
    """Describes files of other types."""
    named = [f"{count} {suffix or 'without a suffix'}" for suffix, count in list(suffixes.items())[:SUFFIXES]]
    rest = sum(list(suffixes.values())[SUFFIXES:])
    named += [f"{rest} more"] if rest else []
    return f"{_count(sum(suffixes.values()), 'file')} of other types ({', '.join(named)})"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _print_files(title: str, files: Sequence[Skipped]) -> None:
    counts = ", ".join(f"{n} {reason}" for reason, n in Counter(file.reason for file in files).most_common())
    rows = [(file.file, file.reason, file.message) for file in files[:SHOWN]]
    if len(files) > SHOWN:
        rows.append(("…", "", f"and {len(files) - SHOWN} more"))
    print_table(f"{title}: {len(files)} ({counts})", ("file", "reason", "what happened"), rows)
