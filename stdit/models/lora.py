"""Linear layers with a low-rank addition (LoRA; Hu et al. 2022), in the place of a model's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stdit.models.layers import Linear


class LoraLinear(Linear):
    """x·Wᵀ + b + alpha / rank · x·Aᵀ·Bᵀ: the linear layer `base`, whose parameters keep their names, and A and B."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_down = Linear(base.in_features, rank, bias=False)  # A
        self.lora_up = Linear(rank, base.out_features, bias=False)  # B
        self.alpha, self.scale = alpha, alpha / rank

    def plain(self) -> Linear:
        """The linear layer with the same parameters, without A and B."""
        with torch.device("meta"):
            layer = Linear(self.in_features, self.out_features, self.bias is not None)
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_up(self.lora_down(x)) * self.scale
