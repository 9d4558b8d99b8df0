"""`stdit eval vae`: what a VAE loses of clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stdit.cli.common.device import DEVICE, pick_device
from stdit.cli.common.memory import MEMORY
from stdit.cli.common.outputs import out_folder
from stdit.cli.common.ranges import FPS
from stdit.cli.common.stopped import when_stopped


@when_stopped("The measured clips are kept: the same command resumes from there.")
def vae(
    clips: Annotated[str, typer.Argument(help="A manifest, or a folder of videos and images; or the URL of either.")],
    model: Annotated[Path, typer.Option(help="The VAE's folder, or a model folder with vae/.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            parser=out_folder,
            help="For evaluation-vae.json, and evaluation-vae/ with pictures.",
        ),
    ],
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT to which clips are scaled and cropped. Default: their own.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="At most so many frames of each clip, from its start.")] = 33,
    fps: Annotated[
        float | None, typer.Option(callback=FPS, help="Frames per second to read. Default: its own.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many clips, the first.")] = 100,
    lpips: Annotated[
        list[Path] | None,
        typer.Option(help="LPIPS' weights, repeatable: VGG16's file and that of the heads, or a folder."),
    ] = None,
    trust_pickle: Annotated[bool, typer.Option("--trust-pickle", help="Open LPIPS' .pth, tensors only.")] = False,
    write: Annotated[
        bool,
        typer.Option("--write-normalisation", help="Write the latents' mean and deviation into the VAE's config.json."),
    ] = False,
    pictures: Annotated[int, typer.Option(min=0, help="Number of clips to draw.")] = 16,
    memory: Annotated[int | None, MEMORY] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw latents from the posterior: not exact, like those of a transformer.")
    ] = False,
    device: Annotated[str | None, DEVICE] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print evaluation-vae.json instead of a table.")] = False,
) -> None:
    """Measure how well a VAE reconstructs clips, and the statistics of its latents.

    Clips of any length take the memory of a few frames.

    Example: stdit eval vae videos/held_out.parquet --model runs/vae/model --size 128x96 --fps 15 --out runs/vae
    """
    from rich.console import Console

    from stdit.cli.common.bars import named_bars
    from stdit.errors import StditError
    from stdit.evaluation.vae import evaluate_vae, normalised_folder, write_normalisation
    from stdit.heartbeat import HEARTBEAT
    from stdit.shapes import VideoShape

    shape = VideoShape.parse(size) if size else None
    if shape is not None and not shape.is_image:
        raise StditError(f"--size {size}: give WIDTHxHEIGHT alone, and the number of frames by --frames.")
    device = pick_device(device)
    HEARTBEAT.doing(f"loading {model}")
    if write:
        normalised_folder(model)  # raises before hours of measuring
    with named_bars(hidden=as_json) as progress:
        result = evaluate_vae(
            model,
            clips,
            out,
            None if shape is None else (shape.width, shape.height),
            frames,
            fps,
            limit,
            lpips or (),
            pictures,
            memory,
            sample,
            device,
            progress,
            trust_pickle,
        )
    written = write_normalisation(model, result["latents"]) if write else None
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    console = Console()
    for view in tables(result):
        console.print(view, highlight=False)
    for failure in result["failures"]:
        console.print(f"left out: {failure}", highlight=False, markup=False, soft_wrap=True)
    if written is not None:
        print(f"{written / 'config.json'}: latents_mean and latents_std are now those above.")
    print(f"{out / 'evaluation-vae.json'}" + (f", pictures in {out / 'evaluation-vae'}" if pictures else ""))


def tables(result: dict[str, Any]) -> list[Any]:
    """The measures of all clips, and those of the latent channels, as rich tables with their definitions."""
    from rich.table import Table

    from stdit.evaluation.measures import RATIOS

    look: dict[str, Any] = {"padding": (0, 1, 0, 0), "box": None, "title_justify": "left"}
    measures = Table(title=f"{len(result['clips'])} clips", **look)
    for name in ("", "all", "worst", "definition"):
        measures.add_column(name, justify="right" if name in ("all", "worst") else "left")
    for name, value in result["measures"].items():
        if value is None:
            continue
        found = [clip["measures"][name] for clip in result["clips"] if clip["measures"][name] is not None]
        if name in RATIOS:
            worst = max(found, key=lambda ratio: abs(ratio - 1))
        else:
            worst = max(found) if name in ("lpips", "flicker", "flicker_still") else min(found)
        how = "; over all clips the median" if name in RATIOS else ""
        measures.add_row(name, f"{value:.4g}", f"{worst:.4g}", result["definitions"][name] + how)
    latents = Table(title="Raw latents", **look)
    for name in ("channel", "mean", "std", "outliers", "furthest"):
        latents.add_column(name, justify="right")
    columns = [result["latents"][name] for name in ("mean", "std", "outliers", "furthest")]
    for channel, (mean, std, outliers, furthest) in enumerate(zip(*columns)):
        latents.add_row(str(channel), f"{mean:.4f}", f"{std:.4f}", f"{outliers:.2%}", f"{furthest:.1f}")
    return [measures, latents, result["definitions"]["latents"]]
