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
from stdit.training.engine.start import Numbers
from stdit.vae.autoencoder import CausalVAE


@dataclass(frozen=True)
class StepKey:
    """The key of a step's random draws."""

    seed: int  # the run's
    epoch: int
    step: int  # of the epoch
    clips: int  # of the step, on all ranks: noise levels are stratified over them
    done: int = 0  # optimizer steps before this one, in the whole run


@dataclass(kw_only=True)
class Batch:
    """The input of an objective's module, for one micro-step of one rank."""

    weight: float  # Σ_c w_c
    flops: int = 0  # of forward and backward
    inputs: dict[str, Tensor]  # made from the clips; `pixels` or `latents` come first and can be leaves of a graph
    noise_level: float | None = None  # the highest, if the objective has noise levels
    by_level: Tensor | None = None  # set by the module: the errors and their weights, (2, parts of the noise levels)


@dataclass
class Critic:
    """An adversary with its own optimizer, which trains from the optimizer step `start` on.

    Its module takes a batch after the objective's module has, and returns Σ_c w_c · its own loss of c.
    """

    module: nn.Module
    optimizer: OptimizerConfig
    start: int


class Objective(Protocol):
    """What a run trains, and its loss.

    module: everything that trains. Takes a batch, returns Σ_c w_c · loss_c.
    vae: a CausalVAE, or another family's behind the same methods.
    cost: the planner's (linear, quadratic) cost of a clip in its tokens.
    """

    module: nn.Module
    vae: CausalVAE
    cost: tuple[int, int]
    critic: Critic | None = None
    numbers: Numbers | None = None  # of the module's parameters that are still on the meta device
    level_names: Sequence[str] = ()  # of the parts of the noise levels, if it has any

    def tokens(self, shape: VideoShape) -> int:
        """Tokens of a clip of this shape: what the planner bounds packs by."""

    def weight(self, examples: Sequence[Example], key: StepKey) -> float:
        """Σ_c w_c of the batch that `prepare` would make, without making its tensors."""

    def prepare(self, examples: Sequence[Example], items: Sequence[PlanItem], key: StepKey) -> Batch:
        """The batch of a micro-step's clips; there may be none."""

    def fresh(self, drawn: bool = True) -> nn.Module:
        """A module like `module` on the CPU, without ZeRO, to be filled with trained weights. Frozen ones are there.

        drawn: whether those that train have their starting values. If not, they may take less memory: they are in the
        precision that the module computes in.
        """


class StepResult(NamedTuple):
    """What a step's forward and backward passes gave. All but `stop` is this rank's share: it adds up."""

    loss: Tensor
    critic_loss: Tensor | None
    tokens: int
    flops: int
    stop: int  # the signal with which a rank was asked to save and stop, or 0
    by_level: Tensor  # (2, parts of the noise levels): errors, and their weights


class Update(NamedTuple):
    """An optimizer step; it changed nothing if the norm is not finite."""

    norm: float  # of the gradient, before clipping
    lr: float
    limit: float = 0.0  # that the norm was clipped to, if it follows the norms of the last steps

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.norm)
