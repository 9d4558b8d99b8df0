"""`stdit eval vae`: what a VAE loses of clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Argument, Option

from stdit.cli.common.options import FPS, Device, Memory, folder_option, pick_device, when_stopped
from stdit.cli.common.tables import print_table
from stdit.errors import StditError
from stdit.heartbeat import HEARTBEAT, named_bars
from stdit.shapes import VideoShape


@when_stopped("The measured clips are kept: the same command resumes from there.")
def vae(
    clips: Annotated[str, Argument(help="A manifest, or a folder of videos and images; or the URL of either.")],
    model: Annotated[Path, Option(help="The VAE's folder, or a model folder with vae/.")],
    out: Annotated[Path, folder_option("For evaluation-vae.json, and evaluation-vae/ with pictures.")],
    size: Annotated[
        str | None, Option(help="WIDTHxHEIGHT to which clips are scaled and cropped. Default: their own.")
    ] = None,
    frames: Annotated[int, Option(min=1, help="At most so many frames of each clip, from its start.")] = 33,
    fps: Annotated[float | None, Option(callback=FPS, help="Frames per second to read. Default: its own.")] = None,
    limit: Annotated[int, Option(min=1, help="At most so many clips, the first.")] = 100,
    lpips: Annotated[
        list[Path] | None, Option(help="LPIPS' weights, repeatable: VGG16's file and that of the heads, or a folder.")
    ] = None,
    trust_pickle: Annotated[bool, Option("--trust-pickle", help="Open LPIPS' .pth, tensors only.")] = False,
    write: Annotated[
        bool, Option("--write-normalisation", help="Write the latents' mean and deviation into the VAE's config.json.")
    ] = False,
    pictures: Annotated[int, Option(min=0, help="Number of clips to draw.")] = 16,
    memory: Memory = None,
    sample: Annotated[
        bool, Option("--sample", help="Draw latents from the posterior: not exact, like those of a transformer.")
    ] = False,
    device: Device = None,
    as_json: Annotated[bool, Option("--json", help="Print evaluation-vae.json instead of a table.")] = False,
) -> None:
    """Measure how well a VAE reconstructs clips, and the statistics of its latents.

    Clips of any length take the memory of a few frames.

    Example: stdit eval vae videos/held_out.parquet --model runs/vae/model --size 128x96 --fps 15 --out runs/vae
    """
    from stdit.evaluation.vae import evaluate_vae, normalised_folder, write_normalisation

    shape = VideoShape.parse(size) if size else None
    if shape is not None and not shape.is_image:
        raise StditError(f"--size {size}: give WIDTHxHEIGHT alone, and the number of frames by --frames.")
    device = pick_device(device)
    HEARTBEAT.doing(f"loading {model}")
    if write:
        normalised_folder(model)  # raises before hours of measuring
    with named_bars(hidden=as_json) as progress:
        result = evaluate_vae(
            model, clips, out, size=(shape.width, shape.height) if shape else None, frames=frames, fps=fps,
            limit=limit, lpips=lpips or (), pictures=pictures, memory=memory, sample=sample, device=device,
            progress=progress, trust_pickle=trust_pickle,
        )  # fmt: skip
    written = write_normalisation(model, result["latents"]) if write else None
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    _print_measures(result)
    for failure in result["failures"]:
        print(f"left out: {failure}")
    if written is not None:
        print(f"{written / 'config.json'}: latents_mean and latents_std are now those above.")
    print(f"{out / 'evaluation-vae.json'}" + (f", pictures in {out / 'evaluation-vae'}" if pictures else ""))


def _print_measures(result: dict[str, Any]) -> None:
    """Prints the measures of all clips, and those of the latent channels, with their definitions."""
    from stdit.evaluation.measures import RATIOS

    rows = []
    for name, value in result["measures"].items():
        if value is None:
            continue
        found = [clip["measures"][name] for clip in result["clips"] if clip["measures"][name] is not None]
        if name in RATIOS:
            worst = max(found, key=lambda ratio: abs(ratio - 1))
        else:
            worst = max(found) if name in ("lpips", "flicker", "flicker_still") else min(found)
        how = "; over all clips the median" if name in RATIOS else ""
        rows.append((name, f"{value:.4g}", f"{worst:.4g}", result["definitions"][name] + how))
    header = ("", "all", "worst", "definition")
    print_table(f"{len(result['clips'])} clips", header, rows, right=(1, 2), bare=True)
    columns = ("mean", "std", "outliers", "furthest")
    channels = [
        (str(channel), f"{mean:.4f}", f"{std:.4f}", f"{outliers:.2%}", f"{furthest:.1f}")
        for channel, (mean, std, outliers, furthest) in enumerate(zip(*(result["latents"][name] for name in columns)))
    ]
    print_table("Raw latents", ("channel", *columns), channels, right=range(5), bare=True)
    Console().print(result["definitions"]["latents"], highlight=False)
