"""Guidance: what the network's output for a clip's prompt becomes with its outputs for other inputs.

Guiding the network's output guides x_0, ε and v alike: at a given sample each is a·output + b, and the weights of the
outputs add up to one.

    guided = unconditional + scale · (conditional − unconditional)        classifier-free (Ho & Salimans 2022)
           + skip_scale · (conditional − output without some blocks)      skip-layer (Hyung et al. 2024)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from stdit.errors import StditError

Branch = Literal["text", "negative", "skipped"]  # the inputs of a clip that the network is run with in a step
ALWAYS = (0.0, 1.0)
RANGES = (  # of options that are numbers
    ("rescale", 0, 1), ("zero_steps", 0, 1000), ("parallel", -1000, 1000), ("norm", 0, 1e9),
    ("momentum", -0.999, 0.999), ("skip_scale", -1000, 1000),
)  # fmt: skip


@dataclass(frozen=True)
class GuidanceOptions:
    """How guidance acts, besides its scale. The defaults are the plain classifier-free one.

    interval: of noise levels where it acts; elsewhere the network runs once (Kynkäänniemi et al. 2024,
        arXiv 2404.07724).
    rescale: how far the guided output gets the standard deviation of the conditional one, 0 to 1 (Lin et al. 2023,
        arXiv 2305.08891, section 3.4).
    zero_star: scales the unconditional output so that it is nearest to the conditional one (CFG-Zero*, Fan et al. 2025,
        arXiv 2503.18886).
    zero_steps: in so many first steps, a flow stands still (the same).
    parallel: the weight of the part of the difference that is parallel to the conditional output; 1: as the other part
        (adaptive projected guidance, Sadat et al. 2024, arXiv 2410.02416).
    norm: the largest L2 norm of the difference; 0: any (the same).
    momentum: how much of the differences of earlier steps is added, usually negative (the same).
    skip_layers: the numbers of the blocks that the third branch leaves out; none: no such branch.
    skip_scale, skip_interval: of that branch.
    """

    interval: tuple[float, float] = ALWAYS
    rescale: float = 0.0
    zero_star: bool = False
    zero_steps: int = 0
    parallel: float = 1.0
    norm: float = 0.0
    momentum: float = 0.0
    skip_layers: tuple[int, ...] = ()
    skip_scale: float = 2.8
    skip_interval: tuple[float, float] = ALWAYS

    def __post_init__(self) -> None:
        for name, (low, high) in (("interval", self.interval), ("skip_interval", self.skip_interval)):
            if not 0 <= low <= high <= 1:
                raise StditError(f"guidance {name} {low:g} to {high:g}: give two noise levels from 0 to 1, in order.")
        for name, low, high in RANGES:
            if not low <= (value := getattr(self, name)) <= high:
                raise StditError(f"guidance {name} {value:g}: it must be from {low:g} to {high:g}.")

    @property
    def projects(self) -> bool:
        return (self.parallel, self.norm, self.momentum) != (1.0, 0.0, 0.0)


PLAIN = GuidanceOptions()


@dataclass
class Guide:
    """The guidance of one clip, over its steps.

    guided: whether there is an unconditional branch at all.
    beyond: counts as Cosmos' pipelines do: cond + scale · (cond − uncond), where scale 0 is the conditional output.
    """

    options: GuidanceOptions
    guided: bool
    beyond: bool = False
    _average: Tensor | None = field(default=None, init=False)  # of the differences so far, for momentum

    def branches(self, step: int, level: float) -> tuple[Branch, ...]:
        """What the network is run with in a step. Nothing, if the clip stands still."""
        options = self.options
        if step < options.zero_steps:
            return ()
        found: list[Branch] = ["text"]
        if self.guided and options.interval[0] <= level <= options.interval[1]:
            found.append("negative")
        if options.skip_layers and options.skip_interval[0] <= level <= options.skip_interval[1]:
            found.append("skipped")
        return tuple(found)

    def combine(
        self, text: Tensor, negative: Tensor | None = None, skipped: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """The guided output of one clip, like its `text`; a branch that did not run is None."""
        options, output = self.options, text
        if negative is not None:
            if options.zero_star:
                negative = negative * ((text * negative).sum() / (negative.square().sum() + 1e-8))
            difference = text - negative
            if options.projects:
                difference = self._projected(difference, text)
            output = (text if self.beyond else negative) + scale * difference
        if skipped is not None:
            output = output + options.skip_scale * (text - skipped)
        if options.rescale and output is not text:
            share = options.rescale * text.std() / output.std() + (1 - options.rescale)
            output = output * share
        return output

    def _projected(self, difference: Tensor, text: Tensor) -> Tensor:
        options = self.options
        if options.momentum:
            if self._average is not None:
                difference = difference + options.momentum * self._average
            self._average = difference
        if options.norm:
            difference = difference * (options.norm / difference.norm()).clamp(max=1)
        along = torch.nn.functional.normalize(text.double().flatten(), dim=0).view_as(text)
        parallel = (difference.double() * along).sum() * along
        return (difference.double() - parallel + options.parallel * parallel).to(difference)


def check_skipped(layers: Collection[int], blocks: int) -> None:
    """Raises StditError for numbers of blocks that a transformer does not have, or if none would be left."""
    if wrong := [layer for layer in layers if not 0 <= layer < blocks]:
        raise StditError(f"guidance skips block {wrong[0]}; these weights have blocks 0 to {blocks - 1}.")
    if len(set(layers)) >= blocks:
        raise StditError(f"guidance skips all {blocks} blocks: leave some.")
