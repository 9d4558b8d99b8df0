"""The interface between the trainer and what it trains.

An objective turns the clips of a micro-step into a batch (`prepare`) and holds the one module of everything that
trains; `module(batch)` returns Σ_c w_c · loss_c over the batch's clips. Divided by Σ_c w_c over the whole step, on all
ranks and micro-steps, these sums add up to the step's exact loss. Everything random is keyed by the clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from stdit.data.load.loader import Example
from stdit.data.plan.split import PlanItem
from stdit.shapes import VideoShape
from stdit.training.engine.optimizer import OptimizerConfig
from stdit.vae.autoencoder import CausalVAE


@dataclass(frozen=True)
class StepKey:
    """The key of a step's random draws.

    seed: the run's.
    epoch: which epoch.
    step: which step of the epoch.
    clips: clips of the step, on all ranks: noise levels are stratified over them.
    done: optimizer steps before this one, in the whole run.
    """

    seed: int
    epoch: int
    step: int
    clips: int
    done: int = 0


class Batch(Protocol):
    """The input of an objective's module, for one micro-step of one rank."""

    @property
    def weight(self) -> float:
        """Σ_c w_c."""
        ...

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward."""
        ...

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors made from the clips, by name. `pixels` or `latents` come first and can be leaves of a graph."""
        ...

    @property
    def noise_level(self) -> float | None:
        """The highest of the batch; None for an objective without noise levels."""
        ...


@dataclass
class Critic:
    """An adversary with its own optimizer.

    module: takes a batch after the objective's module has, and returns Σ_c w_c · its own loss of c.
    optimizer: the settings of its optimizer.
    start: the optimizer step from which it trains.
    """

    module: nn.Module
    optimizer: OptimizerConfig
    start: int


class Objective(Protocol):
    """What a run trains, and its loss."""

    vae: CausalVAE  # or another family's, behind the same methods

    @property
    def module(self) -> nn.Module:
        """Everything that trains. Takes a batch, returns Σ_c w_c · loss_c."""
        ...

    @property
    def critic(self) -> Critic | None: ...

    def tokens(self, shape: VideoShape) -> int:
        """Tokens of a clip of this shape: what the planner bounds packs by."""
        ...

    @property
    def cost(self) -> tuple[int, int]:
        """The planner's (linear, quadratic) cost of a clip in its tokens."""
        ...

    def weight(self, examples: Sequence[Example], key: StepKey) -> float:
        """Σ_c w_c of the batch that `prepare` would make, without making its tensors."""
        ...

    def prepare(self, examples: Sequence[Example], items: Sequence[PlanItem], key: StepKey) -> Batch:
        """The batch of a micro-step's clips; there may be none."""
        ...

    def fresh(self) -> nn.Module:
        """A module like `module` on the CPU, without ZeRO, to be filled with trained weights. Frozen ones are there."""
        ...


class StepResult(NamedTuple):
    """What a step's forward and backward passes gave. Losses, tokens and flops are this rank's share: they add up."""

    loss: Tensor
    critic_loss: Tensor | None
    tokens: int
    flops: int
    stop: int  # the signal with which a rank was asked to save and stop, or 0


class Update(NamedTuple):
    """An optimizer step; it changed nothing if the norm is not finite."""

    norm: float  # of the gradient, before clipping
    lr: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.norm)
