"""`stdit data merge`: joins what the parts of a scan, a captioning or an encoding have made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from stdit.cli.common.options import Json, when_stopped
from stdit.errors import StditError
from stdit.heartbeat import HEARTBEAT, counting_bar

if TYPE_CHECKING:
    from stdit.data.parts import PartRecord


@when_stopped("The parts are still there: the same command merges them.")
def merge(
    out: Annotated[str, Argument(metavar="OUT", help="What the parts were told to write by --out.")],
    workers: Annotated[
        int | None, Option(min=1, max=1000, help="Processes that probe what a scan must probe again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make of the parts of a scan, caption or encode what one run would have made, and remove what they left.

    Nothing is merged while a part is missing: the error has the command that makes it.

    Example: stdit data merge videos/manifest.parquet
    """
    from stdit.data.parts import finished_parts

    HEARTBEAT.doing(f"reading the parts of {out}")
    records = finished_parts(out)
    {"scan": _merge_scan, "caption": _merge_captions, "encode": _merge_caches}[records[0].kind](
        out, records, workers, as_json
    )


def _merge_scan(out: str, records: Sequence[PartRecord], workers: int | None, as_json: bool) -> None:
    from stdit.cli.data.scan import print_scan
    from stdit.data.parts import clear_parts
    from stdit.data.scan.finding import PART_LOG, part_log
    from stdit.data.scan.scan import scan

    settings, logs = records[0].settings, [part_log(out, record.part) for record in records]
    HEARTBEAT.doing(f"listing {settings['folder']}")
    with counting_bar("merging") as (on_start, on_files):
        result = scan(out=out, logs=logs, workers=workers, on_start=on_start, on_file=lambda _: on_files(1), **settings)
    clear_parts(out, records, PART_LOG)
    print_scan(settings["folder"], out, result, as_json)


def _merge_captions(out: str, records: Sequence[PartRecord], workers: int | None, as_json: bool) -> None:
    from stdit.data.manifests import named, read_manifests
    from stdit.data.parts import clear_parts
    from stdit.prepare.caption import JOURNAL, merge_captions

    settings = records[0].settings
    clips = read_manifests(settings["manifests"])
    if clips.hash != settings["hash"]:
        raise StditError(f"{named(settings['manifests'])} has changed since its parts were captioned. Run them again.")
    done = merge_captions(
        clips, out, [record.part for record in records], maker=settings["maker"], weight=settings["weight"],
        replace=settings["replace"],
    )  # fmt: skip
    clear_parts(out, records, JOURNAL)
    if as_json:
        answer = {"manifest": out, "clips": len(clips), "captioned": done.reused, "hash": done.manifest.hash}
        print(json.dumps(answer, ensure_ascii=False))
        return
    print(f"{out}: {done.reused} of {len(clips)} clips have a new caption, of {len(records)} parts.")


def _merge_caches(out: str, records: Sequence[PartRecord], workers: int | None, as_json: bool) -> None:
    from stdit.data.parts import clear_parts
    from stdit.prepare.encode import merge_caches

    failures = [failure for record in records for failure in record.found["failures"]]
    caches = merge_caches(out, records[0].settings["caches"])
    clear_parts(out, records)
    if as_json:
        counts = {name: {"entries": entries, "failed": failed} for name, (entries, failed) in caches.items()}
        print(json.dumps({"cache": out, "caches": counts, "failures": failures}, ensure_ascii=False))
        return
    for failure in failures:
        print(f"skipped: {failure}")
    for name, (entries, failed) in caches.items():
        print(f"{out}: {name} has {entries} entries, {failed} of them failures.")
