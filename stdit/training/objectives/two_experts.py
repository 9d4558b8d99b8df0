"""Two transformers trained by one run, each on the clips of its noise levels (Wan 2.2 A14B)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stdit.data.load.loader import Example
from stdit.data.plan.split import PlanItem
from stdit.models.experts import Experts
from stdit.models.transformer import STDiT
from stdit.shapes import VideoShape
from stdit.text.encoders import TextEncoder
from stdit.training.objectives.flow import FlowBatch, FlowModule, FlowObjective
from stdit.training.objectives.protocol import StepKey


@dataclass
class ExpertsBatch:
    high: FlowBatch
    low: FlowBatch

    @property
    def weight(self) -> float:
        return self.high.weight + self.low.weight

    @property
    def flops(self) -> int:
        return self.high.flops + self.low.flops

    @property
    def inputs(self) -> dict[str, Tensor]:
        return (self.high if self.high.weight else self.low).inputs

    @property
    def noise_level(self) -> float | None:
        return (self.high if self.high.weight else self.low).noise_level


class ExpertsModule(nn.Module):
    def __init__(self, high: FlowModule, low: FlowModule) -> None:
        super().__init__()
        self.high, self.low = high, low

    def forward(self, batch: ExpertsBatch) -> Tensor:
        return self.high(batch.high) + self.low(batch.low)


class ExpertsObjective:
    """Trains `high` on clips whose noise level is at least `boundary`, `low` on the others.

    An expert without a clip in a micro-step runs one token of weight 0, so that all ranks run the same modules.
    """

    critic = None

    def __init__(self, high: FlowObjective, low: FlowObjective, boundary: float) -> None:
        self.high, self.low, self.boundary = high, low, boundary
        self.module = ExpertsModule(high.module, low.module)
        self.vae, self.text_encoder, self.dtype = high.vae, high.text_encoder, high.dtype
        self.model_config, self.scheduler = high.model_config, high.scheduler

    def tokens(self, shape: VideoShape) -> int:
        return self.high.tokens(shape)

    @property
    def cost(self) -> tuple[int, int]:
        return self.high.cost

    def weight(self, examples: Sequence[Example], key: StepKey) -> float:
        return self.high.weight(examples, key)

    def prepare(self, examples: Sequence[Example], items: Sequence[PlanItem], key: StepKey) -> ExpertsBatch:
        is_high = [bool(level >= self.boundary) for level in self.high.levels(items, key)] if items else []

        def batch(objective: FlowObjective, wants_high: bool) -> FlowBatch:
            mine = [index for index, high in enumerate(is_high) if high == wants_high]
            return objective.prepare([examples[index] for index in mine], [items[index] for index in mine], key)

        return ExpertsBatch(batch(self.high, True), batch(self.low, False))

    def fresh(self) -> ExpertsModule:
        return ExpertsModule(self.high.fresh(), self.low.fresh())

    def transformers(self, module: nn.Module) -> list[STDiT]:
        assert isinstance(module, ExpertsModule)
        return [module.high.transformer, module.low.transformer]

    def networks(self, module: nn.Module) -> tuple[Experts, TextEncoder]:
        high, low = self.transformers(module)
        return Experts(high, low, self.boundary), self.text_encoder


TransformerObjective = FlowObjective | ExpertsObjective
