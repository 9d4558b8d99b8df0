"""Tone-maps HDR video (PQ and HLG, ITU-R BT.2100) to 8-bit sRGB, as a player does for an SDR screen."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

PQ, HLG = 16, 18  # transfer characteristics (ITU-T H.273)
WHITE = 203.0  # cd/m² of SDR white in an HDR picture (ITU-R BT.2408)
PEAK = 1000.0  # cd/m² mapped to sRGB's white; brighter light is clipped
_BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)  # ITU-R BT.2407
_CODES = 1 << 16


def to_srgb(rgb: np.ndarray, transfer: int) -> np.ndarray:
    """R'G'B' (…, 3) uint16 with BT.2020 primaries and transfer PQ or HLG, to uint8 sRGB.

    White is 203 cd/m². Tones above 93 cd/m² are rolled off by the curve of ITU-R BT.2390, applied to the largest of R,
    G and B to keep hues. Colours outside sRGB are clipped. HLG is rendered for a 1,000 cd/m² screen (gamma 1.2).
    """
    light = _linear(transfer)[rgb]  # (…, 3), 1 is PEAK
    if transfer == HLG:
        light *= (light @ np.array([0.2627, 0.6780, 0.0593], np.float32))[..., None] ** np.float32(0.2)
    light = np.maximum(light @ _BT2020_TO_BT709.T, 0)
    largest = light.max(-1, keepdims=True)
    inputs, scales = _roll_off()
    light *= np.interp(largest, inputs, scales).astype(np.float32)  # now 1 is WHITE
    return _srgb()[(np.minimum(light, 1) * (_CODES - 1) + 0.5).astype(np.uint16)]


@lru_cache(maxsize=2)
def _linear(transfer: int) -> np.ndarray:
    """(65536,) light by code value, 1 = PEAK: display light for PQ, scene light for HLG."""
    code = np.arange(_CODES) / (_CODES - 1)
    if transfer == PQ:
        return (pq_to_light(code) / PEAK).astype(np.float32)
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)


@lru_cache(maxsize=1)
def _roll_off() -> tuple[np.ndarray, np.ndarray]:
    """(inputs, factors): factors that turn light in units of PEAK into light in units of WHITE (BT.2390-11, 5.4.1)."""
    inputs = np.linspace(0, 1, 4097)
    most = light_to_pq(WHITE) / light_to_pq(PEAK)
    knee = 1.5 * most - 0.5
    e = light_to_pq(inputs * PEAK) / light_to_pq(PEAK)
    t = np.maximum(e - knee, 0) / (1 - knee)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    out = pq_to_light(np.where(e < knee, e, curve) * light_to_pq(PEAK)) / WHITE
    factors = np.append(PEAK / WHITE, out[1:] / inputs[1:])
    # light beyond PEAK becomes white: the factor decreases as 1/light
    beyond = np.geomspace(1.01, 10_000 / PEAK * 2, 200)
    return np.append(inputs, beyond), np.append(factors, 1 / beyond)


@lru_cache(maxsize=1)
def _srgb() -> np.ndarray:
    """(65536,) uint8 sRGB by linear light."""
    light = np.arange(_CODES) / (_CODES - 1)
    return np.round(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)).astype(
        np.uint8
    )


_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128  # SMPTE ST 2084


def pq_to_light(code: np.ndarray) -> np.ndarray:
    """PQ code in [0, 1] to cd/m²."""
    power = np.asarray(code) ** (1 / _M2)
    return 10_000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def light_to_pq(light: np.ndarray | float) -> np.ndarray:
    """cd/m² to PQ code in [0, 1]."""
    power = (np.asarray(light) / 10_000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2
