"""`stdit train`, and `train.py` in a clone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option

from stdit.cli.common.options import Json, within


def train(
    config: Annotated[Path, Argument(help="The run's config: a YAML file, or one of stdit/configs by name.")],
    overrides: Annotated[
        list[str] | None, Argument(help="key=value changes to it; run=PATH names the run folder.")
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Print the memory and the time that the run would take, and stop.")
    ] = False,
    world_size: Annotated[
        int | None, Option(min=1, max=100_000, help="With --dry-run: the ranks. Default: those of the launcher.")
    ] = None,
    gpu: Annotated[
        str | None, Option(help="With --dry-run: a card, such as h200, h100, a100 or 4090: what fits, and how long.")
    ] = None,
    mfu: Annotated[
        float | None, Option(callback=within(0.01, 1), help="With --gpu: the share of the card's peak. Default: 0.4.")
    ] = None,
    as_json: Json = False,
    local_rank: Annotated[int | None, Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> int:
    """Train a VAE or a diffusion transformer, alone or under torchrun or deepspeed.

    The same command resumes a stopped run; a finished run says so. Ctrl-C and SIGTERM save a checkpoint first.

    Examples:

    stdit train toy/dit run=runs/toy

    stdit train pretrain model.preset=14B --dry-run --world-size 64 --gpu h200

    torchrun --nproc-per-node 2 train.py toy/dit parallel.deepspeed=zero2
    """
    from stdit.training.config import load_config
    from stdit.training.engine.parallel import join_world, leave_world
    from stdit.training.run import run
    from stdit.training.watch import watched

    asked = {"--world-size": world_size, "--gpu": gpu, "--mfu": mfu, "--json": as_json or None}
    if not dry_run and (name := next((name for name, value in asked.items() if value is not None), None)):
        raise BadParameter(f"{name} goes with --dry-run.")
    settings = load_config(config, overrides or [])
    world = join_world(settings.parallel.timeout)
    try:
        if not dry_run:
            with watched(world, settings.parallel.timeout):
                run(settings, world)
        elif world.is_main:
            from stdit.cli.dry_run import print_forecast

            print_forecast(settings, world_size or world.size, gpu, mfu, as_json)
    finally:
        leave_world()
    return 0
