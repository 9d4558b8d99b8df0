"""One of several ranks (or the only one): trains under each DeepSpeed JSON and optimizer, rank 0 writes what it saw.

Arguments: config, output folder, then NAME=JSON=STEPS (an empty JSON for plain torch). NAME=JSON=STEPS=OTHER goes on
from the checkpoints of OTHER, made before by whatever engine. A NAME that begins with frozen starts from the model in
init/ of the output folder and trains some of it; one with lora trains adapters beside all of it, and exports them; with
lora-bf16, in bf16. One that begins with vae takes vae.yaml beside the config. The optimizer is Muon for a NAME with
muon, AdamW for one with "-"; others run with SGD, too. With routed, tokens skip the second block, and blocks are
recomputed but for their attention; with lora, the first block is recomputed. With shared, two ranks share every pack.
With half, it also saves after half of its steps; who goes on from it under as many steps goes on from there.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from stdit.training import trainer as trainer_module
from stdit.training.batches import StepLoader
from stdit.training.config import load_config
from stdit.training.engine.parallel import World, join_world, leave_world
from stdit.training.engine.traffic import TRAFFIC
from stdit.training.outputs import evaluation, export
from stdit.training.setup.resolve import resolve
from stdit.training.trainer import Trainer

sys.path.append(str(Path(__file__).parents[1] / "shared"))
from gradients import gradients_of
from random_weights import build_random


def main() -> None:
    torch.set_num_threads(1)
    config, out, *engines = sys.argv[1:]
    world = join_world()
    for engine in engines:
        name, path, steps, *source = engine.split("=")
        both = ("adamw",) if "-" in name else ("sgd", "adamw")
        for optimizer in ("muon",) if "muon" in name else both:
            folder = Path(out) / f"{name}-{optimizer}"
            settings = [f"optimizer.name={optimizer}", f"parallel.deepspeed={path or 'null'}", f"run={folder}"]
            settings += [f"schedule.steps={steps}"] + ["optimizer.lr=0.05"] * (optimizer == "sgd")
            if name.startswith(("frozen", "lora")):
                settings += ["model.preset=null", f"model.init={Path(out) / 'init'}"]
            if name.startswith("frozen"):
                settings += ["model.trainable=[blocks.*.self_attn.*, blocks.1.ffn.*]"]
            if name.startswith("routed"):
                settings += ["objective.flow.routing={start: 1, end: 2}", "parallel.recompute=attention"]
            if "shared" in name:
                settings += ["parallel.sequence_parallel=2"]
            if name.startswith("lora"):
                rank = 4 if "muon" in name else 3  # timm's Muon takes matrices with four rows at least
                settings += [
                    f"model.lora={{rank: {rank}, alpha: 5, merged: true, layout: diffusers}}",
                    "text.trained=null",
                    "parallel.recompute=2",
                ]
                settings += [f"text.path={Path(out) / 'text'}"]
                settings += ["run.precision=bf16"] * ("bf16" in name)
            if source and world.is_main:
                places = (Path(out) / f"{source[0]}-{optimizer}" / "checkpoints", folder / "checkpoints")
                shutil.copytree(*places, ignore=shutil.ignore_patterns(f"step-{int(steps):08d}"))
            world.gather(None)
            train(
                Path(config).with_name("vae.yaml") if name.startswith("vae") else Path(config), settings, folder, world
            )
    leave_world()


def train(config: Path, overrides: list[str], out: Path, world: World) -> None:
    trainer_module.build = build_random
    trainer = Trainer(load_config(config, overrides), world)
    trainer.prepare(resolve(trainer.config))
    steps = trainer.config.schedule.steps
    first = trainer.step
    group, groups = world.rank // trainer.shared, world.size // trainer.shared
    feed = StepLoader(trainer.components.plan_of, trainer.components.loader, group, groups, first)
    losses, ids, micro_steps, sent = [], [], [], []
    for number in range(first, steps):
        step = next(feed.steps)
        TRAFFIC.take()
        loss = trainer.accumulate(step).loss
        traffic = TRAFFIC.take()
        losses.append(float(world.sum_(loss)))
        seen = world.gather([example.clip_id for example in step.examples] if trainer.counts else [])
        ids.append(sorted(one for rank in seen for one in rank))
        micro_steps.append([len(micro.items) for micro in step.micro_steps])
        if number == first:
            gradients = gradients_of(trainer.engine)
            gradients |= gradients_of(trainer.critic) if trainer.critic is not None else {}
            if world.is_main:
                out.mkdir(parents=True, exist_ok=True)
                save_file({name: one.contiguous() for name, one in gradients.items()}, out / "gradients.safetensors")
        trainer.losses.append(loss)
        TRAFFIC.take()
        trainer.update()
        sent.append((traffic + TRAFFIC.take()).sent)
        if "half" in out.name and trainer.step == steps // 2:
            trainer.save()
    trainer.save()
    trainer.saver.finish()
    feed.close()
    module, evaluated = None, {}
    if trainer.config.objective.kind == "flow":
        module = export.trained_module(trainer.components, export.averaged_weights(trainer.engine, world), world)
        assert module is not None
        evaluated = evaluation.evaluate(trainer.components, module, world, steps)
    if trainer.config.model.lora is not None:
        export.export(trainer.components, trainer.engine, world, steps, module)
    packs = world.gather(micro_steps)
    if world.is_main:
        found = {"losses": losses, "ids": ids, "packs": packs, "evaluated": evaluated, "sent": sent}
        found["numbers"] = trainer.components.parameters
        (out / "seen.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
