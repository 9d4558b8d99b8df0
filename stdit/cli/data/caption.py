"""`stdit data caption`: captions clips with a local vision-language model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from stdit.cli.common.options import SECONDS, Device, Json, PartOf, local_gpu, out_manifest, pick_device, when_stopped
from stdit.errors import error_context
from stdit.heartbeat import HEARTBEAT, counting_bar

SHOWN = 40  # failures listed; --json has all


@when_stopped("The captions made so far are kept: the same command goes on from there.")
def caption(
    manifests: Annotated[
        list[str], Argument(metavar="MANIFEST…", help="The manifest of the clips, its URL or a pattern; or several.")
    ],
    model: Annotated[Path, Option(metavar="FOLDER", help="An image- or video-to-text model that transformers loads.")],
    out: Annotated[
        str, Option(metavar="MANIFEST2", parser=out_manifest, help="The manifest to write (.parquet), or its URL.")
    ],
    prompt: Annotated[
        str | None,
        Option(help="The prompt for the model. Default: asks chat models for a description, others nothing."),
    ] = None,
    frames: Annotated[int, Option(min=1, help="Frames shown per clip, spread evenly over it.")] = 8,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest caption, in the model's tokens.")] = 128,
    batch: Annotated[int, Option(min=1, help="Clips captioned at once: more is faster on a GPU.")] = 1,
    replace: Annotated[bool, Option("--replace", help="Replace a clip's captions instead of adding to them.")] = False,
    weight: Annotated[float, Option(help="Weight of the new captions when training draws one per clip.")] = 1.0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Option(help="auto: as the model is stored.")
    ] = "auto",
    device: Device = None,
    workers: Annotated[int, Option(min=1, help="Clips read in parallel, each in its own process.")] = 2,
    timeout: Annotated[float, Option(callback=SECONDS, help="Seconds that reading a clip may take.")] = 60.0,
    part: PartOf = None,
    as_json: Json = False,
) -> None:
    """Caption each clip of a manifest once with a local vision-language model. Nothing is downloaded.

    The model is shown the frames as a video if its processor takes videos, as images if it has a chat template, and
    otherwise the middle frame only. If interrupted, the same command resumes. With --part, many machines share the
    work, and `stdit data merge` writes the manifest.

    Example: stdit data caption clips.parquet --model models/Qwen2.5-VL-7B-Instruct --out captioned.parquet
    """
    from stdit.cli.common.parts import finish_part, part_answer, take_part
    from stdit.data.manifest import parquet_path
    from stdit.data.manifests import named, read_manifests
    from stdit.data.remote.storage import STORAGE
    from stdit.prepare.caption import caption_identity, caption_manifest
    from stdit.text.captioner import load_captioner

    parquet_path(out)
    mine = take_part(part, out, "caption")
    clips = read_manifests(manifests)
    HEARTBEAT.doing(f"loading {model}")
    with error_context("--model"):
        captioner = load_captioner(model, prompt, max_new_tokens, dtype, pick_device(device, local_gpu()))
        maker = caption_identity(model, captioner, frames)
    with counting_bar("captioning", hidden=mine.is_quiet) as (on_start, on_clips):
        done = caption_manifest(
            clips, captioner, out, maker=maker, frames=frames, batch=batch, weight=weight, replace=replace,
            workers=workers, timeout=timeout, part=mine, on_start=on_start, on_clips=on_clips,
        )  # fmt: skip
    then = ""
    if not mine.is_whole:
        settings = {"manifests": manifests, "hash": clips.hash, "maker": maker, "weight": weight, "replace": replace}
        then = " " + finish_part(mine, out, "caption", settings | {"batch": batch}, ("manifests",))
    if as_json:
        answer = {
            "manifest": out if mine.is_whole else None,
            "clips": len(clips),
            "captioned": done.captioned,
            "reused": done.reused,
            "retries": STORAGE.retries,
            "failures": [asdict(failure) for failure in done.failures],
            "hash": done.manifest.hash,
        }
        print(json.dumps(part_answer(mine, answer), ensure_ascii=False))
        return
    for failure in done.failures[:SHOWN]:
        print(f"skipped: {failure.file}: {failure.message}")
    if len(done.failures) > SHOWN:
        print(f"… and {len(done.failures) - SHOWN} more")
    retried = f"; {STORAGE.retries} requests retried" if STORAGE.retries else ""
    what = out if mine.is_whole else f"part {mine} of {named(manifests)}"
    counts = f"{done.captioned} clips captioned, {done.reused} reused, {len(done.failures)} failed{retried}"
    print(f"{what}: {counts}.{then}")
