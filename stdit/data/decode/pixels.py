"""Converts frames to RGB pixels: orientation, scaling to cover a size, colour, HDR, transparency, deinterlacing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import av
import av.filter
import numpy as np
from av.video.format import VideoFormat
from av.video.reformatter import Colorspace, VideoReformatter
from PIL import Image

# SWS_BICUBIC, SWS_ACCURATE_RND and SWS_FULL_CHR_H_INT (without it, every second column of an RGB picture gets its
# neighbour's colour), as numbers: PyAV names the latter two only from 18 on, which needs Python 3.11
_SCALING = 0x4 | 0x40000 | 0x2000

PQ, HLG = 16, 18  # transfer characteristics (ITU-T H.273)
SDR_WHITE = 203.0  # cd/m² of SDR white in an HDR picture (ITU-R BT.2408)
HDR_PEAK = 1000.0  # cd/m² mapped to sRGB's white; brighter light is clipped
_BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)  # ITU-R BT.2407
_CODES = 1 << 16


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, then flip horizontally, then flip vertically), from the display matrix."""
    data = cast(Any, frame.side_data).get("DISPLAYMATRIX")  # older stubs of PyAV lack names
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()  # x' = a·x + c·y, y' = b·x + d·y
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def displayed_size(frame: av.VideoFrame, pixel_aspect: float) -> tuple[int, int]:
    width, height = max(1, round(frame.width * pixel_aspect)), frame.height
    return (height, width) if orientation(frame)[0] else (width, height)


def covering_size(have: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (width, height) with the aspect ratio of `have` that covers `size`."""
    scale = max(size[0] / have[0], size[1] / have[1])
    return max(size[0], round(have[0] * scale)), max(size[1], round(have[1] * scale))


def within(have: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(width, height) scaled down, never up, to at most this shorter side."""
    scale = min(1.0, short_side / min(have))
    return max(1, round(have[0] * scale)), max(1, round(have[1] * scale))


def crop_to(frame: np.ndarray, size: tuple[int, int], crop: tuple[float, float]) -> np.ndarray:
    height, width = frame.shape[:2]
    left, top = round((width - size[0]) * crop[0]), round((height - size[1]) * crop[1])
    return frame[top : top + size[1], left : left + size[0]]


def to_rgb(
    frame: av.VideoFrame,
    pixel_aspect: float,
    size: tuple[int, int] | None,
    crop: tuple[float, float],
    reformatter: VideoReformatter,
) -> np.ndarray:
    """(H, W, 3) uint8 as displayed; swscale scales (bicubic, with antialiasing) and converts in one pass.

    All frames of a read share a reformatter, which caches swscale's tables. HDR (PQ, HLG) becomes sRGB by
    `hdr_to_srgb`; other transfer functions are kept, as players do. Conversion goes via planar RGB: same result as
    "rgb24", but twice as fast for sources with full chroma.
    """
    transpose, flip_x, flip_y = orientation(frame)
    if _has_alpha(frame.format.name):
        frame = _on_white(frame, reformatter)
    width, height = max(1, round(frame.width * pixel_aspect)), frame.height
    if size is not None:
        width, height = covering_size((width, height), size[::-1] if transpose else size)
    is_hdr = frame.color_trc in (PQ, HLG)
    form, colours = "rgb48le" if is_hdr else "gbrp", _colorspace(frame)
    rgb = reformatter.reformat(
        frame, width, height, form, src_colorspace=colours, interpolation=_SCALING, threads=1
    ).to_ndarray()
    if is_hdr:
        rgb = hdr_to_srgb(rgb, frame.color_trc)
    if transpose:
        rgb = rgb.transpose(1, 0, 2)
    if flip_x:
        rgb = rgb[:, ::-1]
    if flip_y:
        rgb = rgb[::-1]
    return rgb if size is None else crop_to(rgb, size, crop)  # a view; the reader copies it


def _colorspace(frame: av.VideoFrame) -> Colorspace | None:
    """The colour space of a frame that declares none: BT.709 from 720 lines on, else BT.601, as players assume."""
    if frame.colorspace not in (0, 2) or frame.format.name == "rgb24":
        return None
    return Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601


@lru_cache(maxsize=256)
def _has_alpha(name: str) -> bool:
    found = VideoFormat(name, 16, 16)
    return found.has_palette or any(component.is_alpha for component in found.components)


def _on_white(frame: av.VideoFrame, reformatter: VideoReformatter) -> av.VideoFrame:
    """Composites a frame (alpha not premultiplied) onto white, as RGB. Scaling first would bleed hidden colours."""
    is_hdr = frame.color_trc in (PQ, HLG)
    form = "rgba64le" if is_hdr else "rgba"
    colours = _colorspace(frame)
    shown = reformatter.reformat(frame, format=form, src_colorspace=colours, interpolation=_SCALING, threads=1)
    rgba: Any = shown.to_ndarray()
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if is_hdr:
        rgb, alpha = hdr_to_srgb(rgb, frame.color_trc), (alpha >> 8).astype(np.uint8)
    if alpha.min() < 255:
        weight = alpha.astype(np.uint16)
        rgb = ((rgb * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24")


def deinterlaced(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """The frames, one for one; interlaced ones as of their first field's time, by FFmpeg's bwdif."""
    graph, kind = None, None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if graph is None or kind != (frame.width, frame.height, frame.format.name):
            if graph is not None:
                yield from _filtered(graph, None)
            kind = (frame.width, frame.height, frame.format.name)
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
            )
            graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
            graph.configure()
        yield from _filtered(graph, frame)
    if graph is not None:
        yield from _filtered(graph, None)


def _filtered(graph: av.filter.Graph, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
    """The frames that are ready once the graph has this one; None is its end."""
    graph.vpush(frame)
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


def cover(frame: np.ndarray, size: tuple[int, int], crop: tuple[float, float]) -> np.ndarray:
    """Scales a picture to cover a (width, height) and crops the surplus."""
    wanted = covering_size((frame.shape[1], frame.shape[0]), size)
    if wanted != (frame.shape[1], frame.shape[0]):
        frame = np.array(Image.fromarray(frame).resize(wanted, Image.Resampling.BICUBIC))
    return np.ascontiguousarray(crop_to(frame, size, crop))


def hdr_to_srgb(rgb: np.ndarray, transfer: int) -> np.ndarray:
    """R'G'B' (…, 3) uint16 with BT.2020 primaries and transfer PQ or HLG, to uint8 sRGB.

    White is 203 cd/m². Tones above 93 cd/m² are rolled off by the curve of ITU-R BT.2390, applied to the largest of R,
    G and B to keep hues. Colours outside sRGB are clipped. HLG is rendered for a 1,000 cd/m² screen (gamma 1.2).
    """
    light = _hdr_light(transfer)[rgb]  # (…, 3), 1 is HDR_PEAK
    if transfer == HLG:
        light *= (light @ np.array([0.2627, 0.6780, 0.0593], np.float32))[..., None] ** np.float32(0.2)
    light = np.maximum(light @ _BT2020_TO_BT709.T, 0)
    largest = light.max(-1, keepdims=True)
    inputs, scales = _roll_off()
    light *= np.interp(largest, inputs, scales).astype(np.float32)  # now 1 is SDR_WHITE
    return _srgb_codes()[(np.minimum(light, 1) * (_CODES - 1) + 0.5).astype(np.uint16)]


@lru_cache(maxsize=2)
def _hdr_light(transfer: int) -> np.ndarray:
    """(65536,) light by code value, 1 = HDR_PEAK: display light for PQ, scene light for HLG."""
    code = np.arange(_CODES) / (_CODES - 1)
    if transfer == PQ:
        return (pq_to_light(code) / HDR_PEAK).astype(np.float32)
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)


@lru_cache(maxsize=1)
def _roll_off() -> tuple[np.ndarray, np.ndarray]:
    """(inputs, factors): factors from light in units of HDR_PEAK to units of SDR_WHITE (BT.2390-11, 5.4.1)."""
    inputs = np.linspace(0, 1, 4097)
    most = light_to_pq(SDR_WHITE) / light_to_pq(HDR_PEAK)
    knee = 1.5 * most - 0.5
    e = light_to_pq(inputs * HDR_PEAK) / light_to_pq(HDR_PEAK)
    t = np.maximum(e - knee, 0) / (1 - knee)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    out = pq_to_light(np.where(e < knee, e, curve) * light_to_pq(HDR_PEAK)) / SDR_WHITE
    factors = np.append(HDR_PEAK / SDR_WHITE, out[1:] / inputs[1:])
    # light beyond HDR_PEAK becomes white: the factor decreases as 1/light
    beyond = np.geomspace(1.01, 10_000 / HDR_PEAK * 2, 200)
    return np.append(inputs, beyond), np.append(factors, 1 / beyond)


@lru_cache(maxsize=1)
def _srgb_codes() -> np.ndarray:
    """(65536,) uint8 sRGB by linear light."""
    light = np.arange(_CODES) / (_CODES - 1)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded).astype(np.uint8)


_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128  # SMPTE ST 2084


def pq_to_light(code: np.ndarray) -> np.ndarray:
    """PQ code in [0, 1] to cd/m²."""
    power = np.asarray(code) ** (1 / _M2)
    return 10_000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def light_to_pq(light: np.ndarray | float) -> np.ndarray:
    """cd/m² to PQ code in [0, 1]."""
    power = (np.asarray(light) / 10_000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2
