"""`stdit eval`: its sub-commands, and `stdit eval toy`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stdit.cli.common.device import DEVICE, pick_device
from stdit.cli.common.outputs import out_folder
from stdit.cli.common.ranges import GUIDANCE, SEED, STEPS
from stdit.cli.eval.captions import captions
from stdit.cli.eval.vae import vae

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure a trained model.")


@app.callback()
def group() -> None:
    """Measure a trained model.

    Example: stdit eval toy --model runs/toy/model --out runs/toy
    """


app.command()(captions)
app.command()(vae)


@app.command()
def toy(
    model: Annotated[Path, typer.Option(help="A model folder trained on the toy set.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            parser=out_folder,
            help="The folder for evaluation.json and evaluation/; the run folder, to put them into its report.",
        ),
    ],
    prompts: Annotated[int, typer.Option(min=1, max=72, help="Held-out captions to sample per shape.")] = 64,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="WIDTHxHEIGHTxFRAMES, repeatable. Default: the trained and two others."),
    ] = None,
    steps: Annotated[int, typer.Option(callback=STEPS, help="Solver steps.")] = 30,
    guidance: Annotated[float, typer.Option(callback=GUIDANCE, help="Classifier-free guidance; 1 is none.")] = 5.0,
    seed: Annotated[int, typer.Option(callback=SEED, help="Seed of the noise and of the choice of captions.")] = 0,
    held_out: Annotated[
        Path | None, typer.Option(help="The held_out folder of the toy set, to measure the VAE on its files, too.")
    ] = None,
    device: Annotated[str | None, DEVICE] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print evaluation.json instead of a table.")] = False,
) -> None:
    """Sample captions that a toy model never saw, and read from the pixels what the clips show.

    Example: stdit eval toy --model runs/toy/model --out runs/toy --held-out data/toy/held_out
    """
    from rich.console import Console

    from stdit.cli.common.bars import named_bars
    from stdit.evaluation.harness import evaluate_toy
    from stdit.heartbeat import HEARTBEAT

    device = pick_device(device)
    HEARTBEAT.doing(f"loading {model}")
    with named_bars(hidden=as_json) as progress:
        result = evaluate_toy(model, out, prompts, shape, steps, guidance, seed, held_out, device, progress)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    Console().print(table(result))
    if result["vae"]:
        print(f"VAE on {result['vae']['clips']} held-out files: {result['vae']['psnr']:.1f} dB PSNR.")
    print(f"{out / 'evaluation.json'}, samples in {out / 'evaluation'}")
    if (out / "metrics.jsonl").exists():  # a run folder
        from stdit.evaluation.report import write_report

        print(f"report: {write_report(out)}")


def table(result: dict):
    """evaluation.json as a rich table: per shape the samples, their 95 % intervals, and the references."""
    from rich.table import Table

    names = list(result["sets"][0]["samples"])
    title = f"{result['settings']['prompts']} held-out captions, read from the pixels: right, in %"
    view = Table(title=title, padding=(0, 1, 0, 0), box=None, title_justify="left")
    view.add_column("", no_wrap=True)
    for name in names:
        view.add_column(name, justify="right")

    def shares(scores: dict) -> list[str]:
        return [f"{100 * cell['share']:.0f}" for cell in scores.values()]

    for shape in result["sets"]:
        intervals = [f"{100 * cell['low']:.0f}–{100 * cell['high']:.0f}" for cell in shape["samples"].values()]
        view.add_row(shape["kind"], style="bold")
        view.add_row(f"  {shape['shape']} samples", *shares(shape["samples"]))
        view.add_row("  95 % interval", *intervals)
        view.add_row(f"  VAE alone, {shape['vae_psnr']:.1f} dB", *shares(shape["vae"]), style="dim")
        view.add_row("  ground truth", *shares(shape["rendered"]), style="dim")
        view.add_row("  captions shuffled", *shares(shape["shuffled"]), style="dim")
    chance = [f"{100 * cell['chance']:.0f}" for cell in result["sets"][0]["samples"].values()]
    view.add_row("chance", *chance, style="dim")
    return view
