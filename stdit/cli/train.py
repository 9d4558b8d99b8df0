"""`stdit train`, and `train.py` in a clone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def train(
    config: Annotated[Path, Argument(help="The run's config: a YAML file, or one of stdit/configs by name.")],
    overrides: Annotated[
        list[str] | None, Argument(help="key=value changes to it; run=PATH names the run folder.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print what would be trained, and stop.")] = False,
    local_rank: Annotated[int | None, Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> int:
    """Train a VAE or a diffusion transformer, alone or under torchrun or deepspeed.

    The same command resumes a stopped run; a finished run says so. Ctrl-C and SIGTERM save a checkpoint first.

    Examples:

    stdit train toy/dit run=runs/toy

    torchrun --nproc-per-node 2 train.py toy/dit parallel.deepspeed=zero2
    """
    from stdit.training.config import load_config
    from stdit.training.engine.parallel import join_world, leave_world
    from stdit.training.run import dry_run as describe
    from stdit.training.run import run
    from stdit.training.setup.resolve import resolve

    settings = load_config(config, overrides or [])
    world = join_world()
    try:
        if dry_run:
            describe(resolve(settings), world)
        else:
            run(settings, world)
    finally:
        leave_world()
    return 0
