"""Clips that could not be read: they keep their place in the plan with weight 0, and checkpoints name them."""

from __future__ import annotations

from typing import Any

from stdit.errors import StditError
from stdit.training.batches import StepClips
from stdit.training.engine.parallel import World


class FailedClips:
    """by_id: the failures of all ranks up to when they last shared them. unshared: how many only this rank knows."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.by_id: dict[str, dict[str, Any]] = {}
        self.unshared = 0

    def note(self, clips: StepClips) -> None:
        """Records and prints the failures among a step's clips."""
        for example in clips.examples:
            if example.failure and example.clip_id not in self.by_id:
                self.by_id[example.clip_id] = {
                    "row": example.row,
                    "epoch": example.epoch,
                    "reason": example.reason,
                    "failure": example.failure,
                }
                self.unshared += 1
                print(f"clip {example.row} left out of training: {example.failure}", flush=True)

    def share(self) -> None:
        """Gathers the failures of all ranks, on all ranks."""
        gathered: dict[str, Any] = {}
        for by_id in self.world.gather(self.by_id):
            gathered |= by_id
        self.by_id, self.unshared = dict(sorted(gathered.items())), 0


def no_clip_could_be_read(clips: StepClips, step: int) -> StditError:
    reason = next((example.failure for example in clips.examples if example.failure), "")
    return StditError(
        f"step {step}: none of its {clips.num_clips} clips could be read: there is nothing to learn from. {reason} The "
        f"run can go on from its last checkpoint."
    )
