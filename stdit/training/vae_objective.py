"""What a clip's loss is in a VAE's own training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stdit.data.loader import Example, to_video
from stdit.data.planner import PlanItem
from stdit.errors import StditError
from stdit.keyed import keyed_generator, keyed_uniform
from stdit.shapes import VideoShape
from stdit.training.objective import ObjectiveConfig, StepKey, VaeLossConfig
from stdit.vae.autoencoder import CausalVAE
from stdit.vae.losses import vae_loss


@dataclass
class VaeBatch:
    """groups: clips of equal shape, (video (B,3,T,H,W), noise (B,z,T',H',W'), clip weights (B,))."""

    groups: list[tuple[Tensor, Tensor, Tensor]]
    weight: float
    flops: int


class VaeModule(nn.Module):
    def __init__(self, vae: CausalVAE, config: VaeLossConfig, touch_all: bool) -> None:
        super().__init__()
        self.vae = vae
        self.config = config
        self.touch_all = touch_all

    def forward(self, batch: VaeBatch) -> Tensor:
        total = torch.zeros((), device=next(self.parameters()).device)
        for video, noise, weights in batch.groups:
            mean, logvar = self.vae.encode_moments(video)
            output = self.vae.decode_raw(mean + (0.5 * logvar).exp() * noise.to(mean))
            total = total + (vae_loss(output, video, mean, logvar, self.config.kl) * weights).sum()
        if self.touch_all:  # images leave temporal layers out: every rank must have every gradient
            total = total + 0.0 * sum(p.float().sum() for p in self.parameters())
        return total


class VaeObjective:
    """L1 and KL. Tokens of a clip are the pixels it is trained on."""

    def __init__(
        self, config: ObjectiveConfig, vae: CausalVAE, *, device: torch.device, dtype: torch.dtype, ranks: int
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.vae = vae
        side, step = config.vae.crop, vae.config.stride[1]
        if side is not None and side % step:
            near = sorted({max(step, side // step * step), side // step * step + step})
            raise StditError(
                f"objective.vae.crop is {side}; it must be a multiple of the VAE's stride, {step} pixels. "
                f"Nearest: {' or '.join(map(str, near))}."
            )
        self.module = VaeModule(vae, config.vae, touch_all=ranks > 1)

    def tokens(self, shape: VideoShape) -> int:
        shape.latent(self.vae.config.stride)
        part = self._part(shape)
        part.latent(self.vae.config.stride)
        return part.frames * part.height * part.width

    @property
    def cost(self) -> tuple[int, int]:
        return 1, 0

    def weight(self, examples: Sequence[Example], key: StepKey) -> float:
        return sum(map(self._weight, examples), 0.0)

    def prepare(self, examples: Sequence[Example], items: Sequence[PlanItem], key: StepKey) -> VaeBatch:
        by_shape: dict[VideoShape, list[Example]] = {}
        for example in examples:
            by_shape.setdefault(self._part(example.shape), []).append(example)
        groups = []
        for shape, alike in by_shape.items():
            latent = shape.latent(self.vae.config.stride)
            size = (self.vae.config.z_dim, latent.frames, latent.height, latent.width)
            noise = [
                torch.randn(size, generator=keyed_generator(key.seed, "noise", key.epoch, one.clip_id, one.occurrence))
                for one in alike
            ]
            weights = [self._weight(one) for one in alike]
            video = torch.stack([to_video(self._crop(one, shape, key)) for one in alike])  # (B, 3, T, H, W)
            groups.append((
                video.to(self.device, self.dtype),
                torch.stack(noise).to(self.device, self.dtype),
                torch.tensor(weights, dtype=torch.float32, device=self.device),
            ))  # fmt: skip
        return VaeBatch(groups, self.weight(examples, key), 0)

    def _weight(self, example: Example) -> float:
        return example.weight * self.tokens(example.shape) ** self.config.token_power

    def _part(self, shape: VideoShape) -> VideoShape:
        """What of a clip of this shape is trained on."""
        side = self.config.vae.crop
        return shape if side is None else VideoShape(shape.frames, min(side, shape.height), min(side, shape.width))

    def _crop(self, example: Example, part: VideoShape, key: StepKey) -> Tensor:
        """A clip's frames, or the keyed part of them, (T, H, W, 3) uint8."""
        frames = example.frames
        assert frames is not None
        for axis, size in ((1, part.height), (2, part.width)):
            room = frames.shape[axis] - size
            draw = keyed_uniform(key.seed, f"vae crop {axis}", key.epoch, example.clip_id, example.occurrence)
            frames = frames.narrow(axis, int(draw * (room + 1)), size)
        return frames

    def fresh(self) -> VaeModule:
        with torch.random.fork_rng(devices=[]):
            return VaeModule(CausalVAE(self.vae.config), self.config.vae, touch_all=False).eval()
