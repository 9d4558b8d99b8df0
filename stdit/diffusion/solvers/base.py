"""What every solver is: from noise to a clip, step by step, in the coordinates of the scheduler it reproduces.

    x = solver.start(noise)
    for index, level in enumerate(solver.levels):
        output = network(solver.network_input(index, x), level)  # guided, without variances
        x = solver.step(index, output, x, fresh noise if solver.draws else None)
    latents = solver.finish(x)

A solver's own arithmetic is fp64 on the host, over levels rounded to fp32 as diffusers' are; the sample keeps its
dtype. Known tokens are put into the network's input and into the finished latents; what the sample holds there between
does not matter, since no solver mixes tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from stdit.diffusion.paths import Path


class Solver(ABC):
    """Takes len(levels) steps, in order and once.

    levels: the noise level that the network is told at each step, in [0, 1]. sigmas: the scheduler's own, one more.
    draws: whether a step takes fresh noise.
    """

    levels: list[float]
    sigmas: list[float]
    path: Path
    draws = False

    def start(self, noise: Tensor) -> Tensor:
        """The first sample, of N(0, 1) noise of any shape."""
        return noise

    def network_input(self, index: int, x: Tensor) -> Tensor:
        """What the network sees of the sample at step `index`."""
        return x

    @abstractmethod
    def step(self, index: int, output: Tensor, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The sample after step `index`. output: the network's, guided; x, noise: (…,), all of one shape and dtype."""

    def finish(self, x: Tensor) -> Tensor:
        """Normalised latents of the last sample."""
        return x
