"""`stdit data toy`: renders the built-in data set of moving shapes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from stdit.cli.common.options import out_folder
from stdit.errors import StditError
from stdit.heartbeat import named_bars


def toy(
    folder: Annotated[
        Path,
        Argument(metavar="FOLDER", parser=out_folder, help="Where to write. A partly written folder is completed."),
    ],
    clips: Annotated[int, Option(min=1, help="Clips to train on.")] = 1000,
    held_out: Annotated[int, Option(min=0, help="Clips of combinations never trained, in FOLDER/held_out.")] = 48,
    seed: Annotated[int, Option(help="Random seed of the clips.")] = 0,
    shapes: Annotated[str, Option(help="Aspect ratios, as sizes: WIDTHxHEIGHT,…")] = "64x64,80x48,48x80",
    seconds: Annotated[str, Option(help="Durations: SECONDS,…")] = "1.25,1.75,2.25,2.75",
    images: Annotated[float, Option(min=0, max=1, help="Share of still images among the clips.")] = 0.1,
    as_json: Annotated[bool, Option("--json", help="Print the counts as JSON.")] = False,
) -> None:
    """Render moving shapes with captions to video files: a data set small enough to watch a model learn.

    Example: stdit data toy data/toy && stdit data scan data/toy/train --out data/toy/manifest.parquet
    """
    from stdit.data.toy import ToySettings, make_toy

    try:
        lengths = tuple(float(value) for value in seconds.split(","))
    except ValueError:
        raise StditError(f"--seconds is {seconds!r}; it must be numbers separated by commas: 1.25,2.25.") from None
    sizes = tuple(part.strip() for part in shapes.split(","))
    settings = ToySettings(clips, held_out, seed, sizes, seconds=lengths, image_share=images)
    with named_bars(hidden=as_json) as progress:
        counts = make_toy(folder, settings, partial(progress, "rendering"))
    if as_json:
        print(json.dumps({"folder": str(folder), **counts}))
        return
    done = f"rendered {counts['rendered']} files" if counts["rendered"] else "is complete already"
    print(f"{folder}: {done}; {counts['train']} clips to train on, {counts['held_out']} held out.")
    print(f"Next: stdit data scan {folder / 'train'} --out {folder / 'manifest.parquet'}")
