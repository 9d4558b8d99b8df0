"""`stdit data caption`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from stdit.cli.common.outputs import out_manifest
from stdit.cli.common.ranges import SECONDS
from stdit.cli.common.stopped import when_stopped

SHOWN = 40  # failures listed; --json has all


@when_stopped("The captions made so far are kept: the same command goes on from there.")
def caption(
    manifest: Annotated[str, typer.Argument(help="The manifest whose clips are captioned, or its URL.")],
    model: Annotated[
        Path, typer.Option(metavar="FOLDER", help="An image- or video-to-text model that transformers loads.")
    ],
    out: Annotated[
        str,
        typer.Option(metavar="MANIFEST2", parser=out_manifest, help="The manifest to write (.parquet), or its URL."),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What to ask the model. Without: to describe what it sees, or nothing if it is not talked to."
        ),
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a clip to show, spread evenly over it.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest caption, in the model's tokens.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Clips the model captions at once: more is faster on a GPU.")] = 1,
    replace: Annotated[
        bool, typer.Option("--replace", help="In place of the captions a clip has, not beside them.")
    ] = False,
    weight: Annotated[float, typer.Option(help="Of the new captions, when training draws one of a clip's.")] = 1.0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as the model is stored.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; a GPU where there is one.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Clips read at the same time, each in its own process.")] = 2,
    timeout: Annotated[float, typer.Option(callback=SECONDS, help="Seconds that reading a clip may take.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Caption a manifest's clips with a local vision-language model, each once. Nothing is downloaded.

    A model whose processor takes videos is shown the frames as one; else one with a chat template is shown them as
    images; else a model is shown the middle frame. Killed and started again it goes on where it was.

    Example: stdit data caption clips.parquet --model models/Qwen2.5-VL-7B-Instruct --out captioned.parquet
    """
    from stdit.cli.common.bars import counting_bar
    from stdit.cli.common.device import pick_device
    from stdit.data.manifest import parquet_path, read_manifest
    from stdit.data.remote.storage import STORAGE
    from stdit.errors import error_context
    from stdit.heartbeat import HEARTBEAT
    from stdit.prepare.caption import caption_identity, caption_manifest
    from stdit.text.captioner import load_captioner

    parquet_path(out)
    clips = read_manifest(manifest)
    HEARTBEAT.doing(f"loading {model}")
    with error_context("--model"):
        captioner = load_captioner(model, prompt, max_new_tokens, dtype, pick_device(device))
        maker = caption_identity(model, captioner, frames)
    with counting_bar("captioning") as (on_start, on_clips):
        done = caption_manifest(
            clips,
            captioner,
            out,
            maker=maker,
            frames=frames,
            batch=batch,
            weight=weight,
            replace=replace,
            workers=workers,
            timeout=timeout,
            on_start=on_start,
            on_clips=on_clips,
        )
    if as_json:
        answer: dict[str, object] = {"manifest": out, "clips": len(clips), "captioned": done.captioned}
        answer |= {
            "reused": done.reused,
            "retries": STORAGE.retries,
            "failures": [asdict(one) for one in done.failures],
        }
        print(json.dumps({**answer, "hash": done.manifest.hash}, ensure_ascii=False))
        return 0
    for failure in done.failures[:SHOWN]:
        print(f"skipped: {failure.file}: {failure.message}")
    if len(done.failures) > SHOWN:
        print(f"… and {len(done.failures) - SHOWN} more")
    print(
        f"{out}: {done.captioned} clips captioned, {done.reused} were already, {len(done.failures)} could not be"
        + (f"; {STORAGE.retries} requests tried again" if STORAGE.retries else "")
        + "."
    )
    return 0
