"""The interface of solvers: from noise to a clip, step by step.

    x = solver.start(noise)
    for index, level in enumerate(solver.levels):
        output = network(solver.network_input(index, x), level)  # guided, without variances
        x = solver.step(index, output, x, generators)
    latents = solver.finish(x)

The sample has the coordinates of the scheduler that is reproduced. The caller puts known tokens into the network's
input and into the finished latents; the sample may hold anything there, because no solver mixes tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Generator, Tensor

from stdit.shapes import LatentShape, VideoShape

Config = Mapping[str, Any]  # of a scheduler, as diffusers writes it
CALLERS = {
    "": "not known; sigma_max tells whether a flow is solved in Cosmos-Predict2's coordinates",
    "plain": "as the scheduler's own set_timesteps does it",
    "ltx": "LTX-Video: evenly spaced levels",
    "ltx condition": "LTX-Video's LTXConditionPipeline: linear, then quadratic levels",
    "cosmos2": "Cosmos-Predict2: σ = t/(1 − t)",
    "cosmos2.5": "Cosmos-Predict2.5: the same, and the network is told the levels themselves",
}


def caller_of(config: Config) -> str:
    """The pipeline whose way of calling its scheduler is meant, a key of CALLERS."""
    caller = str(config.get("_caller", ""))
    assert caller in CALLERS, caller
    return caller


@dataclass(frozen=True)
class Schedule:
    """What a solver's levels depend on besides the scheduler's config, as `make_solver` takes it."""

    steps: int
    shift: float | None
    shape: VideoShape | None
    latent: LatentShape | None
    where: str
    levels: Sequence[float] | None = None


class Solver(ABC):
    """Takes len(levels) steps, in order and once; or, after `begin` in place of `start`, those from an index on.

    levels: the noise level in [0, 1] that the network is told at each step.
    draws: whether a step needs generators, for fresh noise.
    per_step: how many levels make one step of those that are asked for.
    """

    levels: list[float]
    draws = False
    per_step = 1

    def start(self, noise: Tensor) -> Tensor:
        """The first sample, from N(0, 1) noise (B, …)."""
        return noise

    @abstractmethod
    def begin(self, index: int, latents: Tensor, noise: Tensor) -> Tensor:
        """The first sample where steps begin at `index`, from normalised latents (B, …) that are partly noised."""

    def network_input(self, index: int, x: Tensor) -> Tensor:
        """The network's input at step `index`."""
        return x

    @abstractmethod
    def step(self, index: int, output: Tensor, x: Tensor, generators: Sequence[Generator] = ()) -> Tensor:
        """The sample after step `index`.

        output, x: (B, …), the network's guided output and the sample, of one shape and dtype.
        generators: one for each of the B clips, if the solver `draws`.
        """

    def finish(self, x: Tensor) -> Tensor:
        """Normalised latents from the last sample."""
        return x
