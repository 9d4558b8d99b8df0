"""A VAE's measures against closed forms, scikit-image and numpy; streaming against the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stdit.evaluation.measures import ClipMeasures, latent_statistics, pooled_statistics
from stdit.evaluation.vae import _over_clips, reconstruct_in_parts
from stdit.vae.autoencoder import CausalVAE, VaeConfig

TINY = VaeConfig(
    base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), z_dim=3,
    latents_mean=(0.5, -1, 0), latents_std=(1, 2, 0.5),
)  # fmt: skip


def noise(frames: int = 6, low: int = 60, high: int = 180, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (frames, 16, 20, 3)).astype(np.uint8)


def measured(source: np.ndarray, rebuilt: np.ndarray) -> dict:
    measures = ClipMeasures()
    for part in (slice(0, 1), slice(1, 4), slice(4, None)):  # as a stream gives them
        measures.add(source[part], rebuilt[part])
    return measures.result()


def test_an_exact_reconstruction():
    source = noise()
    assert measured(source, source) == {
        "psnr": 100, "psnr_frames": 100, "ssim": 1, "lpips": None, "flicker": 0, "flicker_still": None,
        "motion": 1, "sharpness": 1,
    }  # fmt: skip
    still = np.full_like(source, 7)  # of one colour: nothing to be sharp or to move
    assert {measured(still, still + 3)[name] for name in ("motion", "sharpness", "lpips")} == {None}
    assert measured(source[:1], source[:1])["flicker"] is None


def test_flicker_motion_and_sharpness_are_what_they_say():
    source = noise()
    offset = measured(source, source + 10)  # an error that stays: no flicker, as sharp
    assert (offset["flicker"], offset["motion"], offset["sharpness"]) == (0, 1, 1)
    assert offset["psnr"] == pytest.approx(20 * np.log10(255 / 10), abs=1e-9) == pytest.approx(offset["psnr_frames"])

    alternating = source + (np.arange(6, dtype=np.uint8) % 2 * 8)[:, None, None, None]  # 0, 8, 0, 8, …
    assert measured(source, alternating)["flicker"] == 8
    assert measured(source[:1].repeat(6, 0), alternating[:1].repeat(6, 0))["flicker"] == 0

    standing = source[:1].repeat(6, 0)  # a still picture of a moving source is not rewarded
    motion = np.abs(np.diff(source.astype(float), axis=0)).mean()
    assert measured(source, standing)["flicker"] == pytest.approx(motion)
    assert measured(source, standing)["motion"] == 0

    even = noise() // 2 * 2
    half = measured(even, even // 2)
    assert half["sharpness"] == pytest.approx(0.25) and half["motion"] == pytest.approx(0.25)
    rows, columns = (np.diff(even.astype(float), axis=axis) for axis in (1, 2))
    blurred = ((even.astype(float) + np.roll(even, 1, 2)) / 2).astype(np.uint8)
    energy = sum(np.square(np.diff(blurred.astype(float), axis=axis)).sum() for axis in (1, 2))
    wanted = energy / (np.square(rows).sum() + np.square(columns).sum())
    assert measured(even, blurred)["sharpness"] == pytest.approx(wanted) and wanted < 0.9


def test_one_flat_clip_does_not_rule_the_ratios():
    assert _over_clips("sharpness", [0.2, 1000.0, None, 0.3]) == 0.3
    assert _over_clips("psnr", [20.0, None, 30.0]) == 25
    assert _over_clips("motion", [None]) is None


def test_flicker_where_the_source_stands_still():
    source = noise(low=100, high=120)[:1].repeat(6, 0)
    source[1::2, :, :10] += 100  # the left half blinks, the right half stands still
    source[1::2, :, 10:] += 1
    made = source.copy()
    made[1::2, :, 10:] += 6
    found = measured(source, made)
    assert (found["flicker_still"], found["flicker"]) == (6, 3)
    restless = source.copy()
    restless[1::2, :, :10] -= 90
    assert measured(source, restless)["flicker_still"] == 0 < measured(source, restless)["flicker"]
    assert measured(noise(), noise())["flicker_still"] is None  # nothing stands still


def test_psnr_and_ssim_are_scikit_images():
    metrics = pytest.importorskip("skimage.metrics", reason="pip install 'stdit[dev]'")
    source, rebuilt = noise(), noise(seed=1)
    found = measured(source, rebuilt)
    assert found["psnr"] == pytest.approx(metrics.peak_signal_noise_ratio(source, rebuilt, data_range=255), abs=1e-6)
    same = dict(channel_axis=-1, data_range=255, gaussian_weights=True, use_sample_covariance=False)
    ssim = np.mean([metrics.structural_similarity(a, b, **same) for a, b in zip(source, rebuilt)])
    assert found["ssim"] == pytest.approx(ssim, abs=1e-6)


def test_lpips_is_asked_frame_by_frame():
    class Distance(torch.nn.Module):  # not LPIPS, but something that takes what it takes
        heads = (torch.zeros(1),)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            assert a.shape == (1, 3, 1, 16, 20) and a.min() >= -1 and a.max() <= 1
            return (a - b).abs().amax((1, 2, 3, 4))

    source = noise(2)
    rebuilt = source + np.array([51, 0], np.uint8)[:, None, None, None]
    measures = ClipMeasures(Distance())
    measures.add(source, rebuilt)
    assert measures.result()["lpips"] == pytest.approx(51 / 127.5 / 2)


def test_latents_pooled_over_clips_are_all_latents_together():
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randn(2, t, 5, 7, generator=generator) * (1 + i) + i for i, t in enumerate((1, 4))]
    clips[1][1, 2, 3, 3] = 90  # a dot
    pooled = pooled_statistics([latent_statistics(clip) for clip in clips])
    together = torch.cat([clip.flatten(1) for clip in clips], 1).double().numpy()
    assert pooled["mean"] == pytest.approx(together.mean(1).tolist())
    assert pooled["std"] == pytest.approx(together.std(1).tolist())
    dot = clips[1][1].double()
    assert pooled["furthest"][1] == pytest.approx(float((90 - dot.mean()) / dot.std(correction=0)))
    assert pooled["outliers"][0] < pooled["outliers"][1] or pooled["outliers"][1] == pytest.approx(1 / 175)
    assert latent_statistics(torch.ones(1, 1, 2, 2))["furthest"] == [0]


@torch.no_grad()
def test_streamed_is_the_clip_at_once():
    torch.manual_seed(0)
    vae = CausalVAE(TINY)
    source = noise(41)
    parts = list(reconstruct_in_parts(vae, iter(np.array_split(source, 3))))
    assert len(parts) > 2 and all(len(a) == len(b) for a, b, _ in parts)
    assert np.array_equal(np.concatenate([a for a, _, _ in parts]), source)
    video = torch.from_numpy(source).permute(3, 0, 1, 2)[None] / 127.5 - 1
    raw = vae.encode_moments(video)[0]
    found = torch.cat([z for _, _, z in parts], 1)
    torch.testing.assert_close(found, raw[0], rtol=1e-4, atol=1e-4)
    wanted = ((vae.decode(vae.normalise(raw))[0] + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert np.abs(np.concatenate([b for _, b, _ in parts]) - wanted).max() < 0.51

    drawn = [
        torch.cat([z for _, _, z in reconstruct_in_parts(vae, iter([source]), torch.Generator().manual_seed(seed))], 1)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    deviation = (drawn[0] - raw[0]) / (0.5 * vae.encode_moments(video)[1][0]).exp()
    assert 0.9 < float(deviation.std()) < 1.1
