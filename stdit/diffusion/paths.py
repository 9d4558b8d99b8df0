"""The families' paths from clip to noise: what the network sees, what it is told, and what it is trained to put out.

A path is of x_0, normalised latents, and ε ~ N(0, 1), at a noise level t in [0, 1] (0 the clip, 1 noise):

name  what the network sees   level         what it puts out                 families
flow  (1−t)·x_0 + t·ε         t             ε − x_0 (STDiT3: x_0 − ε)        Wan, LTX, Cosmos 2 and 2.5, STDiT3
ddpm  √ᾱ·x_0 + √(1−ᾱ)·ε       index / 1000  ε, or √ᾱ·ε − √(1−ᾱ)·x_0          PixArt, Latte, Allegro
edm   c_in·(σ_d·x_0 + σ·ε)    σ / (σ + 1)   (σ·x_0 − σ_d·ε) / √(σ² + σ_d²)   Cosmos 1

Which path weights are for is said by the scheduler of their model folder (`stdit.diffusion.solvers.path_of`). Every t
here is a tensor that broadcasts against the latents. Known tokens are clean whatever the path: x_0 as it is, t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from stdit.diffusion.flow import interpolate, velocity
from stdit.errors import StditError
from stdit.shapes import VideoShape

INDICES = 1000  # noise levels of a DDPM, and the unit of most networks' time


@dataclass(frozen=True)
class FlowPath:
    """Rectified flow (Liu et al. 2022; Lipman et al. 2022).

    reverse: the network puts out x_0 − ε, as Open-Sora's does. by_shape: levels move with a clip's size and length.
    """

    reverse: bool = False
    by_shape: bool = False

    name = "flow"
    distribution: Literal["logit_normal", "uniform"] = field(default="logit_normal", init=False)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return interpolate(x0, noise, t)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return -velocity(x0, noise) if self.reverse else velocity(x0, noise)

    def clean(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x_0 of what the network saw and put out."""
        return x + t * output if self.reverse else x - t * output

    def snap(self, t: Tensor) -> Tensor:
        """The nearest levels that the path has, in fp64."""
        return t

    def network_levels(self, levels: Tensor) -> Tensor:
        """What `TokenPack.levels` must be for these noise levels (K,); the network multiplies it by its time_scale."""
        return levels

    def shift(self, shape: VideoShape) -> float:
        """How far the family's own training and sampling move levels towards 1 for a clip of this shape."""
        return open_sora_shift(shape) if self.by_shape else 1.0


def open_sora_shift(shape: VideoShape) -> float:
    """√(area / 512²) · √(latent frames), as Open-Sora 1.2 has it (opensora/schedulers/rf/rectified_flow.py).

    Five latent frames are counted for every 17 frames, whatever is left over.
    """
    frames = 1 if shape.is_image else shape.frames // 17 * 5
    if not frames:
        raise StditError(f"{shape}: Open-Sora's noise levels are for images and for clips of 17 frames and more.")
    return math.sqrt(shape.height * shape.width / 512**2 * frames)


@dataclass(frozen=True)
class DdpmPath:
    """The discrete diffusion of Ho et al. (2020), variance-preserving, over 1000 indices.

    alphas: (1000,) fp64, ᾱ of every index. prediction: "epsilon", or "v_prediction" (Salimans & Ho 2022).
    """

    alphas: Tensor
    prediction: str = "epsilon"

    name = "ddpm"
    distribution: Literal["logit_normal", "uniform"] = field(default="uniform", init=False)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DdpmPath:
        """Of a diffusers scheduler's config; ᾱ rounded to fp32 as theirs are."""
        kind, count = config.get("beta_schedule", "linear"), int(config.get("num_train_timesteps", INDICES))
        start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
        if count != INDICES:
            raise StditError(f"a DDPM of num_train_timesteps {count} is not supported, only one of {INDICES}.")
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
        elif kind == "linear":
            betas = torch.linspace(start, end, count, dtype=torch.float32)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
        else:
            raise StditError(f"beta_schedule {kind!r} is not supported: linear or scaled_linear.")
        if len(betas) != count or not ((betas > 0) & (betas < 1)).all():
            raise StditError(f"a scheduler's betas must be {count} numbers between 0 and 1.")
        return cls(torch.cumprod(1 - betas, 0).double(), str(config.get("prediction_type", "epsilon")))

    def index(self, t: Tensor) -> Tensor:
        """t = index / 1000 to int64 indices."""
        return (t.double() * INDICES).round().long()

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 − ᾱ), shaped as t, in the dtype of `like`."""
        alpha = self.alphas.to(t.device)[self.index(t)]
        return alpha.sqrt().to(like), (1 - alpha).sqrt().to(like)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._scales(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        alpha, sigma = self._scales(t, x0)
        return alpha * noise - sigma * x0

    def clean(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._scales(t, x)
        return (x - sigma * output) / alpha if self.prediction == "epsilon" else alpha * x - sigma * output

    def snap(self, t: Tensor) -> Tensor:
        return (t * INDICES).floor().clamp(max=INDICES - 1) / INDICES

    def network_levels(self, levels: Tensor) -> Tensor:
        return levels

    def shift(self, shape: VideoShape) -> float:
        return 1.0


@dataclass(frozen=True)
class EdmPath:
    """The preconditioned denoiser of Karras et al. (2022): x = σ_d·x_0 + σ·ε, D(x; σ) = c_skip·x + c_out·F(c_in·x).

    Their loss, λ(σ)·|D − σ_d·x_0|² with λ = (σ² + σ_d²)/(σ·σ_d)², is the plain square error of F, since λ·c_out² = 1. A
    level is t = σ/(σ + 1), so log-normal σ are logit-normal t of the same mean and deviation. The network is told
    log(σ)/4. sign: −1 where c_out is negative ("v_prediction").
    """

    sigma_data: float = 0.5
    sign: int = 1

    name = "edm"
    distribution: Literal["logit_normal", "uniform"] = field(default="logit_normal", init=False)
    least_sigma = 0.001  # of known tokens, whose log would be −∞; with as much noise Cosmos' own code gives them

    def _sigma(self, t: Tensor, like: Tensor) -> Tensor:
        return (t.double() / (1 - t.double())).to(like)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma, data = self._sigma(t, x0), self.sigma_data
        return (data * x0 + sigma * noise) / (sigma**2 + data**2).sqrt()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma, data = self._sigma(t, x0), self.sigma_data
        return self.sign * (sigma * x0 - data * noise) / (sigma**2 + data**2).sqrt()

    def clean(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        sigma, data = self._sigma(t, x), self.sigma_data
        return (data * x + self.sign * sigma * output) / (sigma**2 + data**2).sqrt()

    def snap(self, t: Tensor) -> Tensor:
        return t

    def network_levels(self, levels: Tensor) -> Tensor:
        return (levels.double() / (1 - levels.double())).clamp(min=self.least_sigma).log() / 4

    def shift(self, shape: VideoShape) -> float:
        return 1.0


Path = FlowPath | DdpmPath | EdmPath
