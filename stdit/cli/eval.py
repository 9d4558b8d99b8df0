"""`stdit eval`: measures of a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Measure a trained model.")


@app.callback()
def group() -> None:
    """Measure a trained model.

    Example: stdit eval toy --model runs/toy/model --out runs/toy
    """


@app.command()
def toy(
    model: Annotated[Path, typer.Option(help="A model folder trained on the toy set.")],
    out: Annotated[
        Path, typer.Option(help="Where evaluation.json and evaluation/ go; the run folder, for its report.")
    ],
    prompts: Annotated[int, typer.Option(min=1, max=72, help="Held-out captions to sample at each shape.")] = 64,
    shape: Annotated[
        list[str] | None, typer.Option(help="WIDTHxHEIGHTxFRAMES, repeatable. Default: the trained and two untrained.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Solver steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 is none.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Of the noise and of the choice of captions.")] = 0,
    held_out: Annotated[
        Path | None, typer.Option(help="The toy set's held_out folder: measures the VAE on its files too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print evaluation.json instead of a table.")] = False,
) -> None:
    """Sample captions the toy model never saw, and read from the pixels what it made of them.

    Example: stdit eval toy --model runs/toy/model --out runs/toy --held-out data/toy/held_out
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from stdit.evaluation.harness import evaluate_toy

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=as_json, console=Console(stderr=True)) as bar:
        tasks: dict[str, object] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        result = evaluate_toy(model, out, prompts, shape, steps, guidance, seed, held_out, progress)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    Console().print(table(result))
    if result["vae"]:
        print(f"VAE on {result['vae']['clips']} held-out files: {result['vae']['psnr']:.1f} dB PSNR.")
    print(f"{out / 'evaluation.json'}, samples in {out / 'evaluation'}")


def table(result: dict):
    """evaluation.json as a rich table: one row a shape and source, the share right and its 95 % interval."""
    from rich.table import Table

    names = list(result["sets"][0]["samples"])
    view = Table(title=f"{result['settings']['prompts']} held-out captions, read from the pixels: right, in % (95 %)")
    for column in ("shape", "", *names, "VAE dB"):
        view.add_column(column, justify="left" if column in ("shape", "") else "right")
    for one in result["sets"]:
        for place, (key, label) in enumerate(
            (("samples", one["kind"]), ("vae", "its VAE alone"), ("rendered", "ground truth"), ("shuffled", "shuffled"))
        ):
            cells = [
                f"{100 * cell['share']:.0f} ({100 * cell['low']:.0f}–{100 * cell['high']:.0f})"
                for cell in one[key].values()
            ]
            psnr = f"{one['vae_psnr']:.1f}" if key == "vae" else ""
            view.add_row(
                one["shape"] if not place else "",
                label,
                *cells,
                psnr,
                style="bold" if not place else "dim",
                end_section=key == "shuffled",
            )
    chance = [f"{100 * cell['chance']:.0f}" for cell in result["sets"][0]["samples"].values()]
    view.add_row("", "chance", *chance, "", style="dim")
    return view
