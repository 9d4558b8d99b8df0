"""Clips that could not be read, and clips whose loss or gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stdit.data.load.loader import Example
from stdit.data.manifest import Manifest
from stdit.errors import StditError
from stdit.training.batches import StepClips
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.engine import Engine
from stdit.training.engine.parallel import World
from stdit.training.objectives.protocol import Batch, Objective, StepKey

LOSS = "its loss is not finite"
BY_LOSS = (LOSS, "its loss's gradient is not finite")  # of ranks that share a clip, all may see these
SHOWN = 8  # clips that a message names; metrics.jsonl has all


class FailedClips:
    """Clips that could not be read: they keep their place in the plan with weight 0, and checkpoints name them.

    by_id: the failures of all ranks up to when they last shared them.
    unshared: how many only this rank knows.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.by_id: dict[str, dict[str, Any]] = {}
        self.unshared = 0

    def note(self, clips: StepClips) -> None:
        """Records and prints the failures among a step's clips."""
        for example in clips.examples:
            if example.failure and example.clip_id not in self.by_id:
                about = {"row": example.row, "epoch": example.epoch, "reason": example.reason}
                self.by_id[example.clip_id] = about | {"failure": example.failure}
                self.unshared += 1
                print(f"clip {example.row} left out of training: {example.failure}", flush=True)

    def share(self) -> None:
        """Gathers the failures of all ranks, on all ranks."""
        gathered: dict[str, Any] = {}
        for by_id in self.world.gather(self.by_id):
            gathered |= by_id
        self.by_id, self.unshared = dict(sorted(gathered.items())), 0


def agreed(clips: StepClips, world: World) -> StepClips:
    """The step's clips, where one that any rank could not read has failed on all: ranks that share it weigh it alike.

    All ranks call it together.
    """
    mine = {(example.row, example.occurrence): example for example in clips.examples if example.failure}
    told = world.gather({key: {"failure": one.failure, "reason": one.reason} for key, one in mine.items()})
    failed: dict[tuple[int, int], dict[str, Any]] = {key: why for rank in told for key, why in rank.items()}

    def of(example: Example) -> Example:
        why = failed.get((example.row, example.occurrence))
        return example if why is None else replace(example, weight=0.0, **why)

    micro_steps = [replace(micro, examples=[of(example) for example in micro.examples]) for micro in clips.micro_steps]
    return replace(clips, micro_steps=micro_steps)


def no_clip_could_be_read(clips: StepClips, step: int) -> StditError:
    reason = next((example.failure for example in clips.examples if example.failure), "")
    return StditError(
        f"step {step}: none of its {clips.num_clips} clips could be read: there is nothing to learn from. {reason} The "
        f"run can go on from its last checkpoint."
    )


def find_not_finite(
    clips: StepClips, key: StepKey, objective: Objective, engine: Engine, manifest: Manifest, world: World
) -> list[dict[str, Any]]:
    """Runs every clip of the step alone and returns the faulty ones of all ranks, with id, path, rank, noise_level
    and fault.

    All ranks call it together; each runs as many batches as the busiest one. Ranks that share packs run the same clips:
    each clip is named once, and by its data if a rank sees that they are at fault.
    """
    mine = [pair for micro in clips.micro_steps for pair in zip(micro.examples, micro.items)]
    found: dict[int, dict[str, Any]] = {}  # by position in the step
    for number in range(max(world.gather(len(mine)))):
        pairs = mine[number : number + 1]  # none, if other ranks have more
        batch = objective.prepare([example for example, _ in pairs], [item for _, item in pairs], key)
        fault = _fault(batch, engine)
        for example, item in pairs if fault else []:
            if example.latents is not None and not _finite(example.latents):
                fault = "its latents in the cache are not finite; encode it again"
            path, level = manifest[example.row].path, batch.noise_level
            about = {"id": example.clip_id, "path": path, "rank": world.rank, "noise_level": level, "fault": fault}
            found[item.position] = about
    faults: dict[int, dict[str, Any]] = {}
    for rank in world.gather(found):
        for position, clip in rank.items():
            if position not in faults or clip["fault"] not in (*BY_LOSS, faults[position]["fault"]):
                faults[position] = clip
    return list(faults.values())


def _fault(batch: Batch, engine: Engine) -> str:
    """What is not finite in a batch, or ''. Every rank runs the same forwards and backwards."""
    bad = [name for name, tensor in batch.inputs.items() if not _finite(tensor)]
    leaf = next(iter(batch.inputs.values()), None) if engine.differentiable else None
    gradient: Tensor | None = None
    with torch.set_grad_enabled(engine.differentiable):
        if leaf is not None:
            leaf.requires_grad_(True)
        loss = engine.forward(batch)
    if leaf is not None and loss.requires_grad:
        gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0]
    if bad:
        return f"its {bad[-1]} is not finite" if bad[-1].endswith("embedding") else f"its {bad[-1]} are not finite"
    if not _finite(loss):
        return LOSS
    return "" if gradient is None or _finite(gradient) else BY_LOSS[1]


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def describe(faulty: Sequence[dict[str, Any]], num_clips: int) -> str:
    """A sentence that names the clips that `find_not_finite` found among the `num_clips` of a step."""
    if not faulty:
        return f"Each of its {num_clips} clips alone is finite: their sum is too large."
    lines = []
    for clip in faulty[:SHOWN]:
        level = "" if clip["noise_level"] is None else f", noise level {clip['noise_level']:.4f}"
        lines.append(f"\n  {clip['path']} (clip {clip['id'][:16]}, rank {clip['rank']}{level}): {clip['fault']}")
    more = f"\n  and {len(faulty) - SHOWN} more" if len(faulty) > SHOWN else ""
    return f"{len(faulty)} of its {num_clips} clips are not finite:" + "".join(lines) + more


def are_to_blame(faulty: Sequence[dict[str, Any]], num_clips: int) -> bool:
    """Whether the clips are to blame and not the training: only some are faulty, or their data are."""
    return 0 < len(faulty) < num_clips or any(clip["fault"] != LOSS for clip in faulty)


def diverged(folder: Path, step: int, message: str, due_to_clips: bool = False) -> StditError:
    """The error of a training that cannot go on, with the way out."""
    latest = Checkpoint.latest(folder)
    saved = f"{latest.path} is from before" if latest else "nothing was saved"
    remedy = "a lower optimizer.lr, optimizer.clip set, a longer schedule.warmup, or run.precision=fp32."
    if due_to_clips:
        remedy = "a manifest without these clips, or go on with a higher optimizer.max_skipped_steps."
    return StditError(
        f"step {step}: {message}. {saved}; going on from it would end here again, and a run keeps its settings. "
        f"Start another with run=PATH and {remedy}"
    )
