"""`stdit eval captions`: does a model follow its captions?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stdit.cli.common.device import DEVICE, pick_device
from stdit.cli.common.outputs import out_folder
from stdit.cli.common.ranges import GUIDANCE, SEED, STEPS

MEASURES = {
    "below_mean": "loss: own caption below the mean of the others",
    "lowest": "loss: own caption is the lowest",
    "same_group": "loss: own caption below another of its group",
    "nearest": "sample: the nearest clip has its caption",
}


def captions(
    model: Annotated[Path, typer.Option(help="The model folder of the run.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", parser=out_folder, help="Where evaluation-captions.json and .png go; the run folder."
        ),
    ],
    config: Annotated[
        Path | None, typer.Option(help="The config of the run, which names the clips. Default: OUT/config.yaml.")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX",
            help="Captions for which its (group) captures the same text are compared, too.",
        ),
    ] = None,
    clips: Annotated[int, typer.Option(min=2, help="At most so many clips, the first of the manifest.")] = 100,
    levels: Annotated[int, typer.Option(min=1, max=1000, help="Noise levels, spread evenly.")] = 8,
    draws: Annotated[int, typer.Option(min=1, max=1000, help="Noises per level.")] = 4,
    steps: Annotated[
        int | None, typer.Option(callback=STEPS, help="Solver steps. Default: the config's eval.steps.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(callback=GUIDANCE, help="Classifier-free guidance; 1 is none. Default: eval.guidance."),
    ] = None,
    seed: Annotated[int, typer.Option(callback=SEED, help="Seed of the noise.")] = 0,
    device: Annotated[str | None, DEVICE] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print evaluation-captions.json instead of a table.")] = False,
) -> None:
    """Measure whether a model follows its captions, by its loss and by its samples.

    Computes each training clip's loss under every caption at fixed noise. Then samples every caption and finds the
    nearest training clip (mean squared difference of pixels, both decoded by the VAE).

    Example: stdit eval captions --model runs/asl/dit/model --out runs/asl/dit --group 'A person in (.+) signs'
    """
    from rich.console import Console

    from stdit.cli.common.bars import named_bars
    from stdit.evaluation.captions import evaluate_captions
    from stdit.heartbeat import HEARTBEAT
    from stdit.training.config import load_config

    run = load_config(config or out / "config.yaml")
    device = pick_device(device)
    HEARTBEAT.doing(f"loading {model}")
    with named_bars(hidden=as_json) as progress:
        result = evaluate_captions(
            model,
            run.data,
            out,
            group,
            clips,
            levels,
            draws,
            run.eval.steps if steps is None else steps,
            run.eval.guidance if guidance is None else guidance,
            seed,
            device,
            progress=progress,
        )
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    console = Console()
    console.print(table(result))
    for failure in result["failures"]:
        console.print(f"left out: {failure}", highlight=False, markup=False, soft_wrap=True)
    print(f"VAE: {result['vae_psnr']:.1f} dB PSNR on these clips.")
    print(f"{out / 'evaluation-captions.json'}, {out / result['sheet']}")


def table(result: dict[str, Any]):
    """The measures of evaluation-captions.json as a rich table, with 95 % intervals and chance."""
    from rich.table import Table

    view = Table(
        title=f"{len(result['clips'])} clips, {len(result['captions'])} captions",
        padding=(0, 1, 0, 0),
        box=None,
        title_justify="left",
    )
    view.add_column("")
    for name in ("right", "%", "95 %", "chance"):
        view.add_column(name, justify="right", no_wrap=True)
    for name, words in MEASURES.items():
        cell = result["measures"][name]
        if cell is not None:
            view.add_row(
                words,
                f"{cell['right']} of {cell['total']}",
                f"{100 * cell['share']:.0f}",
                f"{100 * cell['low']:.0f}–{100 * cell['high']:.0f}",
                f"{100 * cell['chance']:.0f}",
            )
    return view
