"""`stdit eval toy`: does a model of the toy set draw what it is told?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from rich.text import Text
from typer import Option

from stdit.cli.common.options import GUIDANCE, SEED, STEPS, Device, folder_option, pick_device
from stdit.cli.common.tables import print_table
from stdit.heartbeat import HEARTBEAT, named_bars


def toy(
    model: Annotated[Path, Option(help="A model folder trained on the toy set.")],
    out: Annotated[
        Path,
        folder_option("The folder for evaluation.json and evaluation/; the run folder, to put them into its report."),
    ],
    prompts: Annotated[int, Option(min=1, max=72, help="Held-out captions to sample per shape.")] = 64,
    shape: Annotated[
        list[str] | None, Option(help="WIDTHxHEIGHTxFRAMES, repeatable. Default: the trained and two others.")
    ] = None,
    steps: Annotated[int, Option(callback=STEPS, help="Solver steps.")] = 30,
    guidance: Annotated[float, Option(callback=GUIDANCE, help="Classifier-free guidance; 1 is none.")] = 5.0,
    seed: Annotated[int, Option(callback=SEED, help="Seed of the noise and of the choice of captions.")] = 0,
    held_out: Annotated[
        Path | None, Option(help="The held_out folder of the toy set, to measure the VAE on its files, too.")
    ] = None,
    device: Device = None,
    as_json: Annotated[bool, Option("--json", help="Print evaluation.json instead of a table.")] = False,
) -> None:
    """Sample captions that a toy model never saw, and read from the pixels what the clips show.

    Example: stdit eval toy --model runs/toy/model --out runs/toy --held-out data/toy/held_out
    """
    from stdit.evaluation.harness import evaluate_toy

    device = pick_device(device)
    HEARTBEAT.doing(f"loading {model}")
    with named_bars(hidden=as_json) as progress:
        result = evaluate_toy(model, out, prompts, shape, steps, guidance, seed, held_out, device, progress)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    _print_scores(result)
    if result["vae"]:
        print(f"VAE on {result['vae']['clips']} held-out files: {result['vae']['psnr']:.1f} dB PSNR.")
    print(f"{out / 'evaluation.json'}, samples in {out / 'evaluation'}")
    if (out / "metrics.jsonl").exists():  # a run folder
        from stdit.evaluation.report import write_report

        print(f"report: {write_report(out)}")


def _print_scores(result: dict[str, Any]) -> None:
    """Prints evaluation.json as a table: per shape the samples, their 95 % intervals, and the references."""
    rows = []

    def add(label: str, values: list[str], style: str = "") -> None:
        rows.append([Text(value, style) for value in (label, *values)])

    def percent(cells: dict[str, Any], name: str = "share") -> list[str]:
        return [f"{100 * cell[name]:.0f}" for cell in cells.values()]

    for shape in result["sets"]:
        samples = shape["samples"]
        add(shape["kind"], [], "bold")
        add(f"  {shape['shape']} samples", percent(samples))
        add(
            "  95 % interval", [f"{low}–{high}" for low, high in zip(percent(samples, "low"), percent(samples, "high"))]
        )
        add(f"  VAE alone, {shape['vae_psnr']:.1f} dB", percent(shape["vae"]), "dim")
        add("  ground truth", percent(shape["rendered"]), "dim")
        add("  captions shuffled", percent(shape["shuffled"]), "dim")
    first = result["sets"][0]["samples"]
    add("chance", percent(first, "chance"), "dim")
    title = f"{result['settings']['prompts']} held-out captions, read from the pixels: right, in %"
    print_table(title, ("", *first), rows, right=range(1, len(first) + 1), bare=True)
