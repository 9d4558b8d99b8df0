"""The `objective` section of a run's config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stdit.diffusion.noise_levels import NoiseLevelConfig
from stdit.diffusion.tasks import check_weights
from stdit.errors import StditError
from stdit.vae.training.losses import VaeLossConfig


@dataclass
class FlowConfig:
    """
    noise_levels: how noise levels are drawn.
    caption_dropout: the share of clips trained with an empty caption, for guidance.
    tasks: the tasks to draw from, with their weights. Unset: text_to_video; for weights that take an image in every
        call image_to_video, or first_last_to_video (Wan FLF2V).
    """

    noise_levels: NoiseLevelConfig = field(default_factory=NoiseLevelConfig)
    caption_dropout: float = 0.1
    tasks: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.tasks is not None:
            check_weights(self.tasks)
        if not 0 <= self.caption_dropout <= 1:
            raise StditError(f"caption_dropout {self.caption_dropout} must be in [0, 1].")


@dataclass
class ObjectiveConfig:
    """
    kind: flow trains the transformer (and a text encoder) along the path of its weights, vae the VAE.
    token_power: p in a clip's weight, (its source's weight) × (unknown tokens)^p. 1 weighs every token alike, 0 every
        clip.
    flow: settings of kind flow.
    vae: settings of kind vae.
    """

    kind: Literal["flow", "vae"] = "flow"
    token_power: float = 1.0
    flow: FlowConfig = field(default_factory=FlowConfig)
    vae: VaeLossConfig = field(default_factory=VaeLossConfig)

    def __post_init__(self) -> None:
        if self.token_power > 10:
            raise StditError(f"token_power is {self.token_power:g}; it must be at most 10.")
