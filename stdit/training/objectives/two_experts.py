"""Two experts that are trained by one run, each on the clips of its noise levels (Wan 2.2 A14B)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stdit.data.load.loader import Example
from stdit.data.plan.split import PlanItem
from stdit.diffusion.noise_levels import NoiseLevelConfig
from stdit.models.transformer import Experts
from stdit.shapes import VideoShape
from stdit.text.encoders import TextEncoder
from stdit.training.objectives.flow import FlowBatch, FlowModule, FlowObjective
from stdit.training.objectives.protocol import Batch, Objective, StepKey


@dataclass
class ExpertsBatch(Batch):
    high: FlowBatch
    low: FlowBatch


class ExpertsModule(nn.Module):
    def __init__(self, high: FlowModule, low: FlowModule) -> None:
        super().__init__()
        self.high, self.low = high, low

    def forward(self, batch: ExpertsBatch) -> Tensor:
        total = self.high(batch.high) + self.low(batch.low)
        assert batch.high.by_level is not None and batch.low.by_level is not None
        batch.by_level = batch.high.by_level + batch.low.by_level
        return total


class ExpertsObjective(Objective):
    """Trains `high` on clips whose noise level is at least `boundary`, `low` on the others.

    An expert without a clip in a micro-step runs one token of weight 0, so that all ranks run the same modules.
    """

    def __init__(self, high: FlowObjective, low: FlowObjective, boundary: float) -> None:
        self.high, self.low, self.flows, self.boundary = high, low, [high, low], boundary
        self.module = ExpertsModule(high.module, low.module)
        if high.numbers is not None:
            self.numbers = self._numbers
        self.vae, self.text_encoder, self.dtype = high.vae, high.text_encoder, high.dtype
        self.model_config, self.scheduler, self.cost = high.model_config, high.scheduler, high.cost
        self.level_names = high.level_names

    def _numbers(self, name: str, start: int, stop: int) -> Tensor:
        expert, _, inner = name.partition(".")
        numbers = (self.high if expert == "high" else self.low).numbers
        assert numbers is not None
        return numbers(inner, start, stop)

    def tokens(self, shape: VideoShape) -> int:
        return self.high.tokens(shape)

    def weight(self, examples: Sequence[Example], key: StepKey) -> float:
        return self.high.weight(examples, key)

    def prepare(self, examples: Sequence[Example], items: Sequence[PlanItem], key: StepKey) -> ExpertsBatch:
        is_high = [bool(level >= self.boundary) for level in self.high.levels(items, key)] if items else []
        batches = []
        for flow, wants_high in zip(self.flows, (True, False)):
            mine = [index for index, high in enumerate(is_high) if high == wants_high]
            batches.append(flow.prepare([examples[index] for index in mine], [items[index] for index in mine], key))
        high, low = batches
        seen = high if high.weight else low
        weight, flops = high.weight + low.weight, high.flops + low.flops
        return ExpertsBatch(high, low, weight=weight, flops=flops, inputs=seen.inputs, noise_level=seen.noise_level)

    def for_validation(self, levels: NoiseLevelConfig | None) -> ExpertsObjective:
        """See `FlowObjective.for_validation`."""
        other = copy.copy(self)
        other.flows = [flow.for_validation(levels) for flow in self.flows]
        other.high, other.low = other.flows
        return other

    def fresh(self, drawn: bool = True) -> ExpertsModule:
        return ExpertsModule(self.high.fresh(drawn), self.low.fresh(drawn))

    def networks(self, module: nn.Module) -> tuple[Experts, TextEncoder]:
        assert isinstance(module, ExpertsModule)
        return Experts(module.high.transformer, module.low.transformer, self.boundary), self.text_encoder


TransformerObjective = FlowObjective | ExpertsObjective
