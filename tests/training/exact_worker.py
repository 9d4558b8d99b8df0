"""One of several ranks: trains a tiny model under many settings, one after the other, without saving anything.

Arguments: config, output folder, steps, then NAME=SETTING+SETTING+…. Rank 0 writes NAME.safetensors: the gradients of
the first step before clipping ("gradient/…"), the weights after the last ("weight/…"), and NAME.json: losses and packs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from stdit.training import trainer as trainer_module
from stdit.training.batches import StepLoader
from stdit.training.config import load_config
from stdit.training.engine.engine import Engine, TorchEngine
from stdit.training.engine.parallel import World, join_world, leave_world
from stdit.training.setup.resolve import resolve
from stdit.training.trainer import Trainer

sys.path.append(str(Path(__file__).parents[1] / "shared"))
from gradients import gradients_of
from random_weights import build_random


def main() -> None:
    torch.set_num_threads(1)
    trainer_module.build = build_random
    config, out, steps, *combinations = sys.argv[1:]
    world = join_world()
    for combination in combinations:
        name, _, settings = combination.partition("=")
        train(config, Path(out) / name, int(steps), settings.split("+"), world)
    leave_world()


def train(config: str, out: Path, steps: int, settings: list[str], world: World) -> None:
    given = [*settings, f"run={out}", f"schedule.steps={steps}"]
    trainer = Trainer(load_config(config, given), world)
    trainer.prepare(resolve(trainer.config))
    group, groups = world.rank // trainer.shared, world.size // trainer.shared
    feed = StepLoader(trainer.components.plan_of, trainer.components.loader, group, groups, 0)
    losses, micro_steps, found = [], [], {}
    for number in range(steps):
        clips = next(feed.steps)
        micro_steps.append(len(clips.micro_steps))
        losses.append(float(world.sum_(trainer.accumulate(clips).loss)))
        if number == 0:
            found = {f"gradient/{name}": one for name, one in gradients_of(trainer.engine).items()}
        trainer.update()
    feed.close()
    found |= {f"weight/{name}": one for name, one in masters_of(trainer.engine).items()}
    if world.is_main:
        save_file({name: one.contiguous() for name, one in found.items()}, f"{out}.safetensors")
        Path(f"{out}.json").write_text(json.dumps({"losses": losses, "micro_steps": micro_steps}))


def masters_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole fp32 weights by parameter."""
    if isinstance(engine, TorchEngine) or engine.replicated:
        pairs = zip(engine.flat_masters, engine.pieces)
        return {p.name: flat.detach().clone().view(p.shape) for flat, (p,) in pairs}
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    return {name: safe_get_full_fp32_param(p).detach().float().clone() for name, p in parameters.items()}


if __name__ == "__main__":
    main()
