"""Faster ways to the same numbers on a CPU. Nothing here runs on a GPU, and `layers.py` is complete without it.

Tensors are channels-last (T·H·W·C in memory), as oneDNN's convolutions take them: a training step takes half the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.vae.clips import to_clips, to_frames
from stdit.vae.streaming import PAST_FRAMES, CausalCache

ONEDNN = torch.backends.mkldnn.is_available()
WINOGRAD_CHANNELS = 64  # with fewer channels in or out, adding frames costs more than the convolution it saves
WINOGRAD_STRIP = 3 << 19  # elements of the summed frames at a time, so that they stay in the cache
NORM_STRIP = 1 << 18  # elements that a norm and its activation process at a time, for the same reason


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, even_frames: bool) -> Tensor:
    """A convolution of stride 1 over frames with their past in front, zero-padded in space.

    x: (B, C_in, T + k_t − 1, H, W). weight: (C_out, C_in, k_t, k_h, k_w), k_t > 1.
    even_frames: all chunks but a clip's first frame have an even number of frames here. Only then is Winograd's
    algorithm allowed: otherwise the length of chunks would decide which frames are paired, and change the last bits.
    Returns (B, C_out, T, H, W).
    """
    frames, padding = weight.shape[2], (weight.shape[3] // 2, weight.shape[4] // 2)
    if ONEDNN and x.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        wide = min(weight.shape[:2]) >= WINOGRAD_CHANNELS
        if even_frames and wide and frames == 3 and x.shape[2] % 2 == 0:
            return winograd_over_time(x, weight, bias)
        return onednn(x, weight, bias, (0, *padding))
    if len(x) > 1:
        return F.conv3d(x, weight, bias, padding=(0, *padding))
    # For one small clip torch does not take oneDNN's 3-D convolution but a slow one. A 2-D convolution over frames,
    # with the frames under the kernel side by side as channels, is several times faster.
    inputs = x[0].permute(1, 2, 3, 0)  # (T + k_t − 1, H, W, C_in)
    count = len(inputs) - frames + 1
    stacked = torch.cat([inputs[k : k + count] for k in range(frames)], dim=-1)  # (T, H, W, k_t·C_in)
    kernel = weight.transpose(1, 2).flatten(1, 2)  # (C_out, k_t·C_in, k_h, k_w)
    return to_clips(F.conv2d(stacked.movedim(-1, 1), kernel, bias, padding=padding), 1)


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    """oneDNN's convolution of stride 1, also at sizes for which torch chooses another. It cannot be traced."""
    ones = (1,) * (x.ndim - 2)
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, ones, ones, 1)


def winograd_over_time(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3×3×3 convolution by Winograd's F(2, 3) over time (Lavin & Gray 2015, section 4.1).

    Two output frames take four 2-D convolutions instead of six.
    x: (B, C_in, 2n + 2, H, W), channels-last. Returns (B, C_out, 2n, H, W).
    """
    (b, c, t, h, w), out = x.shape, len(weight)
    first, middle, last = (tap.contiguous(memory_format=torch.channels_last) for tap in weight.unbind(2))
    plus, minus = (first + middle + last) / 2, (first - middle + last) / 2
    y = x.new_empty((b, t - 2, h, w, out)).movedim(-1, 1)  # (B, C_out, 2n, H, W)
    rows = max(1, WINOGRAD_STRIP // (w * max(c, out)))
    for k in range(0, t - 2, 2):
        for top in range(0, h, rows):
            low, high = max(0, top - 1), min(h, top + rows + 1)
            inner = slice(top - low, min(top + rows, h) - low)  # drops the extra row at a strip's edges
            d0, d1, d2, d3 = x[:, :, k : k + 4, low:high].unbind(2)
            y0, y1 = y[:, :, k : k + 2, top : top + rows].unbind(2)
            m, n = onednn(d1 + d2, plus, None, (1, 1))[:, :, inner], onednn(d2 - d1, minus, None, (1, 1))[:, :, inner]
            torch.add(m, n, out=y0).add_(onednn(d0 - d2, first, bias, (1, 1))[:, :, inner])
            torch.sub(m, n, out=y1).add_(onednn(d3 - d1, last, bias, (1, 1))[:, :, inner])
    return y


def convolve_upsampled(conv: nn.Conv2d, frames: Tensor) -> Tensor:
    """conv (3×3, padded) of frames upsampled twofold in height and width by repetition, frame by frame.

    Among the four copies of a pixel, several of the nine taps meet the same pixel. Summed beforehand, four are left.
    frames: (N, C, H, W). Returns (N, C_out, 2H, 2W), channels-last.
    """
    assert conv.bias is not None
    taps = conv.weight
    for dim in (2, 3):  # the upper (left) copy sees the pixel before and itself, the lower itself and the next
        a, b, c = taps.unbind(dim)
        taps = torch.cat([torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)])
    # taps: (4·C_out, C, 2, 2), the copies in the order upper left, lower left, upper right, lower right
    n, _, h, w = frames.shape
    y = frames.new_empty((n, 2 * h, 2 * w, conv.out_channels)).movedim(-1, 1)
    for frame, out in zip(frames.split(1), y.split(1)):
        z = F.conv2d(to_frames(frame[:, :, None]), taps, conv.bias.repeat(4), padding=1)  # (1, 4·C_out, H+1, W+1)
        for place, copy in enumerate(z.chunk(4, dim=1)):
            right, lower = divmod(place, 2)
            out[:, :, lower::2, right::2] = copy[:, :, lower : lower + h, right : right + w]
    return y


def norm_silu_with_past(gamma: Tensor, x: Tensor, layer: nn.Module, cache: CausalCache | None) -> Tensor:
    """silu(RMSNorm(x)) with the layer's past frames in front, written straight into the convolution's input buffer.

    Like `with_past` of the activation, in one pass. x: (B, C, T, H, W).
    """
    b, c, t, h, w = x.shape
    past = None if cache is None else cache.get(layer)
    known = 0 if past is None else past.shape[2]
    front = PAST_FRAMES if known + t > 1 else 0  # a clip's first frame alone is not padded: see `with_past`
    shape = (b, front + t, h, w, c)
    y = x.new_empty(shape) if cache is None else cache.buffer(x, shape)
    y[:, : front - known] = 0
    if past is not None:
        y[:, front - known : front] = past.movedim(1, -1)
    rms_norm_silu(gamma, x.movedim(1, -1), out=y[:, front:])
    if cache is not None:
        last = y[:, -PAST_FRAMES:].movedim(-1, 1)
        # overwrite the former frames where the shape allows: at the widest levels the cache takes most memory
        cache[layer] = last.clone() if past is None or past.shape != last.shape else past.copy_(last)
    return y.movedim(-1, 1)


def rms_norm_silu(gamma: Tensor, x: Tensor, out: Tensor) -> None:
    """out = silu(x / ‖x‖₂ · √C · gamma), rounded once. x, out: (B, T, H, W, C)."""
    w, c = x.shape[-2:]
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = (gamma.flatten() * c**0.5).to(wide)
    rows = max(1, NORM_STRIP // (w * c))
    for clip, clip_out in zip(x.flatten(1, 2), out.flatten(1, 2)):  # (T·H, W, C) each
        for part, part_out in zip(clip.split(rows), clip_out.split(rows)):
            part = part.to(wide)
            length = torch.linalg.vector_norm(part, dim=-1, keepdim=True).clamp_min_(1e-12)
            y = torch.div(part, length, out=part_out if part_out.dtype == wide else None)
            F.silu(y.mul_(scale), inplace=True)
            if y is not part_out:
                part_out.copy_(y)
