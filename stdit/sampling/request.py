"""The options of sampling, defined once for the command and for Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from stdit.diffusion.guidance import PLAIN, GuidanceOptions
from stdit.errors import StditError
from stdit.sampling.known_frames import KnownPixels


@dataclass(frozen=True)
class SampleRequest:
    """Clips to sample, of one shape, one for each prompt.

    prompts: descriptions of the clips.
    size: (width, height) in pixels; by default of the first shape that the model was trained at.
    frames: per clip; by default of the same shape.
    fps: the rate that the frames are meant for; by default the model's.
    steps: of the solver.
    guidance: scale of classifier-free guidance, on above 1, counted as the family's pipeline counts it.
    guidance_2: of the low-noise expert, if there are two; by default `guidance`.
    guidance_options: how guidance acts besides its scale.
    negative_prompt: what guidance moves away from.
    seed: decides the noise, together with a clip's index.
    indices: of the clips; by default 0, 1, … Clip n of a batch is made again alone by its prompt and indices=[n], equal
        up to the rounding of another pack.
    noise: (1 or prompts, C, T', H', W') first noise, in place of the seed's.
    init: frames (T, H, W, 3) uint8 that a clip starts from, partly noised (video to video); for all prompts or each.
    strength: how far they are noised: the share of the steps that are taken. At 1 nothing of them is left.
    known: frames given as condition, {"image": the first frame} or {"video": the first 1 + k·stride frames}, and for
        some weights with them {"last": the last frame}; one for all prompts or one each.
    solver: a short name such as "euler" or "unipc", or a diffusers scheduler's config; by default the folder's own.
    shift: of the noise levels, in place of the folder's (`FolderSettings`).
    levels: the noise levels of the steps, as few-step weights are published with, such as (1, 0.9375, 0.8, 0.5).
        They say the steps too.
    reuse: how far the network's output may have changed since it ran last, as a share, for a step to go without it
        (`Reuse`); 0: every step runs it. At 0.1 about half of 30 steps do.
    window: frames that the network sees at once: a longer clip is denoised in windows that overlap by half (`Windows`).
        None: all.
    tokens_per_pack: the most video tokens in one forward (but never less than a clip).
    """

    prompts: Sequence[str]
    _: KW_ONLY
    size: tuple[int, int] | None = None
    frames: int | None = None
    fps: float | None = None
    steps: int = 30
    guidance: float = 5.0
    guidance_2: float | None = None
    guidance_options: GuidanceOptions = PLAIN
    negative_prompt: str = ""
    seed: int = 0
    indices: Sequence[int] | None = None
    noise: Tensor | None = None
    init: np.ndarray | Sequence[np.ndarray | None] | None = None
    strength: float = 0.8
    known: KnownPixels | Sequence[KnownPixels | None] | None = None
    solver: str | Mapping[str, Any] | None = None
    shift: float | None = None
    levels: Sequence[float] | None = None
    reuse: float = 0.0
    window: int | None = None
    tokens_per_pack: int = 65_536

    def __post_init__(self) -> None:
        if not self.prompts:
            raise StditError("there is no prompt.")
        if not 0 <= self.reuse < 1:
            raise StditError(f"reuse is {self.reuse}; it must be 0 or more, and less than 1.")
        for name in ("guidance", "guidance_2", "shift", "fps"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise StditError(f"{name} is {value}; it must be a finite number.")
        if self.is_changed and not 0 < self.strength <= 1:
            raise StditError(f"strength is {self.strength}; it must be more than 0, and at most 1.")
        for name, values in (
            ("indices", self.clip_indices), ("known", self.known_of_clips), ("init", self.init_of_clips)
        ):  # fmt: skip
            if len(values) != len(self.prompts):
                raise StditError(f"{len(values)} {name} for {len(self.prompts)} prompts: give one each.")
        if self.scales[1] > 1 and not self.guided:
            raise StditError(
                f"guidance {self.guidance:g} with guidance_2 {self.guidance_2:g}: guidance of 1 or less makes no "
                "unconditional prediction, for either expert (as in diffusers). Raise guidance above 1, or set "
                "guidance_2 to 1."
            )

    @property
    def scales(self) -> tuple[float, float]:
        """The guidance of the high-noise expert (or the only transformer), and of the low-noise one."""
        return self.guidance, self.guidance if self.guidance_2 is None else self.guidance_2

    @property
    def guided(self) -> bool:
        """Whether the unconditional prediction is needed, as in diffusers' pipelines."""
        return self.guidance > 1

    @property
    def clip_indices(self) -> Sequence[int]:
        return range(len(self.prompts)) if self.indices is None else self.indices

    @property
    def is_changed(self) -> bool:
        """Whether a clip starts from given frames."""
        return any(init is not None for init in self.init_of_clips)

    @property
    def init_of_clips(self) -> Sequence[np.ndarray | None]:
        if self.init is None or isinstance(self.init, np.ndarray):
            return [self.init] * len(self.prompts)
        return self.init

    @property
    def known_of_clips(self) -> Sequence[KnownPixels | None]:
        if self.known is None or isinstance(self.known, Mapping):
            return [self.known] * len(self.prompts)
        return self.known
