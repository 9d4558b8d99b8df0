"""Other families' autoencoders, run by diffusers (extra `vaes`) behind CausalVAE's encode and decode.

Latents are normalised as diffusers' pipeline of the family does it: (raw − mean) · scaling_factor / std, each of which
a config may leave out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.shapes import Stride, VideoShape, frames_of


@dataclass(frozen=True)
class VaeTraits:
    """What an autoencoder class of diffusers does not say of itself.

    used_by: the families that use it, for messages.
    image: encodes images, so a clip goes through it frame by frame.
    whole: frames go in whole groups; the first frame has no group of its own.
    tiled: works only in tiles of `kernel` at every `stride` (frames, rows, columns).
    """

    used_by: str
    image: bool = False
    whole: bool = False
    tiled: bool = False


IMAGE_VAE = VaeTraits("Stable Diffusion's image VAE: PixArt, Latte", image=True)
OTHERS = {  # whose transformers stdit does not run; those of its families are in their records
    "AutoencoderKLCogVideoX": VaeTraits("CogVideoX"),
    "AutoencoderKLHunyuanVideo": VaeTraits("HunyuanVideo"),
    "AutoencoderKLMochi": VaeTraits("Mochi"),
}


@dataclass(frozen=True)
class OtherConfig:
    """name: diffusers' class. z_dim: latent channels. stride: frames, rows and columns of pixels to one latent."""

    name: str
    z_dim: int
    stride: Stride


class WithoutBudget:
    config: Any

    @property
    def memory(self) -> int | None:
        """Bytes to work in, which these autoencoders do not keep to: None, as a CausalVAE's is by default."""
        return None

    @memory.setter
    def memory(self, wanted: int | None) -> None:
        if wanted is not None:
            raise StditError(
                f"memory {wanted}: a {self.config.name} keeps to no budget, VAEs in Wan's layout do. Leave it out."
            )


class OtherVAE(WithoutBudget, nn.Module):
    """Clips to latents and back through a diffusers autoencoder.

    decode_level: what a timestep-conditioned decoder (LTX-Video 0.9.1 and later) is told of its latents' noise; 0 as
    diffusers' pipeline by default.
    """

    def __init__(self, module: Any, traits: VaeTraits) -> None:
        super().__init__()
        name = type(module).__name__
        self.module, self.traits = module, traits
        frames, side = _ratio(module, "temporal"), _ratio(module, "spatial")
        stride = Stride((frames, side, side), first=frames if self.traits.whole else 1)
        self.config = OtherConfig(name, int(module.config.latent_channels), stride)
        self.decode_level = 0.0
        if self.traits.tiled:
            module.enable_tiling()

    def encode(self, video: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """(B, 3, T, H, W) in [−1, 1] -> normalised latents (B, z, T', H', W'). sample: draw, else the mode."""
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise StditError(
                f"video of {video.dtype} {tuple(video.shape)}: the VAE encodes floats in [-1, 1] (B, 3, T, H, W)."
            )
        shape = VideoShape(*video.shape[2:])
        shape.latent(self.config.stride)  # raises where it does not divide
        self._check_tiles(shape)
        x = _frames(video) if self.traits.image else video
        posterior = self.module.encode(x).latent_dist
        raw = posterior.sample(generator) if sample else posterior.mode()
        return self.normalise(_clips(raw, len(video)) if self.traits.image else raw)

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """Normalised latents (B, z, T', H', W') -> (B, 3, T, H, W), in [−1, 1] (clamp=False: as it comes)."""
        if latents.ndim != 5 or latents.shape[1] != self.config.z_dim:
            raise StditError(
                f"latents of shape {tuple(latents.shape)}: this VAE decodes (B, {self.config.z_dim}, T', H', W')."
            )
        stride = self.config.stride
        height, width = (n * s for n, s in zip(latents.shape[3:], stride[1:]))
        self._check_tiles(VideoShape(frames_of(latents.shape[2], stride), height, width))
        raw = self.denormalise(latents)
        if self.traits.image:
            parts = [self.module.decode(frame).sample for frame in _frames(raw).split(1)]
            video = _clips(torch.cat(parts), len(raw))
        elif self.module.config.get("timestep_conditioning"):
            with torch.random.fork_rng():  # its decoder may draw noise of its own: the same for every clip
                torch.manual_seed(0)
                video = self.module.decode(raw, raw.new_full((len(raw),), self.decode_level)).sample
        else:
            video = self.module.decode(raw).sample
        video = video.transpose(1, 2) if self.traits.tiled else video  # Allegro's gives (B, T, 3, H, W)
        return video.clamp(-1, 1) if clamp else video

    def decode_stream(self, latents: Tensor, clamp: bool = True) -> Iterator[Tensor]:
        """`decode` of one clip (z, T', H', W'): its frames (3, t, H, W) when ready, one by one from an image VAE."""
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
        """mean and scaling_factor / std, of every channel, or of every channel and latent frame (Cosmos)."""
        config = self.module.config

        def values(name: str, absent: float) -> Tensor:
            found = dict(self.module.named_buffers(recurse=False)).get(name, config.get(name))  # LTX-Video has buffers
            dtype = torch.promote_types(like.dtype, torch.float32)
            if found is None:
                return torch.full((1, 1, 1, 1, 1), absent, dtype=dtype, device=like.device)
            table = torch.as_tensor(found, dtype=dtype, device=like.device).view(1, self.config.z_dim, -1, 1, 1)
            if 1 < table.shape[2] < like.shape[2]:
                raise StditError(
                    f"{like.shape[2]} latent frames: {self.config.name} has statistics of {table.shape[2]} only."
                )
            return table[:, :, : like.shape[2]]

        shift = config.get("shift_factor")
        mean = values("latents_mean", 0.0 if shift is None else float(shift))
        return mean, float(config.get("scaling_factor") or 1.0) / values("latents_std", 1.0)

    def _check_tiles(self, shape: VideoShape) -> None:
        """Raises for a clip that tiles would not cover (diffusers leaves such borders black)."""
        if not self.traits.tiled:
            return
        for name, size, kernel, stride in zip(
            ("frames", "height", "width"),
            (shape.frames, shape.height, shape.width), self.module.kernel, self.module.stride,
        ):  # fmt: skip
            if size < kernel or (size - kernel) % stride:
                near = sorted({kernel + max(size - kernel, 0) // stride * stride + n for n in (0, stride)})
                raise StditError(
                    f"{shape}: {self.config.name} goes in tiles, so {name} must be {kernel}+{stride}k, not {size}; "
                    f"nearest are {' and '.join(map(str, near))}."
                )


def _ratio(module: Any, axis: str) -> int:
    """Pixels to one latent: of the config, else of the module, else of the levels of an image VAE."""
    name = f"{axis}_compression_ratio"
    found = module.config.get(name) or module.__dict__.get(name)
    if not found:
        found = 1 if axis == "temporal" else 2 ** (len(module.config.block_out_channels) - 1)
    return int(found)


def _frames(clips: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B·T, C, H, W)."""
    return clips.transpose(1, 2).flatten(0, 1)


def _clips(frames: Tensor, count: int) -> Tensor:
    """(B·T, C, H, W) -> (B, C, T, H, W)."""
    return frames.unflatten(0, (count, -1)).transpose(1, 2)


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
            f"{place}: a {name} ({traits.used_by}) is run by diffusers, which is not installed: "
            "pip install 'stdit[vaes]'."
        ) from None
    return getattr(diffusers, name)


@contextmanager
def _reading(source: VaeFolder) -> Iterator[Any]:
    """diffusers' class; whatever its reading of a strange folder raises becomes a StditError."""
    found = diffusers_class(source.name, source.traits, source.folder)
    try:
        yield found
    except Exception as error:
        raise StditError(f"{source.folder}: diffusers cannot read a {source.name} there: {error}") from error


def other_on_meta(source: VaeFolder) -> OtherVAE:
    """What load_other would load, without memory, from config.json alone."""
    with _reading(source) as found, torch.device("meta"):
        module = found.from_config(found.load_config(str(source.folder), local_files_only=True))
    return OtherVAE(module, source.traits).to("meta")  # constants made elsewhere too


def load_other(source: VaeFolder, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> OtherVAE:
    """The autoencoder of a diffusers folder (config.json and safetensors); nothing is downloaded."""
    with _reading(source) as found:
        module, info = found.from_pretrained(
            str(source.folder), local_files_only=True, use_safetensors=True, output_loading_info=True, torch_dtype=dtype
        )
    lost = {key: sorted(map(str, found)) for key, found in info.items() if found and key != "error_msgs"}
    if lost:
        raise StditError(f"{source.folder}: the VAE's weights do not fit its config.json: {lost}.")
    return OtherVAE(module, source.traits).to(device)
