"""Starting weights, keyed by (seed, name of the parameter): any part of any of them can be drawn alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stdit.keyed.stream import KeyedStream, keyed_stream


@dataclass(frozen=True)
class Start:
    """How the numbers of a parameter start.

    uniform: drawn between −size and size. normal: drawn with mean 0 and standard deviation size. constant: size.
    """

    kind: Literal["constant", "uniform", "normal"]
    size: float

    def draw(self, stream: KeyedStream, start: int, stop: int, device: torch.device | str) -> Tensor:
        """Numbers start to stop of the flattened parameter, (stop − start,) fp32."""
        if self.kind == "constant":
            return torch.full((stop - start,), self.size, dtype=torch.float32, device=device)
        if self.kind == "normal":
            return stream.normal(start, stop, device).mul_(self.size)
        return stream.uniform(start, stop, device).mul_(2).sub_(1).mul_(self.size)


ZERO, ONE = Start("constant", 0.0), Start("constant", 1.0)


@dataclass(frozen=True)
class StartingWeights:
    """The starting weights of a network.

    starts: of the parameters, by name.
    network: a name that keys them too, so that two networks with equal names of parameters start differently.
    """

    starts: Mapping[str, Start]
    network: str
    seed: int

    def draw(self, name: str, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
        """Numbers start to stop of a flattened parameter, (stop − start,) fp32."""
        stream = keyed_stream(self.seed, "weight", self.network, name)
        return self.starts[name].draw(stream, start, stop, device)

    @torch.no_grad()
    def fill(self, module: nn.Module) -> None:
        """Draws the parameters of the network, each in its dtype on its device."""
        for name in self.starts:
            parameter = module.get_parameter(name)
            numbers = self.draw(name, 0, parameter.numel(), parameter.device)
            parameter.copy_(numbers.view(parameter.shape))
