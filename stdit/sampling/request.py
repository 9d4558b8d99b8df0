"""The options of sampling, defined once for the command and for Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

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
    negative_prompt: what guidance moves away from.
    seed: decides the noise, together with a clip's index.
    indices: of the clips; by default 0, 1, … Clip n of a batch is made again alone by its prompt and indices=[n], equal
        up to the rounding of another pack.
    noise: (1 or prompts, C, T', H', W') first noise, in place of the seed's.
    known: frames given as condition, {"image": the first frame} or {"video": the first 1 + k·stride frames}, and for
        some weights with them {"last": the last frame}; one for all prompts or one each.
    solver: a short name such as "euler" or "unipc", or a diffusers scheduler's config; by default the folder's own.
    shift: of the noise levels, in place of the folder's (`FolderSettings`).
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
    negative_prompt: str = ""
    seed: int = 0
    indices: Sequence[int] | None = None
    noise: Tensor | None = None
    known: KnownPixels | Sequence[KnownPixels | None] | None = None
    solver: str | Mapping[str, Any] | None = None
    shift: float | None = None
    tokens_per_pack: int = 65_536

    def __post_init__(self) -> None:
        if not self.prompts:
            raise StditError("there is no prompt.")
        for name in ("guidance", "guidance_2", "shift", "fps"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise StditError(f"{name} is {value}; it must be a finite number.")
        for name, values in (("indices", self.clip_indices), ("known", self.known_of_clips)):
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
    def known_of_clips(self) -> Sequence[KnownPixels | None]:
        if self.known is None or isinstance(self.known, Mapping):
            return [self.known] * len(self.prompts)
        return self.known
