"""A task says which tokens are known: clean, at noise level 0, out of the loss.

The VAE is causal, so the latents of a prefix of 1+4k frames depend on that prefix alone. So the known tokens of a
training clip are cut out of its own latents, and nothing leaks into them from the frames to be generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stdit.errors import StditError, nearest_name
from stdit.keyed import keyed_uniform

TASKS = ("text_to_video", "image_to_video", "extend", "first_last_to_video")


@dataclass(frozen=True)
class Task:
    """The task of one clip.

    known_frames: how many of the first latent frames are known.
    last: the last video frame is given too, to weights that take an image beside the noise. It is not a known token.
    """

    name: str = "text_to_video"
    known_frames: int = 0
    last: bool = False

    def mask(self, latent_frames: int) -> Tensor:
        """(T',) bool over latent frames, true where known. Raises StditError unless one stays unknown."""
        if not 0 <= self.known_frames < max(latent_frames, 1):
            raise StditError(
                f"{self.name}: {self.known_frames} known of {latent_frames} latent frames leaves nothing to generate."
            )
        return torch.arange(latent_frames) < self.known_frames


_FIXED = {task.name: task for task in (Task(), Task("image_to_video", 1), Task("first_last_to_video", 1, last=True))}


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises StditError unless every key is a task, no weight is negative and one is positive."""
    for name in weights:
        if name not in TASKS:
            raise StditError(f"{name!r} is not a task ({', '.join(TASKS)}).{nearest_name(name, TASKS)}")
    if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise StditError(f"task weights {dict(weights)} must not be negative, and one must be positive.")


def draw_task(
    weights: Mapping[str, float], latent_frames: int, *, seed: int, epoch: int, clip_id: str, occurrence: int = 0
) -> Task:
    """Draws the task of a training clip, keyed by (seed, epoch, clip id, occurrence).

    Under `extend`, 2 … T'−1 latent frames are known with equal chance (1 if T' is 2). A clip of one latent frame is
    always text_to_video.
    """
    if latent_frames <= 1:
        return Task()
    u = keyed_uniform(seed, "task", epoch, clip_id, occurrence) * sum(weights.values())
    for name in (task for task in TASKS if weights.get(task, 0) > 0):  # the order of TASKS, not of the config
        u -= weights[name]
        if u < 0:
            break
    if name in _FIXED:
        return _FIXED[name]
    low = min(2, latent_frames - 1)
    pick = keyed_uniform(seed, "known frames", epoch, clip_id, occurrence)
    return Task(name, low + int(pick * (latent_frames - low)))


def frame_levels(mask: Tensor, t: Tensor, patch_frames: int = 1) -> Tensor:
    """The noise levels of a clip's patch frames: 0 where known, t elsewhere.

    mask: (T',) bool, constant over the patch_frames latent frames of each patch.
    t: (), any dtype.
    Returns (T'/patch_frames,) in t's dtype: [0, t, t, t] for 1 known of 4.
    """
    patches = mask.reshape(-1, patch_frames)
    if bool((patches.any(1) != patches.all(1)).any()):
        raise StditError(
            f"{int(mask.sum())} known latent frames end inside a patch of {patch_frames} frames: "
            f"the known frames must be a multiple of {patch_frames}."
        )
    return torch.where(patches.all(1).to(t.device), torch.zeros((), dtype=t.dtype, device=t.device), t)
