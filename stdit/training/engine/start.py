"""Gives a module that was built on the meta device its starting weights, part by part: no copy of all of it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stdit.training.engine.parallel import World

# (name, start, stop) to numbers start to stop of that flattened parameter, (stop − start,) fp32: drawn, or read
Numbers = Callable[[str, int, int], Tensor]


def frozen_alone(module: nn.Module, numbers: Numbers) -> Numbers:
    """`numbers` of the parameters that are frozen; zeros of those that train, which a checkpoint gives later."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}

    def numbers_on_resume(name: str, start: int, stop: int) -> Tensor:
        return torch.zeros(stop - start) if name in trained else numbers(name, start, stop)

    return numbers_on_resume


def allocate(module: nn.Module, dtype: torch.dtype) -> list[str]:
    """Gives the parameters of a module that are on the meta device memory on the CPU, which is not written yet: until
    it is, it takes no room. Buffers become zeros. Returns the parameters' names."""
    names = []
    for place, inner in module.named_modules():
        for name, parameter in [*inner.named_parameters(recurse=False)]:
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=dtype)
                setattr(inner, name, nn.Parameter(empty, parameter.requires_grad))
                names.append(f"{place}.{name}" if place else name)
        for name, buffer in [*inner.named_buffers(recurse=False)]:
            if buffer.is_meta:
                setattr(inner, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    return names


@torch.no_grad()
def fill(module: nn.Module, names: Iterable[str], numbers: Numbers) -> None:
    """Writes whole parameters, one after another."""
    for name in names:
        parameter = module.get_parameter(name)
        parameter.view(-1).copy_(numbers(name, 0, parameter.numel()))


@torch.no_grad()
def fill_partitions(module: nn.Module, names: Iterable[str], numbers: Numbers, world: World) -> None:
    """Writes this rank's part of parameters that DeepSpeed has cut."""
    for name in names:
        parameter: Any = module.get_parameter(name)
        part = parameter.ds_tensor.view(-1)
        start = world.rank * len(part)
        stop = min(start + len(part), parameter.ds_numel)  # the last rank's part is padded
        if start < stop:
            part[: stop - start].copy_(numbers(name, start, stop))


@dataclass(frozen=True)
class KeptNumbers:
    """The fp32 numbers of a parameter from `offset` on that this rank's masters may start with."""

    offset: int
    kept: Tensor

    @classmethod
    def of(cls, parameter: Tensor, stage: int, world: World) -> KeptNumbers:
        share = -(-parameter.numel() // world.size) if stage == 3 else parameter.numel()
        offset = world.rank * share if stage == 3 else 0
        return cls(offset, parameter.detach().flatten()[offset : offset + share].float().clone())

    def numbers(self, start: int, stop: int) -> Tensor:
        return self.kept[start - self.offset : stop - self.offset]
