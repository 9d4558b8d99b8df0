"""From an image model to a video model, as Make-A-Video (Singer et al. 2022) and Video LDM (Blattmann et al. 2023)."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from stdit.models.transformer import Block, STDiT

NEW = "temporal_blocks.*"  # what inflation adds, as a pattern of parameters' names


@torch.no_grad()
def inflate(model: STDiT) -> STDiT:
    """A video model that computes of every frame exactly what the image model does, until it is trained.

    A block over time starts as a copy of the block before it, without its cross-attention, with what it adds to the
    tokens set to zero: the outputs of its attention and of its MLP. The image model's tensors are taken, not copied.
    """
    with torch.device("meta"):
        video = STDiT(model.config.inflated())
    state = model.state_dict()
    for name in video.state_dict():
        if name not in state:  # temporal_blocks.N.… of blocks.N.…
            state[name] = state[name.removeprefix("temporal_")].clone()
    video.load_state_dict(state, strict=True, assign=True)
    for block in cast("list[Block]", video.temporal_blocks):
        for linear in cast("tuple[nn.Linear, ...]", (block.self_attn.o, block.ffn[2])):
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)
    return video
