"""The layers of the causal video VAE: convolutions that see the past only, norm, resampling, attention per frame.

Names of parameters are those of the releases (Wan-Video/Wan2.1, wan/modules/vae.py; Wan-Video/Wan2.2,
wan/modules/vae2_2.py); so are the numbers.

Everything runs on a whole clip at once, or chunk by chunk with a `Past`, with the same result: each causal layer keeps
there the last frames it saw. The tensors are channels-last (T·H·W·C in memory): on a CPU that halves a training step,
and oneDNN's convolutions take them as they are. Without gradients on a CPU, norm and activation are one pass that stays
in the cache and writes straight into the convolution's input, behind the frames of the past.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Past(dict[nn.Module, Tensor]):
    """What the causal layers remember between the chunks of one clip: layer -> its last input frames (B, C, ≤2, H, W).

    Empty before the first chunk; never shared by two clips, nor by an encoder's and a decoder's pass. `beside`: another
    one in use at the same time, a tile's, whose `room` this one takes turns with.
    """

    def __init__(self, beside: Past | None = None):
        super().__init__()
        self._room: list[Tensor] = [] if beside is None else beside._room

    def room(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Memory of `like`'s kind for one convolution's input, until the next is asked for.

        Kept, since the system clears every page of what it gives: 7 % of the time that frames of 256×256 take.
        """
        count = math.prod(shape)
        if not self._room or self._room[0].numel() < count or self._room[0].dtype != like.dtype:
            self._room.clear()
            self._room.append(like.new_empty(count))
        return self._room[0][:count].view(shape)


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution, stride 1, of which frame i of the output sees no frame of the input after i.

    Before the first frame stand k_t − 1 zero frames, or the frames of the chunk before. Space is zero-padded.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]):
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.memory = kernel[0] - 1  # 0 or 2
        self.even = False  # whether all chunks of a clip after its first frame have an even number of frames here

    def forward(self, x: Tensor, past: Past | None = None, ready: bool = False) -> Tensor:
        """(B, C_in, T, H, W) -> (B, C_out, T, H, W). ready: x has the frames of the past in front (see `activated`)."""
        return convolve(self, x if ready or not self.memory else with_past(x, self, past))


ONEDNN = torch.backends.mkldnn.is_available()
PAIRS_FROM = 64  # channels in and out: with fewer, sums of frames take longer than the convolution that they spare
STRIP = 3 << 19  # elements of the sums that are made at a time: they stay in the cache
FRAMES_AT_ONCE = 2  # of the widest levels: a pair


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    """A convolution of stride 1 by oneDNN, whatever torch thinks of its size."""
    ones = (1,) * (x.ndim - 2)
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, ones, ones, 1)


def in_pairs(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A 3×3×3 convolution whose frames are even in number, two at a time by four 2-D convolutions instead of six:
    Winograd's F(2, 3) over time (Lavin & Gray 2015, section 4.1). Some rows at a time.

    x: (B, C_in, 2n + 2, H, W), channels-last. Returns (B, C_out, 2n, H, W).
    """
    (b, c, t, h, w), out = x.shape, conv.out_channels
    first, middle, last = (tap.contiguous(memory_format=torch.channels_last) for tap in conv.weight.unbind(2))
    plus, minus = (first + middle + last) / 2, (first - middle + last) / 2
    y = x.new_empty((b, t - 2, h, w, out)).movedim(-1, 1)  # (B, C_out, 2n, H, W)
    rows = max(1, STRIP // (w * max(c, out)))
    for k in range(0, t - 2, 2):
        for top in range(0, h, rows):
            low, high = max(0, top - 1), min(h, top + rows + 1)
            inner = slice(top - low, min(top + rows, h) - low)  # without the rows that see a neighbour's as zeros
            d0, d1, d2, d3 = x[:, :, k : k + 4, low:high].unbind(2)
            y0, y1 = y[:, :, k : k + 2, top : top + rows].unbind(2)
            m, n = onednn(d1 + d2, plus, None, (1, 1))[:, :, inner], onednn(d2 - d1, minus, None, (1, 1))[:, :, inner]
            torch.add(m, n, out=y0).add_(onednn(d0 - d2, first, conv.bias, (1, 1))[:, :, inner])
            torch.sub(m, n, out=y1).add_(onednn(d3 - d1, last, conv.bias, (1, 1))[:, :, inner])
    return y


def convolve(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """conv(x); a single frame is what it is to the last tap, whose fellows would see zeros.

    Kernels of one row and column run as what they are, which is twice as fast on a CPU as a 3-D one. A small single
    clip's 3-D convolution is not oneDNN's in torch but a slow one. Without gradients oneDNN's is called by its name,
    and wide ones go `in_pairs`; with them, the frames under the kernel are set side by side as channels, and a 2-D
    convolution over frames takes its place, several times faster.
    """
    taps = min(conv.kernel_size[0], x.shape[2])
    weight = conv.weight[:, :, -taps:]
    if weight.shape[2:] == (1, 1, 1):
        y = F.linear(x.movedim(1, -1), weight.flatten(1), conv.bias)  # (B, T, H, W, C_out)
        return y.movedim(-1, 1)
    if weight.shape[3:] == (1, 1):
        rows = x.flatten(3)  # (B, C_in, T, H·W): a 2-D convolution, its height the time
        y = F.conv2d(rows, weight.flatten(3), conv.bias, stride=(conv.stride[0], 1))
        return y.unflatten(3, x.shape[3:])
    if taps == 1:
        y = F.conv2d(to_frames(x), weight[:, :, 0], conv.bias, padding=conv.padding[1:])
        return to_clips(y, len(x))
    by_name = ONEDNN and not (torch.is_grad_enabled() or torch.compiler.is_compiling())  # it cannot be traced
    if x.device.type == "cpu" and x.dtype == torch.float32 and by_name:
        wide = min(conv.in_channels, conv.out_channels) >= PAIRS_FROM
        # not where the length of chunks decides which frames are pairs: chunks of any length give the same numbers
        if isinstance(conv, CausalConv3d) and conv.even and wide and taps == 3 and x.shape[2] % 2 == 0:
            return in_pairs(conv, x)
        return onednn(x, weight, conv.bias, (0, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2))
    if x.device.type == "cpu" and len(x) == 1:
        frames = x[0].permute(1, 2, 3, 0)  # (T + taps − 1, H, W, C_in)
        count = len(frames) - taps + 1
        beside = torch.cat([frames[k : k + count] for k in range(taps)], dim=-1)  # (T, H, W, taps·C_in)
        weight = weight.transpose(1, 2).flatten(1, 2)  # (C_out, taps·C_in, k_h, k_w)
        y = F.conv2d(beside.movedim(-1, 1), weight, conv.bias, padding=conv.padding[1:])  # (T, C_out, H, W)
        return to_clips(y, 1)
    return F.conv3d(x, weight, conv.bias, padding=conv.padding)


def with_past(x: Tensor, layer: nn.Module, past: Past | None, alone: bool = True) -> Tensor:
    """`x` with the two frames that came before it in front, zeros where the clip had not begun.

    alone: a clip's first frame by itself stays so: see `convolve`.
    """
    before = None if past is None else past.get(layer)
    if before is not None:
        x = torch.cat([before, x], dim=2)
    if past is not None:
        past[layer] = x[:, :, -2:].clone()
    missing = 2 - (0 if before is None else before.shape[2])
    return x if not missing or (alone and x.shape[2] == 1) else F.pad(x, (0, 0, 0, 0, missing, 0))


IN_CACHE = 1 << 18  # elements that a norm and its activation work on at a time


class RMSNorm(nn.Module):
    """x / ‖x‖₂ · √C · gamma over the channels of (B, C, …), in fp32 at least; `gamma` is (C, 1, …)."""

    def __init__(self, channels: int, dims: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        # The release divides by max(‖x‖, 1e-12); 1e-24 under the root is that for every ‖x‖ that is not zero.
        y = F.rms_norm(wide.movedim(1, -1), (c,), eps=1e-24 / c).movedim(-1, 1)
        return y.to(x.dtype) * self.gamma

    def silu_into(self, out: Tensor, x: Tensor) -> None:
        """out = silu(norm(x)), both (B, T, H, W, C), rounded once; some rows at a time, which stay in the cache."""
        w, c = x.shape[-2:]
        wide = torch.promote_types(x.dtype, torch.float32)
        gamma = (self.gamma.flatten() * c**0.5).to(wide)
        rows = max(1, IN_CACHE // (w * c))
        for clip, clip_out in zip(x.flatten(1, 2), out.flatten(1, 2)):  # (T·H, W, C) each
            for part, part_out in zip(clip.split(rows), clip_out.split(rows)):
                part = part.to(wide)
                length = torch.linalg.vector_norm(part, dim=-1, keepdim=True).clamp_min_(1e-12)
                y = torch.div(part, length, out=part_out if part_out.dtype == wide else None)
                F.silu(y.mul_(gamma), inplace=True)
                if y is not part_out:
                    part_out.copy_(y)


class FrameGroupNorm(nn.GroupNorm):
    """Stable Diffusion's group norm, of each frame by itself: (B, C, T, H, W) or (B·T, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.ndim == 4 else to_clips(super().forward(to_frames(x)), len(x))


def norm(channels: int, dims: int, groups: int) -> nn.Module:
    return FrameGroupNorm(groups, channels, eps=1e-6) if groups else RMSNorm(channels, dims)


def activated(norm: nn.Module, conv: nn.Module, x: Tensor, past: Past | None) -> Tensor:
    """silu(norm(x)) with the frames of the past in front: what the CausalConv3d takes as `ready`."""
    assert isinstance(conv, CausalConv3d)
    if not isinstance(norm, RMSNorm) or torch.is_grad_enabled() or x.device.type != "cpu":
        return with_past(F.silu(norm(x), inplace=True), conv, past)
    b, c, t, h, w = x.shape
    before = None if past is None else past.get(conv)
    known = 0 if before is None else before.shape[2]
    front = conv.memory if known + t > 1 else 0  # a clip's first frame alone stays alone: see `convolve`
    shape = (b, front + t, h, w, c)
    room = x.new_empty(shape) if past is None else past.room(x, shape)
    room[:, : front - known] = 0
    if before is not None:
        room[:, front - known : front] = before.movedim(1, -1)
    norm.silu_into(room[:, front:], x.movedim(1, -1))
    if past is not None:
        last = room[:, -conv.memory :].movedim(-1, 1)
        # into the memory of the frames before, where there are as many: it is the widest levels' past that counts
        past[conv] = last.clone() if before is None or before.shape != last.shape else before.copy_(last)
    return room.movedim(-1, 1)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), two causal 3×3×3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 0):
        super().__init__()
        self.residual = nn.Sequential(
            norm(in_channels, 3, groups),
            nn.SiLU(inplace=True),
            CausalConv3d(in_channels, out_channels, (3, 3, 3)),
            norm(out_channels, 3, groups),
            nn.SiLU(inplace=True),
            nn.Identity(),  # the release's dropout, which it never uses
            CausalConv3d(out_channels, out_channels, (3, 3, 3)),
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        y = conv1(activated(norm1, conv1, x, past), ready=True)  # (B, C_out, T, H, W)
        z = activated(norm2, conv2, y, past)
        del y  # the memory of a chunk is what three tensors take
        return added(conv2(z, ready=True), self.shortcut(x))


def added(y: Tensor, x: Tensor) -> Tensor:
    """y + x, in y's memory where no gradient needs it."""
    return y + x if torch.is_grad_enabled() else y.add_(x)


class AttentionBlock(nn.Module):
    """x + attention among the H·W positions of each frame, one head over all channels."""

    def __init__(self, channels: int, groups: int = 0):
        super().__init__()
        self.norm = norm(channels, 2, groups)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        tokens = self.norm(to_frames(x)).flatten(2).transpose(1, 2)  # (B·T, H·W, C)
        # as a Linear: a convolution of one frame may put the channels first, and attention then takes a slow, wide way
        qkv = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias)[:, None]  # (B·T, 1, H·W, 3C)
        q, k, v = qkv.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0]
        y = F.linear(y, self.proj.weight.flatten(1), self.proj.bias).transpose(1, 2)  # (B·T, C, H·W)
        return x + to_clips(y.unflatten(2, x.shape[3:]), x.shape[0])


class Downsample(nn.Module):
    """Half the height and width, and with `temporal` half the frames after the first: 1+2k frames become 1+k.

    The first frame passes the temporal convolution by, so that an image is a clip of one frame; every other output
    frame sees three frames of the input, the last of which is its own.
    """

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = to_clips(self.resample(to_frames(x)), x.shape[0])  # (B, C, T, H/2, W/2)
        if self.time_conv is None:
            return x
        before = None if past is None else past.get(self)  # the last frame of the chunk before
        if past is not None:
            past[self] = x[:, :, -1:].clone()
        if before is not None:
            return convolve(self.time_conv, torch.cat([before, x], dim=2))
        if x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], convolve(self.time_conv, x)], dim=2)


class Upsample(nn.Module):
    """Twice the height and width, in other channels, and with `temporal` twice the frames after the first.

    The first frame passes the temporal convolution by, and the others do not see it there (the release starts the
    convolution's memory from zeros at the second frame). Each frame becomes two: the halves of 2C channels.
    """

    def __init__(self, channels: int, out_channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )
        self.time_conv = nn.Conv3d(channels, channels * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        b = x.shape[0]
        if self.time_conv is not None:
            started = past is not None and self in past
            first, rest = (x[:, :, :0], x) if started else (x[:, :, :1], x[:, :, 1:])
            if past is not None and not started:
                past[self] = x.new_empty((*x.shape[:2], 0, *x.shape[3:]))
            if rest.shape[2]:
                rest = convolve(self.time_conv, with_past(rest, self, past, alone=False))  # (B, 2C, T, H, W)
                rest = rest.unflatten(1, (2, -1)).permute(0, 3, 1, 4, 5, 2)  # (B, T, 2, H, W, C), memory's order
                rest = rest.flatten(1, 2).movedim(-1, 1)  # (B, C, 2T, H, W)
            x = rest if started else torch.cat([first, rest], dim=2)
        frames = to_frames(x)
        exact = x.dtype in (torch.float32, torch.float64) and not torch.is_grad_enabled()
        return to_clips(doubled(self.resample[1], frames) if exact else self.resample(frames), b)  # (B, C', T', 2H, 2W)


def doubled(conv: nn.Module, frames: Tensor) -> Tensor:
    """conv (3×3, padded) of frames at twice their height and width, every pixel four times; frame by frame.

    In each of the four places of a pixel's copies some of the nine taps see the same pixel: summed beforehand, four are
    left. frames: (N, C, H, W). Returns (N, C_out, 2H, 2W), channels-last.
    """
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    taps = conv.weight
    for dim in (2, 3):  # the upper (left) copy sees the pixel before and itself, the lower itself and the next
        a, b, c = taps.unbind(dim)
        taps = torch.cat([torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)])
    # (4·C_out, C, 2, 2): the copies in the order left upper, left lower, right upper, right lower
    n, _, h, w = frames.shape
    y = frames.new_empty((n, 2 * h, 2 * w, conv.out_channels)).movedim(-1, 1)
    for frame, out in zip(frames.split(1), y.split(1)):
        z = F.conv2d(to_frames(frame[:, :, None]), taps, conv.bias.repeat(4), padding=1)  # (1, 4·C_out, H+1, W+1)
        for place, copy in enumerate(z.chunk(4, dim=1)):
            right, lower = divmod(place, 2)
            out[:, :, lower::2, right::2] = copy[:, :, lower : lower + h, right : right + w]
    return y


class DownLevel(nn.Module):
    """A level of Wan 2.2's encoder: its layers, plus its input averaged down to their output's shape.

    The input's pixels of a cell of frames × rows × columns stand behind one another as channels (c, t, h, w); every
    `channels · cell / out_channels` that follow one another are averaged. A clip has a zero frame before its first.
    """

    def __init__(self, layers: list[nn.Module], out_channels: int, time: int, space: int):
        super().__init__()
        self.downsamples = nn.Sequential(*layers)
        self.out_channels, self.time, self.space = out_channels, time, space

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        y = x
        for layer in self.downsamples:
            y = layer(y, past)
        return added(y, self.averaged(x))

    def averaged(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, ⌈T / time⌉, H / space, W / space)."""
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time, 0))
        cells = x.unflatten(4, (-1, self.space)).unflatten(3, (-1, self.space)).unflatten(2, (-1, self.time))
        cells = cells.permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, T', H', W', C, time, space, space)
        return cells.reshape(*cells.shape[:4], self.out_channels, -1).mean(-1).movedim(-1, 1)


class UpLevel(nn.Module):
    """A level of Wan 2.2's decoder: its layers, plus its input repeated up to their output's shape.

    The inverse order of DownLevel's: each channel is repeated, and what follows one another is (c, t, h, w) of a cell
    of the output. A clip's first frame gives only the last frame of its cell. Without `space`, at the last level, the
    layers are all there is.
    """

    def __init__(self, layers: list[nn.Module], out_channels: int = 0, time: int = 1, space: int = 0):
        super().__init__()
        self.upsamples = nn.Sequential(*layers)
        self.out_channels, self.time, self.space = out_channels, time, space

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        y = x
        for layer in self.upsamples:
            y = layer(y, past)
        return added(y, self.repeated(x)[:, :, -y.shape[2] :]) if self.space else y

    def repeated(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T · time, H · space, W · space)."""
        cell = (self.out_channels, self.time, self.space, self.space)
        cells = x.movedim(1, -1).repeat_interleave(math.prod(cell) // x.shape[1], dim=-1).unflatten(-1, cell)
        cells = cells.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, T, time, H, space, W, space, C_out)
        return cells.flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)


def to_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B·T, C, H, W); no copy where x is channels-last."""
    y = x.transpose(1, 2).flatten(0, 1)
    if len(y) > 1 or y.stride(1) != 1:
        return y
    # torch takes one frame for channels-last only if the stride to a next one, which is not there, is right, too
    return y.as_strided(y.shape, (y.shape[2] * y.stride(2), *y.stride()[1:]))


def to_clips(x: Tensor, clips: int) -> Tensor:
    """(B·T, C, H, W) -> (B, C, T, H, W), the inverse of `to_frames`."""
    return x.unflatten(0, (clips, -1)).transpose(1, 2)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, T, H, W) -> (B, C·p·p, T, H/p, W/p), channels in the order (c, x, y) of Wan 2.2's VAE; channels-last."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t, h // patch, patch, w // patch, patch)
    x = x.permute(0, 2, 3, 5, 1, 6, 4).reshape(b, t, h // patch, w // patch, c * patch * patch)
    return x.permute(0, 4, 1, 2, 3)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """(B, C·p·p, T, H, W) -> (B, C, T, H·p, W·p), the inverse of `patchify`; contiguous."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c // patch**2, patch, patch, t, h, w).permute(0, 1, 4, 5, 3, 6, 2)
    return x.reshape(b, c // patch**2, t, h * patch, w * patch)
