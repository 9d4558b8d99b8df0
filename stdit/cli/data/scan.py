"""`stdit data scan`: probes files and writes the manifest."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from stdit.cli.common.outputs import out_manifest
from stdit.cli.common.ranges import SECONDS
from stdit.cli.common.stopped import when_stopped

if TYPE_CHECKING:
    from stdit.data.manifest import Skipped
    from stdit.data.scan.scan import Scan

SUFFIXES = 8  # of other files, that are named
SHOWN = 40  # table rows; the file beside the manifest has all


@when_stopped("The manifest is written when all files are probed. Results so far are kept: run the same command again.")
def scan(
    folder: Annotated[
        str, typer.Argument(help="Folder or URL of videos, images and tar shards; searched recursively.")
    ],
    out: Annotated[
        str, typer.Option(metavar="MANIFEST", parser=out_manifest, help="The manifest to write (.parquet), or its URL.")
    ],
    captions: Annotated[
        str | None,
        typer.Option(
            help="CSV (file,caption[,weight]), JSONL or Parquet. Default: captions.csv or captions.jsonl in FOLDER, "
            "else .txt (one caption per line) or .json files beside the videos. Tar shards have their own."
        ),
    ] = None,
    caption_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The column or key of the captions. Default: caption, text or prompt."),
    ] = None,
    file_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column of the file names. Default: file or path.")
    ] = None,
    allow_uncaptioned: Annotated[
        bool, typer.Option("--allow-uncaptioned", help="Keep files without a caption.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Decode only the first frame: faster, but damage is not found.")
    ] = False,
    scenes: Annotated[
        bool, typer.Option("--scenes", help="Cut videos at scene changes: each scene is a clip (PySceneDetect).")
    ] = False,
    scores: Annotated[
        bool,
        typer.Option(
            "--scores",
            help="Score motion, sharpness, brightness, black bars and still frames for data.filter, and find clips "
            "that look alike.",
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Probing processes. Default: one per core.")
    ] = None,
    timeout: Annotated[float, typer.Option(callback=SECONDS, help="Seconds per file.")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Probe every file of a folder or URL, write the manifest, and list what was skipped and why.

    Example: stdit data scan videos --out videos/manifest.parquet
    """
    from rich.console import Console

    from stdit.cli.common.bars import counting_bar
    from stdit.data.manifest import parquet_path
    from stdit.data.remote.storage import STORAGE
    from stdit.data.scan.scan import scan as scan_folder
    from stdit.data.scan.scan import skipped_path
    from stdit.errors import StditError
    from stdit.heartbeat import HEARTBEAT

    parquet_path(out)
    HEARTBEAT.doing(f"listing {folder}")
    with counting_bar("probing") as (on_start, on_files):
        result = scan_folder(
            folder,
            captions,
            out,
            caption_column=caption_column,
            file_column=file_column,
            uncaptioned=allow_uncaptioned,
            verify=not quick,
            scenes=scenes,
            scores=scores,
            workers=workers,
            timeout=timeout,
            on_start=on_start,
            on_file=lambda _: on_files(1),
        )
    if as_json:
        print(json.dumps(_summary(result, out, STORAGE.retries), ensure_ascii=False))
    else:
        console = Console()
        _table(console, "Skipped", result.skipped)
        _table(console, "Damaged, used as far as it goes", result.damaged)
        _table(console, "Look like others, kept unless data.repeats is false", result.repeats)
        if any(s.reason in ("no_caption", "bad_caption") for s in result.skipped):
            console.print("--allow-uncaptioned keeps files without a caption.")
        clips, images = len(result.manifest), sum(clip.image for clip in result.manifest)
        console.print(
            f"{out if clips else 'no manifest'}: {_count(clips - images, 'video')}, {_count(images, 'image')}; "
            f"{_count(len(result.skipped), 'file')} skipped"
            + (f" (all in {skipped_path(out)})" if result.skipped else "")
            + (f"; {_count(result.reused, 'file')} known from an earlier scan" if result.reused else "")
            + (f"; {_others(result.ignored)}" if result.ignored else "")
            + (f"; {_count(STORAGE.retries, 'request')} retried" if STORAGE.retries else "")
            + ".",
            highlight=False,
            soft_wrap=True,
        )
    if not len(result.manifest):  # nothing was written; an older manifest of this name is still there
        raise StditError(
            f"{folder} has no usable clip: {_count(len(result.skipped), 'file')} skipped"
            + (", see above." if result.skipped else ", and none is a video or an image.")
        )
    return 0


def _summary(result: Scan, out: str, retries: int) -> dict[str, object]:
    return {
        "manifest": out if len(result.manifest) else None,
        "clips": len(result.manifest),
        "hash": result.manifest.hash,
        "skipped": [asdict(s) for s in result.skipped],
        "damaged": [asdict(s) for s in result.damaged],
        "repeats": [asdict(s) for s in result.repeats],
        "reused": result.reused,
        "ignored": sum(result.ignored.values()),
        "ignored_suffixes": result.ignored,
        "retries": retries,
    }


def _others(suffixes: dict[str, int]) -> str:
    """Describes files of other types."""
    named = [f"{count} {suffix or 'without a suffix'}" for suffix, count in list(suffixes.items())[:SUFFIXES]]
    rest = sum(list(suffixes.values())[SUFFIXES:])
    named += [f"{rest} more"] if rest else []
    return f"{_count(sum(suffixes.values()), 'file')} of other types ({', '.join(named)})"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _table(console, title: str, rows: Sequence[Skipped]) -> None:
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    counts = ", ".join(f"{n} {reason}" for reason, n in Counter(row.reason for row in rows).most_common())
    table = Table("file", "reason", "what happened", title=f"{title}: {len(rows)} ({counts})", title_justify="left")
    for row in rows[:SHOWN]:
        table.add_row(escape(row.file), row.reason, escape(row.message))
    if len(rows) > SHOWN:
        table.add_row("…", "", f"and {len(rows) - SHOWN} more")
    console.print(table)
