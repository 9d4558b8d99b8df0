"""Other families' autoencoders: diffusers (extra `vaes`) runs them behind the `encode` and `decode` of CausalVAE.

Latents are normalised as in the family's diffusers pipeline: (raw − mean) · scaling_factor / std. A config may omit any
of the three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.shapes import Stride, VideoShape, frames_of
from stdit.vae.clips import check_latents, check_video, to_clips, to_frames


@dataclass(frozen=True)
class VaeTraits:
    """What the config of an autoencoder class of diffusers does not say."""

    used_by: str  # the families that use it, for messages
    image: bool = False  # encodes images, so a clip goes through it frame by frame
    whole: bool = False  # frames go in whole groups; the first frame has no group of its own
    tiled: bool = False  # works only in tiles of `kernel` at every `stride` (frames, rows, columns)


IMAGE_VAE = VaeTraits("Stable Diffusion's image VAE: PixArt, Latte", image=True)
OTHERS = {  # whose transformers stdit does not run; those of its families are in their records
    "AutoencoderKLCogVideoX": VaeTraits("CogVideoX"),
    "AutoencoderKLHunyuanVideo": VaeTraits("HunyuanVideo"),
    "AutoencoderKLMochi": VaeTraits("Mochi"),
}


@dataclass(frozen=True)
class DiffusersVaeConfig:
    """name: the diffusers class. z_dim: latent channels. stride: frames, rows and columns of pixels per latent."""

    name: str
    z_dim: int
    stride: Stride


class NoMemoryBudget:
    """For VAEs that cannot keep to a memory budget: setting one is an error."""

    config: Any

    @property
    def memory(self) -> int | None:
        return None

    @memory.setter
    def memory(self, wanted: int | None) -> None:
        if wanted is not None:
            raise StditError(
                f"memory {wanted}: {self.config.name} keeps to no budget; VAEs in Wan's layout do. Leave it out."
            )


class DiffusersVAE(NoMemoryBudget, nn.Module):
    """A diffusers autoencoder with the methods of CausalVAE.

    decode_level: the noise level given to a timestep-conditioned decoder (LTX-Video 0.9.1 and later); 0, as in the
    diffusers pipeline by default.
    """

    def __init__(self, module: Any, traits: VaeTraits) -> None:
        super().__init__()
        name = type(module).__name__
        self.module, self.traits = module, traits
        frames, side = _ratio(module, "temporal"), _ratio(module, "spatial")
        stride = Stride((frames, side, side), first=frames if self.traits.whole else 1)
        self.config = DiffusersVaeConfig(name, int(module.config.latent_channels), stride)
        self.decode_level = 0.0
        if self.traits.tiled:
            module.enable_tiling()

    def encode(self, video: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, T, H, W) in [−1, 1] -> normalised latents (B, z, T', H', W'). sample: draw; else the mode."""
        check_video(video)
        shape = VideoShape(*video.shape[2:])
        shape.latent(self.config.stride)  # raises unless the stride divides it
        self._check_tiles(shape)
        x = to_frames(video) if self.traits.image else video
        posterior = self.module.encode(x).latent_dist
        raw = posterior.sample(generator) if sample else posterior.mode()
        return self.normalise(to_clips(raw, len(video)) if self.traits.image else raw)

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Normalised latents (B, z, T', H', W') -> (B, 3, T, H, W). clamp: to [−1, 1]."""
        check_latents(latents, self.config.z_dim)
        stride = self.config.stride
        height, width = (n * s for n, s in zip(latents.shape[3:], stride[1:]))
        self._check_tiles(VideoShape(frames_of(latents.shape[2], stride), height, width))
        raw = self.denormalise(latents)
        if self.traits.image:
            parts = [self.module.decode(frame).sample for frame in to_frames(raw).split(1)]
            video = to_clips(torch.cat(parts), len(raw))
        elif self.module.config.get("timestep_conditioning"):
            with torch.random.fork_rng():  # the decoder may draw noise: let it be the same for every clip
                torch.manual_seed(0)
                video = self.module.decode(raw, raw.new_full((len(raw),), self.decode_level)).sample
        else:
            video = self.module.decode(raw).sample
        video = video.transpose(1, 2) if self.traits.tiled else video  # Allegro: (B, T, 3, H, W)
        return video.clamp(-1, 1) if clamp else video

    def decode_stream(self, latents: Tensor, clamp: bool = True) -> Iterator[Tensor]:
        """Decodes one clip (z, T', H', W') to frames (3, t, H, W); an image VAE yields them one by one."""
        for part in latents[None].split(1, dim=2) if self.traits.image else [latents[None]]:
            yield self.decode(part, clamp)[0]

    def normalise(self, raw: Tensor) -> Tensor:
        """(B, z, T', H', W') as encoded -> as the DiT sees them."""
        mean, scale = self._statistics(raw)
        return ((raw - mean) * scale).to(raw.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, scale = self._statistics(latents)
        return (latents / scale + mean).to(latents.dtype)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and scaling_factor / std per channel, or per channel and latent frame (Cosmos)."""
        config = self.module.config

        def values(name: str, default: float) -> Tensor:
            found = dict(self.module.named_buffers(recurse=False)).get(name, config.get(name))  # buffers: LTX-Video
            dtype = torch.promote_types(like.dtype, torch.float32)
            if found is None:
                return torch.full((1, 1, 1, 1, 1), default, dtype=dtype, device=like.device)
            table = torch.as_tensor(found, dtype=dtype, device=like.device).view(1, self.config.z_dim, -1, 1, 1)
            if 1 < table.shape[2] < like.shape[2]:
                raise StditError(
                    f"{like.shape[2]} latent frames: {self.config.name} has statistics for only {table.shape[2]}."
                )
            return table[:, :, : like.shape[2]]

        shift = config.get("shift_factor")
        mean = values("latents_mean", 0.0 if shift is None else float(shift))
        return mean, float(config.get("scaling_factor") or 1.0) / values("latents_std", 1.0)

    def _check_tiles(self, shape: VideoShape) -> None:
        """Raises for a clip that the tiles would not cover: diffusers leaves the uncovered borders black."""
        if not self.traits.tiled:
            return
        for name, size, kernel, stride in zip(
            ("frames", "height", "width"),
            (shape.frames, shape.height, shape.width), self.module.kernel, self.module.stride,
        ):  # fmt: skip
            if size < kernel or (size - kernel) % stride:
                near = sorted({kernel + max(size - kernel, 0) // stride * stride + n for n in (0, stride)})
                raise StditError(
                    f"{shape}: {self.config.name} works in tiles, so {name} must be {kernel}+{stride}k, not {size}; "
                    f"nearest are {' and '.join(map(str, near))}."
                )


def _ratio(module: Any, axis: str) -> int:
    """Pixels per latent: from the config, else the module, else the number of levels of an image VAE."""
    name = f"{axis}_compression_ratio"
    found = module.config.get(name) or module.__dict__.get(name)
    if not found:
        found = 1 if axis == "temporal" else 2 ** (len(module.config.block_out_channels) - 1)
    return int(found)


@dataclass(frozen=True)
class VaeFolder:
    """The folder of an autoencoder that diffusers runs, and its class there."""

    folder: Path
    name: str
    traits: VaeTraits


def diffusers_class(name: str, traits: VaeTraits, place: object) -> Any:
    """An autoencoder class of diffusers. place: what asks for it, for the error if diffusers is not installed."""
    try:
        import diffusers
    except ImportError:
        raise StditError(
            f"{place}: {name} ({traits.used_by}) needs diffusers, which is not installed: pip install 'stdit[vaes]'."
        ) from None
    return getattr(diffusers, name)


def load_diffusers_vae(
    source: VaeFolder, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> DiffusersVAE:
    """Loads the VAE of a diffusers folder; on the meta device, from config.json alone. Nothing is downloaded."""
    found, folder = diffusers_class(source.name, source.traits, source.folder), str(source.folder)
    info: dict[str, Any] = {}
    try:
        if str(device) == "meta":
            with torch.device(device):
                module = found.from_config(found.load_config(folder, local_files_only=True))
        else:
            module, info = found.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, torch_dtype=dtype
            )
    except Exception as error:
        raise StditError(f"{folder}: diffusers cannot read {source.name} there: {error}") from error
    lost = {key: sorted(map(str, names)) for key, names in info.items() if names and key != "error_msgs"}
    if lost:
        raise StditError(f"{folder}: the VAE's weights do not fit its config.json: {lost}.")
    return DiffusersVAE(module, source.traits).to(device)  # also constants that were created on another device
