"""The VAE's objective: reconstruction, and an optional discriminator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stdit.data.load.loader import Example
from stdit.data.plan.split import PlanItem
from stdit.errors import StditError, error_context
from stdit.keyed import keyed_uniform
from stdit.keyed.stream import keyed_stream
from stdit.pixels import to_video
from stdit.shapes import VideoShape
from stdit.training.engine.optimizer import EmaConfig, OptimizerConfig
from stdit.training.objectives.config import ObjectiveConfig
from stdit.training.objectives.loss_weights import clip_weight
from stdit.training.objectives.protocol import Batch, Critic, Objective, StepKey
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


class ShapeGroup(NamedTuple):
    """Clips of equal shape."""

    video: Tensor  # (B, 3, T, H, W)
    noise: Tensor  # (B, z, T', H', W')
    weights: Tensor  # (B,) the clips' weights in the loss


@dataclass
class VaeBatch(Batch):
    """The input of `VaeModule`, and after it of `CriticModule`."""

    groups: list[ShapeGroup]
    adversarial: bool  # whether the discriminator takes part
    reconstructions: list[Tensor] = field(default_factory=list)  # the groups' videos out of the VAE, once it has run


class CriticModule(nn.Module):
    """Learns to tell a batch's clips from their reconstructions."""

    def __init__(self, config: DiscriminatorConfig, seed: int | None = None) -> None:
        super().__init__()
        self.discriminator = Discriminator(config, seed)

    def forward(self, batch: VaeBatch) -> Tensor:
        total = zero_touching_all_parameters(self)
        for group, reconstruction in zip(batch.groups, batch.reconstructions):
            loss = hinge_loss(self.discriminator(group.video), self.discriminator(reconstruction))
            total = total + (loss * group.weights).sum()
        return total


class VaeModule(nn.Module):
    """The VAE with its loss. critic, lpips: used by the loss, not trained here; in lists, to be no submodules."""

    def __init__(self, vae: CausalVAE, config: VaeLossConfig, critic: CriticModule | None, lpips: nn.Module | None):
        super().__init__()
        self.vae = vae
        self.config = config
        self._critics = [critic] if critic else []
        self._lpips = [lpips] if lpips else []

    def forward(self, batch: VaeBatch) -> Tensor:
        total, config = zero_touching_all_parameters(self), self.config
        batch.reconstructions = []
        for video, noise, weights in batch.groups:
            with torch.set_grad_enabled(torch.is_grad_enabled() and config.train != "decoder"):
                mean, logvar = self.vae.encode_moments(video)
            loss = config.kl * kl_loss(mean, logvar)  # (B,), as all losses
            if config.outlier:
                loss = loss + config.outlier * outlier_penalty(mean)
            latents = mean + (0.5 * logvar).exp() * noise.to(mean)
            if batch.adversarial:
                loss = loss + self._adversarial(latents, video, batch)
            else:
                loss = loss + self._pixel_loss(self.vae.decode_raw(latents), video)
            total = total + (loss * weights).sum()
        return total

    def _pixel_loss(self, output: Tensor, video: Tensor) -> Tensor:
        """The distance of reconstructions from their clips, (B,)."""
        loss = pixel_loss(output, video)
        if self.config.wavelet:
            loss = loss + self.config.wavelet * wavelet_loss(output, video)
        if self._lpips:
            assert self.config.lpips is not None
            loss = loss + self.config.lpips.weight * self._lpips[0](output.float(), video.float())
        return loss

    def _adversarial(self, latents: Tensor, video: Tensor, batch: VaeBatch) -> Tensor:
        """The terms of the pixels and of the discriminator, (B,).

        Weighing one against the other takes their gradients at the pixels first. With these the loss becomes linear in
        the pixels, so that the discriminator and LPIPS run backward only once.
        """
        inputs_of_last: list[Tensor] = []
        (critic,), config = self._critics, self.config.discriminator
        last = self.vae.decoder.head[2]
        assert config is not None and isinstance(last, nn.Conv3d)
        handle = last.register_forward_pre_hook(lambda _, inputs: inputs_of_last.append(inputs[0].detach()))
        output = self.vae.decode_raw(latents)
        handle.remove()
        batch.reconstructions.append(output.detach())
        with torch.enable_grad():
            leaf = output.detach().float().requires_grad_()
            pixels = self._pixel_loss(leaf, video)
            generator = generator_loss(critic.discriminator(leaf.to(output.dtype)))
            (of_pixels,) = torch.autograd.grad(pixels.sum(), leaf)
            (of_generator,) = torch.autograd.grad(generator.sum(), leaf)
        patch = self.vae.config.patch_size
        balance = adaptive_weight(last, inputs_of_last[0], patchify(of_pixels, patch), patchify(of_generator, patch))
        factor = config.weight * balance  # (B,)
        gradient = of_pixels + factor[:, None, None, None, None] * of_generator
        value = (pixels + factor * generator).detach()
        return value + ((output.float() - leaf.detach()) * gradient).flatten(1).sum(1)


class VaeObjective(Objective):
    """Reconstruction of clips. A clip's tokens are the pixels that it is trained on."""

    cost = (1, 0)

    def __init__(
        self,
        config: ObjectiveConfig,
        remake: Callable[[], CausalVAE],
        lpips: nn.Module | None = None,
        *,
        seed: int | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """
        remake: makes the VAE with its starting weights, on the CPU.
        seed: of the discriminator's.
        lpips: the network that config.vae.lpips describes, on the device.
        """
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
        if (count := settings.frames) is not None:
            with error_context("objective.vae.frames"):
                VideoShape(count, *self.vae.config.stride[1:]).latent(self.vae.config.stride)
        critic = None
        if (discriminator := settings.discriminator) is not None:
            critic = CriticModule(discriminator, seed)
            optimizer = OptimizerConfig(lr=discriminator.lr, betas=(0.5, 0.9), weight_decay=0.0, ema=EmaConfig(0))
            self.critic = Critic(critic, optimizer, discriminator.start)
        select_trainable_part(self.vae, settings.train)
        self.module = VaeModule(self.vae, settings, critic, lpips)

    def tokens(self, shape: VideoShape) -> int:
        shape.latent(self.vae.config.stride)
        part = self._part(shape)
        part.latent(self.vae.config.stride)
        discriminator, lpips = self.config.vae.discriminator, self.config.vae.lpips
        least = max(2**discriminator.layers if discriminator else 1, SMALLEST if lpips else 1)
        if min(part.height, part.width) < least:
            raise StditError(
                f"objective.vae: {part.width}x{part.height} pixels are too few; discriminator and LPIPS take at least "
                f"{least} per side. Raise crop, take the shape out of data.shapes, or set fewer discriminator.layers."
            )
        return part.frames * part.height * part.width

    def weight(self, examples: Sequence[Example], key: StepKey) -> float:
        return sum(map(self._weight, examples), 0.0)

    def prepare(self, examples: Sequence[Example], items: Sequence[PlanItem], key: StepKey) -> VaeBatch:
        by_shape: dict[VideoShape, list[Example]] = {}
        for example in examples:
            by_shape.setdefault(self._part(example.shape), []).append(example)
        groups = []
        for shape, alike in by_shape.items():
            size = (self.vae.config.z_dim, *shape.latent(self.vae.config.stride).sizes)
            keys = [(key.seed, "noise", key.epoch, example.clip_id, example.occurrence) for example in alike]
            noise = [keyed_stream(*parts).normal(0, math.prod(size), self.device).view(size) for parts in keys]
            weights = [self._weight(example) for example in alike]
            crops = [self._crop(example, shape, key).to(self.device, non_blocking=True) for example in alike]
            groups.append(ShapeGroup(
                video=torch.stack(list(map(to_video, crops))).to(self.dtype),
                noise=torch.stack(noise).to(self.dtype),
                weights=torch.tensor(weights, dtype=torch.float32, device=self.device),
            ))  # fmt: skip
        adversarial = self.critic is not None and key.done >= self.critic.start
        inputs = {"pixels": groups[0].video} if groups else {}
        return VaeBatch(groups, adversarial, weight=self.weight(examples, key), inputs=inputs)

    def _weight(self, example: Example) -> float:
        return clip_weight(example, self.tokens(example.shape), self.config.token_power)

    def _part(self, shape: VideoShape) -> VideoShape:
        """The shape of the part that is trained on."""
        side, count = self.config.vae.crop or max(shape.height, shape.width), self.config.vae.frames or shape.frames
        return VideoShape(min(count, shape.frames), min(side, shape.height), min(side, shape.width))

    def _crop(self, example: Example, part: VideoShape, key: StepKey) -> Tensor:
        """A clip, or a keyed part of it, (T, H, W, 3) uint8."""
        frames = example.frames
        assert frames is not None
        for axis, size in enumerate((part.frames, part.height, part.width)):
            room = frames.shape[axis] - size
            draw = keyed_uniform(key.seed, f"vae crop {axis}", key.epoch, example.clip_id, example.occurrence)
            frames = frames.narrow(axis, int(draw * (room + 1)), size)
        return frames

    def fresh(self, drawn: bool = True) -> VaeModule:
        with torch.random.fork_rng(devices=[]):
            vae = self.remake()
            select_trainable_part(vae, self.config.vae.train)
            return VaeModule(vae, self.config.vae, None, None).eval()


def zero_touching_all_parameters(module: nn.Module) -> Tensor:
    """A 0 that depends on every trainable parameter, so that each rank produces every gradient: images skip the layers
    over time, and a rank may have no clip.

    It must come first in a forward, so last in the backward: gradients are then complete in the order of the
    parameters on every rank. ZeRO-2 reduces them in order of readiness.
    """
    return 0.0 * torch.stack([p.float().sum() for p in module.parameters() if p.requires_grad]).sum()
