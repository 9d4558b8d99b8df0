"""What a clip's loss is in a VAE's own training, and what its discriminator's is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stdit.data.load.loader import Example
from stdit.data.plan.split import PlanItem
from stdit.errors import StditError
from stdit.keyed import keyed_generator, keyed_uniform
from stdit.pixels import to_video
from stdit.shapes import VideoShape
from stdit.training.engine.optimizer import OptimizerConfig
from stdit.training.objectives.config import ObjectiveConfig
from stdit.training.objectives.protocol import Critic, StepKey
from stdit.vae.autoencoder import CausalVAE
from stdit.vae.clips import patchify
from stdit.vae.training.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    generator_loss,
    hinge_loss,
)
from stdit.vae.training.losses import VaeLossConfig, kl_loss, outlier_penalty, pixel_loss, wavelet_loss
from stdit.vae.training.lpips import SMALLEST
from stdit.vae.training.trainable_parts import select_trainable_part


@dataclass
class VaeBatch:
    """groups: clips of equal shape, (video (B,3,T,H,W), noise (B,z,T',H',W'), clip weights (B,)).

    adversarial: whether the discriminator takes part. made: the groups' reconstructions, once the VAE has run.
    """

    groups: list[tuple[Tensor, Tensor, Tensor]]
    weight: float
    flops: int
    adversarial: bool
    made: list[Tensor] = field(default_factory=list)

    noise_level = None

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"pixels": self.groups[0][0]} if self.groups else {}


class CriticModule(nn.Module):
    """Learns to tell a batch's clips from what the VAE made of them."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.discriminator = Discriminator(config)

    def forward(self, batch: VaeBatch) -> Tensor:
        total = nothing(self)
        for (video, _, weights), made in zip(batch.groups, batch.made):
            loss = hinge_loss(self.discriminator(video), self.discriminator(made))
            total = total + (loss * weights).sum()
        return total


class VaeModule(nn.Module):
    """critic, lpips: not among what trains here, and so in lists that a module does not look into."""

    def __init__(self, vae: CausalVAE, config: VaeLossConfig, critic: CriticModule | None, lpips: nn.Module | None):
        super().__init__()
        self.vae = vae
        self.config = config
        self._critics = [critic] if critic else []
        self._lpips = [lpips] if lpips else []

    def forward(self, batch: VaeBatch) -> Tensor:
        total, config = nothing(self), self.config
        batch.made = []
        for video, noise, weights in batch.groups:
            with torch.set_grad_enabled(torch.is_grad_enabled() and config.train != "decoder"):
                mean, logvar = self.vae.encode_moments(video)
            loss = config.kl * kl_loss(mean, logvar)  # (B,), as all losses
            if config.outlier:
                loss = loss + config.outlier * outlier_penalty(mean)
            latents = mean + (0.5 * logvar).exp() * noise.to(mean)
            if batch.adversarial:
                loss = loss + self._against(latents, video, batch)
            else:
                loss = loss + self._pixels(self.vae.decode_raw(latents), video)
            total = total + (loss * weights).sum()
        return total

    def _pixels(self, output: Tensor, video: Tensor) -> Tensor:
        """How far a reconstruction is from its clip, (B,)."""
        loss = pixel_loss(output, video)
        if self.config.wavelet:
            loss = loss + self.config.wavelet * wavelet_loss(output, video)
        if self._lpips:
            assert self.config.lpips is not None
            loss = loss + self.config.lpips.weight * self._lpips[0](output.float(), video.float())
        return loss

    def _against(self, latents: Tensor, video: Tensor, batch: VaeBatch) -> Tensor:
        """The pixels' terms and the discriminator's, (B,).

        Their gradients at the pixels are needed beforehand, to weigh one against the other; with them the loss goes on
        as what is linear in the pixels, so that no network behind them runs backward twice.
        """
        seen: list[Tensor] = []
        (critic,), config = self._critics, self.config.discriminator
        last = self.vae.decoder.head[2]
        assert config is not None and isinstance(last, nn.Conv3d)
        handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        output = self.vae.decode_raw(latents)
        handle.remove()
        batch.made.append(output.detach())
        with torch.enable_grad():
            leaf = output.detach().float().requires_grad_()
            pixels, fooling = self._pixels(leaf, video), generator_loss(critic.discriminator(leaf.to(output.dtype)))
            (down,) = torch.autograd.grad(pixels.sum(), leaf)
            (up,) = torch.autograd.grad(fooling.sum(), leaf)
        patch = self.vae.config.patch_size
        share = config.weight * adaptive_weight(last, seen[0], patchify(down, patch), patchify(up, patch))  # (B,)
        gradient = down + share[:, None, None, None, None] * up
        value = (pixels + share * fooling).detach()
        return value + ((output.float() - leaf.detach()) * gradient).flatten(1).sum(1)


class VaeObjective:
    """Tokens of a clip are the pixels it is trained on."""

    def __init__(
        self,
        config: ObjectiveConfig,
        remake: Callable[[], CausalVAE],
        lpips: nn.Module | None = None,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """remake: gives the VAE as it starts, on the CPU. lpips: what config.vae.lpips describes, on the device."""
        self.config, self.device, self.dtype = config, device, dtype
        self.remake, self.lpips = remake, lpips
        self.vae = remake()
        settings = config.vae
        side, step = settings.crop, self.vae.config.stride[1]
        if side is not None and side % step:
            near = sorted({max(step, side // step * step), side // step * step + step})
            raise StditError(
                f"objective.vae.crop is {side}; it must be a multiple of the VAE's stride, {step} pixels. "
                f"Nearest: {' or '.join(map(str, near))}."
            )
        self.critic: Critic | None = None
        judge = None
        if (described := settings.discriminator) is not None:
            judge = CriticModule(described)
            optimizer = OptimizerConfig(lr=described.lr, betas=(0.5, 0.9), weight_decay=0.0)
            self.critic = Critic(judge, optimizer, described.start)
        select_trainable_part(self.vae, settings.train)
        self.module = VaeModule(self.vae, settings, judge, lpips)

    def tokens(self, shape: VideoShape) -> int:
        shape.latent(self.vae.config.stride)
        part = self._part(shape)
        part.latent(self.vae.config.stride)
        judge, lpips = self.config.vae.discriminator, self.config.vae.lpips
        least = max(2**judge.layers if judge else 1, SMALLEST if lpips else 1)
        if min(part.height, part.width) < least:
            raise StditError(
                f"objective.vae: {part.width}x{part.height} pixels are too few; discriminator and LPIPS take at least "
                f"{least} a side. Raise crop, take the shape out of data.shapes, or set fewer discriminator.layers."
            )
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
            size = (self.vae.config.z_dim, *shape.latent(self.vae.config.stride).sizes)
            noise = [
                torch.randn(size, generator=keyed_generator(key.seed, "noise", key.epoch, one.clip_id, one.occurrence))
                for one in alike
            ]
            weights = [self._weight(one) for one in alike]
            parts = [self._crop(one, shape, key).to(self.device, non_blocking=True) for one in alike]
            video = torch.stack(list(map(to_video, parts)))  # (B, 3, T, H, W)
            groups.append((
                video.to(self.dtype),
                torch.stack(noise).to(self.device, self.dtype),
                torch.tensor(weights, dtype=torch.float32, device=self.device),
            ))  # fmt: skip
        adversarial = self.critic is not None and key.done >= self.critic.start
        return VaeBatch(groups, self.weight(examples, key), 0, adversarial)

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
            vae = self.remake()
            select_trainable_part(vae, self.config.vae.train)
            return VaeModule(vae, self.config.vae, None, None).eval()


def nothing(module: nn.Module) -> Tensor:
    """A zero with a gradient for all that trains: clips leave layers out, images those over time, and every rank must
    have every gradient. It comes first in a forward, so last in the backward, where gradients are whole in the one
    order of the parameters on every rank, whatever ran: ZeRO 2 sums them in the order in which they become so."""
    return 0.0 * torch.stack([p.float().sum() for p in module.parameters() if p.requires_grad]).sum()
