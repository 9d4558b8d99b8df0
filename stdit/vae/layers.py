"""The layers of the causal video VAE: causal convolutions, norms, resampling, attention per frame.

Parameters are named as in the releases (Wan-Video/Wan2.1, wan/modules/vae.py; Wan-Video/Wan2.2, wan/modules/vae2_2.py)
and the numbers agree. Every layer takes a whole clip, or one chunk after another with a `CausalCache`, with the same
result.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.vae import cpu
from stdit.vae.clips import to_clips, to_frames
from stdit.vae.streaming import PAST_FRAMES, CausalCache, with_past


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution of stride 1 whose output frame i sees no input frame after i.

    In front of the first frame stand k_t − 1 zero frames, or the last frames of the chunk before. Space is zero-padded.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]):
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        assert kernel[0] in (1, 1 + PAST_FRAMES)
        self.sees_past = kernel[0] > 1
        self.even_frames = False  # set by `networks.mark_even_frames`

    def forward(self, x: Tensor, cache: CausalCache | None = None, has_past: bool = False) -> Tensor:
        """(B, C_in, T, H, W) -> (B, C_out, T, H, W). has_past: the past frames are in front of x already."""
        if self.sees_past and not has_past:
            x = with_past(x, self, cache)
        frames = min(self.kernel_size[0], x.shape[2])  # a clip's first frame alone meets only the last frame's kernel
        weight = self.weight[:, :, -frames:]
        if self.kernel_size == (1, 1, 1):
            y = F.linear(x.movedim(1, -1), weight.flatten(1), self.bias)  # (B, T, H, W, C_out)
            return y.movedim(-1, 1)
        if frames == 1:
            y = F.conv2d(to_frames(x), weight[:, :, 0], self.bias, padding=self.padding[1:])
            return to_clips(y, len(x))
        if x.device.type == "cpu":
            return cpu.convolve(x, weight, self.bias, self.even_frames)
        return F.conv3d(x, weight, self.bias, padding=self.padding)


def convolve_time(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution with a kernel (k, 1, 1), as a 2-D one whose height is the time: twice as fast on a CPU."""
    y = F.conv2d(x.flatten(3), conv.weight.flatten(3), conv.bias, stride=(conv.stride[0], 1))
    return y.unflatten(3, x.shape[3:])


class RMSNorm(nn.Module):
    """x / ‖x‖₂ · √C · gamma over the channels of (B, C, …), in fp32 at least; `gamma` is (C, 1, …)."""

    def __init__(self, channels: int, dims: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        # The release divides by max(‖x‖, 1e-12); 1e-24 under the root is the same for every ‖x‖ that is not zero.
        y = F.rms_norm(wide.movedim(1, -1), (c,), eps=1e-24 / c).movedim(-1, 1)
        return y.to(x.dtype) * self.gamma


class FrameGroupNorm(nn.GroupNorm):
    """Stable Diffusion's group norm, over each frame alone: (B, C, T, H, W) or (B·T, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim == 4 else to_clips(super().forward(to_frames(x)), len(x))


def norm(channels: int, dims: int, groups: int) -> nn.Module:
    return FrameGroupNorm(groups, channels, eps=1e-6) if groups else RMSNorm(channels, dims)


def norm_silu_with_past(norm: nn.Module, conv: nn.Module, x: Tensor, cache: CausalCache | None) -> Tensor:
    """silu(norm(x)) with the past frames of `conv` in front: what conv(…, has_past=True) takes."""
    if isinstance(norm, RMSNorm) and x.device.type == "cpu" and not torch.is_grad_enabled():
        return cpu.norm_silu_with_past(norm.gamma, x, conv, cache)
    return with_past(F.silu(norm(x), inplace=True), conv, cache)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with two causal 3×3×3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 0):
        super().__init__()
        self.residual = nn.Sequential(
            norm(in_channels, 3, groups),
            nn.SiLU(inplace=True),
            CausalConv3d(in_channels, out_channels, (3, 3, 3)),
            norm(out_channels, 3, groups),
            nn.SiLU(inplace=True),
            nn.Identity(),  # the release's dropout, which is always 0
            CausalConv3d(out_channels, out_channels, (3, 3, 3)),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        y = conv1(norm_silu_with_past(norm1, conv1, x, cache), has_past=True)  # (B, C_out, T, H, W)
        z = norm_silu_with_past(norm2, conv2, y, cache)
        del y  # keeps the peak at three tensors
        return add(conv2(z, has_past=True), self.shortcut(x))


class Head(nn.Sequential):
    """The last norm, its activation and a convolution."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        conv = CausalConv3d(in_channels, out_channels, (3, 3, 3))
        super().__init__(norm(in_channels, 3, groups), nn.SiLU(inplace=True), conv)

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        norm, _, conv = self
        return conv(norm_silu_with_past(norm, conv, x, cache), has_past=True)


def add(y: Tensor, x: Tensor) -> Tensor:
    """y + x, in place unless a gradient needs y."""
    return y + x if torch.is_grad_enabled() else y.add_(x)


class AttentionBlock(nn.Module):
    """x + attention among the H·W positions of each frame, with one head over all channels."""

    def __init__(self, channels: int, groups: int = 0):
        super().__init__()
        self.norm = norm(channels, 2, groups)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        tokens = self.norm(to_frames(x)).flatten(2).transpose(1, 2)  # (B·T, H·W, C)
        # F.linear, not the convolution: of a single frame that may return channels-first, which slows attention down
        qkv = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias)[:, None]  # (B·T, 1, H·W, 3C)
        q, k, v = qkv.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]
        y = F.linear(y, self.proj.weight.flatten(1), self.proj.bias).transpose(1, 2)  # (B·T, C, H·W)
        return x + to_clips(y.unflatten(2, x.shape[3:]), x.shape[0])


class Downsample(nn.Module):
    """Halves height and width, and with `temporal` the frames after the first: 1+2k frames become 1+k.

    The first frame skips the temporal convolution, so an image is a clip of one frame. Every other output frame sees
    three input frames, the last of which is its own.
    """

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        x = to_clips(self.resample(to_frames(x)), x.shape[0])  # (B, C, T, H/2, W/2)
        if self.time_conv is None:
            return x
        last = None if cache is None else cache.get(self)  # of the chunk before
        if cache is not None:
            cache[self] = x[:, :, -1:].clone()
        if last is not None:
            return convolve_time(self.time_conv, torch.cat([last, x], dim=2))
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], convolve_time(self.time_conv, x)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width, changes the channels, and with `temporal` doubles the frames after the first.

    The first frame skips the temporal convolution, and later frames do not see it there (the release, too, starts that
    convolution's memory with zeros at the second frame). Each frame becomes two: the halves of 2C channels.
    """

    def __init__(self, channels: int, out_channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.time_conv = nn.Conv3d(channels, channels * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, cache)
        frames, conv = to_frames(x), self.resample[1]
        exact = x.dtype in (torch.float32, torch.float64) and not torch.is_grad_enabled()
        if exact and x.device.type == "cpu" and isinstance(conv, nn.Conv2d):
            return to_clips(cpu.convolve_upsampled(conv, frames), len(x))
        return to_clips(self.resample(frames), len(x))  # (B, C', T', 2H, 2W)

    def _double_frames(self, time_conv: nn.Conv3d, x: Tensor, cache: CausalCache | None) -> Tensor:
        started = cache is not None and self in cache
        first, rest = (x[:, :, :0], x) if started else (x[:, :, :1], x[:, :, 1:])
        if cache is not None and not started:
            cache[self] = x.new_empty((*x.shape[:2], 0, *x.shape[3:]))
        if rest.shape[2]:
            rest = convolve_time(time_conv, with_past(rest, self, cache, pad_single=True))  # (B, 2C, T, H, W)
            rest = rest.unflatten(1, (2, -1)).permute(0, 3, 1, 4, 5, 2)  # (B, T, 2, H, W, C), the order in memory
            rest = rest.flatten(1, 2).movedim(-1, 1)  # (B, C, 2T, H, W)
        return rest if started else torch.cat([first, rest], dim=2)


class DownLevel(nn.Module):
    """A level of Wan 2.2's encoder: its layers, plus its input averaged down to the shape of their output.

    The pixels of a cell (frames × rows × columns) of the input are listed as channels (c, t, h, w); consecutive groups
    of `channels · cell / out_channels` are averaged. A clip has a zero frame before its first.
    """

    def __init__(self, layers: list[nn.Module], out_channels: int, time: int, space: int):
        super().__init__()
        self.downsamples = nn.Sequential(*layers)
        self.out_channels, self.time, self.space = out_channels, time, space

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        y = x
        for layer in self.downsamples:
            y = layer(y, cache)
        return add(y, self.averaged(x))

    def averaged(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, ⌈T / time⌉, H / space, W / space)."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time, 0))
        cells = x.unflatten(4, (-1, self.space)).unflatten(3, (-1, self.space)).unflatten(2, (-1, self.time))
        cells = cells.permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, T', H', W', C, time, space, space)
        return cells.reshape(*cells.shape[:4], self.out_channels, -1).mean(-1).movedim(-1, 1)


class UpLevel(nn.Module):
    """A level of Wan 2.2's decoder: its layers, plus its input repeated up to the shape of their output.

    The inverse of DownLevel: each channel is repeated, and consecutive ones are (c, t, h, w) of a cell of the output.
    A clip's first frame gives only the last frame of its cell. The last level has `space` 0: its layers alone.
    """

    def __init__(self, layers: list[nn.Module], out_channels: int = 0, time: int = 1, space: int = 0):
        super().__init__()
        self.upsamples = nn.Sequential(*layers)
        self.out_channels, self.time, self.space = out_channels, time, space

    def forward(self, x: Tensor, cache: CausalCache | None = None) -> Tensor:
        y = x
        for layer in self.upsamples:
            y = layer(y, cache)
        return add(y, self.repeated(x)[:, :, -y.shape[2] :]) if self.space else y

    def repeated(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T · time, H · space, W · space)."""
        cell = (self.out_channels, self.time, self.space, self.space)
        cells = x.movedim(1, -1).repeat_interleave(math.prod(cell) // x.shape[1], dim=-1).unflatten(-1, cell)
        cells = cells.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, T, time, H, space, W, space, C_out)
        return cells.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)
