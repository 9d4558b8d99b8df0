"""The paths from clip to noise: the network's input, its noise level, and the output it is trained for.

A path leads from x_0, normalised latents, to ε ~ N(0, 1), along noise levels t in [0, 1] (0 the clip, 1 noise):

name  input                   t             output                           families
flow  (1−t)·x_0 + t·ε         t             ε − x_0 (STDiT3: x_0 − ε)        Wan, LTX, Cosmos 2 and 2.5, STDiT3
ddpm  √ᾱ·x_0 + √(1−ᾱ)·ε       index / 1000  ε, or √ᾱ·ε − √(1−ᾱ)·x_0          PixArt, Latte, Allegro
edm   c_in·(σ_d·x_0 + σ·ε)    σ / (σ + 1)   (σ·x_0 − σ_d·ε) / √(σ² + σ_d²)   Cosmos 1

The scheduler of a model folder says which path its weights are for (`stdit.diffusion.solvers.path_of`). Every t here is
a tensor that broadcasts against the latents. On every path, known tokens are clean: x_0 itself, at t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stdit.diffusion.noise_levels import shift_noise_level
from stdit.errors import StditError
from stdit.shapes import VideoShape

Distribution = Literal["logit_normal", "uniform"]
INDICES = 1000  # noise levels of a DDPM; most networks' time is in thousandths too


@dataclass(frozen=True)
class FlowPath:
    """Rectified flow (Liu et al. 2022; Lipman et al. 2022).

    reverse: the network's output is x_0 − ε, as in Open-Sora.
    by_shape: levels move with a clip's size and length.
    """

    reverse: bool = False
    by_shape: bool = False

    name = "flow"
    distribution: ClassVar[Distribution] = "logit_normal"

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return (1 - t) * x0 + t * noise  # exactly x_0 at t = 0 and exactly ε at t = 1

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return x0 - noise if self.reverse else noise - x0

    def trained_levels(self, t: Tensor, shapes: Sequence[VideoShape]) -> Tensor:
        """Maps drawn levels, (n,) fp64 in (0, 1), to the levels at which the family trains clips of these shapes."""
        if not self.by_shape:
            return t
        return shift_noise_level(t, torch.tensor([open_sora_shift(shape) for shape in shapes], dtype=t.dtype))


def open_sora_shift(shape: VideoShape) -> float:
    """√(area / 512²) · √(latent frames), as Open-Sora 1.2 has it (opensora/schedulers/rf/rectified_flow.py).

    It counts five latent frames for every 17 frames, and ignores the rest.
    """
    frames = 1 if shape.is_image else shape.frames // 17 * 5
    if not frames:
        raise StditError(f"{shape}: Open-Sora's noise levels are for images and for clips of 17 frames and more.")
    return math.sqrt(shape.height * shape.width / 512**2 * frames)


@dataclass(frozen=True, eq=False)
class DdpmPath:
    """The discrete diffusion of Ho et al. (2020), variance-preserving, over 1000 indices.

    betas: (1000,) fp32.
    prediction: "epsilon", or "v_prediction" (Salimans & Ho 2022).
    """

    betas: Tensor
    prediction: str = "epsilon"

    name = "ddpm"
    distribution: ClassVar[Distribution] = "uniform"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DdpmPath:
        """From a diffusers scheduler's config that `check_scheduler` has passed."""
        start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
        if (trained := config.get("trained_betas")) is not None:
            right = isinstance(trained, list | tuple) and all(type(beta) in (int, float) for beta in trained)
            betas = torch.tensor(trained if right else [], dtype=torch.float32)
        elif config.get("beta_schedule", "linear") == "linear":
            betas = torch.linspace(start, end, INDICES, dtype=torch.float32)
        else:  # "scaled_linear"
            betas = torch.linspace(start**0.5, end**0.5, INDICES, dtype=torch.float32) ** 2
        if len(betas) != INDICES or not ((betas > 0) & (betas < 1)).all():
            raise StditError(f"a scheduler's betas must be {INDICES} numbers between 0 and 1.")
        if not torch.cumprod(1 - betas, 0)[-1] > 1e-30:
            raise StditError("a scheduler's betas leave nothing of the clip in the last level: they are too large.")
        return cls(betas, str(config.get("prediction_type", "epsilon")))

    @cached_property
    def alphas(self) -> Tensor:
        """(1000,) fp64: ᾱ of each index, rounded to fp32 as in diffusers."""
        return torch.cumprod(1 - self.betas, 0).double()

    def index(self, t: Tensor) -> Tensor:
        """The int64 indices of t = index / 1000."""
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

    def variance_bound(self, values: Tensor, error: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The variational bound of a step back, in bits, for a learned variance (Nichol & Dhariwal 2021, eq. 4, 15).

        values: v, the network's second output: log σ² = f·log β + (1−f)·log β̃ with f = (v + 1)/2.
        error: of the prediction. It is detached: the bound does not train the prediction.
        x0: clean latents, against which t broadcasts.

        This is KL(q(x_{i−1}|x_i, x_0) ‖ p), which depends on the error but not on x_i. At index 0 it is the likelihood
        of x_0 in bins of 2/255, which latent models inherited from pixels (facebookresearch/DiT, `_vb_terms_bpd`).
        """
        index = self.index(t)
        low, high, scale = (table.to(t.device)[index].to(values) for table in self._bound_tables)
        share = (values + 1) / 2
        log_variance = share * high + (1 - share) * low
        distance = scale * error.detach()
        divergence = log_variance - low - 1 + (low - log_variance).exp() + distance.square() * (-log_variance).exp()
        narrow = (-0.5 * log_variance).exp()
        above, below = (torch.special.ndtr(narrow * (distance + side / 255)) for side in (1, -1))
        mass = torch.where(x0 < -0.999, above, torch.where(x0 > 0.999, 1 - below, above - below))
        return torch.where(index == 0, -mass.clamp(min=1e-12).log(), divergence / 2) / math.log(2)

    @cached_property
    def _bound_tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each index, fp64: log β̃ (β̃_0 is 0, so β̃_1 replaces it), log β, an error's weight in the step's mean."""
        beta = self.betas.double()
        alpha = torch.cumprod(1 - beta, 0)
        before = torch.cat([alpha.new_ones(1), alpha[:-1]])
        posterior = beta * (1 - before) / (1 - alpha)
        scale = beta / ((1 - beta) * (1 - alpha)).sqrt()
        if self.prediction == "v_prediction":  # ε = √ᾱ·v + √(1−ᾱ)·x
            scale = scale * alpha.sqrt()
        return torch.cat([posterior[1:2], posterior[1:]]).log(), beta.log(), scale

    def trained_levels(self, t: Tensor, shapes: Sequence[VideoShape]) -> Tensor:
        return (t * INDICES).floor().clamp(max=INDICES - 1) / INDICES


@dataclass(frozen=True)
class EdmPath:
    """The preconditioned denoiser of Karras et al. (2022): x = σ_d·x_0 + σ·ε, D(x; σ) = c_skip·x + c_out·F(c_in·x).

    Their loss, λ(σ)·|D − σ_d·x_0|² with λ = (σ² + σ_d²)/(σ·σ_d)², is the plain square error of F, since λ·c_out² = 1.
    The noise level is t = σ/(σ + 1), so log-normal σ is logit-normal t with the same mean and deviation. The network is
    told log(σ)/4 (`stdit.models.positions.network_time`).

    sigma_data: σ_d, the deviation of the clips.
    sign: −1 where c_out is negative ("v_prediction").
    """

    sigma_data: float = 0.5
    sign: int = 1

    name = "edm"
    distribution: ClassVar[Distribution] = "logit_normal"

    def _sigma(self, t: Tensor, like: Tensor) -> Tensor:
        return (t.double() / (1 - t.double())).to(like)

    def noisy(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma, data = self._sigma(t, x0), self.sigma_data
        return (data * x0 + sigma * noise) / (sigma**2 + data**2).sqrt()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        sigma, data = self._sigma(t, x0), self.sigma_data
        return self.sign * (sigma * x0 - data * noise) / (sigma**2 + data**2).sqrt()

    def trained_levels(self, t: Tensor, shapes: Sequence[VideoShape]) -> Tensor:
        return t


Path = FlowPath | DdpmPath | EdmPath


def token_errors(
    path: Path, output: Tensor, target: Tensor, places: int, levels: Tensor, clean: Tensor | None
) -> Tensor:
    """The loss of each token, (N,): the square error summed over the `places` of its patch and their C channels.

    output: (N, places·C_out). If C_out is 2·C, the second half is a learned variance. For a DDPM its variational bound
        is added (Nichol & Dhariwal 2021, section 3.1, with λ = 1 as in facebookresearch/DiT); for a flow it is ignored.
    target: (N, places·C).
    levels: (N,) noise levels.
    clean: (N, places·C) x_0; may be None without a learned variance.
    """
    if output.shape == target.shape:
        return (output - target).square().sum(1)
    mean, values = output.unflatten(1, (places, -1)).chunk(2, dim=2)  # (N, places, C) each
    error = mean - target.unflatten(1, (places, -1))
    terms = error.square()
    if isinstance(path, DdpmPath) and clean is not None:
        x0 = clean.unflatten(1, (places, -1))
        terms = terms + path.variance_bound(values, error, x0, levels[:, None, None])
    return terms.sum((1, 2))
