"""`stdit eval captions`: does a model follow its captions?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Option

from stdit.cli.common.options import GUIDANCE, SEED, STEPS, Device, folder_option, pick_device
from stdit.cli.common.tables import print_table
from stdit.heartbeat import HEARTBEAT, named_bars


def captions(
    model: Annotated[Path, Option(help="The model folder of the run.")],
    out: Annotated[Path, folder_option("Where evaluation-captions.json and .png go; the run folder.")],
    config: Annotated[
        Path | None, Option(help="The config of the run, which names the clips. Default: OUT/config.yaml.")
    ] = None,
    group: Annotated[
        str | None,
        Option(metavar="REGEX", help="Captions for which its (group) captures the same text are compared, too."),
    ] = None,
    clips: Annotated[int, Option(min=2, help="At most so many clips, the first of the manifest.")] = 100,
    levels: Annotated[int, Option(min=1, max=1000, help="Noise levels, spread evenly.")] = 8,
    draws: Annotated[int, Option(min=1, max=1000, help="Noises per level.")] = 4,
    steps: Annotated[int | None, Option(callback=STEPS, help="Solver steps. Default: the config's eval.steps.")] = None,
    guidance: Annotated[
        float | None, Option(callback=GUIDANCE, help="Classifier-free guidance; 1 is none. Default: eval.guidance.")
    ] = None,
    seed: Annotated[int, Option(callback=SEED, help="Seed of the noise.")] = 0,
    device: Device = None,
    as_json: Annotated[bool, Option("--json", help="Print evaluation-captions.json instead of a table.")] = False,
) -> None:
    """Measure whether a model follows its captions, by its loss and by its samples.

    Computes each training clip's loss under every caption at fixed noise. Then samples every caption and finds the
    nearest training clip (mean squared difference of pixels, both decoded by the VAE).

    Example: stdit eval captions --model runs/asl/dit/model --out runs/asl/dit --group 'A person in (.+) signs'
    """
    from stdit.evaluation.captions import MEASURES, evaluate_captions
    from stdit.training.config import load_config

    run = load_config(config or out / "config.yaml")
    device = pick_device(device)
    HEARTBEAT.doing(f"loading {model}")
    with named_bars(hidden=as_json) as progress:
        result = evaluate_captions(
            model, run.data, out, group=group, limit=clips, levels=levels, draws=draws,
            steps=run.eval.steps if steps is None else steps,
            guidance=run.eval.guidance if guidance is None else guidance,
            seed=seed, device=device, progress=progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    rows = [
        (
            MEASURES[name],
            f"{cell['right']} of {cell['total']}",
            f"{100 * cell['share']:.0f}",
            f"{100 * cell['low']:.0f}–{100 * cell['high']:.0f}",
            f"{100 * cell['chance']:.0f}",
        )
        for name, cell in result["measures"].items()
        if cell is not None
    ]
    title = f"{len(result['clips'])} clips, {len(result['captions'])} captions"
    print_table(title, ("", "right", "%", "95 %", "chance"), rows, right=range(1, 5), bare=True)
    for failure in result["failures"]:
        print(f"left out: {failure}")
    print(f"VAE: {result['vae_psnr']:.1f} dB PSNR on these clips.")
    print(f"{out / 'evaluation-captions.json'}, {out / result['sheet']}")
