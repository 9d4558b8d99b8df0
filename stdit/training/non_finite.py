"""Names the clips that a loss or gradient which is not finite came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stdit.data.manifest import Manifest
from stdit.training.batches import StepClips
from stdit.training.engine.engine import Engine
from stdit.training.engine.parallel import World
from stdit.training.objectives.protocol import Batch, Objective, StepKey

LOSS = "its loss is not finite"
SHOWN = 8  # clips that a message names; metrics.jsonl has all


def find_clips(
    step: StepClips, key: StepKey, objective: Objective, engine: Engine, manifest: Manifest, world: World
) -> list[dict[str, Any]]:
    """Runs every clip of the step alone and returns those that are not finite, of all ranks: id, path, rank,
    noise_level and what is not finite. All ranks call it together; each runs as many batches as the busiest one."""
    clips = [pair for examples, items in zip(step.examples, step.items) for pair in zip(examples, items)]
    found = []
    for number in range(max(world.gather(len(clips)))):
        mine = clips[number : number + 1]
        batch = objective.prepare([example for example, _ in mine], [item for _, item in mine], key)
        fault = _fault(batch, engine)
        for example, _ in mine if fault else []:
            if example.latents is not None and not _finite(example.latents):
                fault = "its latents in the cache are not finite; encode it again"
            found.append({
                "id": example.clip_id,
                "path": manifest[example.row].path,
                "rank": world.rank,
                "noise_level": batch.noise_level,
                "fault": fault,
            })  # fmt: skip
    return [clip for rank in world.gather(found) for clip in rank]


def describe(clips: list[dict[str, Any]], of: int) -> str:
    """A sentence that names the clips; of: how many the step has."""
    if not clips:
        return f"Each of its {of} clips alone is finite: their sum is too large."
    lines = []
    for clip in clips[:SHOWN]:
        level = "" if clip["noise_level"] is None else f", noise level {clip['noise_level']:.4f}"
        lines.append(f"\n  {clip['path']} (clip {clip['id'][:16]}, rank {clip['rank']}{level}): {clip['fault']}")
    more = f"\n  and {len(clips) - SHOWN} more" if len(clips) > SHOWN else ""
    return f"{len(clips)} of its {of} clips are not finite:" + "".join(lines) + more


def _fault(batch: Batch, engine: Engine) -> str:
    """What of a batch is not finite, or ''. Every rank runs the same forwards."""
    bad = [name for name, tensor in batch.inputs.items() if not _finite(tensor)]
    leaf = next(iter(batch.inputs.values()), None)
    with torch.set_grad_enabled(engine.differentiable):
        if engine.differentiable and leaf is not None:
            leaf.requires_grad_(True)
        loss = engine.forward(batch)
    if bad:
        return f"its {bad[-1]} is not finite" if bad[-1].endswith("embedding") else f"its {bad[-1]} are not finite"
    if not _finite(loss):
        return LOSS
    if leaf is not None and loss.requires_grad and engine.differentiable:
        gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0]
        if gradient is not None and not _finite(gradient):
            return "its loss's gradient is not finite"
    return ""


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
