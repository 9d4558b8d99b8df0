"""Models and packs for the tests of sequence parallelism, and what one rank and each rank of a group compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stdit.models.config import TransformerConfig
from stdit.models.packing import TextPack, TokenPack, pack_clips, pack_texts
from stdit.models.routing import Routing
from stdit.models.sequence import SequenceGroup
from stdit.models.transformer import STDiT

LIMIT = 600.0  # seconds
WAN = TransformerConfig(
    dim=48, heads=4, layers=3, ffn_dim=80, in_channels=5, out_channels=3, text_dim=20, frequency_dim=32, text_padding=16
)
CONFIGS = {
    "ltx": replace(
        WAN, norm="rms", cross_norm="none", rotary="inner_causal", rope_scale=(20.0, 64.0, 64.0), rope_stride=(4, 8, 8),
        rope_fps=25.0,
    ),
    "cosmos": replace(
        WAN, frequency_dim=48, bias=False, qk_norm="per_head", cross_norm="modulated", modulation="low_rank",
        modulation_rank=8, position="learned", position_max=(8, 8, 8), network_time="log_sigma", rotary="axes_ntk",
        blank_channels=1,
    ),
    "wan image": replace(WAN, in_channels=8, image_channels=3, image_text_dim=12),
    "pixart": replace(
        WAN, attention="spatial", rotary="none", position="space", position_base=4, level_condition="size"
    ),
    "latte": replace(WAN, attention="spatial_temporal", rotary="none", position="space_time", position_base=4),
    "stdit3": replace(
        WAN, attention="spatial_temporal_text", rotary="time", position="space_resolution", position_base=4,
        level_condition="fps",
    ),
}  # fmt: skip
PACKS = {  # latents' shapes
    "one clip": [(3, 4, 6)],
    "seven clips": [(1, 2, 2), (1, 2, 4), (2, 4, 6), (2, 4, 6), (1, 8, 4), (3, 4, 6), (1, 2, 2)],
    "one token": [(1, 2, 2)],
}
BLOCKS = range(1, 2)  # that tokens skip


@dataclass
class Joined:
    """A pack with its texts, and which tokens stay in BLOCKS; None: there is no routing."""

    tokens: TokenPack
    texts: TextPack
    stays: Tensor | None = None


def every_other(pack: Joined) -> Tensor:
    stays = torch.arange(len(pack.tokens.tokens)) % 2 == 1
    stays[pack.tokens.segments.host[:-1]] = True
    return stays


def few(pack: Joined) -> Tensor:
    """One token of each clip."""
    stays = torch.zeros(len(pack.tokens.tokens), dtype=torch.bool)
    stays[pack.tokens.segments.host[:-1]] = True
    return stays


STAYS: dict[str, Callable[[Joined], Tensor]] = {"every other": every_other, "few": few}


def random_model(config: TransformerConfig) -> STDiT:
    torch.manual_seed(0)
    model = STDiT(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model.double()


def joined(config: TransformerConfig, shapes: Sequence[tuple[int, int, int]]) -> Joined:
    """Clips with a clean first frame where they have three, and texts of all lengths."""
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    clips, levels, texts, conditions = [], [], [], []
    for number, shape in enumerate(shapes):
        clips.append(draw(config.latent_channels, *shape))
        level = torch.full((shape[0],), 0.2 + 0.1 * number, dtype=torch.float64)
        level[: shape[0] // 3] = 0
        levels.append(level)
        texts.append(draw(1 + number, config.text_dim))
        possible = {
            "fps": torch.tensor(8.0 + number),
            "size": torch.tensor([8.0 * shape[2], 8.0 * shape[1]]),
            "image": draw(config.image_channels, *shape),
            "image_text": draw(2 + number, config.image_text_dim),
        }
        conditions.append({name: possible[name] for name in config.conditions})
    return Joined(pack_clips(clips, levels, config.patch, conditions), pack_texts(texts, 16))


def gradients(model: STDiT, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(gradient is not None for gradient in found)
    return list(found)


def factors(out: int, pack: Joined) -> Tensor:
    """(N, out) of the outputs in the loss."""
    size = (len(pack.tokens.tokens), out)
    return torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def of_whole(model: STDiT, pack: Joined) -> tuple[Tensor, list[Tensor]]:
    """The output of one rank, and the gradients."""
    routing = None if pack.stays is None else Routing.of(pack.tokens, pack.stays, BLOCKS)
    out = model(pack.tokens, pack.texts, routing)
    return out, gradients(model, (out * factors(out.shape[1], pack)).sum())


def of_part(model: STDiT, pack: Joined, group: SequenceGroup) -> tuple[Tensor, list[Tensor]]:
    """The output for the tokens of a rank, and its share of the gradients."""
    part = pack.tokens.part(group)
    routing = None if pack.stays is None else Routing.of(part.pack, pack.stays, BLOCKS)
    out = model(part.pack, pack.texts.part(part.clips), routing)
    return out, gradients(model, (out * factors(out.shape[1], pack)[part.tokens]).sum())
