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
from collections.abc import Sequence

from torch import Generator, Tensor


class Solver(ABC):
    """Takes len(levels) steps, in order and once.

    levels: the noise level in [0, 1] that the network is told at each step.
    draws: whether a step needs generators, for fresh noise.
    """

    levels: list[float]
    draws = False

    def start(self, noise: Tensor) -> Tensor:
        """The first sample, from N(0, 1) noise (B, …)."""
        return noise

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
