"""The sizes of a causal video VAE, and the settings of the releases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from stdit.errors import StditError, error_context, nearest_name
from stdit.settings import check

Channels = Annotated[int, Field(ge=1, le=65_536)]
Multiples = Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1, max_length=8)]

# Of the released Wan 2.1 weights (vae.py; also the defaults of diffusers).
WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
# Of the released Wan 2.2 weights (vae2_2.py).
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclass(frozen=True)
class VaeConfig:
    """The sizes of a CausalVAE.

    base_dim: channels of the encoder at full resolution.
    dim_mult: channels of each level, in units of base_dim; height and width halve between two levels.
    num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    temporal_downsample: whether the frames halve too, for each of the len(dim_mult) − 1 downsamplings.
    z_dim: latent channels.
    patch_size: p×p pixels are folded into channels before the encoder and unfolded after the decoder (Wan 2.2).
    residual: Wan 2.2's shortcuts around each level, which average and repeat.
    groups: 0: Wan's RMS norm. Else Stable Diffusion's layers: a group norm of so many groups over each frame, and
        upsampling that keeps the channels.
    decoder_base_dim: channels of the decoder at full resolution; None: base_dim.
    latents_mean: of the raw latents, per channel, for their normalisation; None: 0.
    latents_std: the same for the standard deviation; None: 1.
    """

    base_dim: Channels = 96
    dim_mult: Multiples = (1, 2, 4, 4)
    num_res_blocks: Annotated[int, Field(ge=1, le=256)] = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    z_dim: Channels = 16
    patch_size: Annotated[int, Field(ge=1, le=64)] = 1
    residual: bool = False
    groups: NonNegativeInt = 0
    decoder_base_dim: Channels | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[NonNegativeFloat, ...] | None = None

    family = "wan_vae"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):  # of YAML and JSON
                object.__setattr__(self, name, tuple(value))
        if self.latents_mean is not None and not any(self.latents_mean):
            object.__setattr__(self, "latents_mean", None)
        if self.latents_std is not None and all(std == 1 for std in self.latents_std):
            object.__setattr__(self, "latents_std", None)
        check(self, "VAE")
        for conflict in self._conflicts():
            raise StditError(f"VAE: {conflict}")

    def _conflicts(self) -> Iterator[str]:
        """What is wrong with settings that are right each for itself."""
        mults, halvings, decoder = self.dim_mult, self.temporal_downsample, self.decoder_base_dim or self.base_dim
        if len(halvings) != len(mults) - 1:
            yield (
                f"temporal_downsample {halvings} has {len(halvings)} entries; {len(mults)} levels in dim_mult have "
                f"{len(mults) - 1} downsamplings between them."
            )
        if sum(halvings) > 2:
            yield (
                f"temporal_downsample {halvings} makes a temporal stride of {self.stride[0]}; diffusers and every "
                "program that reads Wan's VAEs run at most 4."
            )
        for width in (mult * base for base in (self.base_dim, decoder) for mult in mults):
            if self.groups and width % self.groups:
                yield f"a level of {width} channels cannot be normalised in groups={self.groups}."
        for mult in mults[1:]:
            if self.upsampling_halves and mult * decoder % 2:
                yield (
                    f"a level of {mult}×{decoder} channels cannot be halved by the decoder's upsampling. Choose an "
                    "even base_dim."
                )
        cells = [8 if time else 4 for time in halvings]
        averaged = zip((1, *mults), mults, (*cells, 1))
        repeated = zip(mults[:0:-1], (mults[-1], *mults[:0:-1]), reversed(cells))
        for fine, coarse, cell in (*averaged, *repeated):
            if self.residual and fine * cell % coarse:
                yield (
                    f"dim_mult {mults}: {fine} times a cell of {cell} is not a multiple of {coarse}, so the shortcut "
                    "of a residual level cannot average or repeat."
                )
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if values is not None and len(values) != self.z_dim:
                yield (
                    f"{name} has {len(values)} entries, z_dim is {self.z_dim}. With another z_dim, set latents_mean "
                    "and latents_std too: null (training measures them), or one number per channel."
                )
        if self.latents_std is not None and min(self.latents_std) == 0:
            yield f"latents_std {self.latents_std} must be positive."

    @property
    def upsampling_halves(self) -> bool:
        """Whether the decoder's upsampling also halves the channels."""
        return not self.residual and not self.groups

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels per latent."""
        space = self.patch_size * 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal_downsample), space, space


PRESETS: dict[str, VaeConfig] = {
    "wan2.1": VaeConfig(latents_mean=WAN21_MEAN, latents_std=WAN21_STD),
    "wan2.2": VaeConfig(
        base_dim=160, decoder_base_dim=256, z_dim=48, patch_size=2, residual=True,
        latents_mean=WAN22_MEAN, latents_std=WAN22_STD,
    ),
    # For demos and tests on a CPU: the stride of Wan 2.1, 4×8×8, at a sixth of its width.
    "toy": VaeConfig(
        base_dim=16, dim_mult=(1, 2, 4), num_res_blocks=1, temporal_downsample=(True, True), z_dim=8, patch_size=2
    ),
}  # fmt: skip


def preset(name: str, **changes: Any) -> VaeConfig:
    """The named config of PRESETS with some settings changed. Raises StditError if the result is not a valid VAE."""
    if name not in PRESETS:
        raise StditError(f"there is no VAE preset {name!r}.{nearest_name(name, PRESETS)} Known: {', '.join(PRESETS)}.")
    with error_context(f"preset {name} with {', '.join(f'{key}={value}' for key, value in changes.items())}"):
        return replace(PRESETS[name], **changes)
