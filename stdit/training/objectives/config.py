"""The `objective` section of a run's config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from stdit.diffusion.noise_levels import NoiseLevelConfig
from stdit.diffusion.tasks import check_weights
from stdit.errors import StditError, nearest_name
from stdit.settings import Share
from stdit.training.objectives.loss_weights import LEVEL_WEIGHTS
from stdit.training.objectives.routing import RoutingConfig
from stdit.vae.training.losses import VaeLossConfig


@dataclass
class FlowConfig:
    """How a transformer trains.

    noise_levels: how noise levels are drawn.
    caption_dropout: the share of clips trained with an empty caption, for guidance.
    tasks: the tasks to draw from, with their weights. Unset: text_to_video; for weights that take an image in every
        call image_to_video, or first_last_to_video (Wan FLF2V).
    level_weight: how much noise levels count in the loss, see LEVEL_WEIGHTS.
    routing: some tokens skip blocks, so that a step costs less; null for none.
    """

    noise_levels: NoiseLevelConfig = field(default_factory=NoiseLevelConfig)
    caption_dropout: Share = 0.1
    tasks: dict[str, NonNegativeFloat] | None = None
    level_weight: str = "uniform"
    routing: RoutingConfig | None = None

    def __post_init__(self) -> None:
        if self.tasks is not None:
            check_weights(self.tasks)
        if self.level_weight not in LEVEL_WEIGHTS:
            raise StditError(
                f"level_weight {self.level_weight!r} is not one of {', '.join(LEVEL_WEIGHTS)}."
                f"{nearest_name(self.level_weight, LEVEL_WEIGHTS)}"
            )


@dataclass
class ObjectiveConfig:
    """What trains, and on which loss.

    kind: flow trains the transformer (and a text encoder) along the path of its weights, vae the VAE.
    token_power: p in a clip's weight, (its source's weight) × (unknown tokens)^p. 1 weighs every token alike, 0 every
        clip.
    flow: settings of kind flow.
    vae: settings of kind vae.
    """

    kind: Literal["flow", "vae"] = "flow"
    token_power: Annotated[float, Field(ge=0, le=10)] = 1.0
    flow: FlowConfig = field(default_factory=FlowConfig)
    vae: VaeLossConfig = field(default_factory=VaeLossConfig)
